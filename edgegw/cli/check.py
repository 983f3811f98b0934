"""`edgegw check`: is the configuration right, and with --connect, does everything answer."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json
from edgegw.errors import ConfigError, EdgegwError

if TYPE_CHECKING:
    from edgegw.cli.daemon import Place
    from edgegw.config.schema import Config

BROKER_S = 10.0


@click.command("check")
@config_option
@click.option("--connect", is_flag=True, help="Also try every device and broker.")
@json_option
def command(config_path: Path | None, connect: bool, as_json: bool) -> None:
    """Validate the configuration; exit 2 with every mistake if it is wrong.

    With --connect every device is read once, through the gateway where one runs, and every broker is logged in to;
    exit 1 if any of them fails, or any tag is bad.
    """
    from edgegw.config.surroundings import secret_advice
    from edgegw.control.advice import advice
    from edgegw.control.build import build
    from edgegw.uplink import advice as uplink

    config, path = load_config(config_path)
    notes = [
        *advice(config, build(config)[0]), *uplink.advice(config), *secret_advice(config, path),
        *_journal_notes(config, path),
    ]  # fmt: skip
    tags = sum(len(device.tags) for device in config.device.values())
    found: dict[str, str | None] = {}
    if connect:
        found = asyncio.run(_connect(config, path))
    failed = {name: error for name, error in found.items() if error is not None}
    if as_json:
        print_json(
            {
                "ok": not failed,
                "config": str(path),
                "devices": len(config.device),
                "tags": tags,
                "notes": notes,
                "tried": found,
            }
        )
    else:
        click.echo(f"{path}: {len(config.device)} devices, {tags} tags: the configuration is right")
        for note in notes:
            click.echo(f"  note   {note}")
        for name, error in found.items():
            click.echo(f"  {'ok    ' if error is None else 'FAILED'} {error or name}")
    if failed:
        raise click.exceptions.Exit(1)


def _journal_notes(config: "Config", path: Path) -> list[str]:
    """Return what is to be said of the journal's place; raise ConfigError if the gateway could not keep one there.

    Of a folder that is another user's, the service's as a rule, only that user can tell.
    """
    from edgegw.cli.daemon import locate
    from edgegw.config.surroundings import journal_obstacle

    place = locate(config, path)
    if place.pid is not None or (obstacle := journal_obstacle(place.journal)) is None:
        return []
    with suppress(OSError):
        owner = place.journal.parent.stat().st_uid
        if os.geteuid() not in (0, owner):
            return [f"journal.path: {obstacle}; if edgegw runs as another user, check it as that one"]
    raise ConfigError([f"{path}: journal.path: {obstacle}"])


async def _connect(config: "Config", path: Path) -> dict[str, str | None]:
    """Try everything at once; return what went wrong by name, None for what is well."""
    from edgegw.cli.daemon import locate
    from edgegw.cli.reading import ASKING

    place, asking = locate(config, path), asyncio.Semaphore(ASKING)
    names = [*(f"device.{name}" for name in config.device), *(f"uplink {url}" for url in config.uplink.url)]
    tries = [
        *(_device(config, place, name, asking) for name in config.device),
        *(_broker(config, path, url) for url in config.uplink.url),
    ]
    return dict(zip(names, await asyncio.gather(*tries), strict=True))


async def _device(config: "Config", place: "Place", name: str, asking: asyncio.Semaphore) -> str | None:
    from edgegw.cli.reading import read
    from edgegw.scan.bad_tags import listed

    try:
        reading = await read(config, place, name, asking)
    except EdgegwError as error:
        return str(error)
    return f"device.{name}: {listed(reading.bad, len(config.device[name].tags))}" if reading.bad else None


async def _broker(config: "Config", path: Path, url: str) -> str | None:
    from edgegw.errors import UplinkError
    from edgegw.uplink.connect_errors import subscription_refused
    from edgegw.uplink.login import check_id, login
    from edgegw.uplink.negotiation import connect, protocol

    try:
        presented = login(config, path, check_id(config.gateway.id))
        connection = await connect(url, protocol(config), presented)
    except UplinkError as error:
        return str(error)
    try:
        for topic in (f"{config.topic}/cmd", f"{config.topic}/ack"):
            async with asyncio.timeout(BROKER_S):
                reason = await connection.subscribe(topic, lambda _: None)
            if reason is not None:
                return f"uplink {url}: {subscription_refused(topic, reason)}"
    except TimeoutError:
        return f"uplink {url}: no answer to a subscription in {BROKER_S:.0f} s"
    except asyncio.CancelledError:
        if not connection.lost.done():
            raise
        return f"uplink {url}: {connection.lost.result()}"
    finally:
        connection.close()
    return None
