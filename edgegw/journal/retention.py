"""Decides which batches go, and which of those are a loss."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event
from edgegw.journal.store import Stored


class Loss(NamedTuple):
    """Records that nobody upstream has and that go all the same.

    `digest` is the last batch's, `batches` are the seqs that each began and ended with, as far as known.
    """

    first: int
    last: int
    digest: bytes
    batches: list[tuple[int, int]]
    reason: str


class Doom(NamedTuple):
    """Batches to delete, as ranges of seqs, which of them are a loss, and what of other streams to name again."""

    ranges: list[tuple[int, int]]
    lost: list[Loss]
    again: Sequence[Event] = ()


NOTHING = Doom([], [])


def expired(oldest: Iterable[Stored], settled: Ranges, before_ms: int) -> Doom:
    """Choose the settled batches older than `before_ms`, from the oldest on up to the first that stays."""
    doomed: list[Stored] = []
    for stored in oldest:
        if stored.ts >= before_ms or not settled.covers(stored.first, stored.last):
            break
        doomed.append(stored)
    return _doom(doomed, settled)


def make_room(oldest: Iterable[Stored], settled: Ranges, need_bytes: int) -> Doom:
    """Choose what gives back `need_bytes`: settled batches first, then the oldest that are not."""
    batches = list(oldest)
    kept = [stored for stored in batches if settled.covers(stored.first, stored.last)]
    unsent = [stored for stored in batches if not settled.covers(stored.first, stored.last)]
    doomed: list[Stored] = []
    freed = 0
    for stored in kept + unsent:
        if freed >= need_bytes:
            break
        doomed.append(stored)
        freed += stored.bytes
    return _doom(sorted(doomed), settled)


def joined(lost: Iterable[Loss]) -> list[Loss]:
    """Join losses that follow on each other, so that one gap event names them."""
    joint: list[Loss] = []
    for loss in sorted(lost):
        if joint and loss.first <= joint[-1].last + 1:
            loss = loss._replace(first=joint[-1].first, batches=joint[-1].batches + loss.batches)
            joint.pop()
        joint.append(loss)
    return joint


def _doom(doomed: list[Stored], settled: Ranges) -> Doom:
    ranges: list[tuple[int, int]] = []
    lost: list[Loss] = []
    for stored in doomed:
        batch = (stored.first, stored.last)
        if ranges and ranges[-1][1] == stored.first - 1:
            ranges[-1] = (ranges[-1][0], stored.last)
        else:
            ranges.append(batch)
        if not settled.covers(*batch):
            lost.append(Loss(*batch, stored.digest, [batch], "full"))
    return Doom(ranges, joined(lost))
