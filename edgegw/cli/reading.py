"""One reading of a device for a command: through the gateway if one runs, since some devices serve one connection."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from edgegw.cli.daemon import Place, converse
from edgegw.domain.tag import Value
from edgegw.errors import DeviceError, EdgegwError, NoAnswer

if TYPE_CHECKING:
    from edgegw.config.schema import Config

READ_S = 15.0
ASKING = 4
"""Questions to the gateway at once: its socket serves eight connections."""


class Reading(NamedTuple):
    """A device's tags at one moment: `ts` in milliseconds since the Unix epoch, `quality` of those not good.

    `asked` tells that the running gateway gave it.
    """

    ts: int
    values: Mapping[str, Value]
    quality: Mapping[str, str]
    asked: bool

    @property
    def bad(self) -> dict[str, str]:
        """The tags that are bad, with their quality."""
        from edgegw.scan.bad_tags import bad

        return bad(self.quality)


async def read(config: "Config", place: Place, device: str, asking: asyncio.Semaphore) -> Reading:
    """Read all tags of a device once; raise EdgegwError with what is in the way.

    The gateway that runs this configuration is asked, as far as `asking` allows; where none does, or it has another
    device of this name, the device itself.
    """
    if place.pid is not None:
        async with asking:
            asked = await asyncio.to_thread(_ask, config, place, device)
        if asked is not None:
            return asked
    return await _read(config, device)


def _ask(config: "Config", place: Place, device: str) -> Reading | None:
    from edgegw.config.load import fingerprint

    what = {"device": device, "fingerprint": fingerprint(config.device[device])}
    answer = converse(place.journal, f"read {device}", lambda ask: ask({"read": what}))
    if answer is None or answer.get("other"):
        return None
    if not answer.get("ok"):
        raise EdgegwError(str(answer.get("error")))
    return Reading(answer["ts"], answer["values"], answer["quality"], asked=True)


async def _read(config: "Config", device: str) -> Reading:
    from edgegw.domain.image import Image
    from edgegw.drivers.registry import Drivers

    image = Image()
    try:
        async with asyncio.timeout(READ_S), Drivers().make(device, config.device[device]) as driver:
            for scan in await driver.read():
                image.take(scan, 0.0)
    except TimeoutError:
        raise NoAnswer("timeout", f"device.{device}: nothing in {READ_S:.0f} s") from None
    if (latest := image.devices.get(device)) is None:
        raise DeviceError("no-value", f"device.{device}: it answered, and gave no value")
    return Reading(latest.ts, latest.values, latest.quality, asked=False)
