"""Keeps batches in a SQLite file that sqlite-utils made.

The readings go through the connection's own `executemany`: sqlite-utils takes three times as long to insert
them, and its older versions commit in every insert.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlite_utils

from edgegw.domain.batch import Kind, Link, decode, digest
from edgegw.domain.tag import Value
from edgegw.receiver.corrector import Correction
from edgegw.receiver.dedupe import Kept, Key, NamedGap
from edgegw.receiver.sink import Figures, SinkError, Span
from edgegw.receiver.timing import HEAD_BYTES, UNSYNCED
from edgegw.receiver.wire import MAX_INT, Batch, MalformedError, link, read_gap

_OF = {"gateway": str, "stream": str, "seq": int}
_TABLES: dict[str, dict[str, Any]] = {
    "batches": _OF | {"count": int, "kind": str, "received_ts": int, "body": str},
    "readings": _OF | {"ts": int, "device": str, "tag": str, "value": bytes, "quality": str},
    "events": _OF | {"ts": int, "event": str, "body": str},
    "device_status": _OF | {"ts": int, "device": str, "status": str, "reason": str},
    "summaries": _OF | {"ts": int, "device": str, "tag": str, "body": str},
    "conflicts": _OF | {"count": int, "digest": str, "kind": str, "received_ts": int, "body": str},
}
"""The columns; `value` is declared BLOB because that alone changes nothing that is put in."""

_KEYS = {"batches": ("gateway", "stream", "seq"), "conflicts": ("gateway", "stream", "seq", "digest")}
_INDEXES = (
    ("batches", ("gateway", "stream", "seq", "count"), "batches_spans"),
    ("events", ("event",), "events_names"),
)
_OF_RECORDS = ("readings", "events", "device_status", "summaries")
_OF_BATCH = "WHERE gateway = ? AND stream = ? AND"
_UNSYNCED = f"instr(substr(body, 1, {HEAD_BYTES}), '{UNSYNCED}') > 0"
"""The condition of the index `batches_unsynced`: what uses it must say the same."""
LOCKED_S = 60.0
"""How long to wait for another program that holds the file."""


class SqliteSink:
    """The port's implementation over one connection, used from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._naming_the_file():
            conn = sqlite3.connect(path, timeout=LOCKED_S)
            self._db = sqlite_utils.Database(conn)
            self._conn = conn
            self._db.enable_wal()
            conn.execute("PRAGMA synchronous = FULL")
            self._make_tables()

    def _make_tables(self) -> None:
        present = set(self._db.table_names())
        for name, columns in _TABLES.items():
            if name not in present:
                self._db.table(name).create(columns, pk=_KEYS.get(name))
        for table, columns_, name in _INDEXES:
            self._db.table(table).create_index(columns_, name, if_not_exists=True)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise SinkError(f"{self._path}: {error}; another receiver is writing to this file") from error
        except sqlite3.Error as error:
            raise SinkError(f"{self._path}: {error}; nothing unkept was confirmed, start again") from error

    def spans(self) -> Iterable[Span]:
        with self._naming_the_file():
            for gateway, stream, seq, count in self._conn.execute(
                "SELECT gateway, stream, seq, count FROM batches ORDER BY gateway, stream, seq"
            ):
                yield Span(Key(gateway, stream), seq, count)

    def gaps(self) -> Iterable[tuple[Key, NamedGap]]:
        with self._naming_the_file():
            for gateway, stream, body in self._conn.execute(
                "SELECT gateway, stream, body FROM events WHERE event = 'gap' ORDER BY gateway, stream, seq"
            ):
                try:
                    yield read_gap(Key(gateway, stream), body.encode())
                except MalformedError:
                    continue  # said when it came

    def kept(self, key: Key, seq: int, last: int) -> Sequence[Kept]:
        with self._naming_the_file():
            rows = self._conn.execute(
                "SELECT seq, count, kind, body FROM batches WHERE gateway = :gateway AND stream = :stream"
                " AND seq <= :last AND seq >= coalesce((SELECT max(seq) FROM batches"
                "  WHERE gateway = :gateway AND stream = :stream AND seq <= :seq), :seq)",
                {"gateway": key.gateway, "stream": key.stream, "seq": seq, "last": last},
            ).fetchall()
        return [Kept(at, n, Kind(kind), digest(body.encode())) for at, n, kind, body in rows if at + n > seq]

    def add(self, batch: Batch, received_ms: int) -> None:
        key = batch.key
        with self._naming_the_file():
            self._conn.execute(
                _insert("batches"),
                (*key, batch.seq, batch.count, batch.kind.value, received_ms, batch.body.decode()),
            )
            self._add_data(batch)
            self._add_others(batch)

    def prepare_corrections(self) -> None:
        with self._naming_the_file():
            if "corrections" not in self._db.table_names():
                columns = _OF | {"count": int, "delta_ms": int}
                self._db.table("corrections").create(columns, pk=("gateway", "stream", "seq"))
            for table in _OF_RECORDS:
                self._db.table(table).create_index(list(_OF), f"{table}_seqs", if_not_exists=True)
            self._conn.execute(
                f"CREATE INDEX IF NOT EXISTS batches_unsynced ON batches (gateway, stream, seq) WHERE {_UNSYNCED}"
            )
            self._conn.commit()

    def naming_events(self) -> Iterable[tuple[str, bytes]]:
        with self._naming_the_file():
            for gateway, body in self._conn.execute(
                "SELECT gateway, body FROM events WHERE event IN ('start', 'clock-step')"
            ):
                yield gateway, body.encode()

    def unsynced(self, gateway: str, stream: str, seq: int, limit: int) -> Sequence[tuple[str, int, bytes]]:
        with self._naming_the_file():
            rows = self._conn.execute(
                f"SELECT stream, seq, body FROM batches WHERE gateway = ? AND (stream, seq) > (?, ?) AND {_UNSYNCED}"
                " ORDER BY stream, seq LIMIT ?",
                (gateway, stream, seq, limit),
            ).fetchall()
        return [(of, at, body.encode()) for of, at, body in rows]

    def correction(self, key: Key, seq: int) -> Correction | None:
        with self._naming_the_file():
            row = self._conn.execute(
                f"SELECT count, delta_ms FROM corrections {_OF_BATCH} seq = ?", (*key, seq)
            ).fetchone()
        return Correction(*row) if row else None

    def correct(self, batch: Batch, correction: Correction) -> None:
        with self._naming_the_file():
            for table in _OF_RECORDS:
                self._conn.execute(
                    f"DELETE FROM {table} {_OF_BATCH} seq BETWEEN ? AND ?",
                    (*batch.key, batch.seq, batch.last),
                )
            self._add_data(batch)
            self._add_others(batch)
            self._conn.execute(f"DELETE FROM corrections {_OF_BATCH} seq = ?", (*batch.key, batch.seq))
            if correction.records:
                self._conn.execute(
                    "INSERT INTO corrections (gateway, stream, seq, count, delta_ms) VALUES (?, ?, ?, ?, ?)",
                    (*batch.key, batch.seq, *correction),
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
            (*batch.key, batch.seq, record.ts, record.device, tag, msgspec.json.encode(figures).decode())
            for record in batch.summaries
            for tag, figures in record.values.items()
        ]
        self._conn.executemany(_insert("summaries"), summaries)

    def add_conflict(self, batch: Batch, received_ms: int) -> None:
        with self._naming_the_file():
            self._conn.execute(
                _insert("conflicts").replace("INSERT", "INSERT OR IGNORE", 1),
                (*batch.key, batch.seq, batch.count, batch.digest.hex(), batch.kind.value, received_ms,
                 batch.body.decode()),
            )  # fmt: skip

    def commit(self) -> None:
        with self._naming_the_file():
            self._conn.commit()

    def links(self, key: Key) -> Iterator[Link]:
        with self._naming_the_file():
            for (text,) in self._conn.execute(
                "SELECT body FROM batches WHERE gateway = ? AND stream = ? ORDER BY seq", key
            ):
                body = text.encode()
                yield link(decode(body), digest(body))

    def figures(self) -> dict[Key, Figures]:
        with self._naming_the_file():
            count = "SELECT gateway, stream, count(*) FROM {} GROUP BY gateway, stream"
            of = {
                table: {Key(g, s): n for g, s, n in self._conn.execute(count.format(table))}
                for table in ("batches", "readings", "events", "conflicts")
            }
            records = self._conn.execute(
                "SELECT gateway, stream, sum(count) FROM batches GROUP BY gateway, stream"
            )
            return {
                Key(g, s): Figures(
                    of["batches"][Key(g, s)], n, *(of[t].get(Key(g, s), 0) for t in list(of)[1:])
                )
                for g, s, n in records
            }

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
