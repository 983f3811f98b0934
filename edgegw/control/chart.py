"""Plain-text charts over time: a bar for what is on or off, levels for what has a value. Pure."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from math import ceil

from edgegw.domain.tag import Scalar

OFF, PARTLY, ON = "·", "▒", "█"
LEVELS = "▁▂▃▄▅▆▇█"


def bar(spans: Iterable[tuple[int, int | None]], first: int, last: int, width: int) -> str:
    """Return a row of `width` signs, each for its part of the time: on, partly on, or off."""
    share = [0.0] * width
    column_ms = max(1.0, (last - first) / width)
    for on, until in spans:
        off = last if until is None else until
        begin, end = (on - first) / column_ms, (max(off, on + 1) - first) / column_ms
        for column in range(max(0, int(begin)), min(width, ceil(end))):
            share[column] += min(end, column + 1) - max(begin, column)
    return "".join(OFF if part <= 0.0 else ON if part > 0.999 else PARTLY for part in share)


def levels(points: Sequence[tuple[int, Scalar]], first: int, last: int, width: int) -> str:
    """Return a row of `width` levels between the least and the greatest value; a text is its first letter."""
    numbers = [float(value) for _, value in points if not isinstance(value, str)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    column_ms = max(1.0, (last - first) / width)
    row, at = "", 0
    for column in range(width):
        while at < len(points) and points[at][0] < first + (column + 1) * column_ms:
            at += 1
        row += _level(points[at - 1][1], low, high) if at else " "
    return row


def _level(value: Scalar, low: float, high: float) -> str:
    if isinstance(value, str):
        return value[:1] or " "
    if high <= low:
        return LEVELS[0]
    return LEVELS[round((float(value) - low) / (high - low) * (len(LEVELS) - 1))]


def axis(first: int, last: int, width: int) -> str:
    """Return the line below the rows: when they begin and when they end."""
    left, right = when(first), when(last)
    return left + right.rjust(width - len(left)) if len(left) + len(right) < width else f"{left} to {right}"


def when(ts: int) -> str:
    """Return a moment, in UTC, to the second."""
    return datetime.fromtimestamp(ts / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
