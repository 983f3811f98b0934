"""`edgegw rules`: what the rules would have done."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json
from edgegw.errors import JournalDamaged, JournalError

if TYPE_CHECKING:
    from edgegw.config.schema import Config
    from edgegw.control.recording import Moment
    from edgegw.control.replay import Replay
    from edgegw.control.rule import LinkState

SQLITE = b"SQLite format 3\0"


@click.group("rules")
def command() -> None:
    """Try the rules of the configuration."""


@command.command("test")
@click.option(
    "--journal", "journal", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A journal, or exported records as JSON lines; default the configured journal.",
)  # fmt: skip
@click.option(
    "--csv", "table", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A table of values: ts,DEVICE.TAG,WINDOW.FIGURE,... with ts in milliseconds or ISO 8601.",
)  # fmt: skip
@click.option(
    "--link", type=click.Choice(["as-recorded", "online", "offline", "islanded"]), default="as-recorded",
    show_default=True, help="How the link is taken to have been.",
)  # fmt: skip
@config_option
@json_option
def test(
    journal: Path | None, table: Path | None, link: str, config_path: Path | None, as_json: bool
) -> None:
    """Play a recording through the rules on a virtual clock, and show what each would have done.

    Nothing is written anywhere. What the rules write is taken to work; all else is as recorded.
    """
    from edgegw.control.build import build
    from edgegw.control.replay import Replay

    if journal and table:
        raise click.UsageError("found --journal and --csv; expected one of them")
    config, path = load_config(config_path)
    plant, _ = build(config)
    if not plant.rules:
        raise click.UsageError(f"{path} has no rules; expected a section [rule.NAME]")
    held = frozenset(
        name for name, device in config.device.items() if getattr(device, "mode", "") == "subscribe"
    )
    if table:
        first, recorded = "online", _from_table(table, config)
    else:
        first, recorded = _from_journal(journal or _configured(config, path))
    begin = cast("LinkState", first if link == "as-recorded" else link)
    replay = Replay(plant, held=held, link=begin)
    try:
        replay.play(recorded, follow_link=link == "as-recorded")
    except ValueError as error:
        raise click.UsageError(f"{table or journal}: {error}") from None
    for name, inputs in replay.lacking().items():
        click.echo(f"rule.{name}: {', '.join(inputs)}: nowhere in the recording; never known here", err=True)
    if not replay.scans:
        raise JournalError(f"{table or journal or 'the journal'}: no readings in it")
    if as_json:
        print_json({"link": link, **replay.json()})
    else:
        _show(replay, link)


def _configured(config: "Config", path: Path) -> Path:
    from edgegw.cli.daemon import locate, there

    return there(locate(config, path))


def _from_table(file: Path, config: "Config") -> "Iterator[Moment]":
    from edgegw.control.build import build
    from edgegw.control.recording import table

    kinds = {name: limits.kind for name, limits in build(config)[0].limits.items()}
    for name, window in config.window.items():
        kinds |= {f"{name}.{figure}": "number" for figure in (*window.agg, "coverage")}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from table(lines, kinds)


def _from_journal(file: Path) -> tuple[str, "Iterator[Moment]"]:
    """Return how the link was at first, as its first change says, and the moments."""
    from edgegw.control.recording import moments

    with file.open("rb") as begin:
        source = _stored if begin.read(len(SQLITE)) == SQLITE else _lines
    change = next((record for record in source(file, only_events=True) if record.get("event") == "link"), {})
    return str(change.get("from", "online")), moments(source(file))


def _stored(file: Path, *, only_events: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal; a damaged batch is left out, and so are summaries."""
    import msgspec

    from edgegw.domain.batch import Kind
    from edgegw.journal.store import Reader, unpack, walk

    reader = Reader(file)
    thinned = 0
    try:
        for batch in walk(reader):
            if batch.kind is Kind.SUMMARY:
                thinned += batch.count
            if batch.kind is Kind.SUMMARY or (batch.kind is Kind.DATA and only_events):
                continue
            try:
                yield from msgspec.json.decode(unpack(batch))["records"]
            except JournalDamaged as error:
                click.echo(f"left out: {error}", err=True)
    finally:
        reader.close()
    if thinned and not only_events:
        click.echo(f"left out: {thinned:,} records of which only summaries are left", err=True)


def _lines(file: Path, *, only_events: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of JSON lines: batches as they are published, or single records."""
    import msgspec

    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = msgspec.json.decode(line, type=dict[str, Any]) if line.strip() else {"records": []}
                yield from found.get("records", [found])
            except (msgspec.DecodeError, UnicodeDecodeError, TypeError, AttributeError):
                raise click.UsageError(
                    f"{file}: line {number}: expected a journal, or records as JSON"
                ) from None


def _show(replay: "Replay", link: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from edgegw.control import chart

    console = Console(highlight=False)
    found = replay.json()
    seconds = (replay.last_ts - replay.first_ts) / 1000
    click.echo(
        f"{replay.scans:,} scans in {_span(seconds)}, from {chart.when(replay.first_ts)} UTC; link {link}"
    )
    table = Table("rule", "times on", "on for", "first", "last", box=None)
    for name, rule in found["rules"].items():
        moments = [chart.when(rule[key]) if rule[key] is not None else "-" for key in ("first", "last")]
        table.add_row(name, str(rule["times_on"]), _span(rule["total_s"]), *moments)
    console.print(table)
    table = Table("setpoint", "writes", "from", "to", "by", "refused", box=None)
    for name, setpoint in found["setpoints"].items():
        by = ", ".join(f"{cause} {count}" for cause, count in setpoint["causes"].items())
        refused = "; ".join(f"{reason} ({count})" for reason, count in setpoint["refused"].items())
        low, high = (_value(setpoint[key]) for key in ("from", "to"))
        table.add_row(name, f"{setpoint['writes']:,}", low, high, by or "-", refused or "-")
    console.print(table)
    names = [*found["rules"], *found["setpoints"]]
    left = max(map(len, names))
    width = max(20, min(120, shutil.get_terminal_size().columns - left - 2))
    first, last = replay.first_ts, replay.last_ts
    click.echo()
    for name, run in replay.rules.items():
        click.echo(f"{name:<{left}}  {chart.bar(run.spans, first, last, width)}")
    for name, held in replay.setpoints.items():
        click.echo(f"{name:<{left}}  {chart.levels(held.points, first, last, width)}")
    click.echo(f"{'':<{left}}  {chart.axis(first, last, width)}")


def _value(value: object) -> str:
    return "-" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2]) or f"{seconds:g} s"
