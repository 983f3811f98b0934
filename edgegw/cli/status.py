"""`edgegw status`: from the running daemon, else from the journal."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from edgegw.config.schema import Config

ASK_S = 3.0


@click.command("status")
@config_option
@json_option
def command(config_path: Path | None, as_json: bool) -> None:
    """Show link, backlog, devices, rules and windows, from the running gateway or, if it is not, from its journal."""
    config, path = load_config(config_path)
    snapshot = from_daemon(config) or _from_journal(config, path)
    if as_json:
        print_json(snapshot)
    else:
        _show(snapshot)


def from_daemon(config: "Config") -> dict[str, Any] | None:
    """Return the snapshot of the gateway with this id that answers on `status.http`, None if none does."""
    if not config.status.http:
        return None
    try:
        direct = build_opener(ProxyHandler({}))  # it is this machine: no proxy has a say
        with direct.open(f"http://{config.status.http}/api/status", timeout=ASK_S) as answer:
            snapshot = json.load(answer)
    except (URLError, OSError, ValueError):
        return None
    if not isinstance(snapshot, dict) or snapshot.get("gateway") != config.gateway.id:
        return None  # somebody else listens there
    return {**snapshot, "running": True}


def _from_journal(config: "Config", path: Path) -> dict[str, Any]:
    from edgegw import __version__
    from edgegw.cli.daemon import locate
    from edgegw.journal.store import Reader, size_bytes

    place = locate(config, path)
    file = place.journal
    stream, head, acked, pending_records, pending_batches, oldest = "", 0, 0, 0, 0, None
    if file.exists():
        reader = Reader(file)
        settled = reader.acked()
        figures = reader.figures(settled)
        stream, head, acked = reader.stream, reader.tip().head, settled.prefix()
        pending_records = sum(last - first + 1 for first, last in settled.gaps(1, head))
        pending_batches, oldest = figures.pending_batches, figures.oldest_pending_ts
        reader.close()
    return {
        "gateway": config.gateway.id,
        "stream": stream,
        "version": __version__,
        "started": None,
        "running": place.pid is not None,
        "link": {"state": "offline", "since": None, "broker": None},
        "journal": {
            "head": head, "acked": acked, "pending_batches": pending_batches, "pending_records": pending_records,
            "bytes": size_bytes(file), "oldest_pending_ts": oldest, "error": None,
        },
        "devices": {
            name: {"state": "unknown", "reason": None, "last_ts": None, "scans": 0, "errors": 0, "skipped": 0}
            for name in config.device
        },
        "rules": {},
        "windows": {
            name: {"end": None, "coverage": None, "late": 0, "early": 0, "reading_back": False}
            for name in config.window
        },
        "readings": 0,
    }  # fmt: skip


def _show(snapshot: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    link, journal = snapshot["link"], snapshot["journal"]
    running = "running" if snapshot["running"] else "not running"
    if not snapshot["started"]:
        running += " (this is what its journal says)"
    console.print(f"[bold]{snapshot['gateway']}[/bold] edgegw {snapshot['version']}, {running}")
    console.print(f"link     {link['state']}" + (f" to {link['broker']}" if link["broker"] else ""))
    console.print(
        f"journal  head {journal['head']:,}, pending {journal['pending_records']:,} records in "
        f"{journal['pending_batches']:,} batches, {journal['bytes'] / 1024**2:.1f} MiB"
    )
    if journal["error"]:
        console.print(f"         [red]{journal['error']}[/red]")
    table = Table("device", "state", "scans", "errors", "skipped", box=None)
    for name, device in snapshot["devices"].items():
        state = device["state"] + (f" ({device['reason']})" if device["reason"] else "")
        table.add_row(name, state, f"{device['scans']:,}", f"{device['errors']:,}", f"{device['skipped']:,}")
    console.print(table)
    if rules := snapshot.get("rules"):
        console.print()
        console.print(_rules(rules))
    if windows := snapshot.get("windows"):  # a daemon of an earlier version does not say
        console.print()
        console.print(_windows(windows))


def _rules(rules: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("rule", "state", "since", box=None)
    for name, rule in rules.items():
        state = "on" if rule["active"] else "off"
        table.add_row(name, state + (" (undecided)" if rule.get("undecided") else ""), _when(rule["since"]))
    return table


def _windows(windows: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("window", "until", "coverage", "late", box=None)
    for name, window in windows.items():
        coverage = "-" if window["coverage"] is None else f"{window['coverage']:.1%}"
        until = _when(window["end"]) + (" (its history is being read)" if window["reading_back"] else "")
        table.add_row(name, until, coverage, f"{window['late']:,}")
    return table


def _when(ts: int | None) -> str:
    return "-" if ts is None else f"{datetime.fromtimestamp(ts / 1000, UTC):%Y-%m-%d %H:%M:%S}"
