"""What numbers a register can hold, so that a limit is kept by what arrives there and not only by what was meant. Pure.

All is in decimals as they are written: with scale 0.1 a raw 461 is 46.1, and no more than a `max` of 46.1.
"""

import struct
from math import inf, isfinite
from typing import Literal, NamedTuple

from edgegw.drivers.scaling import scaling

Kind = Literal["integer", "float32", "float64"]


class Grid(NamedTuple):
    """The raw numbers of a kind, each times `scale` plus `offset`."""

    kind: Kind = "float64"
    scale: float = 1.0
    offset: float = 0.0

    @property
    def step(self) -> float:
        """The difference between two neighbours; 0 where the register does not count in steps."""
        return abs(self.scale) if self.kind == "integer" else 0.0

    def held_as(self, kind: str) -> "Grid":
        """Return what is left of it where the device says that it holds another type, as in `int32`."""
        if kind.startswith(("int", "uint")):
            return self._replace(kind="integer")
        return self._replace(kind="float32") if (self.kind, kind) == ("float64", "float32") else self

    def nearest(self, value: float, low: float = -inf, high: float = inf) -> float | None:
        """Return what is held nearest to a value, from `low` to `high`; None if nothing that is held lies there.

        An integer is not rounded to a double where the register counts in ones.
        """
        ones = (self.kind, self.scale, self.offset) == ("integer", 1.0, 0.0)
        if ones and isinstance(value, int) and low <= value <= high:
            return value
        value = min(max(value, low), high)
        if self.kind == "integer":
            return self._whole(value, low, high)
        if self.kind == "float32":
            return self._single(value, low, high)
        return value

    def _whole(self, value: float, low: float, high: float) -> float | None:
        exact = (value - self.offset) / self.scale
        if not isfinite(exact):
            return value  # no integer holds it: the driver says so
        raw = round(exact)
        towards = -1 if (self._told(raw) > high) == (self.scale > 0.0) else 1
        for near in (raw, raw + towards):
            if low <= self._told(near) <= high:
                return self._told(near)
        return None

    def _told(self, raw: int) -> float:
        """Return a raw number as a driver tells it: as the decimal that is meant."""
        return scaling(self.scale, self.offset).whole(raw)

    def _single(self, value: float, low: float, high: float) -> float | None:
        try:
            raw: float = struct.unpack("<f", struct.pack("<f", (value - self.offset) / self.scale))[0]
        except OverflowError:
            return value  # no float32 holds it: the driver says so
        if self._within(raw, low, high):
            return value
        for near in (_neighbour(raw, -1), _neighbour(raw, 1)):
            if self._within(near, low, high):
                return near * self.scale + self.offset
        return None

    def _within(self, raw: float, low: float, high: float) -> bool:
        """Tell whether a raw float32 lies there; the last digits of a double, which scaling costs, do not count."""
        value = raw * self.scale + self.offset
        return low - abs(low) * 1e-14 <= value <= high + abs(high) * 1e-14


def _neighbour(raw: float, direction: int) -> float:
    """Return the next float32 up or down."""
    bits: int = struct.unpack("<i", struct.pack("<f", raw))[0]
    if raw == 0.0:
        bits = 1 if direction > 0 else 1 - 2**31
    else:
        bits += direction if raw > 0.0 else -direction
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])
