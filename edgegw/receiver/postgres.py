"""Keeps batches in a PostgreSQL database (extra `postgres`)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString

import msgspec

from edgegw.domain.batch import Kind, Link, decode, digest
from edgegw.domain.tag import Value
from edgegw.receiver.apart import Apart, TablesApart
from edgegw.receiver.corrector import Correction, Place
from edgegw.receiver.dedupe import Key, NamedGap, Outline
from edgegw.receiver.postgres_link import as_line, connect, psycopg
from edgegw.receiver.sink import BatchError, Figures, SinkError, SinkUnusable, Span
from edgegw.receiver.timing import HEAD_BYTES, UNSYNCED
from edgegw.receiver.wire import Batch, MalformedError, link, outline, read_gap

_SCHEMA: tuple[LiteralString, ...] = (
    "CREATE TABLE IF NOT EXISTS batches (gateway text, stream text, seq bigint, count bigint NOT NULL,"
    " kind text NOT NULL, received_ts bigint NOT NULL, body text NOT NULL,"
    " PRIMARY KEY (gateway, stream, seq))",
    "CREATE TABLE IF NOT EXISTS beside (gateway text, stream text, seq bigint, period bigint, count bigint NOT NULL,"
    " kind text NOT NULL, received_ts bigint NOT NULL, body text NOT NULL,"
    " PRIMARY KEY (gateway, stream, seq, period))",
    "CREATE TABLE IF NOT EXISTS readings (gateway text NOT NULL, stream text NOT NULL, seq bigint NOT NULL,"
    " ts bigint NOT NULL, device text NOT NULL, tag text NOT NULL, value double precision, value_text text,"
    " quality text)",
    "CREATE TABLE IF NOT EXISTS events (gateway text NOT NULL, stream text NOT NULL, seq bigint NOT NULL,"
    " ts bigint NOT NULL, event text NOT NULL, body text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS device_status (gateway text NOT NULL, stream text NOT NULL,"
    " seq bigint NOT NULL, ts bigint NOT NULL, device text NOT NULL, status text NOT NULL, reason text)",
    "CREATE TABLE IF NOT EXISTS summaries (gateway text NOT NULL, stream text NOT NULL, seq bigint NOT NULL,"
    " ts bigint NOT NULL, device text NOT NULL, tag text NOT NULL, body text NOT NULL, period bigint)",
    "ALTER TABLE summaries ADD COLUMN IF NOT EXISTS period bigint",
    "CREATE TABLE IF NOT EXISTS conflicts (gateway text, stream text, seq bigint, count bigint NOT NULL,"
    " digest text, kind text NOT NULL, received_ts bigint NOT NULL, body text NOT NULL,"
    " PRIMARY KEY (gateway, stream, seq, digest))",
    "CREATE TABLE IF NOT EXISTS beginnings (gateway text, stream text, seq bigint NOT NULL,"
    " PRIMARY KEY (gateway, stream))",
    "CREATE INDEX IF NOT EXISTS batches_spans ON batches (gateway, stream, seq, count)",
    "CREATE INDEX IF NOT EXISTS events_names ON events (event)",
)
"""A number stands in `value`; text, or an array as JSON, in `value_text`. What `beside` is for: see `sqlite.py`."""

_ALL: LiteralString = (
    "(SELECT gateway, stream, seq, 0::bigint AS layer, count, received_ts, body FROM batches"
    " UNION ALL SELECT gateway, stream, seq, 1 + period, count, received_ts, body FROM beside) AS every_batch"
)
_OF_RECORDS: tuple[LiteralString, ...] = ("readings", "events", "device_status")
"""The tables whose rows bear the seqs of records; those of `summaries` bear their batch's first."""
_OF_BATCH: LiteralString = "WHERE gateway = %s AND stream = %s AND"
_UNSYNCED: LiteralString = f"position('{UNSYNCED}' in left(body, {HEAD_BYTES})) > 0"
"""The condition of the indexes `batches_unsynced` and `beside_unsynced`: what uses them must say the same."""
_CORRECTIONS: tuple[LiteralString, ...] = (
    "CREATE TABLE IF NOT EXISTS corrections (gateway text, stream text, seq bigint, count bigint NOT NULL,"
    " delta_ms bigint NOT NULL, period bigint, PRIMARY KEY (gateway, stream, seq, period))",
    *(
        f"CREATE INDEX IF NOT EXISTS {table}_seqs ON {table} (gateway, stream, seq)"
        for table in (*_OF_RECORDS, "summaries")
    ),
    *(
        f"CREATE INDEX IF NOT EXISTS {table}_unsynced ON {table} (gateway, stream, seq) WHERE {_UNSYNCED}"
        for table in ("batches", "beside")
    ),
)


class PostgresSink:
    """The port's implementation over one connection."""

    def __init__(self, url: str) -> None:
        self._conn = connect(url)
        try:
            for statement in _SCHEMA:
                self._conn.execute(statement)
            self.apart: Apart = TablesApart(self._execute, "%s", "bytea")
            self._conn.commit()
        except (
            psycopg.OperationalError,
            psycopg.IntegrityError,
        ) as error:  # the latter: another one makes them
            self._conn.close()
            raise SinkError(as_line(error)) from error
        except psycopg.Error as error:
            self._conn.close()
            raise SinkUnusable(as_line(error)) from error

    def _execute(self, statement: str, parameters: Sequence[Any]) -> "psycopg.Cursor[Any]":
        with _naming_the_database():
            return self._conn.execute(statement.encode(), parameters)

    def spans(self) -> Iterable[Span]:
        rows = self._rows(
            f"SELECT gateway, stream, seq, count, received_ts FROM {_ALL} ORDER BY gateway, stream, seq, layer"
        )
        return (Span(Key(gateway, stream), *figures) for gateway, stream, *figures in rows)

    def gaps(self) -> Iterable[tuple[Key, NamedGap]]:
        for gateway, stream, body in self._rows(
            "SELECT gateway, stream, body FROM events WHERE event = 'gap' ORDER BY gateway, stream, seq"
        ):
            try:
                yield read_gap(Key(gateway, stream), body.encode())
            except MalformedError:
                continue  # said when it came

    def _rows(self, query: LiteralString, parameters: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Yield a query's rows without ever holding them all."""
        with _naming_the_database(), self._conn.cursor(name="rows") as cursor:
            cursor.execute(query, parameters)
            yield from cursor

    def kept(self, key: Key, seq: int, last: int) -> Sequence[Outline]:
        of = {"gateway": key.gateway, "stream": key.stream, "seq": seq, "last": last}
        with _naming_the_database():
            rows = self._conn.execute(
                "SELECT body FROM batches"
                " WHERE gateway = %(gateway)s AND stream = %(stream)s AND seq <= %(last)s"
                " AND seq >= coalesce((SELECT max(seq) FROM batches"
                "  WHERE gateway = %(gateway)s AND stream = %(stream)s AND seq <= %(seq)s), %(seq)s)"
                " UNION ALL SELECT body FROM beside WHERE gateway = %(gateway)s AND stream = %(stream)s"
                " AND seq <= %(last)s AND seq + count > %(seq)s",
                of,
            ).fetchall()
        return [there for (body,) in rows if (there := outline(body.encode())).last >= seq]

    def add(self, batch: Batch, received_ms: int, *, beside: bool = False) -> None:
        row = (*batch.key, batch.seq, batch.count, batch.kind.value, received_ms, batch.body.decode())
        with _naming_the_database(), self._conn.cursor() as cursor:
            if beside:
                cursor.execute(
                    "INSERT INTO beside (gateway, stream, seq, count, kind, received_ts, body, period)"
                    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                    (*row, batch.period_s),
                )
            else:
                cursor.execute(
                    "INSERT INTO batches (gateway, stream, seq, count, kind, received_ts, body)"
                    " VALUES (%s, %s, %s, %s, %s, %s, %s)",
                    row,
                )
            _add_records(cursor, batch)

    def prepare_corrections(self) -> None:
        with _naming_the_database():
            for statement in _CORRECTIONS:
                self._conn.execute(statement)
            self._conn.commit()

    def naming_events(self) -> Iterable[tuple[str, bytes]]:
        rows = self._rows("SELECT gateway, body FROM events WHERE event IN ('start', 'clock-step')")
        return ((gateway, body.encode()) for gateway, body in rows)

    def unsynced(self, gateway: str, after: Place, limit: int) -> Sequence[tuple[Place, bytes]]:
        with _naming_the_database():
            rows = self._conn.execute(
                f"SELECT stream, seq, layer, body FROM {_ALL}"
                f" WHERE gateway = %s AND (stream, seq, layer) > (%s, %s, %s) AND {_UNSYNCED}"
                " ORDER BY stream, seq, layer LIMIT %s",
                (gateway, *after, limit),
            ).fetchall()
        return [(Place(*place), body.encode()) for *place, body in rows]

    def correction(self, batch: Batch) -> Correction | None:
        with _naming_the_database():
            row = self._conn.execute(
                f"SELECT count, delta_ms FROM corrections {_OF_BATCH} seq = %s AND period = %s",
                (*batch.key, batch.seq, batch.period_s),
            ).fetchone()
        return Correction(*row) if row else None

    def correct(self, batch: Batch, correction: Correction) -> None:
        of, period_s = (*batch.key, batch.seq), batch.period_s
        with _naming_the_database(), self._conn.cursor() as cursor:
            if period_s:
                cursor.execute(f"DELETE FROM summaries {_OF_BATCH} seq = %s AND period = %s", (*of, period_s))
            for table in () if period_s else _OF_RECORDS:
                cursor.execute(f"DELETE FROM {table} {_OF_BATCH} seq BETWEEN %s AND %s", (*of, batch.last))
            _add_records(cursor, batch)
            cursor.execute(f"DELETE FROM corrections {_OF_BATCH} seq = %s AND period = %s", (*of, period_s))
            if correction.records:
                cursor.execute(
                    "INSERT INTO corrections (gateway, stream, seq, count, delta_ms, period)"
                    " VALUES (%s, %s, %s, %s, %s, %s)",
                    (*of, *correction, period_s),
                )

    def add_conflict(self, batch: Batch, received_ms: int) -> None:
        with _naming_the_database():
            self._conn.execute(
                "INSERT INTO conflicts (gateway, stream, seq, count, digest, kind, received_ts, body)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (*batch.key, batch.seq, batch.count, batch.digest.hex(), batch.kind.value, received_ms,
                 batch.body.decode()),
            )  # fmt: skip

    def beginnings(self) -> Iterable[tuple[Key, int]]:
        for gateway, stream, seq in self._rows("SELECT gateway, stream, seq FROM beginnings"):
            yield Key(gateway, stream), seq

    def begin(self, key: Key, seq: int) -> None:
        with _naming_the_database():
            self._conn.execute(
                "INSERT INTO beginnings (gateway, stream, seq) VALUES (%s, %s, %s)", (*key, seq)
            )

    def commit(self) -> None:
        with _naming_the_database():
            self._conn.commit()

    def links(self, key: Key) -> Iterator[Link]:
        for (text,) in self._rows(
            f"SELECT body FROM {_ALL} WHERE gateway = %s AND stream = %s ORDER BY seq, layer", key
        ):
            body = text.encode()
            yield link(decode(body), digest(body))

    def figures(self) -> dict[Key, Figures]:
        rows = self._rows(
            "SELECT gateway, stream, b.n, coalesce(r.n, 0), coalesce(e.n, 0), coalesce(c.n, 0)"
            f" FROM (SELECT gateway, stream, count(*) AS n FROM {_ALL} GROUP BY gateway, stream) b"
            " LEFT JOIN (SELECT gateway, stream, count(*) AS n FROM readings GROUP BY 1, 2) r"
            "  USING (gateway, stream)"
            " LEFT JOIN (SELECT gateway, stream, count(*) AS n FROM events GROUP BY 1, 2) e"
            "  USING (gateway, stream)"
            " LEFT JOIN (SELECT gateway, stream, count(*) AS n FROM conflicts GROUP BY 1, 2) c"
            "  USING (gateway, stream)"
        )
        return {Key(gateway, stream): Figures(*numbers) for gateway, stream, *numbers in rows}

    def close(self) -> None:
        self._conn.close()


@contextmanager
def _naming_the_database() -> Iterator[None]:
    try:
        yield
    except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
        raise BatchError(as_line(error)) from error
    except psycopg.IntegrityError as error:
        raise SinkError(f"{as_line(error)}; another receiver is writing to this database") from error
    except psycopg.Error as error:
        raise SinkError(f"{as_line(error)}; nothing unkept was confirmed") from error


def _add_records(cursor: "psycopg.Cursor[Any]", batch: Batch) -> None:
    readings = _readings(batch)
    if b"\\u0000" in batch.body:  # PostgreSQL's text cannot hold that character
        readings = [tuple(_without_nul(field) for field in row) for row in readings]
    with cursor.copy(
        "COPY readings (gateway, stream, seq, ts, device, tag, value, value_text, quality) FROM STDIN"
    ) as copy:
        for row in readings:
            copy.write_row(row)
    for statement, rows in _others(batch):
        cursor.executemany(statement, [tuple(map(_without_nul, row)) for row in rows])


def _readings(batch: Batch) -> list[tuple[Any, ...]]:
    gateway, stream = batch.key
    return [
        (
            gateway,
            stream,
            seq,
            record.ts,
            record.device,
            tag,
            *columns(value),
            (record.quality or {}).get(tag),
        )
        for seq, record in enumerate(batch.data, batch.seq)
        for tag, value in (record.values or {}).items()
    ]


def _others(batch: Batch) -> Iterator[tuple[LiteralString, list[tuple[Any, ...]]]]:
    if batch.kind is Kind.EVENT:
        yield (
            "INSERT INTO events (gateway, stream, seq, ts, event, body) VALUES (%s, %s, %s, %s, %s, %s)",
            [
                (*batch.key, seq, event.ts, event.event, bytes(raw).decode())
                for seq, (event, raw) in enumerate(zip(batch.events, batch.raw, strict=True), batch.seq)
            ],
        )
    if batch.kind is Kind.DATA:
        yield (
            "INSERT INTO device_status (gateway, stream, seq, ts, device, status, reason)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [
                (*batch.key, seq, record.ts, record.device, record.status, record.reason)
                for seq, record in enumerate(batch.data, batch.seq)
                if record.status is not None
            ],
        )
    if batch.kind is Kind.SUMMARY:
        yield (
            "INSERT INTO summaries (gateway, stream, seq, ts, device, tag, body, period)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
            [
                (
                    *batch.key, batch.seq, record.ts, record.device, tag,
                    msgspec.json.encode(figures).decode(), batch.period_s,
                )
                for record in batch.summaries
                for tag, figures in record.values.items()
            ],
        )  # fmt: skip


def columns(value: Value) -> tuple[float | None, str | None]:
    """Return what stands for a value in `value` and `value_text`."""
    if isinstance(value, str):
        return None, value
    if isinstance(value, list):
        return None, msgspec.json.encode(value).decode()
    return (None if value is None else float(value)), None


def _without_nul(field: Any) -> Any:
    return field.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(field, str) else field
