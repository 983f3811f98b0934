"""What a stream's batches amount to: new, kept already, or in conflict; and which seqs nobody has named."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from edgegw.domain.batch import Gap, Kind
from edgegw.domain.ranges import Ranges


class Key(NamedTuple):
    """Whose batch it is: seqs are numbers of one stream of one gateway."""

    gateway: str
    stream: str

    def __str__(self) -> str:
        return f"{self.gateway} {self.stream}"


class Kept(msgspec.Struct, frozen=True):
    """A batch that is kept already, as far as a comparison needs it."""

    seq: int
    count: int
    kind: Kind
    digest: bytes


class NamedGap(NamedTuple):
    """Records that a gap event declares gone for good; `last_prev` is None where the event has none."""

    first: int
    last: int
    reason: str
    last_prev: bytes | None

    def link(self) -> Gap:
        """Return what the chain's verification needs of it."""
        return Gap(self.first, self.last, self.last_prev)


class Verdict(Enum):
    """What to do with a batch."""

    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class Stream:
    """One stream as received so far."""

    __slots__ = ("gaps", "named", "received")

    def __init__(self) -> None:
        self.received = Ranges()
        self.named = Ranges()
        self.gaps: list[NamedGap] = []

    def judge(
        self, seq: int, count: int, kind: Kind, digest: bytes, kept: Callable[[], Sequence[Kept]]
    ) -> Verdict:
        """Say what a batch is; `kept` is asked for the kept batches that overlap it only where some must.

        `kept` may have forgotten old batches: one that is wholly covered by what it no longer knows counts as
        a duplicate. A summary and the batches that it stands for are no conflict: what came first stays.
        """
        last = seq + count - 1
        if not self.received.overlaps(seq, last):
            return Verdict.NEW
        there = kept()
        if any(batch.seq == seq and batch.digest == digest for batch in there):
            return Verdict.DUPLICATE
        covered = self.received.covers(seq, last)
        if covered and all((batch.kind is Kind.SUMMARY) != (kind is Kind.SUMMARY) for batch in there):
            return Verdict.DUPLICATE
        return Verdict.CONFLICT

    def keep(self, seq: int, count: int) -> None:
        """Count a batch as received."""
        self.received.add(seq, seq + count - 1)

    def name(self, gap: NamedGap) -> bool:
        """Take in a gap event; False if it is known."""
        if gap in self.gaps:
            return False
        self.gaps.append(gap)
        self.named.add(gap.first, gap.last)
        return True

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
