"""All of the journal's SQL: one writing connection, and readers that only read.

The file is in WAL mode with `synchronous=FULL`: a commit that returned is on the disk. The writer
checkpoints by itself, readers take short SELECTs, and SQLite comes with apsw (3.51.3 or newer), because
older versions can corrupt a WAL database that has two connections.
"""

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Self

import apsw
import zstandard

from edgegw.domain.batch import GENESIS, Batch, Kind
from edgegw.domain.ranges import Ranges
from edgegw.errors import JournalDamaged, JournalError

APPLICATION_ID = 0x65646777  # "edgw"
VERSION = 1
PAGE = 4096

Row = tuple[int, int, str, int, bytes, int, bytes]
"""seq, count, kind, ts, digest, size, packed: the columns of `batch`."""


class Tip(NamedTuple):
    """Where a journal ends: the last seq given out and the hash that the next batch carries."""

    head: int
    digest: bytes


class Stored(NamedTuple):
    """A batch without its body: what retention decides by."""

    first: int
    last: int
    ts: int
    digest: bytes
    bytes: int


class Store:
    """The writing connection. Used by one thread; every method raises JournalError or JournalDamaged."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.wal_bytes = min(16 * 1024**2, max_bytes // 4)
        self._max_pages = (max_bytes - self.wal_bytes) // PAGE
        self._db: apsw.Connection | None = None
        self.stream = ""
        self.created = False

    def open(self, now_ms: int, *, check: bool) -> Self:
        """Open the file, or make one with a new stream; `check` looks through the b-trees first."""
        with _mapped(self.path, "open"):
            db = self._db = apsw.Connection(str(self.path))
            db.set_busy_timeout(5_000)
            db.pragma("page_size", PAGE)
            db.pragma("journal_mode", "wal")
            db.pragma("synchronous", "FULL")
            db.pragma("wal_autocheckpoint", 0)
            application = db.pragma("application_id")
            if application == 0 and db.pragma("schema_version") == 0:
                self._create(db, now_ms)
            elif application != APPLICATION_ID or db.pragma("user_version") != VERSION:
                raise JournalDamaged(
                    f"journal {self.path}: not a journal of this version; expected one that edgegw made"
                )
            elif check and (found := db.pragma("quick_check")) != "ok":
                raise JournalDamaged(f"journal {self.path}: {found}")
            db.pragma("max_page_count", self._max_pages)
            self.stream = str(db.execute("SELECT id FROM stream").get)
        return self

    def _create(self, db: apsw.Connection, now_ms: int) -> None:
        with db:
            db.execute((resources.files("edgegw.journal") / "schema.sql").read_text())
            db.execute("INSERT INTO stream VALUES (?, ?)", (str(uuid.uuid4()), now_ms))
            db.pragma("application_id", APPLICATION_ID)
            db.pragma("user_version", VERSION)
        self.created = True

    def close(self) -> None:
        """Checkpoint what is left and close; a connection that is beyond that is dropped."""
        db, self._db = self._db, None
        if db is not None:
            with _mapped(self.path, "close"):
                try:
                    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                finally:
                    db.close(True)

    @property
    def _open(self) -> apsw.Connection:
        if self._db is None:
            raise JournalError(f"journal {self.path}: not open")
        return self._db

    def tip(self) -> Tip:
        """Return where the journal ends."""
        with _mapped(self.path, "read"):
            return _tip(self._open)

    def acked(self) -> Ranges:
        """Return what was settled when it was last written down."""
        with _mapped(self.path, "read"):
            return _acked(self._open)

    def append(
        self, rows: Sequence[Row], *, doomed: Iterable[tuple[int, int]] = (), acked: Ranges | None = None
    ) -> None:
        """Delete the batches within each of `doomed`, add `rows`, write down what is settled, all or nothing.

        It is durable when this returns.
        """
        with _mapped(self.path, "commit"):
            db = self._open
            with _transaction(db):
                db.executemany("DELETE FROM batch WHERE seq BETWEEN ? AND ?", doomed)
                db.executemany("INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
                if acked is not None:
                    db.execute("DELETE FROM acked")
                    db.executemany("INSERT INTO acked VALUES (?, ?)", list(acked))

    def checkpoint(self, *, force: bool = False) -> bool:
        """Move the WAL into the database once it has grown to a quarter of its share; tell whether it did."""
        with _mapped(self.path, "checkpoint"):
            wal = _wal(self.path)
            if not force and (not wal.exists() or wal.stat().st_size < self.wal_bytes // 4):
                return False
            try:
                self._open.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError:
                return False  # a reader is in the way for a moment; the next commit tries again
            return True

    def free_bytes(self) -> int:
        """Return how much still fits below the limit."""
        with _mapped(self.path, "read"):
            db = self._open
            return (self._max_pages - int(db.pragma("page_count")) + int(db.pragma("freelist_count"))) * PAGE

    def oldest(self, first: int, last: int, limit: int) -> list[Stored]:
        """Return the oldest batches that begin within `first` to `last`, never the newest of all."""
        with _mapped(self.path, "read"):
            rows: Any = self._open.execute(
                "SELECT seq, seq + count - 1, ts, digest, length(packed) FROM batch"
                " WHERE seq BETWEEN ? AND ? AND seq < (SELECT max(seq) FROM batch) ORDER BY seq LIMIT ?",
                (first, last, limit),
            ).fetchall()
        return [Stored(*row) for row in rows]

    def batch(self, seq: int) -> Stored | None:
        """Return what is known of the batch that begins with `seq`."""
        with _mapped(self.path, "read"):
            row: Any = self._open.execute(
                "SELECT seq, seq + count - 1, ts, digest, length(packed) FROM batch WHERE seq = ?", (seq,)
            ).fetchone()
        return Stored(*row) if row else None

    def pending_batches(self, settled: Ranges, head: int) -> int:
        """Count the batches that are not settled."""
        with _mapped(self.path, "read"):
            counts: list[Any] = [
                self._open.execute("SELECT count(*) FROM batch WHERE seq BETWEEN ? AND ?", gap).get
                for gap in settled.gaps(1, head)
            ]
        return sum(counts)


class Reader:
    """A connection that only reads, each time in one short SELECT."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _mapped(path, "open"):
            self._db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            self._db.set_busy_timeout(5_000)
            if self._db.pragma("application_id") != APPLICATION_ID:
                raise JournalDamaged(f"journal {path}: not a journal; expected one that edgegw made")
            self.stream = str(self._db.execute("SELECT id FROM stream").get)

    def close(self) -> None:
        """Close the connection."""
        self._db.close(True)

    def tip(self) -> Tip:
        """Return where the journal ends."""
        with _mapped(self.path, "read"):
            return _tip(self._db)

    def acked(self) -> Ranges:
        """Return what was settled when it was last written down."""
        with _mapped(self.path, "read"):
            return _acked(self._db)

    def batches(self, first: int, last: int, *, limit: int, max_bytes: int = 1 << 62) -> list[Batch]:
        """Return the batches that begin within `first` to `last`, in order.

        At most `limit` of them, and no more once they come to `max_bytes` of JSON.
        """
        found: list[Batch] = []
        with _mapped(self.path, "read"):
            rows: Any = self._db.execute(
                "SELECT seq, count, kind, digest, size, packed FROM batch"
                " WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
                (first, last, limit),
            )
            total = 0
            for seq, count, kind, digest, size, packed in rows:
                found.append(Batch(seq, count, Kind(kind), digest, size, packed))
                total += size
                if total >= max_bytes:
                    break
            rows.close(True)
        return found

    def newest(self, limit: int) -> list[Batch]:
        """Return the newest batches, oldest first."""
        with _mapped(self.path, "read"):
            first: Any = self._db.execute(
                "SELECT min(seq) FROM (SELECT seq FROM batch ORDER BY seq DESC LIMIT ?)", (limit,)
            ).get
        return self.batches(first, 1 << 62, limit=limit) if first else []

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

    def oldest_ts(self, first: int, last: int) -> int | None:
        """Return the time of the first batch that begins within `first` to `last`, None if there is none."""
        with _mapped(self.path, "read"):
            row: Any = self._db.execute(
                "SELECT ts FROM batch WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT 1", (first, last)
            ).fetchone()
        return row[0] if row else None


def _tip(db: apsw.Connection) -> Tip:
    row: Any = db.execute("SELECT seq + count - 1, digest FROM batch ORDER BY seq DESC LIMIT 1").fetchone()
    return Tip(*row) if row else Tip(0, GENESIS)


def _acked(db: apsw.Connection) -> Ranges:
    rows: Any = db.execute("SELECT first, last FROM acked ORDER BY first").fetchall()
    return Ranges(rows)


class Figures(NamedTuple):
    """What a journal holds: counts, bytes of JSON and as stored, and what waits for the upstream."""

    batches: int
    records: int
    json_bytes: int
    stored_bytes: int
    pending_batches: int
    oldest_pending_ts: int | None


def unpack(batch: Batch) -> bytes:
    """Return a batch's JSON bytes; raise JournalDamaged if they are not what was once written."""
    try:
        body = zstandard.ZstdDecompressor().decompress(batch.packed, max_output_size=batch.size)
    except zstandard.ZstdError as error:
        raise JournalDamaged(f"batch {batch.seq}: {error}") from None
    if hashlib.sha256(body).digest() != batch.digest:
        raise JournalDamaged(f"batch {batch.seq}: its bytes do not give its hash")
    return body


def size_bytes(path: Path) -> int:
    """Return what the database and its WAL take on the disk."""
    return sum(file.stat().st_size for file in (path, _wal(path)) if file.exists())


def set_aside(path: Path, stamp: str) -> Path:
    """Move the database and its WAL to a name with the date; return it."""
    aside = path.with_name(f"{path.name}.{stamp}")
    try:
        for old, new in ((_wal(path), _wal(aside)), (path, aside)):
            if old.exists():
                old.rename(new)
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
    except OSError as error:
        raise JournalError(f"journal {path}: cannot be set aside as {aside}: {error.strerror}") from error
    return aside


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


class _mapped:  # noqa: N801  reads as a statement
    """Turns SQLite's errors into the journal's, with the file and what was tried."""

    __slots__ = ("path", "what")

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, apsw.CorruptError | apsw.NotADBError | apsw.FormatError):
            raise JournalDamaged(f"journal {self.path}: {self.what}: {error}") from error
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
        first = batches[-1].last + 1
