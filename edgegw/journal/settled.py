"""What needs no sending any more, and what is in the drain's hands: shared by the event loop and the writer."""

import threading
from collections.abc import Callable, Iterable, Sequence

from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges


class Settled:
    """The set of seqs that are acknowledged or named in a gap, and the count of batches outside it.

    What the drain holds in its hands is not thinned meanwhile, and what is being thinned it does not take: otherwise
    a batch and its summary would both be sent. Nor is what it has not `heard` of yet: it takes that as it was made.

    Where receivers confirm (`end_to_end`), what the broker has confirmed and no receiver yet is `delivered`: still
    pending, and the first to go when there must be room.
    """

    def __init__(self) -> None:
        self.pending_batches = 0
        self.dirty = False
        self.generation = 0
        self.releases = 0
        self.heard = 0
        self.end_to_end = False
        self._stream = ""
        self._ranges = Ranges()
        self._held = Ranges()
        self._published = Ranges()
        self._delivered = Ranges()
        self._claimed = Ranges()
        self._lock = threading.Lock()

    def acknowledge(self, batch: Batch) -> None:
        """Note that the upstream has a batch; one of an earlier stream settles nothing in this one."""
        self.acknowledge_spans(batch.stream, [(batch.seq, batch.last)])

    def acknowledge_spans(
        self, stream: str, batches: Sequence[tuple[int, int]], generation: int | None = None
    ) -> bool:
        """Note that the upstream has these batches, each named by its first and last seq.

        False, and nothing is noted, if some may have been thinned since they were looked up, at `generation`.
        """
        with self._lock:
            if generation is not None and self._outdated(batches, generation):
                return False
            if stream != self._stream:
                return True
            for first, last in batches:
                if not self._ranges.covers(first, last):
                    self._ranges.add(first, last)
                    self.pending_batches -= 1
                    self.dirty = True
            return True

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

    def begin(self, stream: str, ranges: Ranges, head: int, *, end_to_end: bool) -> None:
        """Start from what a journal says of itself."""
        with self._lock:
            self._stream = stream
            self.heard = head
            self.end_to_end = end_to_end
            self._ranges = ranges
            self._held, self._published, self._delivered, self._claimed = (Ranges() for _ in range(4))
            self.generation += 1

    def note_end_to_end(self) -> None:
        """Note that a receiver has confirmed something of this stream."""
        with self._lock:
            self.dirty = self.dirty or not self.end_to_end
            self.end_to_end = True

    def note_delivered(self, batch: Batch) -> None:
        """Note that the broker has confirmed a batch that no receiver has confirmed."""
        with self._lock:
            if batch.stream == self._stream:
                self._delivered.add(batch.seq, batch.last)

    def delivered(self) -> Ranges:
        """Return what the broker has confirmed and nobody else, of what is pending."""
        with self._lock:
            delivered = self._delivered.copy()
            for first, last in self._ranges:
                delivered.remove(first, last)
            return delivered

    def recount(self, pending: Callable[[Ranges], int]) -> None:
        """Count the batches outside the set as the file holds them."""
        with self._lock:
            self.pending_batches = pending(self._ranges)

    def copy(self) -> Ranges:
        """Return the set as it is now."""
        with self._lock:
            return self._ranges.copy()

    # -- what the drain has in its hands -----------------------------------------------------------------

    def hold(self, batches: Sequence[Batch], generation: int | None = None) -> bool:
        """Take batches into hand; False if some may have been thinned since they were read, at `generation`."""
        with self._lock:
            if generation is not None and self._outdated([(b.seq, b.last) for b in batches], generation):
                return False
            for batch in batches:
                if batch.stream == self._stream:
                    self._held.add(batch.seq, batch.last)
            return True

    def _outdated(self, batches: Sequence[tuple[int, int]], generation: int) -> bool:
        return generation != self.generation or any(self._claimed.overlaps(*batch) for batch in batches)

    def hear(self, batch: Batch) -> None:
        """Note that the listener has heard of all up to this batch."""
        with self._lock:
            if batch.stream == self._stream:
                self.heard = batch.last

    def publish(self, batch: Batch) -> None:
        """Note that a batch has gone out: the upstream may have it."""
        with self._lock:
            if batch.stream == self._stream:
                self._published.add(batch.seq, batch.last)

    def carry(self, stream: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Note that these seqs have gone out by hand."""
        with self._lock:
            for first, last in ranges if stream == self._stream else ():
                self._published.add(first, last)

    def release(self, batches: Sequence[Batch] | None = None) -> None:
        """Let go of batches, or of all."""
        with self._lock:
            if batches is None:
                self._held = Ranges()
                self.releases += 1
            for batch in batches or ():
                self._held.remove(batch.seq, batch.last)

    # -- thinning ----------------------------------------------------------------------------------------

    def out_of_reach(self) -> Ranges:
        """Return what must not be thinned: settled, or in hand."""
        with self._lock:
            reach = self._ranges.copy()
            for first, last in self._held:
                reach.add(first, last)
            return reach

    def published(self) -> Ranges:
        """Return what has gone out since the stream was opened."""
        with self._lock:
            return self._published.copy()

    def claim(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Keep the drain from taking these until `thinned`; False if it has some in hand."""
        with self._lock:
            if any(self._held.overlaps(first, last) for first, last in ranges):
                return False
            self._claimed = Ranges(ranges)
            return True

    def thinned(self, fewer: int = 0) -> None:
        """Note that what was claimed has been replaced (or not, if it failed), by so many batches fewer."""
        with self._lock:
            self._claimed = Ranges()
            self.generation += 1
            self.pending_batches -= fewer
