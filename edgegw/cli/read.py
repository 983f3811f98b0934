"""`edgegw read`: one device, once, by hand."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json

if TYPE_CHECKING:
    from edgegw.config.schema import Config
    from edgegw.domain.image import Latest

READ_S = 15.0


@click.command("read")
@click.argument("device")
@click.argument("tags", nargs=-1)
@config_option
@json_option
def command(device: str, tags: tuple[str, ...], config_path: Path | None, as_json: bool) -> None:
    """Read DEVICE's tags once, all of them or those named; DEVICE may also be given as DEVICE.TAG."""
    config, _ = load_config(config_path)
    device, _, tag = device.partition(".")
    wanted = (*([tag] if tag else []), *(name.removeprefix(f"{device}.") for name in tags))
    if device not in config.device:
        raise click.UsageError(
            f"no device {device!r} in the configuration; there are: {', '.join(config.device)}"
        )
    known = config.device[device].tags
    for name in wanted:
        if name not in known:
            raise click.UsageError(f"device {device} has no tag {name!r}; it has: {', '.join(known)}")
    found = asyncio.run(_read(config, device))
    names = [name for name in known if name in (wanted or known) and name in found.values]
    quality = found.quality
    if as_json:
        values = {name: found.values[name] for name in names}
        print_json({
            "ts": found.ts, "device": device, "values": values,
            "quality": {name: quality[name] for name in names if name in quality},
        })  # fmt: skip
        return
    width = max(len(name) for name in names)
    for name in names:
        unit = known[name].unit
        value = found.values[name]
        value = "-" if value is None else f"{value:.7g}" if isinstance(value, float) else value
        click.echo(
            f"{device}.{name:<{width}}  {value} {unit}".rstrip()
            + (f"  [{quality[name]}]" if name in quality else "")
        )


async def _read(config: "Config", device: str) -> "Latest":
    from edgegw.domain.image import Image
    from edgegw.drivers.registry import Drivers
    from edgegw.errors import NoAnswer

    image = Image()
    try:
        async with asyncio.timeout(READ_S), Drivers().make(device, config.device[device]) as driver:
            for scan in await driver.scan():
                image.take(scan, 0.0)
    except TimeoutError:
        raise NoAnswer("timeout", f"device.{device}: nothing in {READ_S:.0f} s") from None
    return image.devices[device]
