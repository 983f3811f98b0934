"""Walks the batches that may hold records of a period, whatever is written meanwhile."""

from collections.abc import Iterator
from typing import NamedTuple

from edgegw.domain.batch import Batch
from edgegw.journal.store import Reader

STEP = 64
"""Batches read in one SELECT, so that none stays open."""


class Period(NamedTuple):
    """A stretch of time in milliseconds, its end excluded."""

    from_ms: int = -(1 << 62)
    to_ms: int = 1 << 62

    @property
    def bounded(self) -> bool:
        """Whether it leaves anything out."""
        return self != Period()


def walk(reader: Reader, period: Period) -> Iterator[Batch]:
    """Yield the batches up to the present head that may hold records of a period, in order."""
    for first, last in reader.spans_between(period.from_ms, period.to_ms - 1):
        while batches := reader.batches(first, last, limit=STEP):
            yield from batches
            first = batches[-1].seq + 1
