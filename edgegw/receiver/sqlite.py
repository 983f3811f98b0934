"""Keeps batches in a SQLite file that sqlite-utils made.

The readings go through the connection's own `executemany`: sqlite-utils takes three times as long to insert
them, and its older versions commit in every insert.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlite_utils

from edgegw.domain.batch import Link, decode, digest
from edgegw.domain.tag import Value
from edgegw.receiver.apart import Apart, TablesApart
from edgegw.receiver.corrector import Correction, Place
from edgegw.receiver.dedupe import Key, NamedGap, Outline
from edgegw.receiver.sink import BatchError, Figures, SinkError, SinkUnusable, Span
from edgegw.receiver.timing import HEAD_BYTES, UNSYNCED
from edgegw.receiver.wire import MAX_INT, Batch, MalformedError, link, outline, read_gap

_OF = {"gateway": str, "stream": str, "seq": int}
_TABLES: dict[str, dict[str, Any]] = {
    "batches": _OF | {"count": int, "kind": str, "received_ts": int, "body": str},
    "beside": _OF | {"period": int, "count": int, "kind": str, "received_ts": int, "body": str},
    "readings": _OF | {"ts": int, "device": str, "tag": str, "value": bytes, "quality": str},
    "events": _OF | {"ts": int, "event": str, "body": str},
    "device_status": _OF | {"ts": int, "device": str, "status": str, "reason": str},
    "summaries": _OF | {"ts": int, "device": str, "tag": str, "body": str, "period": int},
    "conflicts": _OF | {"count": int, "digest": str, "kind": str, "received_ts": int, "body": str},
    "beginnings": _OF,
}
"""The columns; `value` is declared BLOB because that alone changes nothing that is put in.

`beside` has the batches that came when others of their seqs were kept: a summary for seqs that are partly in
`batches`, or what a summary there stands for.
"""

_KEYS = {
    "batches": ("gateway", "stream", "seq"),
    "beside": ("gateway", "stream", "seq", "period"),
    "conflicts": ("gateway", "stream", "seq", "digest"),
    "beginnings": ("gateway", "stream"),
}
_ALL = """(SELECT gateway, stream, seq, 0 AS layer, body FROM batches
 UNION ALL SELECT gateway, stream, seq, 1 + period, body FROM beside)"""
"""Every batch. SQLite merges by the indexes only what it is asked to order by columns that it is also asked for."""
_INDEXES = (
    ("batches", ("gateway", "stream", "seq", "count"), "batches_spans"),
    ("events", ("event",), "events_names"),
)
_OF_RECORDS = ("readings", "events", "device_status")
"""The tables whose rows bear the seqs of records; those of `summaries` bear their batch's first."""
_OF_BATCH = "WHERE gateway = ? AND stream = ? AND"
_UNSYNCED = f"instr(substr(body, 1, {HEAD_BYTES}), '{UNSYNCED}') > 0"
"""The condition of the indexes `batches_unsynced` and `beside_unsynced`: what uses them must say the same."""
LOCKED_S = 10.0
"""How long to wait for another program that has locked the file; after that it is an outage."""
_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOMEM,
    }
)
"""Primary result codes of what passes by itself, or by making room."""


class SqliteSink:
    """The port's implementation over one connection, used from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            conn = sqlite3.connect(path, timeout=LOCKED_S)
            self._db = sqlite_utils.Database(conn)
            self._conn = conn
            self._db.enable_wal()
            conn.execute("PRAGMA synchronous = FULL")
            self._make_tables()
            self.apart: Apart = TablesApart(self._execute, "?", "BLOB")
            conn.commit()
        except sqlite3.Error as error:
            passing = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _PASSING
            raise (SinkError if passing else SinkUnusable)(f"{path}: {error}") from error

    def _make_tables(self) -> None:
        present = set(self._db.table_names())
        for name, columns in _TABLES.items():
            if name not in present:
                self._db.table(name).create(columns, pk=_KEYS.get(name))
        if "period" not in self._db.table("summaries").columns_dict:  # the file of an earlier version
            self._db.table("summaries").add_column("period", int)
        for table, columns_, name in _INDEXES:
            self._db.table(table).create_index(columns_, name, if_not_exists=True)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise SinkError(f"{self._path}: {error}; another receiver is writing to this file") from error
        except sqlite3.DataError as error:
            raise BatchError(f"{self._path}: {error}") from error
        except sqlite3.Error as error:
            raise SinkError(f"{self._path}: {error}; nothing unkept was confirmed") from error

    def _execute(self, statement: str, parameters: Sequence[Any]) -> sqlite3.Cursor:
        with self._naming_the_file():
            return self._conn.execute(statement, parameters)

    def spans(self) -> Iterable[Span]:
        with self._naming_the_file():
            for table in ("batches", "beside"):
                for gateway, stream, seq, count, received_ms in self._conn.execute(
                    f"SELECT gateway, stream, seq, count, received_ts FROM {table} ORDER BY gateway, stream, seq"
                ):
                    yield Span(Key(gateway, stream), seq, count, received_ms)

    def gaps(self) -> Iterable[tuple[Key, NamedGap]]:
        with self._naming_the_file():
            for gateway, stream, body in self._conn.execute(
                "SELECT gateway, stream, body FROM events WHERE event = 'gap' ORDER BY gateway, stream, seq"
            ):
                try:
                    yield read_gap(Key(gateway, stream), body.encode())
                except MalformedError:
                    continue  # said when it came

    def kept(self, key: Key, seq: int, last: int) -> Sequence[Outline]:
        of = {"gateway": key.gateway, "stream": key.stream, "seq": seq, "last": last}
        with self._naming_the_file():
            rows = self._conn.execute(
                "SELECT body FROM batches WHERE gateway = :gateway AND stream = :stream"
                " AND seq <= :last AND seq >= coalesce((SELECT max(seq) FROM batches"
                "  WHERE gateway = :gateway AND stream = :stream AND seq <= :seq), :seq)"
                " UNION ALL SELECT body FROM beside WHERE gateway = :gateway AND stream = :stream"
                " AND seq <= :last AND seq + count > :seq",
                of,
            ).fetchall()
        return [there for (body,) in rows if (there := outline(body.encode())).last >= seq]

    def add(self, batch: Batch, received_ms: int, *, beside: bool = False) -> None:
        period = (batch.period_s,) if beside else ()
        of_batch = (batch.count, batch.kind.value, received_ms, batch.body.decode())
        with self._naming_the_file():
            self._conn.execute(
                _insert("beside" if beside else "batches"), (*batch.key, batch.seq, *period, *of_batch)
            )
            self._add_data(batch)
            self._add_others(batch)

    def prepare_corrections(self) -> None:
        with self._naming_the_file():
            if "corrections" not in self._db.table_names():
                columns = _OF | {"count": int, "delta_ms": int, "period": int}
                self._db.table("corrections").create(columns, pk=("gateway", "stream", "seq", "period"))
            for table in (*_OF_RECORDS, "summaries"):
                self._db.table(table).create_index(list(_OF), f"{table}_seqs", if_not_exists=True)
            for table in ("batches", "beside"):
                self._conn.execute(
                    f"CREATE INDEX IF NOT EXISTS {table}_unsynced ON {table} (gateway, stream, seq) WHERE {_UNSYNCED}"
                )
            self._conn.commit()

    def naming_events(self) -> Iterable[tuple[str, bytes]]:
        with self._naming_the_file():
            for gateway, body in self._conn.execute(
                "SELECT gateway, body FROM events WHERE event IN ('start', 'clock-step')"
            ):
                yield gateway, body.encode()

    def unsynced(self, gateway: str, after: Place, limit: int) -> Sequence[tuple[Place, bytes]]:
        with self._naming_the_file():
            rows = self._conn.execute(
                f"SELECT stream, seq, layer, body FROM {_ALL} WHERE gateway = ? AND (stream, seq, layer) > (?, ?, ?)"
                f" AND {_UNSYNCED} ORDER BY stream, seq, layer LIMIT ?",
                (gateway, *after, limit),
            ).fetchall()
        return [(Place(*place), body.encode()) for *place, body in rows]

    def correction(self, batch: Batch) -> Correction | None:
        with self._naming_the_file():
            row = self._conn.execute(
                f"SELECT count, delta_ms FROM corrections {_OF_BATCH} seq = ? AND period = ?",
                (*batch.key, batch.seq, batch.period_s),
            ).fetchone()
        return Correction(*row) if row else None

    def correct(self, batch: Batch, correction: Correction) -> None:
        of, period_s = (*batch.key, batch.seq), batch.period_s
        with self._naming_the_file():
            if period_s:
                self._conn.execute(
                    f"DELETE FROM summaries {_OF_BATCH} seq = ? AND period = ?", (*of, period_s)
                )
            for table in () if period_s else _OF_RECORDS:
                self._conn.execute(f"DELETE FROM {table} {_OF_BATCH} seq BETWEEN ? AND ?", (*of, batch.last))
            self._add_data(batch)
            self._add_others(batch)
            self._conn.execute(f"DELETE FROM corrections {_OF_BATCH} seq = ? AND period = ?", (*of, period_s))
            if correction.records:
                self._conn.execute(
                    "INSERT INTO corrections (gateway, stream, seq, count, delta_ms, period)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (*of, *correction, period_s),
                )

    def _add_data(self, batch: Batch) -> None:
        gateway, stream = batch.key
        rows: list[tuple[Any, ...]] = []
        statuses: list[tuple[Any, ...]] = []
        for seq, record in enumerate(batch.data, batch.seq):
            ts, device, quality = record.ts, record.device, record.quality or {}
            if record.status is not None:
                statuses.append((gateway, stream, seq, ts, device, record.status, record.reason))
            rows.extend(
                [
                    (
                        gateway,
                        stream,
                        seq,
                        ts,
                        device,
                        tag,
                        value if type(value) is float else plain(value),
                        quality.get(tag),
                    )
                    for tag, value in (record.values or {}).items()
                ]
            )
        self._conn.executemany(_insert("readings"), rows)
        self._conn.executemany(_insert("device_status"), statuses)

    def _add_others(self, batch: Batch) -> None:
        events = [
            (*batch.key, seq, event.ts, event.event, bytes(raw).decode())
            for seq, (event, raw) in enumerate(zip(batch.events, batch.raw, strict=False), batch.seq)
        ]
        self._conn.executemany(_insert("events"), events)
        summaries = [
            (
                *batch.key, batch.seq, record.ts, record.device, tag, msgspec.json.encode(figures).decode(),
                batch.period_s,
            )
            for record in batch.summaries
            for tag, figures in record.values.items()
        ]  # fmt: skip
        self._conn.executemany(_insert("summaries"), summaries)

    def add_conflict(self, batch: Batch, received_ms: int) -> None:
        with self._naming_the_file():
            self._conn.execute(
                _insert("conflicts").replace("INSERT", "INSERT OR IGNORE", 1),
                (*batch.key, batch.seq, batch.count, batch.digest.hex(), batch.kind.value, received_ms,
                 batch.body.decode()),
            )  # fmt: skip

    def beginnings(self) -> Iterable[tuple[Key, int]]:
        with self._naming_the_file():
            rows = self._conn.execute("SELECT gateway, stream, seq FROM beginnings").fetchall()
        return [(Key(gateway, stream), seq) for gateway, stream, seq in rows]

    def begin(self, key: Key, seq: int) -> None:
        with self._naming_the_file():
            self._conn.execute(_insert("beginnings"), (*key, seq))

    def commit(self) -> None:
        with self._naming_the_file():
            self._conn.commit()

    def links(self, key: Key) -> Iterator[Link]:
        with self._naming_the_file():
            for text, *_ in self._conn.execute(
                f"SELECT body, seq, layer FROM {_ALL} WHERE gateway = ? AND stream = ? ORDER BY seq, layer",
                key,
            ):
                body = text.encode()
                yield link(decode(body), digest(body))

    def figures(self) -> dict[Key, Figures]:
        with self._naming_the_file():
            of = {
                table: Counter(
                    {
                        Key(gateway, stream): count
                        for gateway, stream, count in self._conn.execute(
                            f"SELECT gateway, stream, count(*) FROM {table} GROUP BY gateway, stream"
                        )
                    }
                )
                for table in ("batches", "beside", "readings", "events", "conflicts")
            }
        batches = of["batches"] + of["beside"]
        return {key: Figures(n, *(of[t][key] for t in list(of)[2:])) for key, n in batches.items()}

    def close(self) -> None:
        self._conn.close()


def _insert(table: str) -> str:
    columns = _TABLES[table]
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def plain(value: Value) -> str | float | int | None:
    """Return what stands for a value in a column: a list as JSON, a bool as 0 or 1.

    An integer beyond 64 bits with sign becomes a float; the batch's body has it exactly.
    """
    if isinstance(value, list):
        return msgspec.json.encode(value).decode()
    if isinstance(value, int):
        return int(value) if -MAX_INT - 1 <= value <= MAX_INT else float(value)
    return value
