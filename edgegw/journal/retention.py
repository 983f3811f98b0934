"""Decides which batches go, and which of those are a loss."""

from collections.abc import Iterable
from typing import NamedTuple

from edgegw.domain.ranges import Ranges
from edgegw.journal.store import Stored


class Loss(NamedTuple):
    """Records that nobody upstream has and that go all the same; `digest` is the last batch's."""

    first: int
    last: int
    digest: bytes
    batches: int


class Doom(NamedTuple):
    """Batches to delete, as ranges of seqs, which of them are a loss, and what it gives back."""

    ranges: list[tuple[int, int]]
    lost: list[Loss]
    bytes: int


NOTHING = Doom([], [], 0)


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


def _doom(doomed: list[Stored], settled: Ranges) -> Doom:
    ranges: list[tuple[int, int]] = []
    lost: list[Loss] = []
    for stored in doomed:
        if ranges and ranges[-1][1] == stored.first - 1:
            ranges[-1] = (ranges[-1][0], stored.last)
        else:
            ranges.append((stored.first, stored.last))
        if settled.covers(stored.first, stored.last):
            continue
        if lost and lost[-1].last == stored.first - 1:
            lost[-1] = Loss(lost[-1].first, stored.last, stored.digest, lost[-1].batches + 1)
        else:
            lost.append(Loss(stored.first, stored.last, stored.digest, 1))
    return Doom(ranges, lost, sum(stored.bytes for stored in doomed))


def condemn(damaged: Iterable[Stored]) -> Doom:
    """Give up batches whose bytes are not what was once written, whether or not they were sent."""
    return _doom(sorted(damaged), Ranges())
