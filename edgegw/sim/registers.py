"""The register maps of the simulated Modbus devices, as data over the plant's state."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgegw.sim import plant
from edgegw.sim.plant import State

Raw = int | float | bytes
Write = Callable[[State, float], State | None]
"""Apply a raw value that a client wrote to the plant; None if the device will not take it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a device: where it stands, how it is packed (`struct`, big-endian) and what it shows."""

    table: str
    address: int
    format: str
    read: Callable[[State], Raw]
    write: Write | None = None
    words_swapped: bool = False

    @property
    def size(self) -> int:
        """Registers (or coils) that the value takes."""
        return 1 if self.format == "?" else struct.calcsize(">" + self.format) // 2

    def encode(self, state: State) -> list[int]:
        """Return the point's registers."""
        raw = struct.pack(">" + self.format, self.read(state))
        words = [word for (word,) in struct.iter_unpack(">H", raw)]
        return words[::-1] if self.words_swapped else words

    def decode(self, words: list[int]) -> float:
        """Return the number in the point's registers."""
        raw = struct.pack(f">{self.size}H", *(words[::-1] if self.words_swapped else words))
        return float(struct.unpack(">" + self.format, raw)[0])


def _power(field: str, low: float, high: float) -> Write:
    def write(state: State, raw: float) -> State | None:
        if not low <= raw <= high:
            return None
        return replace(state, **{field: raw})  # type: ignore[arg-type]

    return write


def _switch(field: str) -> Write:
    def write(state: State, raw: float) -> State:
        return replace(state, **{field: raw != 0.0})  # type: ignore[arg-type]

    return write


def _limit(state: State, raw: float) -> State | None:
    return replace(state, solar_limit=raw / 100.0) if raw <= 100.0 else None


def _whole(value: float) -> int:
    return math.floor(value + 0.5)


METER = (
    Point("holding", 0, "f", lambda s: s.voltage_v),
    Point("holding", 2, "f", lambda s: s.grid_kw * 1000.0),
    Point("holding", 4, "f", lambda s: s.frequency_hz),
    Point("holding", 6, "Q", lambda s: _whole(s.import_kwh * 1000.0)),
    Point("holding", 10, "Q", lambda s: _whole(s.export_kwh * 1000.0)),
    Point("coil", 0, "?", lambda s: s.breaker, _switch("breaker")),
)
BATTERY = (
    Point("input", 0, "H", lambda s: _whole(s.soc * 1000.0)),
    Point("input", 1, "i", lambda s: _whole(s.battery_kw * 1000.0)),
    Point("input", 3, "h", lambda s: _whole(s.battery_c * 10.0)),
    Point(
        "holding",
        10,
        "f",
        lambda s: s.battery_setpoint_kw,
        _power("battery_setpoint_kw", -plant.BATTERY_KW, plant.BATTERY_KW),
    ),
)
SOLAR = (
    Point("input", 0, "I", lambda s: _whole(s.solar_kw * 1000.0), words_swapped=True),
    Point("input", 2, "Q", lambda s: _whole(s.solar_kwh * 1000.0), words_swapped=True),
    Point("input", 6, "H", lambda s: int(s.solar_kw > 0.0) | int(s.solar_limit < 1.0) << 1),
    Point("holding", 0, "H", lambda s: _whole(s.solar_limit * 100.0), _limit),
)
GENSET = (
    Point("input", 0, "H", lambda s: s.genset.value),
    Point("input", 1, "f", lambda s: s.genset_kw),
    Point("input", 3, "H", lambda s: _whole(s.fuel * 1000.0)),
    Point("input", 4, "I", lambda s: _whole(s.genset_h * 10.0)),
    Point(
        "holding", 0, "f", lambda s: s.genset_setpoint_kw, _power("genset_setpoint_kw", 0.0, plant.GENSET_KW)
    ),
    Point("holding", 10, "12s", lambda s: b"EG-60 D"),
    Point("coil", 0, "?", lambda s: s.genset_start, _switch("genset_start")),
)
