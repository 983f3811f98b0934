"""The signal of one tag: its readings held as steps, in the order of their times in whatever order they come."""

from bisect import bisect_left
from math import inf

from edgegw.series.pane import EMPTY, Pane

HELD, READING, HOLE, CARRIED = range(4)
"""What a point is, in the order that they have at one moment: what was held over a step of the clock, a reading, the
end of what was held, and what went on all the same."""

Point = tuple[float, int, float | None, float]
"""From when, of which kind, the value (None: unknown), and until when that holds if nothing follows."""

UNKNOWN: Point = (-inf, HOLE, None, -inf)


class Signal:
    """Keeps the points from the fold on, and the last one before it."""

    __slots__ = ("_before", "_index", "_last", "_points", "_resumed_ms", "hold_ms", "late")

    def __init__(self, index: int, hold_ms: float) -> None:
        self.hold_ms = hold_ms
        self.late = 0
        self._index = index
        self._points: list[Point] = []
        self._before = UNKNOWN
        self._last: tuple[int, float | None] = (0, None)
        self._resumed_ms: int | None = None

    def take(self, ts: int, value: float | None, open_ms: int) -> int | None:
        """Take a reading; return from when on the signal is another one, None if it is not.

        What is older than `open_ms` is too late for its time. It is counted, and holds from there on all the same
        if nothing newer is known.
        """
        changed: int | None = None
        resumed_ms, self._resumed_ms = self._resumed_ms, None
        if resumed_ms is not None and ts < resumed_ms:
            changed = max(resumed_ms, open_ms)
            self._put((changed, CARRIED, value, ts + self.hold_ms))
        elif (ts, value) == self._last:
            return None  # the source says it again: it is one reading
        self._last = (ts, value)
        if ts >= open_ms:
            self._put((ts, READING, value, ts + self.hold_ms))
            return ts
        if changed is None:
            self.late += 1
            changed = self._late((open_ms, CARRIED, value, ts + self.hold_ms), ts)
        return changed

    def end(self, ts: int, open_ms: int) -> int | None:
        """End what is held; return from when on the signal is another one, None if it is not."""
        if ts >= open_ms:
            self._put((ts, HOLE, None, ts))
            return ts
        return self._late((open_ms, HOLE, None, ts), ts)

    def resume(self, ts: int) -> None:
        """Take the next reading for what holds from `ts` on, however old it is by its own time."""
        self._resumed_ms = ts

    def carry(self, ts: int, value: float) -> None:
        """Go on with a value at another time: the clock was set."""
        self._put((ts, HELD, value, ts + self.hold_ms))

    def held(self, at_ms: int) -> float | None:
        """Return what is held just after a moment, None if that is unknown."""
        _, _, value, until = self._point(bisect_left(self._points, (at_ms + 1,)) - 1)
        return value if until > at_ms else None

    def following(self, at_ms: int) -> float:
        """Return the first moment from `at_ms` on at which something is known, infinity if there is none."""
        if self.held(at_ms) is not None:
            return at_ms
        known = (at for at, _, value, _ in self._points if at >= at_ms and value is not None)
        return next(known, inf)

    def measure(self, start_ms: int, stop_ms: int) -> Pane:
        """Return what it comes to from one moment to just before another; neither is before the fold."""
        area, covered, low, high, total, count = 0.0, 0.0, inf, -inf, 0.0, 0
        first, last = EMPTY.first, EMPTY.last
        begin, end = bisect_left(self._points, (start_ms,)), bisect_left(self._points, (stop_ms,))
        _, _, value, until = self._point(begin - 1)
        since: float = start_ms
        for at, kind, new, new_until in [*self._points[begin:end], (stop_ms, HOLE, None, stop_ms)]:
            if value is not None and (held := min(at, until) - since) > 0:
                area += value * held
                covered += held
                low = min(low, value)
                high = max(high, value)
            if kind == READING and new is not None:
                total += new
                count += 1
                first = min(first, (at, self._index, new))
                last = (at, self._index, new)
            since, value, until = at, new, new_until
        return Pane(area, int(covered), low, high, total, count, first, last)

    def fold(self, upto_ms: int) -> None:
        """Let go of the points before a moment, but for what they carry into it."""
        end = bisect_left(self._points, (upto_ms,))
        self._before = self._point(end - 1)
        del self._points[:end]

    def forget(self) -> None:
        """Let go of everything."""
        self._points.clear()
        self._before = UNKNOWN

    def _point(self, index: int) -> Point:
        return self._points[index] if index >= 0 else self._before

    def _late(self, point: Point, ts: int) -> int | None:
        """Put a point where the open time begins, unless something newer than `ts` is known there."""
        at = int(point[0])
        if self._point(bisect_left(self._points, (at + 1,)) - 1)[0] > ts:
            return None
        self._put(point)
        return at

    def _put(self, point: Point) -> None:
        points = self._points
        if not points or points[-1][0] < point[0]:
            points.append(point)
            return
        place = point[:2]
        index = bisect_left(points, place)
        if index < len(points) and points[index][:2] == place:
            points[index] = point
        else:
            points.insert(index, point)
