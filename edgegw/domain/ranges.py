"""Sets of sequence numbers, kept as the ranges they fall into."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of integers held as sorted, disjoint, non-adjacent closed ranges.

    What is acknowledged or received is a long run from 1 and a few islands above it, so every operation
    costs in the number of runs, not of numbers.
    """

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in ranges:
            self.add(first, last)

    def add(self, first: int, last: int) -> None:
        """Put `first` to `last`, both included, into the set."""
        lo = bisect_left(self._lasts, first - 1)
        hi = bisect_right(self._firsts, last + 1)
        if lo < hi:
            first = min(first, self._firsts[lo])
            last = max(last, self._lasts[hi - 1])
        self._firsts[lo:hi] = [first]
        self._lasts[lo:hi] = [last]

    def remove(self, first: int, last: int) -> None:
        """Take `first` to `last`, both included, out of the set."""
        lo = bisect_left(self._lasts, first)
        hi = bisect_right(self._firsts, last)
        if lo >= hi:
            return
        firsts, lasts = [], []
        if self._firsts[lo] < first:
            firsts.append(self._firsts[lo])
            lasts.append(first - 1)
        if self._lasts[hi - 1] > last:
            firsts.append(last + 1)
            lasts.append(self._lasts[hi - 1])
        self._firsts[lo:hi] = firsts
        self._lasts[lo:hi] = lasts

    def covers(self, first: int, last: int) -> bool:
        """Tell whether the whole of `first` to `last` is in the set."""
        at = bisect_left(self._lasts, last)
        return at < len(self._firsts) and self._firsts[at] <= first

    def overlaps(self, first: int, last: int) -> bool:
        """Tell whether any of `first` to `last` is in the set."""
        at = bisect_left(self._lasts, first)
        return at < len(self._firsts) and self._firsts[at] <= last

    def gaps(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of `first` to `last` that are not in the set, in order."""
        at = bisect_left(self._lasts, first)
        while first <= last:
            if at >= len(self._firsts) or self._firsts[at] > last:
                yield first, last
                return
            if first < self._firsts[at]:
                yield first, self._firsts[at] - 1
            first = self._lasts[at] + 1
            at += 1

    def common(self, other: "Ranges") -> "Ranges":
        """Return what is in both sets."""
        both = self.copy()
        for first, last in self:
            for gap in other.gaps(first, last):
                both.remove(*gap)
        return both

    def prefix(self) -> int:
        """Return the greatest n for which 1 to n are all in the set, 0 if 1 is not."""
        if self._firsts and self._firsts[0] <= 1:
            return self._lasts[0]
        return 0

    def total(self) -> int:
        """Return how many numbers are in the set."""
        return sum(self._lasts) - sum(self._firsts) + len(self._firsts)

    def copy(self) -> "Ranges":
        """Return a set of its own with the same numbers."""
        twin = Ranges()
        twin._firsts = self._firsts.copy()
        twin._lasts = self._lasts.copy()
        return twin

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._firsts, self._lasts, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._firsts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"
