"""`edgegw read`: one device, once, by hand."""

import asyncio
from pathlib import Path

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json
from edgegw.domain.quality import is_bad


@click.command("read")
@click.argument("device")
@click.argument("tags", nargs=-1)
@config_option
@json_option
def command(device: str, tags: tuple[str, ...], config_path: Path | None, as_json: bool) -> None:
    """Read DEVICE's tags once, all of them or those named; DEVICE may also be given as DEVICE.TAG.

    A running gateway is asked to read it, else the device itself. Exit 1 if any of the tags is bad.
    """
    from edgegw.cli.daemon import locate
    from edgegw.cli.reading import read

    config, path = load_config(config_path)
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
    found = asyncio.run(read(config, locate(config, path), device, asyncio.Semaphore()))
    names = [name for name in known if name in (wanted or known)]
    quality = {name: "bad:no-value" for name in names if name not in found.values} | dict(found.quality)
    if as_json:
        values = {name: found.values.get(name) for name in names}
        print_json({
            "ts": found.ts, "device": device, "values": values,
            "quality": {name: quality[name] for name in names if name in quality},
        })  # fmt: skip
    else:
        width = max(len(name) for name in names)
        for name in names:
            unit = known[name].unit
            value = found.values.get(name)
            value = "-" if value is None else f"{value:.7g}" if isinstance(value, float) else value
            click.echo(
                f"{device}.{name:<{width}}  {value} {unit}".rstrip()
                + (f"  [{quality[name]}]" if name in quality else "")
            )
    if any(is_bad(quality.get(name)) for name in names):
        raise click.exceptions.Exit(1)
