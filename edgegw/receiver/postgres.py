"""Keeps batches in a PostgreSQL database (extra `postgres`)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString

import msgspec

from edgegw.domain.batch import Kind, Link, decode, digest
from edgegw.domain.tag import Value
from edgegw.errors import ConfigError
from edgegw.receiver.corrector import Correction
from edgegw.receiver.dedupe import Kept, Key, NamedGap
from edgegw.receiver.sink import Figures, SinkError, Span
from edgegw.receiver.timing import HEAD_BYTES, UNSYNCED
from edgegw.receiver.wire import Batch, MalformedError, link, read_gap

try:
    import psycopg
except ImportError as error:
    raise ConfigError(
        ["--to: postgresql:// needs psycopg, which is not installed; pip install 'edgegw[postgres]'"]
    ) from error

_SCHEMA: tuple[LiteralString, ...] = (
    "CREATE TABLE IF NOT EXISTS batches (gateway text, stream text, seq bigint, count bigint NOT NULL,"
    " kind text NOT NULL, received_ts bigint NOT NULL, body text NOT NULL,"
    " PRIMARY KEY (gateway, stream, seq))",
    "CREATE TABLE IF NOT EXISTS readings (gateway text NOT NULL, stream text NOT NULL, seq bigint NOT NULL,"
    " ts bigint NOT NULL, device text NOT NULL, tag text NOT NULL, value double precision, value_text text,"
    " quality text)",
    "CREATE TABLE IF NOT EXISTS events (gateway text NOT NULL, stream text NOT NULL, seq bigint NOT NULL,"
    " ts bigint NOT NULL, event text NOT NULL, body text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS device_status (gateway text NOT NULL, stream text NOT NULL,"
    " seq bigint NOT NULL, ts bigint NOT NULL, device text NOT NULL, status text NOT NULL, reason text)",
    "CREATE TABLE IF NOT EXISTS summaries (gateway text NOT NULL, stream text NOT NULL, seq bigint NOT NULL,"
    " ts bigint NOT NULL, device text NOT NULL, tag text NOT NULL, body text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS conflicts (gateway text, stream text, seq bigint, count bigint NOT NULL,"
    " digest text, kind text NOT NULL, received_ts bigint NOT NULL, body text NOT NULL,"
    " PRIMARY KEY (gateway, stream, seq, digest))",
    "CREATE INDEX IF NOT EXISTS batches_spans ON batches (gateway, stream, seq, count)",
    "CREATE INDEX IF NOT EXISTS events_names ON events (event)",
)
"""A number stands in `value`; text, or an array as JSON, in `value_text`."""

_OF_RECORDS: tuple[LiteralString, ...] = ("readings", "events", "device_status", "summaries")
_OF_BATCH: LiteralString = "WHERE gateway = %s AND stream = %s AND"
_UNSYNCED: LiteralString = f"position('{UNSYNCED}' in left(body, {HEAD_BYTES})) > 0"
"""The condition of the index `batches_unsynced`: what uses it must say the same."""
_CORRECTIONS: tuple[LiteralString, ...] = (
    "CREATE TABLE IF NOT EXISTS corrections (gateway text, stream text, seq bigint, count bigint NOT NULL,"
    " delta_ms bigint NOT NULL, PRIMARY KEY (gateway, stream, seq))",
    *(f"CREATE INDEX IF NOT EXISTS {table}_seqs ON {table} (gateway, stream, seq)" for table in _OF_RECORDS),
    f"CREATE INDEX IF NOT EXISTS batches_unsynced ON batches (gateway, stream, seq) WHERE {_UNSYNCED}",
)


class PostgresSink:
    """The port's implementation over one connection."""

    def __init__(self, url: str) -> None:
        with _naming_the_database():
            self._conn = psycopg.connect(url)
            for statement in _SCHEMA:
                self._conn.execute(statement)
            self._conn.commit()

    def spans(self) -> Iterable[Span]:
        rows = self._rows("SELECT gateway, stream, seq, count FROM batches ORDER BY gateway, stream, seq")
        return (Span(Key(gateway, stream), seq, count) for gateway, stream, seq, count in rows)

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

    def kept(self, key: Key, seq: int, last: int) -> Sequence[Kept]:
        with _naming_the_database():
            rows = self._conn.execute(
                "SELECT seq, count, kind, body FROM batches"
                " WHERE gateway = %(gateway)s AND stream = %(stream)s AND seq <= %(last)s"
                " AND seq >= coalesce((SELECT max(seq) FROM batches"
                "  WHERE gateway = %(gateway)s AND stream = %(stream)s AND seq <= %(seq)s), %(seq)s)",
                {"gateway": key.gateway, "stream": key.stream, "seq": seq, "last": last},
            ).fetchall()
        return [Kept(at, n, Kind(kind), digest(body.encode())) for at, n, kind, body in rows if at + n > seq]

    def add(self, batch: Batch, received_ms: int) -> None:
        with _naming_the_database(), self._conn.cursor() as cursor:
            cursor.execute(
                "INSERT INTO batches (gateway, stream, seq, count, kind, received_ts, body)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s)",
                (*batch.key, batch.seq, batch.count, batch.kind.value, received_ms, batch.body.decode()),
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

    def unsynced(self, gateway: str, stream: str, seq: int, limit: int) -> Sequence[tuple[str, int, bytes]]:
        with _naming_the_database():
            rows = self._conn.execute(
                "SELECT stream, seq, body FROM batches WHERE gateway = %s AND (stream, seq) > (%s, %s) AND "
                f"{_UNSYNCED} ORDER BY stream, seq LIMIT %s",
                (gateway, stream, seq, limit),
            ).fetchall()
        return [(of, at, body.encode()) for of, at, body in rows]

    def correction(self, key: Key, seq: int) -> Correction | None:
        with _naming_the_database():
            row = self._conn.execute(
                f"SELECT count, delta_ms FROM corrections {_OF_BATCH} seq = %s", (*key, seq)
            ).fetchone()
        return Correction(*row) if row else None

    def correct(self, batch: Batch, correction: Correction) -> None:
        with _naming_the_database(), self._conn.cursor() as cursor:
            for table in _OF_RECORDS:
                cursor.execute(
                    f"DELETE FROM {table} {_OF_BATCH} seq BETWEEN %s AND %s",
                    (*batch.key, batch.seq, batch.last),
                )
            _add_records(cursor, batch)
            cursor.execute(f"DELETE FROM corrections {_OF_BATCH} seq = %s", (*batch.key, batch.seq))
            if correction.records:
                cursor.execute(
                    "INSERT INTO corrections (gateway, stream, seq, count, delta_ms) VALUES (%s, %s, %s, %s, %s)",
                    (*batch.key, batch.seq, *correction),
                )

    def add_conflict(self, batch: Batch, received_ms: int) -> None:
        with _naming_the_database():
            self._conn.execute(
                "INSERT INTO conflicts (gateway, stream, seq, count, digest, kind, received_ts, body)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (*batch.key, batch.seq, batch.count, batch.digest.hex(), batch.kind.value, received_ms,
                 batch.body.decode()),
            )  # fmt: skip

    def commit(self) -> None:
        with _naming_the_database():
            self._conn.commit()

    def links(self, key: Key) -> Iterator[Link]:
        for (text,) in self._rows(
            "SELECT body FROM batches WHERE gateway = %s AND stream = %s ORDER BY seq", key
        ):
            body = text.encode()
            yield link(decode(body), digest(body))

    def figures(self) -> dict[Key, Figures]:
        rows = self._rows(
            "SELECT gateway, stream, b.batches, b.records,"
            " coalesce(r.n, 0), coalesce(e.n, 0), coalesce(c.n, 0)"
            " FROM (SELECT gateway, stream, count(*) AS batches, sum(count)::bigint AS records FROM batches"
            "  GROUP BY gateway, stream) b"
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
    except psycopg.Error as error:
        raise SinkError(
            f"postgresql: {str(error).strip()}; nothing unkept was confirmed, start again"
        ) from error


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
            "INSERT INTO summaries (gateway, stream, seq, ts, device, tag, body)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [
                (*batch.key, batch.seq, record.ts, record.device, tag, msgspec.json.encode(figures).decode())
                for record in batch.summaries
                for tag, figures in record.values.items()
            ],
        )


def columns(value: Value) -> tuple[float | None, str | None]:
    """Return what stands for a value in `value` and `value_text`."""
    if isinstance(value, str):
        return None, value
    if isinstance(value, list):
        return None, msgspec.json.encode(value).decode()
    return (None if value is None else float(value)), None


def _without_nul(field: Any) -> Any:
    return field.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(field, str) else field
