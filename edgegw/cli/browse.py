"""`edgegw browse`: what an OPC UA server offers."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json

if TYPE_CHECKING:
    from edgegw.drivers.opcua.browse import Entry

TIMEOUT_S = 5.0
VALUE_LETTERS = 60


@click.command("browse")
@click.argument("device")
@config_option
@click.option(
    "--start", default="i=85", show_default=True, help="The node to begin under, as in ns=2;s=Plant."
)
@click.option(
    "--depth", type=click.IntRange(min=1), default=3, show_default=True, help="How many levels down."
)
@click.option("--most", type=click.IntRange(min=1), default=1000, show_default=True, help="Entries at most.")
@json_option
def command(device: str, config_path: Path | None, start: str, depth: int, most: int, as_json: bool) -> None:
    """List the address space of an OPC UA DEVICE of the configuration, or of an opc.tcp:// URL.

    The node ids are what a tag's `address` takes.
    """
    from edgegw.errors import DeviceError

    name, url, timeout_s = _endpoint(device, config_path)
    try:
        entries = asyncio.run(_entries(url, timeout_s, start, depth, most + 1))
    except DeviceError as error:
        raise error.located(f"{name} ({url})") from None
    if as_json:
        print_json([entry._asdict() for entry in entries[:most]])
    else:
        _print_table(entries[:most])
    if len(entries) > most:
        click.echo(f"there is more: only the first {most} entries are shown, see --most", err=True)


def _endpoint(device: str, config_path: Path | None) -> tuple[str, str, float]:
    """Return what to call the server, its URL and its timeout."""
    from edgegw.config.schema import OpcUaDevice

    if device.startswith("opc.tcp://"):
        return "browse", device, TIMEOUT_S
    config, _ = load_config(config_path)
    known = {name: found for name, found in config.device.items() if isinstance(found, OpcUaDevice)}
    if device not in known:
        what = "not an OPC UA device" if device in config.device else "not in the configuration"
        expected = f"{', '.join(known) or '(it has none)'}, or an opc.tcp:// URL"
        raise click.UsageError(f"device {device!r} is {what}; expected one of: {expected}")
    return f"device.{device}", known[device].url, known[device].timeout.s


async def _entries(url: str, timeout_s: float, start: str, depth: int, most: int) -> "list[Entry]":
    from edgegw.drivers.opcua.browse import browse

    return [entry async for entry in browse(url, timeout_s=timeout_s, start=start, depth=depth, most=most)]


def _print_table(entries: "list[Entry]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("node", "name", "type", "value"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        value = entry.value if len(entry.value) <= VALUE_LETTERS else entry.value[: VALUE_LETTERS - 1] + "…"
        row = (entry.node, "  " * entry.depth + entry.name, entry.type or entry.kind, value)
        table.add_row(*map(Text, row))
    Console().print(table)
