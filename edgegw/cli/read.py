"""`edgegw read`: one device, once, by hand."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json

if TYPE_CHECKING:
    from edgegw.config.schema import Config
    from edgegw.domain.record import Scan

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
    scan = asyncio.run(_read(config, device))
    names = [name for name in known if name in (wanted or known) and name in scan.values]
    quality = scan.quality or {}
    if as_json:
        values = {name: scan.values[name] for name in names}
        print_json({
            "ts": scan.ts, "device": device, "values": values,
            "quality": {name: quality[name] for name in names if name in quality},
        })  # fmt: skip
        return
    width = max(len(name) for name in names)
    for name in names:
        unit = known[name].unit
        value = scan.values[name]
        value = "-" if value is None else f"{value:.7g}" if isinstance(value, float) else value
        click.echo(
            f"{device}.{name:<{width}}  {value} {unit}".rstrip()
            + (f"  [{quality[name]}]" if name in quality else "")
        )


async def _read(config: "Config", device: str) -> "Scan":
    from edgegw.drivers.registry import Drivers
    from edgegw.errors import NoAnswer
    from edgegw.scan.scanner import merge

    try:
        async with asyncio.timeout(READ_S), Drivers().make(device, config.device[device]) as driver:
            first, *rest = await driver.scan()
    except TimeoutError:
        raise NoAnswer("timeout", f"device.{device}: nothing in {READ_S:.0f} s") from None
    for scan in rest:
        first = merge(first, scan)
    return first
