"""The pane: what a stretch of time comes to, in figures that can be joined with those of others."""

from collections.abc import Callable, Iterable, Mapping
from math import inf, isfinite
from typing import NamedTuple

HOUR_MS = 3_600_000

Reading = tuple[float, int, float]
"""When, which tag, what."""


class Pane(NamedTuple):
    """A stretch of one or several signals.

    `area` is value times milliseconds; it, `low` and `high` are of the signals where they are known, for
    `covered_ms` in all. `total`, `first` and `last` are of the readings, of which there are `readings`.
    """

    area: float = 0.0
    covered_ms: int = 0
    low: float = inf
    high: float = -inf
    total: float = 0.0
    readings: int = 0
    first: Reading = (inf, 0, 0.0)
    last: Reading = (-inf, 0, 0.0)

    @property
    def empty(self) -> bool:
        """Whether nothing is known of it."""
        return not self.covered_ms and not self.readings


EMPTY = Pane()
_JOIN: tuple[Callable[..., object], ...] = (sum, sum, min, max, sum, sum, min, max)


def joined(panes: Iterable[Pane]) -> Pane:
    """Return what panes come to together: of stretches that follow each other, or of several tags, or both."""
    columns = zip(*panes, strict=True)
    figures = [join(column) for join, column in zip(_JOIN, columns, strict=False)]
    return Pane(*figures) if figures else EMPTY  # type: ignore[arg-type]


_AGGREGATES: Mapping[str, Callable[[Pane], float | None]] = {
    "mean": lambda pane: pane.area / pane.covered_ms if pane.covered_ms else None,
    "integral": lambda pane: pane.area / HOUR_MS if pane.covered_ms else None,
    "min": lambda pane: pane.low if pane.covered_ms else None,
    "max": lambda pane: pane.high if pane.covered_ms else None,
    "sum": lambda pane: pane.total,
    "count": lambda pane: pane.readings,
    "first": lambda pane: pane.first[2] if pane.readings else None,
    "last": lambda pane: pane.last[2] if pane.readings else None,
}


def aggregate(pane: Pane, name: str) -> float | None:
    """Return one of the contract's aggregates, None where there is nothing that it could be of."""
    value = _AGGREGATES[name](pane)
    return value if value is not None and isfinite(value) else None
