"""What a sound configuration still says that its owner may not have meant. Pure."""

from collections.abc import Iterator

from edgegw.config.schema import Config, Guard
from edgegw.control.guard import Limits, settled
from edgegw.control.plant import Plant


def advice(config: Config, plant: Plant) -> list[str]:
    """Return a line for each oddity of the writable tags, each with its place."""
    return [
        f"device.{device}.tags.{name}: {line}"
        for device, section in config.device.items()
        for name, tag in section.tags.items()
        if tag.writable
        for line in (*_limits(plant.limits[f"{device}.{name}"]), *_wear(tag))
    ]


def _wear(tag: Guard) -> Iterator[str]:
    """Say where a register that wears out may be written without end: EEPROM lasts some 100,000 writes."""
    if tag.eeprom and tag.max_per_hour is None:
        yield "kept in EEPROM, which wears with each write, and has no max_per_hour; expected max_per_hour = 4 or so"


def _limits(limits: Limits) -> Iterator[str]:
    for key, value in (("min", limits.min), ("max", limits.max), ("safe", limits.safe)):
        if value is None or isinstance(value, bool | str):
            continue
        held = settled(limits, value)
        if limits.resolution and held != value:
            yield f"{key} {value:g} comes to {held:g}, since the register counts in {limits.resolution:g}"
