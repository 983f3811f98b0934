"""The plant as control knows it: its rules, its setpoints' limits, and how long its readings are good for."""

from collections.abc import Mapping
from typing import NamedTuple

from edgegw.control.guard import Limits
from edgegw.control.rule import Rule


class Plant(NamedTuple):
    """What the engine knows of the site: rules, limits, how long each device's readings are good for.

    `overdue_after_s` is how long after it was seen a device must have been read again, or be lost.
    """

    rules: tuple[Rule, ...]
    limits: Mapping[str, Limits]
    stale_after_s: Mapping[str, float]
    rule_stale_after_s: Mapping[str, float]
    hand_back: str
    overdue_after_s: Mapping[str, float]

    def learnt(self, device: str, types: Mapping[str, str]) -> "Plant":
        """Return the plant with the types in which a device says that it holds its tags."""
        finer = dict(self.limits)
        for tag, kind in types.items():
            if (limits := finer.get(f"{device}.{tag}")) is not None:  # a device may have been configured anew
                finer[f"{device}.{tag}"] = limits._replace(grid=limits.grid.held_as(kind))
        return self._replace(limits=finer)
