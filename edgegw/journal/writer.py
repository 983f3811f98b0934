"""The writer: turns the inbox into durable batches, in its own thread, whatever the disk does.

A turn takes all that came in, groups it, gives the groups their numbers and links, and commits them in
transactions of a bounded size. If the disk does not take them they wait here, up to a bound, and keep their
order; a file that cannot be trusted is set aside, and a new stream begins.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from edgegw import clock
from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record
from edgegw.errors import JournalDamaged, JournalError
from edgegw.journal import retention
from edgegw.journal.encode import Group, Sealer, group
from edgegw.journal.inbox import Inbox, Lost
from edgegw.journal.mark import Mark, MarkFile
from edgegw.journal.settled import Settled
from edgegw.journal.store import PAGE, Reader, Store, Stored, set_aside

log = logging.getLogger(__name__)

WAITING_BYTES = 16 * 1024**2
"""Encoded records that may wait for the disk."""
TRANSACTION_BYTES = 2 * 1024**2
"""Encoded records in one transaction, so that the WAL stays within its share."""
ROW_BYTES = 160
"""What a batch takes beside its body."""
ACKED_EVERY_S = 10.0
"""How often what is settled is written down: each time costs a page, and a loss only means sending again."""
PRUNE_EVERY_S = 10.0
RETRY_S = 1.0


class Committed(NamedTuple):
    """What the listener is told after a commit: the batches and their JSON bytes, in order."""

    stream: str
    batches: list[Batch]
    bodies: list[bytes]


class _Sealed(NamedTuple):
    batch: Batch
    body: bytes
    ts: int
    gap: retention.Loss | None
    """What a gap event names, so that it counts as settled once the event is durable."""


Tell = Callable[[Committed | None, list[asyncio.Future[None]]], None]


class Writer:
    """Owns the store. All methods are called in one thread; stream, head and error may be read from others."""

    def __init__(
        self, path: Path, gateway: str, config: JournalConfig, max_message: int,
        inbox: Inbox, settled: Settled, tell: Tell,
    ) -> None:  # fmt: skip
        self.stream = ""
        self.head = 0
        self.error: str | None = None
        self._path = path
        self._gateway = gateway
        self._config = config
        self._max_message = max_message
        self._inbox = inbox
        self._settled = settled
        self._tell = tell
        self._mark = MarkFile(path)
        self._store: Store | None = None
        self._sealer: Sealer | None = None
        self._waiting: list[Group | Lost] = []
        self._rest: list[Group | Lost] = []
        self._flushes: list[asyncio.Future[None]] = []
        self._acked_at = self._pruned_at = clock.mono_s()
        self._failures = 0
        self._failing_since = 0.0

    @property
    def behind(self) -> bool:
        """Whether something waits that is not durable."""
        return bool(self._waiting)

    @property
    def retry_s(self) -> float | None:
        """How long to wait before the next turn after a failure, None if all is well."""
        return RETRY_S if self._failures else None

    def open(self) -> None:
        """Open the file; if it cannot be opened now, each turn tries again."""
        self._guarded(self._ready)

    def turn(self, *, last: bool = False) -> None:
        """Take what came in and make it durable; on the last turn write down what is settled, too."""
        self._guarded(lambda: self._turn(last))

    def close(self) -> None:
        """Close the file in order, so that the next start need not look through it."""
        store, self._store = self._store, None
        try:
            if store is not None:
                store.close()
                self._write_mark(clean=True, sync=True)
        except JournalError as error:
            log.error("%s; while closing", error)

    # -- failing and recovering --------------------------------------------------------------------------

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            try:
                step()
            except JournalDamaged as error:
                self._failed(error)
                self._replace("damaged", str(error))
                step()
        except JournalError as error:
            self._failed(error)
        else:
            if self._failures:
                down_s = clock.mono_s() - self._failing_since
                log.warning("journal: back after %d failures, %.0f s", self._failures, down_s)
            self._failures = 0
            self.error = None

    def _failed(self, error: JournalError) -> None:
        if not self._failures:
            self._failing_since = clock.mono_s()
            log.error("%s; records wait in memory, polling goes on", error)
        self._failures += 1
        self.error = str(error)
        store, self._store = self._store, None  # after an I/O error a connection is not to be trusted
        if store is not None:
            try:
                store.close()
            except JournalError as again:
                log.debug("journal: closing after a failure: %s", again)

    def _replace(self, reason: str, detail: str) -> None:
        """Set the file aside under a name with the date, and prepare the events that say so."""
        stamp = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%S%fZ")
        mark = self._mark.read()
        settled = _last_words(self._path)
        aside = set_aside(self._path, stamp)
        self._mark.remove()
        log.error(
            "journal %s: %s (%s); set aside as %s, a new stream begins",
            self._path,
            reason,
            detail,
            aside.name,
        )
        fields: dict[str, object] = {"reason": reason, "set_aside": aside.name}
        if mark is not None:
            fields |= {"previous": mark.stream, "previous_head": mark.head}
        records: list[Record] = [Event(clock.wall_ms(), "stream", fields)]
        if mark is not None and mark.head > settled.prefix():
            gap = {"stream": mark.stream, "from": settled.prefix() + 1, "to": mark.head, "reason": "damaged"}
            records.append(Event(clock.wall_ms(), "gap", gap))
        self._waiting = [*group(records, self._max_message), *self._waiting]
        self._sealer = None

    def _ready(self) -> tuple[Store, Sealer]:
        """Return the open store and the sealer that stands at its tip."""
        if self._store is not None and self._sealer is not None:
            return self._store, self._sealer
        mark = self._mark.read()
        store = Store(self._path, self._config.max_size).open(
            clock.wall_ms(), check=mark is not None and not mark.clean
        )
        tip = store.tip()
        if mark is not None and not store.created and (mark.stream != store.stream or mark.head > tip.head):
            store.close()
            self._replace("older-copy", f"it ends at {tip.head}, the mark beside it at {mark.head}")
            return self._ready()
        if self._sealer is not None and self.stream == store.stream and tip.digest == self._sealer.digest:
            self._waiting = self._rest  # the commit that seemed to fail is on the disk after all
        settled = store.acked()
        if (oldest := store.oldest(1, tip.head, 1)) and oldest[0].first > 1:
            settled.add(1, oldest[0].first - 1)  # deleted: acknowledged, or named in a gap event
        if self.stream == store.stream:
            for first, last in self._settled.copy():
                settled.add(first, last)
        self._settled.begin(settled, store.pending_batches(settled, tip.head))
        self.head, self.stream = tip.head, store.stream
        self._store, self._sealer = store, Sealer(self._gateway, store.stream, tip.head, tip.digest)
        if store.created and not self._waiting:
            self._waiting = [*group([Event(clock.wall_ms(), "stream", {"reason": "new"})], self._max_message)]
        self._write_mark(clean=False, sync=True)
        return self._store, self._sealer

    # -- one turn ----------------------------------------------------------------------------------------

    def _turn(self, last: bool) -> None:
        store, sealer = self._ready()
        condemned = self._take()
        doom = self._doom(store, condemned)
        reason = "damaged" if condemned else "full"
        while self._waiting or doom.ranges:
            groups, rest = self._next_groups()
            doom = self._room_for(store, groups, doom)
            sealed = self._seal(sealer, groups, doom, reason)
            rows = [(b.seq, b.count, b.kind.value, ts, b.digest, b.size, b.packed) for b, _, ts, _ in sealed]
            self._rest = rest
            store.append(rows, doomed=doom.ranges, acked=self._acked_due())
            self._waiting = rest
            self._done(sealer, sealed)
            doom = retention.NOTHING
        if (acked := self._acked_due(now=last)) is not None:
            store.append([], acked=acked)
        self._write_mark(clean=False, sync=store.checkpoint())
        flushed, self._flushes = self._flushes, []
        if flushed:
            self._tell(None, flushed)

    def _take(self) -> list[Stored]:
        """Empty the inbox into `_waiting`; return the batches found damaged."""
        if sum(made.size for made in self._waiting if isinstance(made, Group)) > WAITING_BYTES:
            return []
        taken = self._inbox.take()
        records: list[Record] = []
        for item in taken.items:
            if isinstance(item, Lost):
                self._waiting += [*group(records, self._max_message), item]
                records = []
            else:
                records.append(item)
        self._waiting += group(records, self._max_message)
        self._flushes += taken.flushes
        return taken.condemned

    def _next_groups(self) -> tuple[list[Group | Lost], list[Group | Lost]]:
        """Split what waits into one transaction's worth and the rest."""
        size = 0
        for at, made in enumerate(self._waiting):
            size += made.size if isinstance(made, Group) else 0
            if size > TRANSACTION_BYTES and at:
                return self._waiting[:at], self._waiting[at:]
        return self._waiting, []

    def _seal(
        self, sealer: Sealer, groups: Sequence[Group | Lost], doom: retention.Doom, reason: str
    ) -> list[_Sealed]:
        """Give the groups their numbers, and name in gap events what goes for good."""
        now = "synced" if clock.synchronised() else "unsynced"
        sealed: list[_Sealed] = []

        def seal(made: Group, gap: retention.Loss | None = None) -> None:
            batch, body = sealer.seal(made, now)
            sealed.append(_Sealed(batch, body, made.ts, gap))

        for lost in doom.lost:
            seal(self._gap(lost, reason), lost)
        for made in groups:
            if isinstance(made, Group):
                seal(made)
            else:
                digest = sealer.digest
                lost = retention.Loss(*sealer.skip(made.count), digest, 0)
                seal(self._gap(lost, "full"), lost)
        return sealed

    def _gap(self, lost: retention.Loss, reason: str) -> Group:
        """Name what is gone for good."""
        fields = {"from": lost.first, "to": lost.last, "reason": reason, "last_prev": lost.digest.hex()}
        (made,) = group([Event(clock.wall_ms(), "gap", fields)], self._max_message)
        return made

    def _done(self, sealer: Sealer, sealed: list[_Sealed]) -> None:
        """Note that batches are durable, and pass them on."""
        self.head = sealer.head
        self._settled.appended(len(sealed))
        for gap in (made.gap for made in sealed if made.gap):
            log.error("journal: records %d to %d are gone for good; a gap event says so", gap.first, gap.last)
            self._settled.gone(gap.first, gap.last, gap.batches)
        if sealed:
            self._tell(
                Committed(self.stream, [made.batch for made in sealed], [made.body for made in sealed]), []
            )

    # -- what goes ---------------------------------------------------------------------------------------

    def _doom(self, store: Store, condemned: Sequence[Stored]) -> retention.Doom:
        """Choose what goes at this turn: what was found damaged, and now and then what is old and settled."""
        if condemned:
            there = [stored for seq in {found.first for found in condemned} if (stored := store.batch(seq))]
            return retention.condemn(there)
        if clock.mono_s() - self._pruned_at < PRUNE_EVERY_S:
            return retention.NOTHING
        self._pruned_at = clock.mono_s()
        settled = self._settled.copy()
        oldest = store.oldest(1, settled.prefix(), 1000)
        return retention.expired(oldest, settled, clock.wall_ms() - self._config.keep)

    def _room_for(self, store: Store, groups: Sequence[Group | Lost], doom: retention.Doom) -> retention.Doom:
        """Add to what goes whatever must, for these groups to fit below `max_size`."""
        need = 16 * PAGE + sum(made.size + ROW_BYTES for made in groups if isinstance(made, Group))
        short = need - store.free_bytes() - doom.bytes
        if short <= 0:
            return doom
        settled = self._settled.copy()
        oldest: list[Stored] = []
        for first, last in [*settled, *settled.gaps(1, self.head)]:
            oldest += store.oldest(first, last, 2000)
        return retention.make_room(oldest, settled, max(short, self._config.max_size // 100) + doom.bytes)

    def _acked_due(self, *, now: bool = False) -> Ranges | None:
        """Return what is settled if it is time to write it down."""
        if not self._settled.dirty or (not now and clock.mono_s() - self._acked_at < ACKED_EVERY_S):
            return None
        self._acked_at = clock.mono_s()
        self._settled.dirty = False
        return self._settled.copy()

    def _write_mark(self, *, clean: bool, sync: bool) -> None:
        self._mark.write(Mark(self.stream, self.head, clean), sync=sync)


def _last_words(path: Path) -> Ranges:
    """Return what a file to be set aside says was settled, if it can still say it."""
    try:
        reader = Reader(path)
        try:
            return reader.acked()
        finally:
            reader.close()
    except JournalError:
        return Ranges()
