"""`edgegw status`: from the running daemon, else from the journal."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json
from edgegw.errors import EdgegwError

if TYPE_CHECKING:
    from rich.table import Table

    from edgegw.cli.daemon import Place
    from edgegw.config.schema import Config

ASK_S = 3.0


@click.command("status")
@config_option
@json_option
def command(config_path: Path | None, as_json: bool) -> None:
    """Show link, backlog, devices, rules and windows, from the running gateway or, if it is not, from its journal."""
    from edgegw.cli.daemon import locate

    config, path = load_config(config_path)
    place = locate(config, path)
    snapshot = (_from_socket(place) if place.pid is not None else None) or from_daemon(config)
    if snapshot is None and place.pid is not None:
        raise EdgegwError(
            f"the gateway runs (process {place.pid}), and neither its socket {place.socket} nor status.http answers"
        )
    if snapshot is None:
        snapshot = _from_journal(config, path, place.journal)
    if as_json:
        print_json(snapshot)
    else:
        _show(snapshot)


def _from_socket(place: "Place") -> dict[str, Any] | None:
    """Return the status that the running gateway gives on its socket, None if it gives none or it may not be asked."""
    from edgegw.cli.daemon import converse

    try:
        answer = converse(place.journal, "status", lambda ask: ask({"status": {}}))
    except EdgegwError:
        return None
    status = answer.get("status") if answer is not None else None
    return status if isinstance(status, dict) else None


def from_daemon(config: "Config") -> dict[str, Any] | None:
    """Return the status of the gateway with this id that answers on `status.http`, None if none does."""
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
    return snapshot


def _from_journal(config: "Config", config_path: Path, file: Path) -> dict[str, Any]:
    import msgspec

    from edgegw.config.load import digest
    from edgegw.journal.store import Reader, size_bytes
    from edgegw.status.snapshot import JournalStatus, stopped

    journal, stream = JournalStatus(str(file.absolute()), int(config.journal.max_size)), ""
    if file.exists():
        reader = Reader(file)
        settled = reader.acked()
        figures = reader.figures(settled)
        stream, journal.head, journal.acked = reader.stream, reader.tip().head, settled.prefix()
        journal.pending_records = sum(last - first + 1 for first, last in settled.gaps(1, journal.head))
        journal.pending_batches, journal.oldest_pending_ts = (
            figures.pending_batches,
            figures.oldest_pending_ts,
        )
        reader.close()
    journal.bytes = size_bytes(file)
    snapshot: dict[str, Any] = msgspec.to_builtins(stopped(config, digest(config_path), journal, stream))
    return snapshot


def _show(snapshot: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    link, journal = snapshot["link"], snapshot["journal"]
    running = "running" if snapshot["running"] else "not running"
    if not snapshot["running"]:
        running += " (this is what its journal says)"
    console.print(f"[bold]{snapshot['gateway']}[/bold] edgegw {snapshot['version']}, {running}")
    console.print(f"link     {link['state']}" + (f" to {link['broker']}" if link["broker"] else ""))
    console.print(
        f"journal  head {journal['head']:,}, pending {journal['pending_records']:,} records in "
        f"{journal['pending_batches']:,} batches, {journal['bytes'] / 1024**2:.1f} MiB"
    )
    if journal["error"]:
        console.print(f"         [red]{journal['error']}[/red]")
    for problem in (snapshot["health"] or {"problems": []})["problems"]:
        console.print(
            f"[red]problem[/red]  {escape(problem['code'])}: {escape(problem['what'])}, "
            f"since {_when(problem['since'])}"
        )
    table = Table("device", "state", "bad tags", "scans", "errors", "skipped", box=None)
    for name, device in snapshot["devices"].items():
        state = device["state"] + (f" ({device['reason']})" if device["reason"] else "")
        counts = (device[key] for key in ("bad_tags", "scans", "errors", "skipped"))
        table.add_row(name, state, *(f"{count:,}" for count in counts))
    console.print(table)
    if rules := snapshot["rules"]:
        console.print()
        console.print(_rules(rules))
    if windows := snapshot["windows"]:
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
