"""The writer: turns the inbox into durable batches, in its own thread, whatever the disk does.

A turn takes all that came in, groups it, gives the groups their numbers and links, and commits them in
transactions of a bounded size. If the disk does not take them they wait here, up to a bound, and keep their
order; a file that cannot be trusted is set aside, and a new stream begins.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from edgegw import clock
from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain.batch import GENESIS, Batch
from edgegw.domain.era import Era
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record
from edgegw.errors import JournalDamaged, JournalError, JournalFull
from edgegw.journal import retention, succession, timekeeper
from edgegw.journal.ballast import Headroom
from edgegw.journal.encode import Group, Sealer, group, group_entries
from edgegw.journal.inbox import Damage, Inbox, Lost, Prune
from edgegw.journal.keeper import ROW_BYTES, Keeper
from edgegw.journal.mark import Mark, MarkFile
from edgegw.journal.retention import Doom, Loss
from edgegw.journal.settled import Settled
from edgegw.journal.spanner import Spanner
from edgegw.journal.store import (
    PAGE,
    Row,
    Span,
    Store,
    Tip,
    ballast_bytes,
    delete_set_aside,
    set_aside,
    unpack,
)
from edgegw.journal.succession import Left
from edgegw.journal.wear import Odometer

log = logging.getLogger(__name__)

WAITING_BYTES = 16 * 1024**2
"""Encoded records that may wait for the disk."""
TRANSACTION_BYTES = 2 * 1024**2
"""Encoded records in one transaction, at most; less where half the WAL's share is less."""
ACKED_EVERY_S = 10.0
"""How often what is settled is written down: each time costs a page, and a loss only means sending again."""
KEEP_ASIDE = 2
"""Files set aside that stay, at most, and no more than `max_size` of them in all."""
RETRY_S = 1.0
PRUNE_S = 0.1
"""How long a turn prunes because it was asked to."""
SAY_S = 30.0


class Committed(NamedTuple):
    """What the listener is told after a commit: the batches and their JSON bytes, in order."""

    stream: str
    batches: list[Batch]
    bodies: list[bytes]


class _Sealed(NamedTuple):
    batch: Batch
    body: bytes
    first_ts: int
    last_ts: int


class _Unsure(NamedTuple):
    """A transaction under way: if it seems to fail, it may still be found on the disk.

    `gaps` are what its gap events name, which is settled once they are durable.
    """

    sealed: list[_Sealed]
    gaps: list[Loss]
    fewer: int
    rest: list[Group | Lost]


Tell = Callable[[Committed | None, list[asyncio.Future[None]]], None]


class Writer:
    """Owns the store. All methods are called in one thread; stream, head and error may be read from others."""

    def __init__(
        self, path: Path, gateway: str, config: JournalConfig, inbox: Inbox, settled: Settled, tell: Tell
    ) -> None:
        self.stream = ""
        self.head = 0
        self.error: str | None = None
        self._path = path
        self._gateway = gateway
        self._config = config
        self._era = timekeeper.present()
        self._inbox = inbox
        self._settled = settled
        self._tell = tell
        self._mark = MarkFile(path)
        self._keeper = Keeper(config, settled, inbox)
        self._headroom = Headroom(path, ballast_bytes(config.max_size))
        self._odometer = Odometer()
        self._store: Store | None = None
        self._sealer: Sealer | None = None
        self._opening: list[Group] = []
        self._waiting: list[Group | Lost] = []
        self._damages: list[Damage] = []
        self._prunes: list[Prune] = []
        self._unsure: _Unsure | None = None
        self._flushes: list[asyncio.Future[None]] = []
        self._spanner = Spanner()
        self._gone = self._fewer = 0
        self._say_s = 0.0
        self._acked_at = clock.mono_s()
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
        self._odometer.start()
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
                self._write_mark(clean=not self._damages, sync=True)
        except JournalError as error:
            log.error("%s; while closing", error)

    # -- failing and recovering --------------------------------------------------------------------------

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            try:
                step()
            except JournalDamaged as error:
                self._failed(error)
                self._try_again(step)
        except JournalError as error:
            self._failed(error)
            self._headroom.squeezed(full=isinstance(error, JournalFull))
        except Exception as error:  # the thread's edge: without the writer nothing would be kept any more
            if not self._failures:
                log.exception("journal: crashed")
            self._failed(JournalError(f"journal {self._path}: {type(error).__name__}: {error}"))
        else:
            if self._failures:
                down_s = clock.mono_s() - self._failing_since
                log.warning("journal: back after %d failures, %.0f s", self._failures, down_s)
            self._failures = 0
            self.error = None

    def _try_again(self, step: Callable[[], object]) -> None:
        """Set the file aside only if it is damaged, too, when it is opened and checked anew: a misread is not."""
        try:
            step()
        except JournalDamaged as error:
            self._failed(error)
            self._replace("damaged", str(error))
            step()

    def _failed(self, error: JournalError) -> None:
        if not self._failures:
            self._failing_since = clock.mono_s()
            log.error("%s; records wait in memory, polling goes on", error)
        self._failures += 1
        self.error = str(error)
        self._spanner.clear()
        self._settled.thinned()
        self._settled.dirty = True  # what was to be written down may not have been
        store, self._store = self._store, None  # after an I/O error a connection is not to be trusted
        if store is not None:
            try:
                store.close()
            except JournalError as again:
                log.debug("journal: closing after a failure: %s", again)

    def _replace(self, reason: str, detail: str) -> None:
        """Set the file aside under a name with the date, and prepare the events that say so."""
        stamp = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%S%fZ")
        left = self._left(self._mark.read())
        aside = set_aside(self._path, stamp)
        deleted = delete_set_aside(self._path, KEEP_ASIDE, self._config.max_size)
        log.error(
            "journal %s: %s (%s); set aside as %s, a new stream begins",
            self._path,
            reason,
            detail,
            aside.name,
        )
        if deleted:
            log.warning(
                "journal %s: deleted older files that were set aside: %s", self._path, ", ".join(deleted)
            )
        self._begin_with(left, reason, {"set_aside": aside.name, **({"deleted": deleted} if deleted else {})})
        self._damages = []

    def _left(self, mark: Mark | None) -> dict[str, Left]:
        return succession.gather(mark, self._path, (self.stream, Left(self.head, self._settled.copy())))

    def _begin_with(self, left: dict[str, Left], reason: str, more: dict[str, object]) -> None:
        self._opening = self._grouped(succession.opening(left, reason, more))

    def _ready(self) -> tuple[Store, Sealer]:
        """Return the open store and the sealer that stands at its tip."""
        if self._store is not None and self._sealer is not None:
            return self._store, self._sealer
        mark = self._mark.read()
        unclean = mark is None or not mark.clean
        store = Store(self._path, self._config.max_size).open(clock.wall_ms(), check=unclean)
        try:
            tip, older = self._tip(store, mark)
            if self._unsure:
                self._make_sure(store)
        except JournalError:
            store.close()
            raise
        if older:
            store.close()
            self._replace("older-copy", older)
            return self._ready()
        if self.stream != store.stream:
            if not tip.head and not self._opening:
                left = self._left(mark)
                left.pop(store.stream, None)
                self._begin_with(left, "lost" if left else "new", {})
            self._begin_stream(store)
            settled = store.acked()
            settled.remove(tip.head + 1, 1 << 62)
            self._settled.begin(store.stream, settled, tip.head, end_to_end=store.end_to_end())
            if unclean:
                self._skip_damaged_commits(store, tip)
        if self._headroom.confined:
            store.confine()
        self.head, self.stream = tip.head, store.stream
        self._store, self._sealer = store, Sealer(self._gateway, store.stream, tip.head, tip.digest)
        if tip.head:  # until then the mark tells of the stream before
            self._write_mark(clean=False, sync=True)
        unsure, self._unsure = self._unsure, None
        if unsure and unsure.sealed and unsure.sealed[-1].batch.digest == tip.digest:
            self._durable(unsure)  # the commit that seemed to fail is on the disk after all
        self._settled.recount(lambda settled: store.pending_batches(settled, self.head))
        return self._store, self._sealer

    def _skip_damaged_commits(self, store: Store, tip: Tip) -> None:
        """Use no seq again of commits that the WAL shows to have been, and that can be read no more."""
        beyond = store.committed_beyond(tip.head)
        if beyond is not None:
            log.error(
                "journal %s: WAL damaged; records %d to %d were committed and cannot be read; a gap event names them",
                self._path, tip.head + 1, beyond.last,
            )  # fmt: skip
            self._waiting.insert(0, Lost(beyond.last - tip.head, "damaged", beyond.link))

    def _make_sure(self, store: Store) -> None:
        """Have all that the WAL holds written once more: after a sync that failed the kernel takes it for written.

        The commit after the checkpoint begins the WAL anew: what is left of the old one must not be played back.
        """
        if not store.checkpoint(force=True):
            raise JournalError(f"journal {self._path}: a reader is in the way of making sure after a failure")
        store.append([], wear=store.wear())

    def _begin_stream(self, store: Store) -> None:
        noted = store.wear()
        self._odometer.begin(noted._replace(run_ms=max(noted.run_ms, store.latest_run_ms())))
        self._keeper.begin()
        self._spanner.clear()

    def _tip(self, store: Store, mark: Mark | None) -> tuple[Tip, str]:
        """Return where the journal ends and, if it is a copy older than its mark, how that shows.

        If its newest batch is damaged, only the mark can tell where it ends; without it there is no going on.
        """
        newest = store.newest()
        tip = Tip(newest.last, newest.digest) if newest else Tip(0, GENESIS)
        if newest is not None:
            try:
                unpack(newest)
            except JournalDamaged as error:
                if mark is None or (mark.stream, mark.head) != (store.stream, tip.head):
                    raise
                tip = Tip(mark.head, bytes.fromhex(mark.digest))
                self._damages.append(Damage(store.stream, str(error), newest.seq, newest.seq))
        if mark is None:
            gone = tip.head and not self._mark.path.exists()
            return tip, "no mark is beside it, as with a copy that was put back" if gone else ""
        if mark.stream != store.stream:
            return tip, f"the mark beside it is of stream {mark.stream}" if tip.head else ""
        if mark.head > tip.head or (mark.head == tip.head and mark.digest != tip.digest.hex()):
            return tip, f"it ends at {tip.head}, the mark beside it at {mark.head}"
        return tip, ""

    # -- one turn ----------------------------------------------------------------------------------------

    def _turn(self, last: bool) -> None:
        store, sealer = self._ready()
        self._headroom.look(store)
        self._take()
        if self._damages:
            doom = self._keeper.condemned(store, sealer, self._keeper.confirmed(store, self._damages))
            if doom.ranges:
                self._commit(store, sealer, [], doom)
            self._damages = []
        expired = self._keeper.expired(store, self._odometer.run_ms)
        while self._waiting or expired.ranges or not sealer.head:
            groups = self._next_groups(store)
            self._make_room(store, sealer, groups)
            self._commit(store, sealer, groups, expired)
            expired = retention.NOTHING
        self._prune(store, sealer)
        if (acked := self._acked_due(now=last)) is not None or last:
            spans = self._spanner.take(all_of_it=last)
            wear = self._odometer.due(store.take_fsyncs, now=last)
            store.append([], acked=acked, spans=spans, wear=wear, end_to_end=self._settled.end_to_end)
            self._checkpoint(store)
        flushed, self._flushes = self._flushes, []
        if flushed:
            self._tell(None, flushed)

    def _prune(self, store: Store, sealer: Sealer) -> None:
        """Let go of what a hand wishes away, for a moment in each turn: records wait meanwhile."""
        until_s = clock.mono_s() + PRUNE_S
        while self._prunes and clock.mono_s() < until_s:
            prune = self._prunes[0]
            doom, batches = self._keeper.pruned(store, self._odometer.run_ms - prune.older_than_ms)
            if batches:
                self._commit(store, sealer, [], doom)
                prune.batches += batches
                prune.records += sum(last - first + 1 for first, last in doom.ranges)
            else:
                self._flushes.append(self._prunes.pop(0).done)

    def _take(self) -> None:
        """Empty the inbox into `_waiting`, unless that holds too much already."""
        if sum(made.size for made in self._waiting if isinstance(made, Group)) > WAITING_BYTES:
            return
        taken = self._inbox.take()
        for item in taken.items:
            if isinstance(item, list):
                self._waiting += group_entries(item, self._era, self._inbox.max_message)
            elif isinstance(item, Era):
                self._era = item
            else:
                self._waiting.append(item)
        self._odometer.count(taken.readings)
        self._flushes += taken.flushes
        self._prunes += taken.prunes
        for damage in taken.damages:
            if damage.stream != self.stream:
                continue  # that file has been set aside
            if not damage.last:
                raise JournalDamaged(damage.detail)
            self._damages.append(damage)

    def _grouped(self, records: Iterable[Record]) -> list[Group]:
        return group(records, self._era, self._inbox.max_message)

    def _next_groups(self, store: Store) -> list[Group | Lost]:
        """Return one transaction's worth of what waits."""
        limit = min(TRANSACTION_BYTES, store.wal_bytes // 2)
        size = 0
        for at, made in enumerate(self._waiting):
            size += made.size if isinstance(made, Group) else 0
            if size > limit and at:
                return self._waiting[:at]
        return self._waiting

    def _commit(
        self, store: Store, sealer: Sealer, groups: Sequence[Group | Lost], doom: Doom = retention.NOTHING
    ) -> None:
        """Delete what is doomed, add groups from the front of what waits, and name what is lost, all or nothing.

        What is settled is written down with whatever goes, so that at any time each seq has a batch or is settled.
        """
        sealed, gaps = self._seal(sealer, groups, doom)
        acked = self._acked_due(gaps, now=bool(doom.ranges))
        rows = [self._row(made.batch, made.last_ts) for made in sealed]
        rows += [self._row(new.batch, new.last_ts, new.link, new.period_s) for new in doom.summaries]
        for made in sealed:
            self._spanner.add(
                Span(made.batch.seq, made.batch.last, made.first_ts, made.last_ts), len(made.batch.packed)
            )
        spans = self._spanner.take(all_of_it=bool(doom.summaries))
        spans += [Span(new.batch.seq, new.batch.last, new.first_ts, new.last_ts) for new in doom.summaries]
        self._unsure = unsure = _Unsure(sealed, gaps, doom.fewer, self._waiting[len(groups) :])
        store.append(
            rows, doomed=doom.ranges, acked=acked, spans=spans, wear=self._odometer.due(store.take_fsyncs),
            end_to_end=self._settled.end_to_end,
        )  # fmt: skip
        if not self.head:  # a stream's first: that it began must be known before anybody hears of it
            self._mark.write(Mark(self.stream, sealer.head, sealer.digest.hex(), clean=False), sync=True)
        self._unsure = None
        self._durable(unsure)
        self._checkpoint(store)

    def _row(self, batch: Batch, ts: int, link: bytes | None = None, period_s: int = 0) -> Row:
        run_ms = self._odometer.run_ms
        return Row(
            batch.seq, batch.count, batch.kind.value, period_s, ts, run_ms, batch.digest, link, batch.size, batch.packed
        )  # fmt: skip

    def _seal(
        self, sealer: Sealer, groups: Sequence[Group | Lost], doom: Doom
    ) -> tuple[list[_Sealed], list[Loss]]:
        """Give the groups their numbers, and name in gap events what goes for good."""
        sealed: list[_Sealed] = []
        gaps = [*doom.lost]
        for made in [
            *(() if sealer.head else self._opening),
            *self._grouped([*doom.events, *map(_gap, doom.lost)]),
            *groups,
        ]:
            if isinstance(made, Lost):
                gaps.append(Loss(*sealer.skip(made.count, made.link), sealer.digest, [], made.reason))
                (made,) = self._grouped([_gap(gaps[-1])])
            sealed.append(_Sealed(*sealer.seal(made), made.first_ts, made.last_ts))
        return sealed, gaps

    def _durable(self, done: _Unsure) -> None:
        """Note that a transaction is on the disk, and pass its batches on."""
        self._waiting = done.rest
        self._settled.thinned(done.fewer)
        if not done.sealed:
            return
        self.head = done.sealed[-1].batch.last
        self._opening = []
        self._settled.appended(len(done.sealed))
        for gap in done.gaps:
            self._settled.gone(gap.first, gap.last, gap.batches)
        self._keeper.note_named(done.gaps, done.sealed[0].batch.seq)
        self._say_gone(done)
        batches = [made.batch for made in done.sealed]
        self._tell(Committed(self.stream, batches, [made.body for made in done.sealed]), [])

    def _say_gone(self, done: _Unsure) -> None:
        """Say, at most every half a minute, what a journal that is full no longer has as it was read."""
        self._gone += sum(gap.last - gap.first + 1 for gap in done.gaps)
        self._fewer += done.fewer
        if not (self._gone or self._fewer) or clock.mono_s() < self._say_s:
            return
        self._say_s = clock.mono_s() + SAY_S
        log.error(
            "journal: %d records are gone for good, %d batches have become summaries; gap events say which",
            self._gone,
            self._fewer,
        )
        self._gone = self._fewer = 0

    def _checkpoint(self, store: Store) -> None:
        self._write_mark(clean=False, sync=store.checkpoint())

    # -- what goes ---------------------------------------------------------------------------------------

    def _make_room(self, store: Store, sealer: Sealer, groups: Sequence[Group | Lost]) -> None:
        """Let go of as much as it takes for these groups to fit below the limit.

        It goes in transactions of its own, because what deleting gives back is known only afterwards: pages are
        shared between batches.
        """
        need = store.slack_bytes + sum(_room(made.size) for made in groups if isinstance(made, Group))
        while (short := need - store.free_bytes()) > 0:
            doom = self._keeper.acknowledged(store, sealer.head, short)
            if not doom.ranges:
                if self._headroom.extend(store):
                    continue
                doom = self._keeper.unsent(store, sealer, short, cramped=self._headroom.cramped)
            if not doom.ranges:
                return  # nothing is left whose going would give back anything
            self._commit(store, sealer, [], doom)
            self._headroom.cramped = False

    def _acked_due(self, gaps: Sequence[Loss] = (), *, now: bool = False) -> Ranges | None:
        """Return what is settled, with what is about to be, if it is time to write it down."""
        due = now or clock.mono_s() - self._acked_at >= ACKED_EVERY_S
        if not gaps and not (due and self._settled.dirty):
            return None
        self._acked_at = clock.mono_s()
        self._settled.dirty = False
        acked = self._settled.copy()
        for gap in gaps:
            acked.add(gap.first, gap.last)
        return acked

    def _write_mark(self, *, clean: bool, sync: bool) -> None:
        if self.head and self._sealer is not None:
            self._mark.write(Mark(self.stream, self.head, self._sealer.digest.hex(), clean), sync=sync)


def _gap(lost: Loss) -> Event:
    """Name what is gone for good."""
    fields = {"from": lost.first, "to": lost.last, "reason": lost.reason, "last_prev": lost.digest.hex()}
    return Event(clock.wall_ms(), "gap", fields)


def _room(size: int) -> int:
    """Return the most that a batch of so much JSON can take in the file: rows do not share pages evenly."""
    row = size + ROW_BYTES
    return 2 * row if row < PAGE else row + 2 * PAGE
