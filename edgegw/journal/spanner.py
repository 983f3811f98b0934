"""The spanner: gathers neighbouring batches into the spans of the index by time."""

from edgegw.journal.store import Span

BATCHES = 256
BYTES = 1024**2
"""What a span covers at most, packed: a search reads as much at the least."""


class Spanner:
    """Takes each batch as it is numbered; a span that is never finished costs a search, nothing else."""

    def __init__(self) -> None:
        self._open: Span | None = None
        self._batches = self._bytes = 0

    def add(self, span: Span, size: int) -> None:
        """Take a batch of so many bytes."""
        known = self._open
        if known is None:
            self._open = span
        else:
            self._open = Span(
                known.first, max(known.last, span.last),
                min(known.first_ts, span.first_ts), max(known.last_ts, span.last_ts),
            )  # fmt: skip
        self._batches += 1
        self._bytes += size

    def take(self, *, all_of_it: bool = False) -> list[Span]:
        """Return the span that is complete, or whatever there is."""
        if self._open is None or not (all_of_it or self._batches >= BATCHES or self._bytes >= BYTES):
            return []
        done = [self._open]
        self.clear()
        return done

    def clear(self) -> None:
        """Forget what is not finished."""
        self._open = None
        self._batches = self._bytes = 0
