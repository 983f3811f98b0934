"""The image: the latest reading of every tag, as control and status see it."""

from collections.abc import Mapping
from typing import NamedTuple

from edgegw.domain.record import Scan
from edgegw.domain.tag import Value


class Latest(NamedTuple):
    """A device's latest readings.

    `at_s` is when they were acquired, by the monotonic clock. While `held` the device would have said if they
    had changed (a subscription), so that they do not age.
    """

    ts: int
    values: Mapping[str, Value]
    quality: Mapping[str, str]
    at_s: float
    held: bool = False

    def fresh(self, now_s: float, stale_after_s: float) -> bool:
        """Tell whether the readings are young enough to act on."""
        return self.held or now_s <= self.at_s + stale_after_s


class Image:
    """The latest readings by device. What is in it is immutable: a shallow copy is a frozen image."""

    def __init__(self) -> None:
        self.devices: dict[str, Latest] = {}

    def take(self, scan: Scan, now_s: float, *, held: bool = False) -> None:
        """Take a scan; tags that it does not hold keep what they had."""
        known = self.devices.get(scan.device)
        quality = scan.quality or {}
        values: Mapping[str, Value] = scan.values
        if known is not None and len(values) < len(known.values):
            quality = {tag: why for tag, why in known.quality.items() if tag not in values} | quality
            values = {**known.values, **values}
        self.devices[scan.device] = Latest(scan.ts, values, quality, now_s, held)

    def lost(self, device: str, now_s: float) -> None:
        """Note that a device stopped answering: from now on what is known of it ages."""
        known = self.devices.get(device)
        if known is not None and known.held:
            self.devices[device] = known._replace(at_s=now_s, held=False)

    def forget(self, device: str) -> None:
        """Drop a device that is no longer configured."""
        self.devices.pop(device, None)

    def frozen(self) -> dict[str, Latest]:
        """Return the image as it is now; it does not change any more."""
        return dict(self.devices)
