"""When a device's scans are due."""

from math import ceil
from typing import NamedTuple
from zlib import crc32

SPREAD_S = 0.25
"""The first scans of many devices are spread over this much, so that they do not all come at once for ever."""


class Due(NamedTuple):
    """When the next scan is due, and how many before it are passed over."""

    at_s: float
    skipped: int


def first(name: str, now_s: float, period_s: float) -> float:
    """Return when a device's first scan is due: soon, and always at the same place among its neighbours."""
    return now_s + crc32(name.encode()) % 1000 / 1000 * min(SPREAD_S, period_s)


def following(due_s: float, now_s: float, period_s: float) -> Due:
    """Return the next scan's time on the grid that `due_s` is on: never two at once, a late one is skipped."""
    skipped = max(0, ceil((now_s - due_s) / period_s) - 1)
    return Due(due_s + (skipped + 1) * period_s, skipped)
