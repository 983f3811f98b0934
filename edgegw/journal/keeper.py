"""The keeper: decides, from what the store says, what of the journal goes and what takes its place.

It only reads; the writer carries out what it decides, in one transaction with the events that tell of it.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import msgspec

from edgegw import clock
from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain.batch import HEAD_ROOM, Message
from edgegw.domain.batch import decode as decode_batch
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event
from edgegw.errors import JournalDamaged
from edgegw.journal import retention
from edgegw.journal.encode import Sealer
from edgegw.journal.inbox import Damage, Inbox
from edgegw.journal.retention import Doom, Loss, NamedLosses, Summary
from edgegw.journal.settled import Settled
from edgegw.journal.store import Store, Stored, of_period, unpack
from edgegw.journal.thin import COARSER, Source, Thinned, thin, timing

log = logging.getLogger(__name__)

PRUNE_EVERY_S = 10.0
THIN_BYTES = 8 * 1024**2
"""JSON that is thinned at one time, at the most: it takes a tenth of a second, and records wait meanwhile. It is less
where half the WAL's share is."""
THIN_BATCHES = 4096
GAIN = 0.7
"""Summaries that take more than this of what they replace are not worth the readings."""
ROW_BYTES = 160
"""What a batch takes beside its body."""

EVENT_BYTES = 200
"""What the event takes that tells of it."""
GAP_BATCH_BYTES = 600
"""What the batch takes that such an event stands in, with its row."""


class Keeper:
    """Keeps the journal within its limits; used by the writer's thread."""

    def __init__(self, config: JournalConfig, settled: Settled, inbox: Inbox) -> None:
        self._config = config
        self._settled = settled
        self._inbox = inbox
        self._pruned_at = clock.mono_s()
        self._releases = 0
        self.begin()

    def begin(self) -> None:
        """Start anew with another stream."""
        self._no_gain: dict[int, int] = {}  # by period: up to which seq thinning has nothing to gain from
        self._empty = Ranges()  # where there are no rows any more
        self._named = NamedLosses()

    def note_named(self, losses: Sequence[Loss], seq: int) -> None:
        """Note that the batch at `seq` names these losses."""
        self._named.add(losses, seq)

    def expired(self, store: Store, run_ms: int) -> Doom:
        """Choose, now and then, what is settled and old."""
        if clock.mono_s() - self._pruned_at < PRUNE_EVERY_S:
            return retention.NOTHING
        self._pruned_at = clock.mono_s()
        settled = self._settled.copy()
        oldest = store.oldest(1, settled.prefix(), 1000)
        return retention.expired(oldest, settled, run_ms - self._config.keep)

    def pruned(self, store: Store, before_run_ms: int) -> tuple[Doom, int]:
        """Choose some of what is settled and older than that, wherever it stands; return how many batches these are."""
        settled = self._settled.copy()
        for first, last in settled:
            found = store.oldest(first, last, 1000)
            old = [s for s in found if s.run_ms < before_run_ms and settled.covers(s.first, s.last)]
            if old:
                return retention.dooming(old, settled), len(old)
        return retention.NOTHING, 0

    def acknowledged(self, store: Store, head: int, need_bytes: int) -> Doom:
        """Choose what is settled and gives back so much room, or as much as there is of it."""
        settled = self._settled.copy()
        return retention.freeing(
            self._settled_rows(store, head, settled), settled, self._share(store, need_bytes)
        )

    def unsent(self, store: Store, sealer: Sealer, need_bytes: int, *, cramped: bool = False) -> Doom:
        """Choose what gives back room though no receiver has it, some of it at a time: what the broker has confirmed,
        what can be thinned, what is oldest.

        What is thinned gives back less than it seems to where its rows share pages with others: `cramped`, after that
        has failed, lets go instead.
        """
        need_bytes = self._share(store, need_bytes, cramped=cramped)
        settled = self._settled.copy()
        doom = self._drop(store, self._settled.delivered(), settled, need_bytes)
        if not doom.ranges and self._config.when_full == "thin" and not cramped:
            doom = self._thin(store, sealer)
        return doom if doom.ranges else self._drop(store, settled.gaps(1, sealer.head), settled, need_bytes)

    def _share(self, store: Store, need_bytes: int, *, cramped: bool = False) -> int:
        """Return how much to free at one time: what is needed, and a small part of what is there."""
        return max(need_bytes, store.used_bytes() // (10 if cramped else 100))

    def _settled_rows(self, store: Store, head: int, settled: Ranges) -> Iterator[Stored]:
        for seqs in settled:
            for first, last in list(self._empty.gaps(*seqs)):  # what is found is added
                rows = store.oldest(first, last, 2000)
                yield from rows
                if not rows and last < head:
                    self._empty.add(first, last)

    # -- dropping ----------------------------------------------------------------------------------------

    def _drop(
        self, store: Store, within: Iterable[tuple[int, int]], settled: Ranges, need_bytes: int
    ) -> Doom:
        """Choose the oldest of what no receiver has, within these seqs.

        Nothing goes whose naming takes as much room as it gives back: gap events would go for gap events without end.
        """
        wanted, within = need_bytes, list(within)
        while True:
            unsent = (stored for seqs in within for stored in store.oldest(*seqs, 2000))
            doom = retention.freeing(unsent, settled, wanted)
            named = self._named_again(store, doom, settled)
            batches = sum(len(loss.batches) for loss in doom.lost)
            events = len(named.lost) + len(named.events)
            gained = doom.bytes + ROW_BYTES * batches - GAP_BATCH_BYTES - EVENT_BYTES * events
            if gained >= need_bytes or doom.bytes < wanted:
                return named if gained > 0 else retention.NOTHING
            wanted *= 2

    def _named_again(self, store: Store, doom: Doom, settled: Ranges) -> Doom:
        """Add to what is lost what the gap events among it named: nobody upstream has heard of that yet."""
        lost: list[Loss] = [*doom.lost]
        again: list[Event] = []
        for loss in doom.lost:
            for batch in store.events(loss.first, loss.last):
                try:
                    records = msgspec.json.decode(unpack(batch))["records"]
                except JournalDamaged as error:
                    log.error("journal: %s; what it named goes unnamed", error)
                    continue
                for record in records:
                    if record["event"] != "gap":
                        continue
                    if "stream" in record or "summary" in record:
                        again.append(Event(record.pop("ts"), record.pop("event"), record))
                    else:
                        digest = bytes.fromhex(record["last_prev"])
                        lost.append(Loss(record["from"], record["to"], digest, [], record["reason"]))
        lost = self._named.widened(lost, settled)
        gone = Ranges((loss.first, loss.last) for loss in lost)
        events = [event for event in again if not _names_within(event, gone)]
        return doom._replace(lost=lost, events=events)

    # -- thinning ----------------------------------------------------------------------------------------

    def _thin(self, store: Store, sealer: Sealer) -> Doom:
        """Choose readings, or summaries, to be replaced by coarser ones; what gains nothing is not tried again."""
        if self._releases != self._settled.releases:
            self._releases = self._settled.releases
            self._no_gain = {}  # what was on its way then may be thinned now
        upto = self._settled.heard
        for finer in retention.finer_periods(store.bytes_by_period()):
            while oldest := self._thinnable(store, finer, upto):
                doom = self._thinned(store, sealer, oldest, finer)
                if doom.ranges and self._settled.claim(doom.ranges):
                    coarser = COARSER[finer]
                    self._no_gain[coarser] = min(self._no_gain.get(coarser, 0), doom.ranges[0][0] - 1)
                    return doom
                if not doom.ranges:
                    self._no_gain[finer] = oldest[-1].last
            self._no_gain[finer] = upto
        return retention.NOTHING

    def _thinnable(self, store: Store, finer: int, upto: int) -> list[Stored]:
        """Return the oldest batches of a period that thinning may gain something from."""
        found: list[Stored] = []
        size, limit = 0, min(THIN_BYTES, store.wal_bytes // 2)
        for first, last in self._settled.out_of_reach().gaps(self._no_gain.get(finer, 0) + 1, upto):
            for stored in store.oldest(first, last, THIN_BATCHES - len(found), of_period(finer)):
                if size + stored.size > limit and found:
                    return found
                found.append(stored)
                size += stored.size
            if len(found) >= THIN_BATCHES:
                break
        return found

    def _thinned(self, store: Store, sealer: Sealer, oldest: Sequence[Stored], finer: int) -> Doom:
        """Return what thinning these batches comes to, as far as it gains something."""
        ranges: list[tuple[int, int]] = []
        summaries: list[Summary] = []
        events: list[Event] = []
        fewer = 0
        said = dict(_messages(store, oldest))
        sound = [stored for stored in oldest if stored.first in said]
        for stretch in retention.stretches(sound, self._settled.published(), lambda s: timing(said[s.first])):
            sources = [
                [Source(*stored[:2], stored.link, said[stored.first]) for stored in run] for run in stretch
            ]
            limit = self._inbox.max_message - HEAD_ROOM
            made = [_summary(sealer, one, COARSER[finer]) for one in thin(sources, COARSER[finer], limit)]
            was = sum(stored.bytes + ROW_BYTES for run in stretch for stored in run)
            now = sum(len(summary.batch.packed) + ROW_BYTES for summary in made) + EVENT_BYTES * len(stretch)
            if not made or now > GAIN * was:
                continue
            ranges += [(run[0].first, run[-1].last) for run in stretch]
            summaries += made
            fewer += sum(map(len, stretch)) - len(made)
            if not finer:
                events += map(_gone, stretch)
        return Doom(ranges, [], events, summaries, fewer)

    # -- damage ------------------------------------------------------------------------------------------

    def confirmed(self, store: Store, damages: Sequence[Damage]) -> list[Damage]:
        """Read what a reader found damaged once more, and return what is: a single misread must not cost a batch."""
        found = []
        for damage in damages:
            if store.sound(damage.first, damage.last):
                log.warning("journal: %s; read once more it is sound", damage.detail)
            else:
                found.append(damage)
        return found

    def condemned(self, store: Store, sealer: Sealer, damages: Sequence[Damage]) -> Doom:
        """Give up what was found damaged: all up to the next sound batch, which also tells the last one's hash."""
        settled = self._settled.copy()
        ranges: list[tuple[int, int]] = []
        lost: list[Loss] = []
        for first, last in Ranges((damage.first, damage.last) for damage in damages):
            upto, digest = sealer.head, sealer.digest
            while (follower := store.following(last)) is not None:
                try:
                    prev = decode_batch(unpack(follower)).prev
                except JournalDamaged:
                    last = follower.seq
                    continue
                upto, digest = follower.seq - 1, bytes.fromhex(prev)
                break
            ranges.append((first, upto))
            # with the newest batch goes a gap event in its place, also if the upstream has it: the tip stays
            for gone in list(settled.gaps(first, upto)) or ([(first, upto)] if follower is None else []):
                known = digest if gone[1] == upto else store.last_link(*gone)
                lost.append(Loss(*gone, known, [gone], "damaged"))
        for damage in damages if lost else ():
            log.error("journal: %s", damage.detail)
        return Doom(ranges, lost)


def _messages(store: Store, oldest: Sequence[Stored]) -> Iterator[tuple[int, Message]]:
    """Yield what each batch says; one that is damaged is left for whoever reads it to send it."""
    for stored in oldest:
        with suppress(JournalDamaged, msgspec.DecodeError):
            yield stored.first, decode_batch(unpack(store.batch(stored.first)))


def _summary(sealer: Sealer, thinned: Thinned, period_s: int) -> Summary:
    batch = sealer.summary(thinned, period_s)
    return Summary(batch, thinned.last_prev, period_s, thinned.first_ts, thinned.last_ts)


def _names_within(event: Event, gone: Ranges) -> bool:
    """Tell whether a gap event of thinned readings names what is gone altogether by now."""
    return "stream" not in event.fields and gone.covers(event.fields["from"], event.fields["to"])


def _gone(run: Sequence[Stored]) -> Event:
    """Name the readings that a summary now stands for."""
    fields = {
        "from": run[0].first, "to": run[-1].last, "reason": "full", "last_prev": run[-1].link.hex(), "summary": True,
    }  # fmt: skip
    return Event(clock.wall_ms(), "gap", fields)
