"""Decides which batches go, and which of those are a loss. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event
from edgegw.journal.store import Stored
from edgegw.journal.thin import COARSER


class Loss(NamedTuple):
    """Records that nobody upstream has and that go all the same.

    `digest` is what the batch after them carries as prev, `batches` are the seqs that each began and ended with, as
    far as known.
    """

    first: int
    last: int
    digest: bytes
    batches: list[tuple[int, int]]
    reason: str


class Summary(NamedTuple):
    """A summary that takes the place of thinned batches."""

    batch: Batch
    link: bytes
    period_s: int
    first_ts: int
    last_ts: int


class Doom(NamedTuple):
    """Batches to delete, as ranges of seqs; which of them are a loss; what is to be said besides.

    `summaries` take the place of some of them, `fewer` being how many batches that saves.
    """

    ranges: list[tuple[int, int]]
    lost: list[Loss]
    events: Sequence[Event] = ()
    summaries: Sequence[Summary] = ()
    fewer: int = 0
    bytes: int = 0
    """What the bodies of those to delete take."""


NOTHING = Doom([], [])


def expired(oldest: Iterable[Stored], settled: Ranges, before_run_ms: int) -> Doom:
    """Choose the settled batches older than that, from the oldest on up to the first that stays.

    Age is told by how long the journal has been open: the wall clock may step.
    """
    doomed: list[Stored] = []
    for stored in oldest:
        if stored.run_ms >= before_run_ms or not settled.covers(stored.first, stored.last):
            break
        doomed.append(stored)
    return dooming(doomed, settled)


def freeing(oldest: Iterable[Stored], settled: Ranges, need_bytes: int) -> Doom:
    """Choose the first batches that together give back `need_bytes`."""
    doomed: list[Stored] = []
    freed = 0
    for stored in oldest:
        if freed >= need_bytes:
            break
        doomed.append(stored)
        freed += stored.bytes
    return dooming(sorted(doomed), settled)._replace(bytes=freed)


def finer_periods(bytes_by_period: Mapping[int, int]) -> list[int]:
    """Return what to thin, by its period, in the order to try: what is finer keeps half of the room that there is.

    With a long outage the file so comes to hold the last hours as read, days of minutes and weeks of quarters.
    """
    periods: list[int] = []
    left = sum(bytes_by_period.values())
    for finer in COARSER:
        if 2 * bytes_by_period.get(finer, 0) > left or periods:
            periods.append(finer)
        left -= bytes_by_period.get(finer, 0)
    return periods


def stretches(
    oldest: Iterable[Stored], published: Ranges, timing: Callable[[Stored], bytes]
) -> list[list[list[Stored]]]:
    """Return what is to be thinned together: runs of batches that follow on each other, with events between them.

    What has gone out and what has not are never in one: whoever has some of it already could make nothing of a
    summary of all. Nor are batches whose times are to be read differently.
    """
    made: list[list[list[Stored]]] = []
    was: tuple[bool, bytes] | None = None
    for stored in oldest:
        now = published.overlaps(stored.first, stored.last), timing(stored)
        if now != was:
            made.append([])
        if made[-1] and made[-1][-1][-1].last + 1 == stored.first:
            made[-1][-1].append(stored)
        else:
            made[-1].append([stored])
        was = now
    return made


def joined(lost: Iterable[Loss]) -> list[Loss]:
    """Join losses that overlap or follow on each other, so that one gap event names them."""
    joint: list[Loss] = []
    for loss in sorted(lost):
        if joint and loss.first <= joint[-1].last + 1:
            before = joint.pop()
            later = loss if loss.last >= before.last else before
            loss = later._replace(first=before.first, batches=before.batches + loss.batches)
        joint.append(loss)
    return joint


class NamedLosses:
    """What gap events name and nobody upstream has confirmed.

    A loss beside one of these is named together with it. So a journal that drops its oldest records for days, with
    the gap events among them, names one range that grows, instead of more and more of them.
    """

    def __init__(self) -> None:
        self._named: list[tuple[Loss, int]] = []

    def add(self, losses: Iterable[Loss], seq: int) -> None:
        """Note that the batch at `seq` names these; what it names again is named by it alone."""
        for loss in losses:
            self._named = [
                (known, by) for known, by in self._named if known.first < loss.first or known.last > loss.last
            ]
            self._named.append((loss._replace(batches=[]), seq))

    def widened(self, lost: Iterable[Loss], settled: Ranges) -> list[Loss]:
        """Return losses, each joined with what was named beside it before and is not confirmed."""
        self._named = [(known, by) for known, by in self._named if not settled.covers(by, by)]
        lost = list(lost)
        wide = joined([*lost, *(known for known, _ in self._named)])
        return [one for one in wide if any(one.first <= loss.first <= one.last for loss in lost)]


def dooming(doomed: Iterable[Stored], settled: Ranges) -> Doom:
    """Return what deleting these batches, which are in order, comes to."""
    ranges: list[tuple[int, int]] = []
    lost: list[Loss] = []
    for stored in doomed:
        batch = (stored.first, stored.last)
        if ranges and ranges[-1][1] == stored.first - 1:
            ranges[-1] = (ranges[-1][0], stored.last)
        else:
            ranges.append(batch)
        if not settled.covers(*batch):
            lost.append(Loss(*batch, stored.link, [batch], "full"))
    return Doom(ranges, joined(lost))
