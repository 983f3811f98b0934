"""The keeper: decides, from what the store says, what of the journal goes and what takes its place.

It only reads; the writer carries out what it decides, in one transaction with the events that tell of it.
"""

import logging
from collections.abc import Iterator, Sequence

import msgspec

from edgegw import clock
from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain.batch import HEAD_ROOM
from edgegw.domain.batch import decode as decode_batch
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event
from edgegw.errors import JournalDamaged
from edgegw.journal import retention
from edgegw.journal.encode import Sealer
from edgegw.journal.inbox import Damage
from edgegw.journal.retention import Doom, Loss, Summary
from edgegw.journal.settled import Settled
from edgegw.journal.store import EVENTS, NOT_EVENTS, Store, Stored, of_period, unpack
from edgegw.journal.thin import COARSER, Source, Thinned, thin, timing

log = logging.getLogger(__name__)

PRUNE_EVERY_S = 10.0
THIN_BYTES = 8 * 1024**2
"""JSON that is thinned at one time, at the most: it takes a tenth of a second, and records wait meanwhile."""
THIN_BATCHES = 4096
GAIN = 0.7
"""Summaries that take more than this of what they replace are not worth the readings."""
ROW_BYTES = 160
"""What a batch takes beside its body."""

EVENT_BYTES = 200
"""What the event takes that tells of it."""


class Keeper:
    """Keeps the journal within its limits; used by the writer's thread."""

    def __init__(self, config: JournalConfig, settled: Settled, max_message: int) -> None:
        self._config = config
        self._settled = settled
        self._limit = max_message - HEAD_ROOM
        self._pruned_at = clock.mono_s()
        self._no_gain: dict[int, Ranges] = {}

    def begin(self) -> None:
        """Start anew with another stream."""
        self._no_gain = {}

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

    def room(self, store: Store, sealer: Sealer, upto: int, need_bytes: int) -> Doom:
        """Choose what gives back room, some of it at a time: what is settled, what can be thinned, what is oldest.

        Of what comes after seq `upto` the drain has not heard yet: it is not thinned.
        """
        need_bytes = max(need_bytes, self._config.max_size // 100)
        settled = self._settled.copy()
        kept = [stored for first, last in settled for stored in store.oldest(first, last, 2000)]
        if kept:
            return retention.freeing(kept, settled, need_bytes)
        if self._config.when_full == "drop":
            return self._drop(store, sealer.head, settled, need_bytes, "true")
        doom = self._thin(store, sealer, upto)
        for which in (NOT_EVENTS, EVENTS):
            if not doom.ranges:
                doom = self._drop(store, sealer.head, settled, need_bytes, which)
        return doom

    # -- dropping ----------------------------------------------------------------------------------------

    def _drop(self, store: Store, head: int, settled: Ranges, need_bytes: int, which: str) -> Doom:
        unsent = [s for first, last in settled.gaps(1, head) for s in store.oldest(first, last, 2000, which)]
        return self._named_again(store, retention.freeing(unsent, settled, need_bytes))

    def _named_again(self, store: Store, doom: Doom) -> Doom:
        """Add to what is lost what the gap events among it named: nobody upstream has heard of that yet."""
        lost, again = [*doom.lost], []
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
        return Doom(doom.ranges, retention.joined(lost), again)

    # -- thinning ----------------------------------------------------------------------------------------

    def _thin(self, store: Store, sealer: Sealer, upto: int) -> Doom:
        """Choose readings, or summaries, to be replaced by coarser ones."""
        for finer in retention.finer_periods(store.bytes_by_period()):
            while oldest := self._thinnable(store, finer, upto):
                doom = self._thinned(store, sealer, oldest, finer)
                if doom.ranges and self._settled.claim(doom.ranges):
                    return doom
        return retention.NOTHING

    def _thinnable(self, store: Store, finer: int, upto: int) -> list[Stored]:
        """Return the oldest batches of a period that thinning may gain something from."""
        skip = self._settled.out_of_reach()
        for first, last in self._no_gain.get(finer, ()):
            skip.add(first, last)
        found: list[Stored] = []
        size = 0
        for first, last in skip.gaps(1, upto):
            for stored in store.oldest(first, last, THIN_BATCHES - len(found), of_period(finer)):
                if size > THIN_BYTES:
                    return found
                found.append(stored)
                size += stored.size
            if len(found) >= THIN_BATCHES:
                break
        return found

    def _thinned(self, store: Store, sealer: Sealer, oldest: Sequence[Stored], finer: int) -> Doom:
        """Return what thinning these batches comes to; what gains nothing is not tried again."""
        no_gain = self._no_gain.setdefault(finer, Ranges())
        ranges: list[tuple[int, int]] = []
        summaries: list[Summary] = []
        events: list[Event] = []
        fewer = 0
        for stretch in retention.stretches(oldest, self._settled.published()):
            made: list[Summary] = []
            for sources in self._sources(store, stretch):
                made += [
                    _summary(sealer, t, COARSER[finer]) for t in thin(sources, COARSER[finer], self._limit)
                ]
            spans = [(run[0].first, run[-1].last) for run in stretch]
            was = sum(stored.bytes + ROW_BYTES for run in stretch for stored in run)
            now = sum(len(summary.batch.packed) + ROW_BYTES for summary in made) + EVENT_BYTES * len(stretch)
            if now > GAIN * was or Ranges((s.batch.seq, s.batch.last) for s in made) != Ranges(spans):
                for span in spans:
                    no_gain.add(*span)
                continue
            ranges += spans
            summaries += made
            fewer += sum(map(len, stretch)) - len(made)
            if not finer:
                events += map(_gone, stretch)
        return Doom(ranges, [], events, summaries, fewer)

    def _sources(self, store: Store, stretch: Sequence[Sequence[Stored]]) -> Iterator[list[list[Source]]]:
        """Yield the runs' batches, in parts whose times are read alike; nothing at all if one is damaged."""
        parts: list[list[list[Source]]] = []
        was: bytes | None = None
        for run in stretch:
            begins = True
            for stored in run:
                try:
                    message = decode_batch(unpack(store.batch(stored.first)))
                except (JournalDamaged, msgspec.DecodeError):
                    return  # who reads it to send it will say so
                if (now := timing(message)) != was:
                    parts.append([])
                    begins, was = True, now
                if begins:
                    parts[-1].append([])
                    begins = False
                parts[-1][-1].append(Source(stored.first, stored.last, stored.link, message))
        yield from parts

    # -- damage ------------------------------------------------------------------------------------------

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


def _summary(sealer: Sealer, thinned: Thinned, period_s: int) -> Summary:
    batch = sealer.summary(thinned, period_s)
    return Summary(batch, thinned.last_prev, period_s, thinned.first_ts, thinned.last_ts)


def _gone(run: Sequence[Stored]) -> Event:
    """Name the readings that a summary now stands for."""
    fields = {
        "from": run[0].first, "to": run[-1].last, "reason": "full", "last_prev": run[-1].link.hex(), "summary": True,
    }  # fmt: skip
    return Event(clock.wall_ms(), "gap", fields)
