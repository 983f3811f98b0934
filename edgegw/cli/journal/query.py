"""`edgegw journal query`: readings and events by name and time."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from edgegw.cli.moment import duration, from_option, period, to_option
from edgegw.cli.options import config_option, open_journal
from edgegw.errors import EdgegwError

if TYPE_CHECKING:
    from edgegw.cli.journal.output import Columns, Row
    from edgegw.config.schema import Config
    from edgegw.journal.query import EventFound, Looked, Reading, Wanted

FORMATS = ("table", "chart", "csv", "ndjson", "sqlite", "parquet")
SUFFIXES = {
    ".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson", ".txt": "table",
    ".db": "sqlite", ".sqlite": "sqlite", ".parquet": "parquet",
}  # fmt: skip
"""The format that a file's name asks for."""
FILES_ONLY = ("sqlite", "parquet")
READINGS: "Columns" = {
    "ts": int, "device": str, "tag": str, "value": bytes, "quality": str,
    "min": bytes, "max": bytes, "last": bytes, "count": int,
}  # fmt: skip
EVENTS: "Columns" = {"ts": int, "seq": int, "event": str, "body": dict}


@click.command("query")
@click.argument("names", nargs=-1, metavar="[TAG]...")
@from_option
@to_option
@click.option("--last", "last_ms", callback=duration, help="Only so long back from now, as in 1h.")
@click.option(
    "--events", "of_events", is_flag=True, help="Events instead of readings; TAG is an event's name then."
)
@click.option(
    "--every", "step_ms", callback=duration,
    help="A row for each tag and each so long, as in 1m: mean, least, greatest, last and number of readings.",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Default: what --out is called, else table."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write to this new file instead of the terminal."
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format ndjson.")
@config_option
def query(
    names: tuple[str, ...], from_ms: int | None, to_ms: int | None, last_ms: int | None, of_events: bool,
    step_ms: int | None, form: str | None, out: Path | None, as_json: bool, config_path: Path | None,
) -> None:  # fmt: skip
    """Show readings, in the order in which they were journaled; the gateway may run meanwhile.

    TAG is a tag (meter1.power_kw), a device (meter1), or either with * in it; without any it is all tags. Where the
    journal holds a summary instead of readings, a row is their mean.
    """
    from edgegw import clock
    from edgegw.journal.query import Looked, Wanted, events, readings
    from edgegw.journal.resample import resample

    if as_json and form not in (None, "ndjson"):
        raise click.UsageError(f"found --json and --format {form}; expected one of them")
    form = _form("ndjson" if as_json else form, out)
    if of_events and (step_ms or form == "chart"):
        raise click.UsageError("--events: events have no values; expected no --every and no chart")
    if last_ms is not None:
        if from_ms is not None:
            raise click.UsageError("found --from and --last; expected one of them")
        from_ms = clock.wall_ms() - last_ms
    within = period(from_ms, to_ms)
    reader, config = open_journal(config_path)
    looked = Looked(lambda reason: click.echo(f"warning: {reason}; it is left out", err=True))
    began_s = time.monotonic()
    try:
        if of_events:
            _put_events(form, out, events(reader, within, names, looked))
        else:
            wanted = Wanted(names)
            found = readings(reader, within, wanted, looked)
            if form == "chart":
                from edgegw.cli.journal.draw import draw, extent

                first, last = extent(reader, within)
                with _opened(out) as file:
                    draw(file, found, first, last, lambda name: _unit(config, name))
            else:
                _put_readings(
                    form, out, resample(found, step_ms) if step_ms else found, config, wanted, bool(step_ms)
                )
    finally:
        reader.close()
    _say(looked, "events" if of_events else "readings", time.monotonic() - began_s)


def _form(form: str | None, out: Path | None) -> str:
    """Return the format that is asked for, before any work is done for it."""
    if form is None:
        if out is not None and out.suffix not in SUFFIXES:
            raise click.UsageError(
                f"--out {out}: its name does not say the format; expected {', '.join(SUFFIXES)}, or --format"
            )
        form = SUFFIXES[out.suffix] if out else "table"
    if form in FILES_ONLY and out is None:
        raise click.UsageError(f"--format {form} needs --out FILE")
    if form == "parquet":
        import edgegw.cli.journal.parquet  # noqa: F401  says how to get what it needs
    if out is not None and out.exists():
        raise EdgegwError(f"{out}: it is there already; name another file, or remove it first")
    return form


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """Give the terminal, or a file that is there only once it is whole."""
    from edgegw.runtime.whole import whole

    if out is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    with whole(out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        yield file


def _put(form: str, out: Path | None, name: str, columns: "Columns", rows: "Iterable[Row]") -> None:
    from edgegw.cli.journal import output
    from edgegw.runtime.whole import whole

    if form in ("csv", "ndjson"):
        write = output.write_csv if form == "csv" else output.write_ndjson
        with _opened(out) as file:
            write(file, columns, rows)
        return
    assert out is not None
    with whole(out) as beside:
        if form == "sqlite":
            output.write_sqlite(beside, name, columns, rows)
        else:
            from edgegw.cli.journal.parquet import write_parquet

            write_parquet(beside, columns, rows)


def _put_readings(
    form: str, out: Path | None, found: "Iterable[Reading]", config: "Config", wanted: "Wanted", figures: bool
) -> None:
    from edgegw.cli.journal.output import write_lines

    if form != "table":
        _put(form, out, "readings", READINGS, found)
        return
    known = [
        f"{device}.{tag}"
        for device, made in config.device.items()
        for tag in made.tags
        if wanted.matches(device, tag)
    ]
    heads = {"time": 24, "tag": max(map(len, known), default=12), "value": -12, "unit": 5}
    heads |= {"min": -10, "max": -10, "count": -7, "quality": 0} if figures else {"quality": 0}
    with _opened(out) as file:
        write_lines(file, heads, (_line(reading, _unit(config, reading.name), figures) for reading in found))


def _line(reading: "Reading", unit: str, figures: bool) -> list[str]:
    from edgegw.cli.journal.output import when

    cells = [when(reading.ts), reading.name, _shown(reading.value), unit]
    quality = reading.quality or ""
    if figures:
        return [*cells, _shown(reading.low), _shown(reading.high), f"{reading.samples:,}", quality]
    if reading.samples is not None:
        low, high = _shown(reading.low), _shown(reading.high)
        quality = f"{quality} (mean of {reading.samples:,}, {low} to {high})".lstrip()
    return [*cells, quality]


def _shown(value: Any) -> str:
    from edgegw.cli.journal.output import as_text

    return "-" if value is None else f"{value:.7g}" if isinstance(value, float) else as_text(value)


def _unit(config: "Config", name: str) -> str:
    device, _, tag = name.partition(".")
    made = config.device.get(device)
    return made.tags[tag].unit if made and tag in made.tags else ""


def _put_events(form: str, out: Path | None, found: "Iterable[EventFound]") -> None:
    from edgegw.cli.journal.output import as_text, when, write_lines

    if form != "table":
        _put(form, out, "events", EVENTS, found)
        return
    with _opened(out) as file:
        heads = {"time": 24, "seq": -10, "event": 14, "body": 0}
        rows = ([when(one.ts), str(one.seq), one.event, as_text(one.body)] for one in found)
        write_lines(file, heads, rows)


def _say(looked: "Looked", what: str, took_s: float) -> None:
    click.echo(
        f"{looked.found:,} {what} in {took_s:.2f} s; looked at {looked.batches:,} batches, "
        f"{looked.json_bytes / 1024**2:,.1f} MiB of JSON",
        err=True,
    )
