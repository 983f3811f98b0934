"""The image: the latest reading of every tag, as control and status see it."""

from collections.abc import Mapping
from math import inf
from typing import NamedTuple

from edgegw.domain.record import Scan
from edgegw.domain.tag import Value


class Latest(NamedTuple):
    """A device's latest readings.

    `at_s` is when they were acquired and `seen_s` when they were there, by the monotonic clock. While `held` the
    device would have said if they had changed (a subscription), so that they do not age. `since_s` is since when the
    device has answered without a break, or, while it is `lost`, since when it has not.
    """

    ts: int
    values: Mapping[str, Value]
    quality: Mapping[str, str]
    at_s: float
    held: bool = False
    seen_s: float = -inf
    since_s: float = -inf
    lost: bool = False

    def fresh(self, now_s: float, stale_after_s: float) -> bool:
        """Tell whether the readings are young enough to act on."""
        return self.held or now_s <= self.at_s + stale_after_s

    def answering(self, now_s: float, overdue_after_s: float) -> bool:
        """Tell whether the device answered a moment ago, however long a scan of it takes."""
        return not self.lost and (self.held or now_s <= max(self.at_s, self.seen_s) + overdue_after_s)


class Image:
    """The latest readings by device. What is in it is immutable: a shallow copy is a frozen image."""

    def __init__(self) -> None:
        self.devices: dict[str, Latest] = {}

    def take(self, scan: Scan, now_s: float, *, held: bool = False, seen_s: float | None = None) -> None:
        """Take a scan acquired at `now_s`, and there at `seen_s` if that is later.

        Tags that it does not hold keep what they had, unless the device was lost since.
        """
        known = self.devices.get(scan.device)
        quality = scan.quality or {}
        values: Mapping[str, Value] = scan.values
        since_s = -inf
        if known is not None and known.lost:
            since_s = now_s
        elif known is not None:
            since_s = known.since_s
            if len(values) < len(known.values):
                quality = {tag: why for tag, why in known.quality.items() if tag not in values} | quality
                values = {**known.values, **values}
        seen_s = now_s if seen_s is None else seen_s
        self.devices[scan.device] = Latest(scan.ts, values, quality, now_s, held, seen_s, since_s)

    def lost(self, device: str, now_s: float) -> None:
        """Note that a device stopped answering: from now on what is known of it ages."""
        known = self.devices.get(device)
        if known is not None and not known.lost:
            at_s = now_s if known.held else known.at_s
            self.devices[device] = known._replace(at_s=at_s, held=False, since_s=now_s, lost=True)

    def forget(self, device: str) -> None:
        """Drop a device that is no longer configured."""
        self.devices.pop(device, None)

    def frozen(self) -> dict[str, Latest]:
        """Return the image as it is now; it does not change any more."""
        return dict(self.devices)
