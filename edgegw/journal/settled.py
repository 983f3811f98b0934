"""What needs no sending any more: acknowledged by the upstream, or gone and named in a gap."""

import threading
from collections.abc import Iterable

from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges


class Settled:
    """A set of seqs that the event loop and the writer share, and the count of batches outside it."""

    def __init__(self) -> None:
        self.pending_batches = 0
        self.dirty = False
        self._stream = ""
        self._ranges = Ranges()
        self._lock = threading.Lock()

    def acknowledge(self, batch: Batch) -> None:
        """Note that the upstream has a batch; one of an earlier stream settles nothing in this one."""
        self.acknowledge_spans(batch.stream, [(batch.seq, batch.last)])

    def acknowledge_spans(self, stream: str, batches: Iterable[tuple[int, int]]) -> None:
        """Note that the upstream has these batches, each named by its first and last seq."""
        with self._lock:
            if stream != self._stream:
                return
            for first, last in batches:
                if not self._ranges.covers(first, last):
                    self._ranges.add(first, last)
                    self.pending_batches -= 1
                    self.dirty = True

    def gone(self, first: int, last: int, batches: Iterable[tuple[int, int]]) -> None:
        """Note that seqs are gone for good, and with them these batches."""
        with self._lock:
            self.pending_batches -= sum(not self._ranges.covers(*batch) for batch in batches)
            self._ranges.add(first, last)
            self.dirty = True

    def appended(self, batches: int) -> None:
        """Count new batches."""
        with self._lock:
            self.pending_batches += batches

    def begin(self, stream: str, ranges: Ranges, pending_batches: int) -> None:
        """Start from what a journal says of itself."""
        with self._lock:
            self._stream = stream
            self._ranges = ranges
            self.pending_batches = pending_batches

    def copy(self) -> Ranges:
        """Return the set as it is now."""
        with self._lock:
            return self._ranges.copy()
