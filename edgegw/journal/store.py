"""All of the journal's SQL: one writing connection, and readers that only read.

The file is in WAL mode with `synchronous=FULL`: a commit that returned is on the disk. The writer
checkpoints by itself, readers take short SELECTs, and SQLite comes with apsw (3.51.3 or newer), because
older versions can corrupt a WAL database that has two connections.
"""

import hashlib
import os
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Self

import apsw
import zstandard

from edgegw.domain.batch import GENESIS, HEAD_ROOM, Batch, Kind, names
from edgegw.domain.ranges import Ranges
from edgegw.errors import JournalDamaged, JournalError, JournalFull
from edgegw.journal.wal import Trace, committed_beyond
from edgegw.journal.wear import Wear

APPLICATION_ID = 0x65646777  # "edgw"
VERSION = 4
PAGE = 1024
"""A commit at rest writes two pages: small ones, in a WAL that does not change its length, cost the card a third."""
OPEN_WAIT_MS = 5_000
FRAME = PAGE + 24
SLACK = 64 * 1024
"""What is kept free for the events that name what went, and for what is settled; less of a file that may not grow."""
CHECKPOINT_FSYNCS = 4
"""Of the WAL, of the database, of the mark beside it, and of the WAL's header when that begins anew."""
CHECKPOINT_WAIT_MS = 100
"""How long the writer waits for readers to go: not long, for the records that come in meanwhile wait, too."""


class Row(NamedTuple):
    """The columns of `batch`."""

    seq: int
    records: int
    kind: str
    period: int
    ts: int
    run_ms: int
    digest: bytes
    link: bytes | None
    size: int
    packed: bytes


class Span(NamedTuple):
    """Between which times the records of neighbouring batches lie."""

    first: int
    last: int
    first_ts: int
    last_ts: int


class Tip(NamedTuple):
    """Where a journal ends: the last seq given out and the hash that the next batch carries."""

    head: int
    digest: bytes


class Stored(NamedTuple):
    """A batch without its body: what retention decides by. `link` is the hash that the next one carries."""

    first: int
    last: int
    run_ms: int
    link: bytes
    size: int
    bytes: int


def wal_bytes(max_bytes: int) -> int:
    """Return the WAL's share of what a journal may take."""
    return min(16 * 1024**2, max_bytes // 4)


def ballast_bytes(max_bytes: int) -> int:
    """Return what a journal must be given back on a full disk: what the WAL grows to before it is emptied, and some."""
    return wal_bytes(max_bytes) // 4 + SLACK


def data_bytes(max_bytes: int) -> int:
    """Return what a journal's file may grow to: what it may take less the WAL's share and the ballast."""
    return max_bytes - wal_bytes(max_bytes) - ballast_bytes(max_bytes)


class Store:
    """The writing connection. Used by one thread; every method raises JournalError or JournalDamaged."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.wal_bytes = wal_bytes(max_bytes)
        self.stream = ""
        self._fsyncs = 0
        self._max_pages = self._limit_pages = data_bytes(max_bytes) // PAGE
        self._confined = False
        self._wal_pages = 0
        self._db: apsw.Connection | None = None

    def open(self, now_ms: int, *, check: bool) -> Self:
        """Open the file, or make one with a new stream; `check` looks through the b-trees first.

        What cannot be opened is closed again before the error goes on: the file may be moved next.
        """
        try:
            self._prepare(now_ms, check)
        except JournalError:
            with suppress(JournalError):
                self.close()
            raise
        return self

    def _prepare(self, now_ms: int, check: bool) -> None:
        with _mapped(self.path, "open"):
            self.path.touch(0o640)
            db = self._db = apsw.Connection(str(self.path))
            db.set_busy_timeout(OPEN_WAIT_MS)
            application = db.pragma("application_id")
            new = application == 0 and db.pragma("schema_version") == 0
            if not new and (application != APPLICATION_ID or db.pragma("user_version") != VERSION):
                raise JournalDamaged(
                    f"journal {self.path}: not a journal of this version; expected one that edgegw made"
                )
            db.pragma("page_size", PAGE)
            db.pragma("journal_mode", "wal")
            db.pragma("synchronous", "FULL")
            db.pragma("wal_autocheckpoint", 0)
            if new:
                self._create(db, now_ms)
            elif check and (found := db.pragma("quick_check")) != "ok":
                raise JournalDamaged(f"journal {self.path}: {found}")
            db.pragma("max_page_count", self._max_pages)
            db.set_wal_hook(self._committed)
            self.stream = _stream(db, self.path)
            if db.execute("SELECT count(*) FROM reserve").get:
                db.execute("DELETE FROM reserve")  # of a process that was killed while it reserved
            db.set_busy_timeout(CHECKPOINT_WAIT_MS)

    def _create(self, db: apsw.Connection, now_ms: int) -> None:
        with db:
            db.execute((resources.files("edgegw.journal") / "schema.sql").read_text())
            db.execute("INSERT INTO stream VALUES (?, ?, 0)", (str(uuid.uuid4()), now_ms))
            db.pragma("application_id", APPLICATION_ID)
            db.pragma("user_version", VERSION)

    def _committed(self, db: apsw.Connection, name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def take_fsyncs(self) -> int:
        """Return how often the disk was waited for since this was last asked."""
        fsyncs, self._fsyncs = self._fsyncs, 0
        return fsyncs

    def confine(self) -> None:
        """Grow no more, neither the database nor its WAL: others have filled the disk."""
        with _mapped(self.path, "read"):
            self._limit_pages = min(self._max_pages, int(self._open.pragma("page_count")))
        self._confined = True

    def reserve(self, size_bytes: int) -> None:
        """Take so much of the disk now, as free pages of the file that later records fill; raise JournalFull.

        They are written once, so that they are there whatever others take; the WAL grows by as much.
        """
        with _mapped(self.path, "reserve"):
            db = self._open
            with _transaction(db):
                db.execute("INSERT INTO reserve VALUES (zeroblob(?))", (size_bytes,))
            self.checkpoint(force=True)
            with _transaction(db):
                db.execute("DELETE FROM reserve")
            self._fsyncs += 2

    def relax(self) -> None:
        """Grow up to the limit again."""
        self._limit_pages = self._max_pages
        self._confined = False

    def close(self) -> None:
        """Checkpoint what is left and close; a connection that is beyond that is dropped."""
        db, self._db = self._db, None
        if db is not None:
            with _mapped(self.path, "close"):
                try:
                    with suppress(apsw.BusyError):  # a reader is there: the WAL stays as it is
                        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                finally:
                    db.close(True)

    @property
    def _open(self) -> apsw.Connection:
        if self._db is None:
            raise JournalError(f"journal {self.path}: not open")
        return self._db

    def newest(self) -> Batch | None:
        """Return the newest batch, None if there is none yet."""
        with _mapped(self.path, "read"):
            return _newest(self._open, self.stream)

    def committed_beyond(self, tip: int) -> Trace | None:
        """Return the last batch that was committed after record `tip` and cannot be read, None if there is none.

        To be asked before anything is written: that takes the place of the frames that bear witness.
        """
        with _mapped(self.path, "read"):
            frames, _ = self._open.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
            wal = _wal(self.path)
            content = wal.read_bytes() if wal.exists() else b""
        return committed_beyond(content, max(0, frames), PAGE, tip)

    def following(self, seq: int) -> Batch | None:
        """Return the first batch that begins after `seq`, None if there is none."""
        with _mapped(self.path, "read"):
            found = _batches(self._open, self.stream, "seq > ? ORDER BY seq LIMIT 1", (seq,))
        return found[0] if found else None

    def events(self, first: int, last: int) -> list[Batch]:
        """Return the batches of events that begin within `first` to `last`."""
        with _mapped(self.path, "read"):
            where = "seq BETWEEN ? AND ? AND kind = 'event' ORDER BY seq"
            return _batches(self._open, self.stream, where, (first, last))

    def last_link(self, first: int, last: int) -> bytes:
        """Return the hash that follows the last row within `first` to `last`, whether or not its bytes give it."""
        with _mapped(self.path, "read"):
            found: Any = self._open.execute(
                "SELECT CAST(coalesce(link, digest) AS BLOB) FROM batch WHERE seq BETWEEN ? AND ?"
                " ORDER BY seq DESC LIMIT 1",
                (first, last),
            ).get
        return found or GENESIS

    def acked(self) -> Ranges:
        """Return what was settled when it was last written down."""
        with _mapped(self.path, "read"):
            return _acked(self._open)

    def end_to_end(self) -> bool:
        """Tell whether a receiver has confirmed anything of this stream."""
        with _mapped(self.path, "read"):
            return bool(self._open.execute("SELECT CAST(end_to_end AS INTEGER) FROM stream").get)

    def append(
        self, rows: Sequence[Row], *, doomed: Iterable[tuple[int, int]] = (), acked: Ranges | None = None,
        spans: Iterable[Span] = (), wear: Wear | None = None, end_to_end: bool = False,
    ) -> None:  # fmt: skip
        """Delete the batches within each of `doomed`, add `rows`, write down what is settled, all or nothing.

        Each of `spans` takes the place of what others cover of it; `end_to_end` notes, for good, that a receiver has
        confirmed something. It is durable when this returns.
        """
        with _mapped(self.path, "commit"):
            db = self._open
            with _transaction(db):
                db.executemany("DELETE FROM batch WHERE seq BETWEEN ? AND ?", doomed)
                db.executemany("INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
                for span in spans:
                    _put_span(db, span)
                if acked is not None:
                    db.execute("DELETE FROM acked")
                    rows_acked = ((first, last, _sum(first, last)) for first, last in acked)
                    db.executemany("INSERT INTO acked VALUES (?, ?, ?)", rows_acked)
                    db.execute("DELETE FROM span WHERE last < (SELECT min(seq) FROM batch)")
                    if end_to_end:
                        db.execute("UPDATE stream SET end_to_end = 1 WHERE end_to_end = 0")
                if wear is not None:
                    db.execute("DELETE FROM wear")
                    db.execute("INSERT INTO wear VALUES (?, ?, ?, ?, ?)", (*wear, _sum(*wear)))
            self._fsyncs += 1

    def checkpoint(self, *, force: bool = False) -> bool:
        """Move the WAL into the database once it has grown to a quarter of its share; tell whether it did."""
        if not force and self._wal_pages * FRAME < self.wal_bytes // 4:
            return False
        with _mapped(self.path, "checkpoint"):
            large = not self._confined and _wal(self.path).stat().st_size > self.wal_bytes // 2
            mode = apsw.SQLITE_CHECKPOINT_TRUNCATE if large else apsw.SQLITE_CHECKPOINT_RESTART
            try:
                self._open.wal_checkpoint(mode=mode)
            except apsw.BusyError:
                return False  # a reader is in the way for a moment; the next commit tries again
        self._wal_pages = 0
        self._fsyncs += CHECKPOINT_FSYNCS
        return True

    @property
    def slack_bytes(self) -> int:
        """What is kept free for the events that name what went, and for what is settled."""
        return min(SLACK, self._limit_pages * PAGE // 8)

    def used_bytes(self) -> int:
        """Return what of the file holds anything."""
        with _mapped(self.path, "read"):
            db = self._open
            return (int(db.pragma("page_count")) - int(db.pragma("freelist_count"))) * PAGE

    def free_bytes(self) -> int:
        """Return how much still fits below the limit."""
        with _mapped(self.path, "read"):
            db = self._open
            return (
                self._limit_pages - int(db.pragma("page_count")) + int(db.pragma("freelist_count"))
            ) * PAGE

    def bytes_by_period(self) -> dict[int, int]:
        """Return how much of the file each kind of batch takes, by the seconds its records stand for; 0 is the rest."""
        with _mapped(self.path, "read"):
            db = self._open
            rows: Any = db.execute(
                "SELECT period, sum(length(packed)) FROM batch INDEXED BY summary_bytes"
                " WHERE period > 0 GROUP BY period"
            ).fetchall()
        return {0: self.used_bytes() - sum(size for _, size in rows), **dict(rows)}

    def latest_run_ms(self) -> int:
        """Return how long the journal had been open, in all, when its newest batch was written."""
        with _mapped(self.path, "read"):
            latest = "SELECT CAST(run_ms AS INTEGER) FROM batch ORDER BY seq DESC LIMIT 1"
            return int(self._open.execute(latest).get or 0)

    def wear(self) -> Wear:
        """Return what had been written in the journal's life when that was last noted."""
        with _mapped(self.path, "read"):
            return _wear(self._open)

    def oldest(self, first: int, last: int, limit: int, which: str = "true") -> list[Stored]:
        """Return the oldest batches that begin within `first` to `last`, never the newest of all.

        `which` narrows them down (see `of_period`). Whatever a row says of its count, a batch ends
        before the next begins.
        """
        with _mapped(self.path, "read"):
            rows: Any = self._open.execute(
                "SELECT seq, min(seq + CAST(count AS INTEGER),"
                " (SELECT min(seq) FROM batch AS later WHERE later.seq > batch.seq)) - 1,"
                " CAST(run_ms AS INTEGER), CAST(coalesce(link, digest) AS BLOB), CAST(size AS INTEGER),"
                f" length(packed) FROM batch WHERE seq BETWEEN ? AND ? AND {which}"
                " AND seq < (SELECT max(seq) FROM batch) ORDER BY seq LIMIT ?",
                (first, last, limit),
            ).fetchall()
        if any(None in row for row in rows):
            raise JournalDamaged(f"journal {self.path}: a row within {first} to {last} is not whole")
        return [Stored(*row) for row in rows]

    def batch(self, seq: int) -> Batch:
        """Return the batch that begins at `seq`; raise JournalDamaged if there is none."""
        with _mapped(self.path, "read"):
            found = _batches(self._open, self.stream, "seq = ?", (seq,))
        if not found:
            raise JournalDamaged(f"journal {self.path}: the batch at {seq} is not there")
        return found[0]

    def sound(self, first: int, last: int) -> bool:
        """Tell whether batches that give their hashes hold each seq of `first` to `last`, as the disk has it now."""
        with _mapped(self.path, "read"):
            self._open.release_memory()
        while first <= last:
            with _mapped(self.path, "read"):
                found = _batches(
                    self._open, self.stream, "seq BETWEEN ? AND ? ORDER BY seq LIMIT 64", (first, last)
                )
            if not found:
                return False
            for batch in found:
                try:
                    unpack(batch)
                except JournalDamaged:
                    return False
                if batch.seq != first:
                    return False
                first = batch.last + 1
        return True

    def pending_batches(self, settled: Ranges, head: int) -> int:
        """Count the batches that are not settled."""
        with _mapped(self.path, "read"):
            counts: list[Any] = [
                self._open.execute("SELECT count(*) FROM batch WHERE seq BETWEEN ? AND ?", gap).get
                for gap in settled.gaps(1, head)
            ]
        return sum(counts)


def of_period(period_s: int) -> str:
    """Narrow `oldest` down to summaries of a period, or to readings if that is 0."""
    return f"period = {period_s:d} AND period > 0" if period_s else "period = 0 AND kind <> 'event'"


class Reader:
    """A connection that only reads, each time in one short SELECT."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _mapped(path, "open"), ExitStack() as opening:
            self._db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            opening.callback(self._db.close, True)
            self._db.set_busy_timeout(OPEN_WAIT_MS)
            if self._db.pragma("application_id") != APPLICATION_ID:
                raise JournalDamaged(f"journal {path}: not a journal; expected one that edgegw made")
            self.stream = _stream(self._db, path)
            opening.pop_all()

    def close(self) -> None:
        """Close the connection."""
        self._db.close(True)

    def tip(self) -> Tip:
        """Return where the journal ends."""
        with _mapped(self.path, "read"):
            newest = _newest(self._db, self.stream)
        return Tip(newest.last, newest.digest) if newest else Tip(0, GENESIS)

    def acked(self) -> Ranges:
        """Return what was settled when it was last written down."""
        with _mapped(self.path, "read"):
            return _acked(self._db)

    def batches(self, first: int, last: int, *, limit: int, max_bytes: int = 1 << 62) -> list[Batch]:
        """Return the batches that begin within `first` to `last`, in order.

        At most `limit` of them, and no more once they come to `max_bytes` of JSON.
        """
        with _mapped(self.path, "read"):
            return _batches(
                self._db,
                self.stream,
                "seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
                (first, last, limit),
                max_bytes,
            )

    def bounds(self, first: int, last: int, *, limit: int) -> list[tuple[int, int]]:
        """Return where the batches begin and end that begin within `first` to `last`, in order."""
        with _mapped(self.path, "read"):
            rows: Any = self._db.execute(
                "SELECT seq, seq + max(1, CAST(count AS INTEGER)) - 1 FROM batch"
                " WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
                (first, last, limit),
            ).fetchall()
        return list(rows)

    def before(self, seq: int, *, limit: int) -> list[Batch]:
        """Return the last batches that begin before `seq`, newest first."""
        with _mapped(self.path, "read"):
            return _batches(self._db, self.stream, "seq < ? ORDER BY seq DESC LIMIT ?", (seq, limit))

    def spans_between(self, from_ms: int, to_ms: int) -> list[tuple[int, int]]:
        """Return the ranges of seqs whose batches may hold records of this time, both ends included, in order."""
        with _mapped(self.path, "read"):
            spans = _spans(self._db, "true", ())
            ends: Any = self._db.execute("SELECT min(seq), max(seq) FROM batch").fetchone()
        if ends[0] is None:
            return []
        found = Ranges(Ranges((span.first, span.last) for span in spans).gaps(*ends))
        for span in spans:
            if span.first_ts <= to_ms and span.last_ts >= from_ms:
                found.add(span.first, span.last)
        return list(found)

    def wear(self) -> Wear:
        """Return what has been written in the journal's life, as of its last checkpoint."""
        with _mapped(self.path, "read"):
            return _wear(self._db)

    def figures(self, settled: Ranges) -> "Figures":
        """Count what is there."""
        head = self.tip().head
        with _mapped(self.path, "read"):
            totals: Any = self._db.execute(
                "SELECT count(*), coalesce(sum(count), 0), coalesce(sum(size), 0),"
                " coalesce(sum(length(packed)), 0) FROM batch"
            ).fetchone()
            pending, oldest = 0, None
            for gap in settled.gaps(1, head):
                row: Any = self._db.execute(
                    "SELECT count(*), min(ts) FROM batch WHERE seq BETWEEN ? AND ?", gap
                )
                count, ts = row.fetchone()
                pending += count
                oldest = oldest if ts is None or (oldest is not None and oldest < ts) else ts
        batches, records, json_bytes, stored_bytes = totals
        return Figures(batches, records, json_bytes, stored_bytes, pending, oldest)

    def used(self) -> tuple[int, int]:
        """Return how many bytes of the file hold anything, and the first seq that is kept, 0 if there is none."""
        with _mapped(self.path, "read"):
            pages = int(self._db.pragma("page_count")) - int(self._db.pragma("freelist_count"))
            first = self._db.execute("SELECT min(seq) FROM batch").get
        return pages * PAGE, int(first or 0)

    def oldest_ts(self, first: int, last: int) -> int | None:
        """Return the time of the first batch that begins within `first` to `last`, None if there is none."""
        with _mapped(self.path, "read"):
            row: Any = self._db.execute(
                "SELECT ts FROM batch WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT 1", (first, last)
            ).fetchone()
        return row[0] if row else None


def _stream(db: apsw.Connection, path: Path) -> str:
    try:
        return str(uuid.UUID(db.execute("SELECT id FROM stream").get))
    except (ValueError, AttributeError, TypeError):
        raise JournalDamaged(f"journal {path}: it does not say which stream it holds") from None


def _newest(db: apsw.Connection, stream: str) -> Batch | None:
    found = _batches(db, stream, "true ORDER BY seq DESC LIMIT 1", ())
    return found[0] if found else None


def _batches(
    db: apsw.Connection, stream: str, where: str, values: tuple[int, ...], max_bytes: int = 1 << 62
) -> list[Batch]:
    """Return the batches that an SQL condition selects, no more once they come to `max_bytes` of JSON."""
    rows: Any = db.execute(
        "SELECT seq, CAST(count AS INTEGER), CAST(kind AS BLOB), CAST(digest AS BLOB), CAST(size AS INTEGER),"
        f" CAST(packed AS BLOB) FROM batch WHERE {where}",
        values,
    )
    found: list[Batch] = []
    total = 0
    try:
        for row in rows:
            found.append(_batch(stream, *row))
            total += found[-1].size
            if total >= max_bytes:
                break
    finally:
        rows.close(True)  # ends the SELECT: while one is open the WAL cannot be emptied
    return found


_KINDS = {kind.value.encode(): kind for kind in Kind}


def _batch(
    stream: str, seq: int, count: int | None, kind: bytes | None, digest: bytes | None, size: int | None,
    packed: bytes | None,
) -> Batch:  # fmt: skip
    """Take a row for a batch; one whose columns cannot be a batch's has no bytes, and so fails its check."""
    if not count or count < 0 or kind not in _KINDS or digest is None or size is None or packed is None:
        return Batch(stream, seq, 1, Kind.DATA, b"", 0, b"")
    return Batch(stream, seq, count, _KINDS[kind], digest, size, packed)


def _acked(db: apsw.Connection) -> Ranges:
    """Return what was settled; a range that is not as it was written is left out, which costs a repeat."""
    rows: Any = db.execute("SELECT first, CAST(last AS INTEGER), CAST(sum AS INTEGER) FROM acked").fetchall()
    return Ranges((first, last) for first, last, found in rows if found == _sum(first, last))


def _put_span(db: apsw.Connection, span: Span) -> None:
    """Write a span down; of others that it overlaps there stays what lies beside it."""
    begins = "(SELECT coalesce(max(seq), 0) FROM span WHERE seq <= ?)"
    others = _spans(db, f"seq BETWEEN {begins} AND ? AND last >= ?", (span.first, span.last, span.first))
    beside = [other._replace(last=span.first - 1) for other in others if other.first < span.first]
    beside += [other._replace(first=span.last + 1) for other in others if other.last > span.last]
    db.execute("DELETE FROM span WHERE seq BETWEEN ? AND ?", (span.first, span.last))
    rows = ((*one, _sum(*one)) for one in (*beside, span))
    db.executemany("INSERT OR REPLACE INTO span VALUES (?, ?, ?, ?, ?)", rows)


def _spans(db: apsw.Connection, where: str, values: tuple[int, ...]) -> list[Span]:
    """Return spans, in order; one that is not as it was written is left out, which costs a search."""
    rows: Any = db.execute(
        "SELECT seq, CAST(last AS INTEGER), CAST(first_ts AS INTEGER), CAST(last_ts AS INTEGER),"
        f" CAST(sum AS INTEGER) FROM span WHERE {where} ORDER BY seq",
        values,
    ).fetchall()
    return [Span(*row) for *row, found in rows if found == _sum(*row)]


def _wear(db: apsw.Connection) -> Wear:
    """Return what was written down; if that is not as it was written, counting begins anew."""
    row: Any = db.execute(
        "SELECT CAST(run_ms AS INTEGER), CAST(readings AS INTEGER), CAST(written_bytes AS INTEGER),"
        " CAST(fsyncs AS INTEGER), CAST(sum AS INTEGER) FROM wear"
    ).fetchone()
    return Wear(*row[:-1]) if row and row[-1] == _sum(*row[:-1]) else Wear()


def _sum(*numbers: int) -> int:
    return zlib.crc32(repr(numbers).encode())


class Figures(NamedTuple):
    """What a journal holds: counts, bytes of JSON and as stored, and what waits for the upstream."""

    batches: int
    records: int
    json_bytes: int
    stored_bytes: int
    pending_batches: int
    oldest_pending_ts: int | None


def unpack(batch: Batch) -> bytes:
    """Return a batch's JSON bytes; raise JournalDamaged if these or its figures are not what was once written."""
    try:
        if zstandard.frame_content_size(batch.packed) != batch.size:  # before so much memory is asked for
            raise JournalDamaged(f"batch {batch.seq}: its bytes do not give its size")
        body = zstandard.ZstdDecompressor().decompress(batch.packed)
    except zstandard.ZstdError as error:
        raise JournalDamaged(f"batch {batch.seq}: {error}") from None
    if hashlib.sha256(body).digest() != batch.digest:
        raise JournalDamaged(f"batch {batch.seq}: its bytes do not give its hash")
    if names(batch.stream, batch.seq, batch.count, batch.kind) not in body[:HEAD_ROOM]:
        raise JournalDamaged(f"batch {batch.seq}: its row does not say what its bytes say")
    return body


def size_bytes(path: Path) -> int:
    """Return what the database and its WAL take on the disk."""
    return sum(file.stat().st_size for file in (path, _wal(path)) if file.exists())


def disk_share(path: Path) -> float:
    """Return how much of the disk that a file's folder is on is used, from 0 to 1; 0 if that cannot be told."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return 0.0
    used = disk.f_blocks - disk.f_bfree
    return used / (used + disk.f_bavail) if used else 0.0


def set_aside(path: Path, stamp: str) -> Path:
    """Move the database and its logs to a name with the date; return it.

    None of them may stay: SQLite would take it for a log of the file that comes next.
    """
    aside = path.with_name(f"{path.name}.{stamp}")
    try:
        for suffix in ("-wal", "-journal", ""):
            if (old := path.with_name(path.name + suffix)).exists():
                old.rename(aside.with_name(aside.name + suffix))
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
    except OSError as error:
        raise JournalError(f"journal {path}: cannot be set aside as {aside}: {error.strerror}") from error
    return aside


def delete_set_aside(path: Path, keep: int, max_bytes: int) -> list[str]:
    """Delete files that were set aside beside a journal, but for the newest `keep` and no more than `max_bytes` of
    them; return the names of those deleted. The newest always stays."""
    aside = sorted(
        file for file in path.parent.glob(f"{path.name}.*Z") if _ASIDE.fullmatch(file.name[len(path.name) :])
    )
    deleted: list[str] = []
    total = 0
    for number, file in enumerate(reversed(aside)):
        logs = [
            log for suffix in ("-wal", "-journal") if (log := file.with_name(file.name + suffix)).exists()
        ]
        with suppress(OSError):
            total += sum(one.stat().st_size for one in (file, *logs))
            if number and (number >= keep or total > max_bytes):
                for one in (*logs, file):
                    one.unlink()
                deleted.append(file.name)
    return deleted


_ASIDE = re.compile(r"\.\d{8}T\d{12}Z")


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


_DAMAGE = (
    apsw.CorruptError, apsw.NotADBError, apsw.FormatError,
    apsw.SQLError, apsw.ConstraintError,  # our SQL and our numbers are right: the schema or the b-tree is not
    UnicodeDecodeError,
)  # fmt: skip


class _mapped:  # noqa: N801  reads as a statement
    """Turns SQLite's errors into the journal's, with the file and what was tried."""

    __slots__ = ("path", "what")

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _DAMAGE):
            raise JournalDamaged(f"journal {self.path}: {self.what}: {error}") from error
        if isinstance(error, apsw.FullError):
            raise JournalFull(f"journal {self.path}: {self.what}: the disk is full") from error
        if isinstance(error, apsw.Error | OSError):
            raise JournalError(
                f"journal {self.path}: {self.what}: {error or type(error).__name__}"
            ) from error


class _transaction:  # noqa: N801  reads as a statement
    """BEGIN IMMEDIATE to COMMIT; rolled back if SQLite has not done so itself (a full disk does)."""

    __slots__ = ("db",)

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db

    def __enter__(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self.db.execute("COMMIT")
            except apsw.Error:
                self._roll_back()
                raise
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")


def walk(reader: Reader, first: int = 1, *, step: int = 64) -> Iterator[Batch]:
    """Yield every batch from `first` on, a few at a time so that no SELECT stays open."""
    while batches := reader.batches(first, 1 << 62, limit=step):
        yield from batches
        first = batches[-1].seq + 1


def walk_back(reader: Reader, *, step: int = 16) -> Iterator[Batch]:
    """Yield every batch from the newest back, a few at a time."""
    seq = 1 << 62
    while batches := reader.before(seq, limit=step):
        yield from batches
        seq = batches[-1].seq
