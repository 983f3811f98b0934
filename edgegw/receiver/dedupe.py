"""What a stream's batches amount to: new, kept already, or in conflict; and which seqs nobody has named. Pure."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from edgegw.domain.batch import Gap
from edgegw.domain.ranges import Ranges


class Key(NamedTuple):
    """Whose batch it is: seqs are numbers of one stream of one gateway."""

    gateway: str
    stream: str

    def __str__(self) -> str:
        return f"{self.gateway} {self.stream}"


class Outline(msgspec.Struct, frozen=True):
    """A batch as far as a comparison needs it; `period_s` is that of a summary, 0 of what was recorded itself."""

    seq: int
    count: int
    period_s: int
    digest: bytes

    @property
    def last(self) -> int:
        """The number of the last record."""
        return self.seq + self.count - 1

    def agrees(self, other: "Outline") -> bool:
        """Tell whether both can be right, overlapping as they do: the coarser one holds the place of the finer one."""
        fine, coarse = sorted((self, other), key=lambda one: one.period_s)
        return fine.period_s < coarse.period_s and coarse.seq <= fine.seq and fine.last <= coarse.last


class NamedGap(NamedTuple):
    """Records that a gap event declares gone for good; `last_prev` is None where the event has none.

    Of what was `thinned` a summary is still to come.
    """

    first: int
    last: int
    reason: str
    last_prev: bytes | None
    thinned: bool = False

    def link(self) -> Gap:
        """Return what the chain's verification needs of it."""
        return Gap(self.first, self.last, self.last_prev)


class Verdict(Enum):
    """What to do with a batch: keep it, keep it beside others of the same seqs, drop it, or set it apart."""

    NEW = "new"
    BESIDE = "beside"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class Stream:
    """One stream as received so far."""

    __slots__ = ("begins", "gaps", "named", "received", "recorded")

    def __init__(self) -> None:
        self.begins = 1
        self.received = Ranges()
        self.recorded = Ranges()
        self.named = Ranges()
        self.gaps: dict[NamedGap, None] = {}
        """The gap events in the order in which they came."""

    def judge(self, batch: Outline, kept: Callable[[], Sequence[Outline]]) -> Verdict:
        """Say what a batch is; `kept` is asked for the kept batches that overlap it only where some must.

        A summary and what it took the place of are no conflict, and both are kept: what stands for a stretch is spread
        over its summaries, so that one may tell of readings beyond its own seqs. `kept` may have forgotten old
        batches: what is covered by what it no longer knows of counts as a duplicate.
        """
        if not self.received.overlaps(batch.seq, batch.last):
            return Verdict.NEW
        there = kept()
        if batch in there:
            return Verdict.DUPLICATE
        forgotten = self._forgotten(batch, there)
        if forgotten.covers(batch.seq, batch.last):
            return Verdict.DUPLICATE
        if (forgotten and not batch.period_s) or not all(batch.agrees(other) for other in there):
            return Verdict.CONFLICT
        return Verdict.BESIDE

    def _forgotten(self, batch: Outline, there: Sequence[Outline]) -> Ranges:
        """Return which of a batch's seqs came with batches like it that are not there any more."""
        forgotten = Ranges([(batch.seq, batch.last)])
        for hole in (self.received if batch.period_s else self.recorded).gaps(batch.seq, batch.last):
            forgotten.remove(*hole)
        for other in there:
            if batch.period_s or not other.period_s:
                forgotten.remove(other.seq, other.last)
        return forgotten

    def keep(self, seq: int, count: int, *, recorded: bool = False) -> None:
        """Count a batch as received; `recorded` ones, which are no summaries, need remembering by who may forget."""
        self.received.add(seq, seq + count - 1)
        if recorded:
            self.recorded.add(seq, seq + count - 1)

    def name(self, gap: NamedGap) -> bool:
        """Take in a gap event; False if it is known."""
        if gap in self.gaps:
            return False
        self.gaps[gap] = None
        if not gap.thinned:
            self.named.add(gap.first, gap.last)
        return True

    def begin(self, seq: int) -> None:
        """Expect nothing before a seq."""
        self.begins = seq
        if seq > 1:
            self.named.add(1, seq - 1)

    @property
    def head(self) -> int:
        """The last seq received."""
        return max((last for _, last in self.received), default=0)

    def missing(self) -> list[tuple[int, int]]:
        """Return the ranges up to the last seq heard of that were neither received nor named by a gap."""
        known = self.named.copy()
        for first, last in self.received:
            known.add(first, last)
        return list(known.gaps(1, max((last for _, last in known), default=0)))
