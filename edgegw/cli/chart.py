"""Plain-text charts of readings over time, in braille dots: two columns and four rows of them a sign. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from typing import NamedTuple

ROWS = 6
LEFT = 10
"""Signs for the scale, left of the dots."""
BLANK = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot of a braille sign, by column and row from the top (Unicode 16.0, 15.7)."""
BRIDGED = 3
"""Empty columns between readings are filled if there are no more than so many times the usual number."""
TICK_WIDTH = 20


class Extent(NamedTuple):
    """The least, greatest and last value within a column."""

    low: float
    high: float
    last: float


def plot(columns: Mapping[int, Extent], width: int, rows: int = ROWS) -> list[str]:
    """Return `rows` lines (two at least) of `width` signs, with the scale on their left.

    There is at least one column; they are numbered from 0 to 2 * `width` - 1.
    """
    low = min(extent.low for extent in columns.values())
    high = max(extent.high for extent in columns.values())
    cells = [[0] * width for _ in range(rows)]
    for at, (bottom, top) in _levels(columns, low, high, rows * 4 - 1).items():
        for level in range(bottom, top + 1):
            row, dot = divmod(rows * 4 - 1 - level, 4)
            cells[row][at // 2] |= DOTS[at % 2][dot]
    labels = [_label(high), *[""] * (rows - 2), _label(low)]
    return [
        f"{label:>{LEFT}} ┤" + "".join(chr(BLANK + cell) if cell else " " for cell in row).rstrip()
        for label, row in zip(labels, cells, strict=True)
    ]


def _label(value: float) -> str:
    text = f"{value:.4g}"
    return text if len(text) <= LEFT else f"{value:.3g}"


def _levels(columns: Mapping[int, Extent], low: float, high: float, most: int) -> dict[int, tuple[int, int]]:
    """Return from which level to which each column is drawn; a value holds until the next if that is near."""

    def level(value: float) -> int:
        return round((value - low) / (high - low) * most) if high > low else most // 2

    order = sorted(columns)
    usual = sorted(after - at for at, after in pairwise(order))
    near = BRIDGED * usual[len(usual) // 2] if usual else 0
    levels: dict[int, tuple[int, int]] = {}
    for at, after in zip(order, [*order[1:], None], strict=True):
        extent = columns[at]
        bottom, top = level(extent.low), level(extent.high)
        levels[at] = (bottom, top)
        if after is not None and after - at <= near:
            held = level(extent.last)
            levels |= dict.fromkeys(range(at + 1, after), (held, held))
    return levels


def axis(first_ms: int, last_ms: int, width: int) -> tuple[str, str]:
    """Return the line below charts of `width` signs, and the times that stand at its ticks, UTC."""
    count = max(1, width // TICK_WIDTH)
    form = "%H:%M:%S" if last_ms - first_ms < 2 * 86_400_000 else "%m-%d %H:%M"
    line, times = ["─"] * width, [" "] * width
    for tick in range(count):
        at = tick * width // count
        ts = first_ms + (last_ms - first_ms) * at // width
        line[at] = "┬"
        for offset, sign in enumerate(datetime.fromtimestamp(ts / 1000, UTC).strftime(form)):
            if at + offset < width:
                times[at + offset] = sign
    left = " " * (LEFT + 1)
    return f"{left}└" + "".join(line), f"{left} " + "".join(times).rstrip()
