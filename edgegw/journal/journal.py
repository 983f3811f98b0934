"""The journal as the rest of the gateway sees it: append, listen, read back, acknowledge.

`append` never waits: the record goes into the inbox, and the writer's thread makes it durable within a commit
interval and only then tells the listener. Everything here is called on the event loop's thread.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain.batch import Batch
from edgegw.domain.era import Era
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record
from edgegw.errors import JournalDamaged, JournalError
from edgegw.journal.inbox import Damage, Inbox, Prune
from edgegw.journal.settled import Settled
from edgegw.journal.store import Reader, data_bytes, disk_share, size_bytes, unpack
from edgegw.journal.timekeeper import Timekeeper
from edgegw.journal.writer import Committed, Writer

log = logging.getLogger(__name__)

READ_BYTES = 2 * 1024**2
"""JSON read back at once for sending."""
LOOK_BATCHES = 256
"""Batches looked at in one turn where only their bounds matter."""


class Found(NamedTuple):
    """Batches read back, with their JSON bytes if these are sound, and how far was looked.

    `generation` tells `hold` whether they have been thinned since.
    """

    batches: list[tuple[Batch, bytes | None]]
    through: int
    generation: int


class Condition(NamedTuple):
    """The journal as the status shows it.

    `unconfirmed` is the share of what it may hold that holds what the upstream has not confirmed, `disk` the share of
    its disk that is used, by whatever.
    """

    stream: str
    head: int
    acked: int
    pending_batches: int
    pending_records: int
    bytes: int
    oldest_pending_ts: int | None
    error: str | None
    unconfirmed: float = 0.0
    disk: float = 0.0


class Journal:
    """Keeps records until the upstream has them. Start it, append to it, listen to it, close it."""

    def __init__(self, path: Path, gateway: str, config: JournalConfig, max_message: int) -> None:
        self.path = path
        self.opened = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._data_bytes = data_bytes(config.max_size)
        self._listener: Callable[[Committed], None] = lambda committed: None
        self._timekeeper = Timekeeper()
        self._inbox = Inbox(max_message)
        self._settled = Settled()
        self._writer = Writer(path, gateway, config, self._inbox, self._settled, self._tell)
        self._wake = threading.Event()
        self._closing = False
        self._period_s = config.commit_interval.s * 0.9  # the rest of the interval is for the commit itself
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="journal-read")
        self._reader: Reader | None = None

    @property
    def stream(self) -> str:
        """The identity of this journal's life; empty until it is open."""
        return self._writer.stream

    @property
    def head(self) -> int:
        """The last seq that is durable."""
        return self._writer.head

    def start(self) -> None:
        """Start the writer; the file is opened in its thread, and again and again if it cannot be."""
        self._thread.start()

    def listen(self, listener: Callable[[Committed], None]) -> None:
        """Have `listener` called in the event loop after each commit."""
        self._listener = listener

    @property
    def era(self) -> Era:
        """How the times of records that come now are to be read."""
        return self._timekeeper.era

    def append(self, record: Record) -> None:
        """Take a record; it never waits, and is durable within a commit interval if the disk is well."""
        was = self._timekeeper.era
        if (era := self._timekeeper.look()) is None:
            self._inbox.put(record)
        else:
            self._put_between(record, era, era.offset_ms - was.offset_ms)
        if self._inbox.much and not self._writer.error:
            self._wake.set()

    def _put_between(self, record: Record, era: Era, step_ms: int) -> None:
        """Put a record where it belongs: before the clock's step, or after it."""
        if abs(record.ts - (era.wall_ms - step_ms)) < abs(record.ts - era.wall_ms):
            self._inbox.put(record)
            self._begin_era(era, step_ms)
        else:
            self._begin_era(era, step_ms)
            self._inbox.put(record)

    def _begin_era(self, era: Era, step_ms: int) -> None:
        """Part what comes before the clock's step from what comes after, and say how far it went."""
        self._inbox.tell(era)
        log.warning("clock: stepped by %d ms; %s", step_ms, "synced" if era.synced else "unsynced")
        self._inbox.put(Event(era.wall_ms, "clock-step", {"step_ms": step_ms, **era.wire()}))

    async def flush(self) -> None:
        """Return when all that was appended so far is durable."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._inbox.tell(done)
        self._wake.set()
        await done

    async def prune(self, older_than_ms: int) -> tuple[int, int]:
        """Delete what is settled and was written longer ago than that; return how many batches and records."""
        prune = Prune(older_than_ms, self._loop.create_future())
        self._inbox.tell(prune)
        self._wake.set()
        await prune.done
        return prune.batches, prune.records

    def acknowledge(self, batch: Batch) -> None:
        """Note that the upstream has a batch."""
        self._settled.acknowledge(batch)

    @property
    def end_to_end(self) -> bool:
        """Whether a receiver has confirmed anything of this stream, also in earlier runs."""
        return self._settled.end_to_end

    def note_end_to_end(self) -> None:
        """Note that a receiver has confirmed something of this stream; it is durable within ten seconds."""
        self._settled.note_end_to_end()

    def note_delivered(self, batch: Batch) -> None:
        """Note that the broker has confirmed a batch and no receiver has yet: it goes first if there must be room."""
        self._settled.note_delivered(batch)

    def published(self) -> Ranges:
        """Return what has gone out of this stream since it was opened."""
        return self._settled.published()

    def limit_message(self, size_bytes: int | None) -> None:
        """Make new batches no larger than that (JSON, bytes), and never larger than `max_message`."""
        self._inbox.limit_message(size_bytes)

    async def acknowledge_ranges(self, stream: str, ranges: Iterable[tuple[int, int]]) -> Ranges:
        """Note that the upstream has the batches wholly within each of `ranges`; return what that settles.

        Of another stream, or beyond the head, there is nothing to note. Raises JournalError.
        """
        found = Ranges()
        for within in ranges:
            while not await self._acknowledge_within(stream, *within, found):
                pass  # some was thinned meanwhile: look again
        return found

    async def _acknowledge_within(self, stream: str, first: int, last: int, found: Ranges) -> bool:
        settled, generation = self._settled.copy(), self._settled.generation
        for gap in settled.gaps(first, min(last, self.head)):
            async for batches in self._bounds(stream, *gap):
                whole = [batch for batch in batches if batch[1] <= gap[1]]
                if not self._settled.acknowledge_spans(stream, whole, generation):
                    return False
                for batch in whole:
                    found.add(*batch)
        return True

    async def kept(self, stream: str, first: int, last: int) -> Ranges:
        """Return the seqs of the batches that overlap `first` to `last` and are still here; raise JournalError."""
        found = Ranges()
        before = await self._loop.run_in_executor(self._readers, self._over, stream, first)
        async for batches in self._bounds(stream, before, last):
            for batch in batches:
                found.add(*batch)
        return found

    def hold(self, batches: Sequence[Batch], generation: int | None = None) -> bool:
        """Take batches into hand to send them; False if they may have been thinned since they were read."""
        return self._settled.hold(batches, generation)

    def publish(self, batch: Batch) -> None:
        """Note that a batch has gone out."""
        self._settled.publish(batch)

    def carried(self, stream: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Note that these seqs have gone out by hand."""
        self._settled.carry(stream, ranges)

    def release(self, batches: Sequence[Batch] | None = None) -> None:
        """Let go of batches that are not on their way any more; of all, without any."""
        self._settled.release(batches)

    def settled(self) -> Ranges:
        """Return what needs no sending any more: acknowledged, or gone and named in a gap."""
        return self._settled.copy()

    async def read(self, first: int, last: int, limit: int) -> Found:
        """Return up to `limit` batches of `first` to `last`, each checked.

        A batch whose bytes are not what was once written comes without them, and is named in a gap event, as is
        a hole that nothing accounts for.
        """
        return await self._loop.run_in_executor(self._readers, self._read, first, last, limit)

    async def condition(self) -> Condition:
        """Return the journal's figures."""
        return await self._loop.run_in_executor(self._readers, self._condition)

    def _condition(self) -> Condition:
        settled, head = self._settled.copy(), self.head
        pending = max(0, head - settled.total())
        unsent = next(settled.gaps(1, head), None)
        return Condition(
            stream=self.stream,
            head=head,
            acked=settled.prefix(),
            pending_batches=self._settled.pending_batches,
            pending_records=pending,
            bytes=size_bytes(self.path),
            oldest_pending_ts=self._oldest_ts(*unsent) if unsent else None,
            error=self._writer.error,
            unconfirmed=self._unconfirmed(pending, head) if pending else 0.0,
            disk=disk_share(self.path),
        )

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Commit what is left and close the file; tell whether all of it became durable."""
        self._closing = True
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # a disk that hangs holds readers, too
                await self._loop.run_in_executor(self._readers, self._close_reader)
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive() and not self._writer.behind and not self._inbox

    def _write(self) -> None:
        """Run the writer's turns in its thread."""
        self._writer.open()
        self._loop.call_soon_threadsafe(self.opened.set)
        while not self._closing:
            self._wake.wait(self._writer.retry_s or self._period_s)
            self._wake.clear()
            self._writer.turn()
        self._writer.turn(last=True)
        self._writer.close()

    def _tell(self, committed: Committed | None, flushed: list[asyncio.Future[None]]) -> None:
        """Pass on, from the writer's thread, what has become durable."""
        self._loop.call_soon_threadsafe(self._told, committed, flushed)

    def _told(self, committed: Committed | None, flushed: list[asyncio.Future[None]]) -> None:
        if committed is not None:
            self._listener(committed)
            self._settled.hear(committed.batches[-1])
        for done in flushed:
            if not done.done():
                done.set_result(None)

    def _open_reader(self) -> Reader:
        """Return the reading connection, a new one when a new stream has begun."""
        if self._reader is not None and self._reader.stream != self.stream:
            self._close_reader()
        if self._reader is None:
            try:
                self._reader = Reader(self.path)
            except JournalDamaged as error:
                self._inbox.tell(Damage(self.stream, str(error)))
                raise
        return self._reader

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _unconfirmed(self, pending: int, head: int) -> float:
        """Return the share of the journal's room that pending records hold, as if each were as large as any other."""
        try:
            used, first = self._open_reader().used()
        except JournalError:
            return 0.0  # the writer's own error is shown
        kept = max(1, head - first + 1)
        return used / self._data_bytes * min(1.0, pending / kept)

    def _oldest_ts(self, first: int, last: int) -> int | None:
        try:
            return self._open_reader().oldest_ts(first, last)
        except JournalError:
            return None  # the writer's own error is shown

    def _read(self, first: int, last: int, limit: int) -> Found:
        reader = self._open_reader()
        generation = self._settled.generation
        try:
            begins = self._over(reader.stream, first)
            batches = reader.batches(begins, last, limit=limit, max_bytes=READ_BYTES)
        except JournalDamaged as error:
            self._inbox.tell(Damage(reader.stream, str(error)))
            self._close_reader()  # what it has in memory may be what is wrong
            raise
        settled = self._settled.copy()
        found: list[tuple[Batch, bytes | None]] = []
        following = begins
        for batch in batches:
            self._doubt(reader.stream, settled, following, batch.seq - 1)
            try:
                found.append((batch, unpack(batch)))
            except JournalDamaged as error:
                batch = msgspec.structs.replace(batch, count=1)  # where it ends is the writer's to find out
                self._inbox.tell(Damage(batch.stream, str(error), batch.seq, batch.seq))
                found.append((batch, None))
            following = batch.last + 1
        if len(batches) == limit or sum(batch.size for batch in batches) >= READ_BYTES:
            return Found(found, following - 1, generation)
        self._doubt(reader.stream, settled, following, last)
        return Found(found, last, generation)

    async def _bounds(self, stream: str, first: int, last: int) -> AsyncIterator[list[tuple[int, int]]]:
        """Yield the bounds of the batches that begin within `first` to `last`, a few at a time."""
        while first <= last:
            batches = await self._loop.run_in_executor(self._readers, self._look, stream, first, last)
            if not batches:
                return
            yield batches
            first = batches[-1][1] + 1

    def _look(self, stream: str, first: int, last: int) -> list[tuple[int, int]]:
        reader = self._open_reader()
        return reader.bounds(first, last, limit=LOOK_BATCHES) if reader.stream == stream else []

    def _over(self, stream: str, seq: int) -> int:
        """Return where the batch that holds `seq` begins, `seq` itself if none does, or none that is sound."""
        reader = self._open_reader()
        before = reader.before(seq, limit=1) if reader.stream == stream else []
        with suppress(JournalDamaged):
            if before and before[0].last >= seq and unpack(before[0]):
                return before[0].seq
        return seq

    def _doubt(self, stream: str, settled: Ranges, first: int, last: int) -> None:
        """Tell the writer of a hole, unless what stood there was settled; it may know better meanwhile."""
        first = max(1, first)  # before the first there is nothing to be missed
        if first <= last and not settled.covers(first, last):
            self._inbox.tell(Damage(stream, f"records {first} to {last} are not there", first, last))
