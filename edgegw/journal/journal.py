"""The journal's service: one writer thread that commits what came in, at each commit interval.

`append` never waits: records go into an inbox, the writer takes them all at its next turn, groups them into
batches, numbers, links and commits them, and only then tells the listener. When the disk does not take them
the inbox fills; past its bound new records are counted, given numbers, and named in a gap event once the disk
is back. Everything public is called from the event loop's thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from edgegw import clock
from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record, Scan
from edgegw.errors import JournalDamaged, JournalError
from edgegw.journal import retention
from edgegw.journal.encode import Group, Sealer, group
from edgegw.journal.mark import Mark, MarkFile
from edgegw.journal.store import PAGE, Reader, Stored, Store, set_aside, size_bytes, unpack

log = logging.getLogger(__name__)

INBOX_READINGS = 500_000
"""Readings that may wait for the disk before new ones are lost: about 40 MB."""
WAITING_BYTES = 16 * 1024**2
"""Encoded records that may wait for the disk."""
TRANSACTION_BYTES = 2 * 1024**2
"""Encoded records in one transaction, so that the WAL stays within its share."""
READ_BYTES = 2 * 1024**2
"""JSON read back at once for sending."""
ACKED_EVERY_S = 10.0
PRUNE_EVERY_S = 10.0
RETRY_S = 1.0
ROW_BYTES = 160


class Committed(NamedTuple):
    """What the listener is told after a commit: the batches and their JSON bytes, in order."""

    stream: str
    batches: list[Batch]
    bodies: list[bytes]


class Found(NamedTuple):
    """Batches read back, with their JSON bytes if these are sound, and how far was looked."""

    batches: list[tuple[Batch, bytes | None]]
    through: int


class Condition(NamedTuple):
    """The journal as the status shows it."""

    stream: str
    head: int
    acked: int
    pending_batches: int
    pending_records: int
    bytes: int
    oldest_pending_ts: int | None
    error: str | None


class _Lost:
    """Stands in the inbox for records that found it full."""

    __slots__ = ("count", "first_ts", "last_ts")

    def __init__(self, ts: int) -> None:
        self.count = 0
        self.first_ts = self.last_ts = ts


class Journal:
    """Keeps records until the upstream has them. Start it, append to it, listen to it, close it."""

    def __init__(self, path: Path, gateway: str, config: JournalConfig, max_message: int) -> None:
        self.path = path
        self.opened = asyncio.Event()
        self._gateway = gateway
        self._config = config
        self._max_message = max_message
        self._loop = asyncio.get_running_loop()
        self._listener: Callable[[Committed], None] = lambda committed: None
        self._inbox: deque[Record | _Lost | Stored | asyncio.Future[None]] = deque()
        self._put = self._got = 0
        self._losing: _Lost | None = None
        self._lock = threading.Lock()
        self._settled = Ranges()
        self._pending_batches = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="journal-read")
        self._reader: Reader | None = None
        # owned by the writer thread; the loop reads head, stream and error
        self.stream = ""
        self.head = 0
        self.error: str | None = None
        self._store: Store | None = None
        self._sealer: Sealer | None = None
        self._mark = MarkFile(path)
        self._waiting: list[Group | _Lost] = []
        self._flushes: list[asyncio.Future[None]] = []
        self._acked_at = self._pruned_at = clock.mono_s()
        self._acked_dirty = False
        self._failures = 0
        self._failing_since = 0.0

    # -- the event loop's side ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the writer; the file is opened in its thread, and again and again if it cannot be."""
        self._thread.start()

    def listen(self, listener: Callable[[Committed], None]) -> None:
        """Have `listener` called in the event loop after each commit."""
        self._listener = listener

    def append(self, record: Record) -> None:
        """Take a record; it never waits, and is durable within a commit interval if the disk is well."""
        weight = len(record.values) if isinstance(record, Scan) else 1
        if self._put - self._got > INBOX_READINGS and not isinstance(record, Event):
            with self._lock:
                if self._losing is None:
                    self._losing = _Lost(record.ts)
                    self._inbox.append(self._losing)
                self._losing.count += 1
                self._losing.last_ts = record.ts
            return
        self._losing = None
        self._put += weight
        self._inbox.append(record)

    async def flush(self) -> None:
        """Return when all that was appended so far is durable."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._inbox.append(done)
        self._wake.set()
        await done

    def acknowledge(self, batch: Batch) -> None:
        """Note that the upstream has a batch."""
        with self._lock:
            if not self._settled.covers(batch.seq, batch.last):
                self._settled.add(batch.seq, batch.last)
                self._pending_batches -= 1
                self._acked_dirty = True

    def settled(self) -> Ranges:
        """Return what needs no sending any more: acknowledged, or gone and named in a gap."""
        with self._lock:
            return self._settled.copy()

    async def read(self, first: int, last: int, limit: int) -> Found:
        """Return up to `limit` batches of `first` to `last`, each checked.

        A batch whose bytes are not what was once written comes without them, and is named in a gap event.
        """
        return await self._loop.run_in_executor(self._readers, self._read, first, last, limit)

    async def condition(self) -> Condition:
        """Return the journal's figures."""
        with self._lock:
            acked, covered = self._settled.prefix(), self._settled.total()
            pending = self._pending_batches
            unsent = next(self._settled.gaps(1, self.head), None)
        oldest = await self._loop.run_in_executor(self._readers, self._oldest_ts, *unsent) if unsent else None
        return Condition(
            self.stream, self.head, acked, pending, max(0, self.head - covered),
            size_bytes(self.path), oldest, self.error,
        )  # fmt: skip

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Commit what is left and close the file; tell whether all of it became durable."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, timeout_s)
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._reader is not None:
            self._reader.close()
        return not self._thread.is_alive() and not self._waiting and not self._inbox

    def _open_reader(self) -> Reader:
        if self._reader is None:
            self._reader = Reader(self.path)
        return self._reader

    def _oldest_ts(self, first: int, last: int) -> int | None:
        try:
            return self._open_reader().oldest_ts(first, last)
        except JournalError:
            return None  # the writer's own error is shown

    def _read(self, first: int, last: int, limit: int) -> Found:
        batches = self._open_reader().batches(first, last, limit=limit, max_bytes=READ_BYTES)
        found: list[tuple[Batch, bytes | None]] = []
        for batch in batches:
            try:
                found.append((batch, unpack(batch)))
            except JournalDamaged as error:
                log.error("journal: %s; it is left out and named in a gap event", error)
                self._inbox.append(Stored(batch.seq, batch.last, 0, batch.digest, len(batch.packed)))
                found.append((batch, None))
        whole = len(batches) < limit and sum(batch.size for batch in batches) < READ_BYTES
        return Found(found, last if whole else batches[-1].last)

    # -- the writer's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        period_s = self._config.commit_interval.s * 0.9
        while not self._closing:
            self._wake.wait(RETRY_S if self._failures else period_s)
            self._wake.clear()
            self._turn()
        self._turn()
        self._shut()

    def _turn(self) -> None:
        try:
            store, sealer = self._ready()
            condemned = self._take()
            self._commit(store, sealer, condemned)
        except JournalDamaged as error:
            self._failed(error)
            self._replace("damaged", str(error))
        except JournalError as error:
            self._failed(error)
        else:
            self._recovered()

    def _failed(self, error: JournalError) -> None:
        if not self._failures:
            self._failing_since = clock.mono_s()
            log.error("%s; records wait in memory, polling goes on", error)
        self._failures += 1
        self.error = str(error)
        store, self._store = self._store, None
        if store is not None:
            try:
                store.close()
            except JournalError as again:
                log.debug("journal: closing after a failure: %s", again)

    def _recovered(self) -> None:
        if self._failures:
            log.warning("journal: back after %d failures, %.0f s", self._failures, clock.mono_s() - self._failing_since)
        self._failures = 0
        self.error = None

    def _ready(self) -> tuple[Store, Sealer]:
        """Return the open store and the sealer that stands at its tip."""
        if self._store is not None and self._sealer is not None:
            return self._store, self._sealer
        mark = self._mark.read()
        store = Store(self.path, self._config.max_size).open(clock.wall_ms(), check=mark is not None and not mark.clean)
        tip = store.tip()
        if mark is not None and not store.created and (mark.stream != store.stream or mark.head > tip.head):
            store.close()
            self._replace("older-copy", f"it ends at {tip.head}, the mark beside it at {mark.head}")
            return self._ready()
        if self._sealer is not None and self.stream == store.stream and tip.digest == self._sealer.digest:
            self._waiting.clear()  # the commit that seemed to fail is on the disk after all
        settled = store.acked()
        if tip.head:
            # what was deleted below the oldest batch is settled: acknowledged, or named in a gap event
            oldest = store.oldest(1, tip.head, 1)
            if oldest and oldest[0].first > 1:
                settled.add(1, oldest[0].first - 1)
        pending = store.pending_batches(settled, tip.head)
        with self._lock:
            if self.stream == store.stream:
                for first, last in self._settled:
                    settled.add(first, last)
            self._settled, self._pending_batches = settled, pending
        self.head, self.stream = tip.head, store.stream
        self._store, self._sealer = store, Sealer(self._gateway, store.stream, tip.head, tip.digest)
        if store.created:
            self._waiting.insert(0, self._stream_event("new"))
        self._write_mark(clean=False)
        self._loop.call_soon_threadsafe(self.opened.set)
        return self._store, self._sealer

    def _stream_event(self, reason: str) -> Group:
        (made,) = group([Event(clock.wall_ms(), "stream", {"reason": reason})], self._max_message)
        return made

    def _replace(self, reason: str, detail: str) -> None:
        """Set the file aside under a name with the date; the next turn begins a new stream."""
        stamp = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%S%fZ")
        mark = self._mark.read()
        old = _last_words(self.path)
        aside = set_aside(self.path, stamp)
        self._mark.path.unlink(missing_ok=True)
        self._reader = None
        log.error("journal %s: %s (%s); set aside as %s, a new stream begins", self.path, reason, detail, aside.name)
        fields: dict[str, object] = {"reason": reason, "set_aside": aside.name}
        if mark is not None:
            fields |= {"previous": mark.stream, "previous_head": mark.head}
        records: list[Record] = [Event(clock.wall_ms(), "stream", fields)]
        if mark is not None and mark.head > (acked := old.prefix() if old else 0):
            gap = {"stream": mark.stream, "from": acked + 1, "to": mark.head, "reason": "damaged"}
            records.append(Event(clock.wall_ms(), "gap", gap))
        self._waiting = [*group(records, self._max_message), *self._waiting]
        self._sealer = None

    def _take(self) -> list[Stored]:
        """Empty the inbox into `_waiting`; return the batches found damaged."""
        condemned: list[Stored] = []
        if sum(made.size for made in self._waiting if isinstance(made, Group)) > WAITING_BYTES:
            return condemned
        records: list[Record] = []
        weight = 0
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Stored):
                condemned.append(item)
            elif isinstance(item, asyncio.Future):
                self._flushes.append(item)
            elif isinstance(item, _Lost):
                self._waiting += group(records, self._max_message)
                records = []
                with self._lock:
                    if self._losing is item:
                        self._losing = None
                self._waiting.append(item)
            else:
                records.append(item)
                weight += len(item.values) if isinstance(item, Scan) else 1
        self._waiting += group(records, self._max_message)
        self._got += weight
        return condemned

    def _commit(self, store: Store, sealer: Sealer, condemned: Sequence[Stored]) -> None:
        """Make everything that waits durable, in transactions of a bounded size, and tell the listener."""
        doom = self._doom(store, condemned)
        while self._waiting or doom.ranges:
            groups, rest = self._next_groups()
            doom = self._room_for(store, groups, doom)
            sealed: list[tuple[Batch, bytes, int]] = []
            now = "synced" if clock.synchronised() else "unsynced"
            for first, last, digest in doom.lost:
                reason = "damaged" if condemned else "full"
                self._seal_gap(sealer, sealed, now, first, last, digest, reason)
            for made in groups:
                if isinstance(made, _Lost):
                    digest = sealer.digest
                    first, last = sealer.skip(made.count)
                    self._seal_gap(sealer, sealed, now, first, last, digest, "full")
                else:
                    batch, body = sealer.seal(made, now)
                    sealed.append((batch, body, made.ts))
            acked = self._acked_due()
            store.append(
                [(b.seq, b.count, b.kind.value, ts, b.digest, b.size, b.packed) for b, _, ts in sealed],
                doomed=doom.ranges,
                acked=acked,
            )
            self._waiting = rest
            self._done(sealer, sealed)
            doom, condemned = retention.Doom([], [], 0), ()
        if (acked := self._acked_due()) is not None:
            store.append([], acked=acked)
        synced = store.checkpoint()
        if self.head:
            self._write_mark(clean=False, sync=synced)
        for done in self._flushes:
            self._loop.call_soon_threadsafe(_resolve, done)
        self._flushes = []

    def _done(self, sealer: Sealer, sealed: list[tuple[Batch, bytes, int]]) -> None:
        """Note that batches are durable, and pass them on."""
        with self._lock:
            self.head = sealer.head
            self._pending_batches += len(sealed)
        if sealed:
            told = Committed(self.stream, [batch for batch, _, _ in sealed], [body for _, body, _ in sealed])
            self._loop.call_soon_threadsafe(self._listener, told)

    def _seal_gap(
        self, sealer: Sealer, sealed: list[tuple[Batch, bytes, int]], now: str, first: int, last: int, digest: bytes, why: str
    ) -> None:
        """Name what is gone for good, and count it as settled: there is nothing left to send."""
        fields = {"from": first, "to": last, "reason": why, "last_prev": digest.hex()}
        (made,) = group([Event(clock.wall_ms(), "gap", fields)], self._max_message)
        batch, body = sealer.seal(made, now)
        sealed.append((batch, body, made.ts))
        with self._lock:
            self._settled.add(first, last)
            self._acked_dirty = True
        log.error("journal: records %d to %d are gone (%s)", first, last, why)

    def _next_groups(self) -> tuple[list[Group | _Lost], list[Group | _Lost]]:
        size = 0
        for at, made in enumerate(self._waiting):
            size += made.size if isinstance(made, Group) else 0
            if size > TRANSACTION_BYTES and at:
                return self._waiting[:at], self._waiting[at:]
        return self._waiting, []

    def _doom(self, store: Store, condemned: Sequence[Stored]) -> retention.Doom:
        """Choose what goes at this turn: what was found damaged, and now and then what is old and settled."""
        if condemned:
            known = {stored.first: stored for stored in condemned}
            doomed = [stored for seq in sorted(known) if (stored := store.batch(seq)) is not None]
            return retention.condemn(doomed)
        now_s = clock.mono_s()
        if now_s - self._pruned_at < PRUNE_EVERY_S:
            return retention.Doom([], [], 0)
        self._pruned_at = now_s
        settled = self.settled()
        oldest = store.oldest(1, settled.prefix(), 1000)
        return retention.expired(oldest, settled, clock.wall_ms() - self._config.keep)

    def _room_for(self, store: Store, groups: list[Group | _Lost], doom: retention.Doom) -> retention.Doom:
        """Add to what goes whatever must, for these groups to fit below `max_size`."""
        need = 16 * PAGE + sum(made.size + ROW_BYTES for made in groups if isinstance(made, Group))
        short = need - store.free_bytes() - doom.bytes
        if short <= 0:
            return doom
        settled = self.settled()
        slack = max(short, self._config.max_size // 100)
        oldest: list[Stored] = []
        for first, last in settled:
            oldest += store.oldest(first, last, 2000)
        for first, last in settled.gaps(1, self.head):
            oldest += store.oldest(first, last, 2000)
        return retention.make_room(oldest, settled, slack + doom.bytes)

    def _acked_due(self) -> Ranges | None:
        """Return what is settled if it is time to write it down: seldom, since it costs a page each time."""
        now_s = clock.mono_s()
        if not self._acked_dirty or (now_s - self._acked_at < ACKED_EVERY_S and not self._closing):
            return None
        self._acked_at = now_s
        self._acked_dirty = False
        return self.settled()

    def _write_mark(self, *, clean: bool, sync: bool = False) -> None:
        try:
            self._mark.write(Mark(self.stream, self.head, clean), sync=sync)
        except OSError as error:
            raise JournalError(f"journal {self._mark.path}: {error.strerror}") from error

    def _shut(self) -> None:
        store, self._store = self._store, None
        try:
            if store is not None:
                store.close()
                self._write_mark(clean=True, sync=True)
        except JournalError as error:
            log.error("%s; while closing", error)


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _last_words(path: Path) -> Ranges | None:
    """Return what a file to be set aside says was settled, if it can still say it."""
    try:
        reader = Reader(path)
        try:
            return reader.acked()
        finally:
            reader.close()
    except JournalError:
        return None
