"""When a device's scans are due."""

from collections import defaultdict
from collections.abc import Mapping
from math import ceil
from typing import NamedTuple
from zlib import crc32

from edgegw.config.schema import AnyDevice, ModbusDevice

SPREAD_S = 0.25
"""The first scans of many devices are spread over this much, so that they do not all come at once for ever."""

SHARED_SPREAD_MAX_S = 30.0
"""The first scans of units that share a connection are spread over their period, but nobody waits longer."""


class Due(NamedTuple):
    """When the next scan is due, and how many before it are passed over."""

    at_s: float
    skipped: int


def first_delays(devices: Mapping[str, AnyDevice]) -> dict[str, float]:
    """Return how long after the start each device's first scan is due, in seconds.

    Soon, and at the same place among its neighbours each time. The units of one url are spread evenly over their
    periods, since their connection carries one request at a time.
    """
    delays = {
        name: crc32(name.encode()) % 1000 / 1000 * min(SPREAD_S, device.every.s)
        for name, device in devices.items()
    }
    units: dict[str, list[str]] = defaultdict(list)
    for name, device in devices.items():
        if isinstance(device, ModbusDevice):
            units[device.url].append(name)
    for names in units.values():
        if len(names) > 1:
            for place, name in enumerate(sorted(names)):
                delays[name] = place / len(names) * min(SHARED_SPREAD_MAX_S, devices[name].every.s)
    return delays


def following(due_s: float, now_s: float, period_s: float) -> Due:
    """Return the next scan's time on the grid that `due_s` is on: never two at once, a late one is skipped."""
    skipped = max(0, ceil((now_s - due_s) / period_s) - 1)
    return Due(due_s + (skipped + 1) * period_s, skipped)
