"""Charts of readings, one below the other, each tag with its own scale."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import click

from edgegw import clock
from edgegw.cli import chart
from edgegw.cli.chart import Extent
from edgegw.journal.period import Period
from edgegw.journal.query import Reading
from edgegw.journal.resample import resample
from edgegw.journal.store import Reader

MOST = 20
"""Tags that are drawn; more would be no chart any more."""
WIDTH = (20, 200)


def extent(reader: Reader, period: Period) -> tuple[int, int]:
    """Return where a chart begins and ends: with the period or, where that is open, with what the journal holds."""
    newest = reader.before(1 << 62, limit=1)
    oldest = reader.oldest_ts(1, 1 << 62)
    if not newest or oldest is None:
        return 0, 1
    is_from, is_to = period.from_ms != Period().from_ms, period.to_ms != Period().to_ms
    end = clock.wall_ms() if is_from else (reader.oldest_ts(newest[0].seq, newest[0].seq) or oldest) + 1
    first = period.from_ms if is_from else oldest
    last = period.to_ms if is_to else end
    return min(first, last - 1), last


def draw(
    out: TextIO, readings: Iterable[Reading], first_ms: int, last_ms: int, unit: Callable[[str], str]
) -> None:
    """Draw the numbers among readings, as wide as the terminal is; `unit` tells a tag's."""
    width = max(WIDTH[0], min(WIDTH[1], shutil.get_terminal_size().columns - chart.LEFT - 3))
    step_ms = max(1, -(-(last_ms - first_ms) // (2 * width)))
    left_out: set[str] = set()
    tags: dict[str, dict[int, Extent]] = {}
    for row in resample(_few(readings, left_out), step_ms, origin_ms=first_ms):
        at = max(0, min(2 * width - 1, (row.ts - first_ms) // step_ms))
        if isinstance(row.low, float) and isinstance(row.high, float):
            last = float(row.last) if isinstance(row.last, bool | int | float) else row.high
            tags.setdefault(row.name, {})[at] = Extent(row.low, row.high, last)
    for name in sorted(tags):
        last_value = tags[name][max(tags[name])].last
        click.echo(f"{name}  {last_value:.7g} {unit(name)}".rstrip(), file=out)
        for line in chart.plot(tags[name], width):
            click.echo(line, file=out)
    if tags:
        for line in chart.axis(first_ms, first_ms + step_ms * 2 * width, width):
            click.echo(line, file=out)
    if left_out:
        click.echo(f"{len(left_out)} more tags are not drawn; name those that you want", err=True)


def _few(readings: Iterable[Reading], left_out: set[str]) -> Iterator[Reading]:
    """Pass on the readings of the first tags that hold numbers."""
    drawn: set[str] = set()
    for reading in readings:
        name = reading.name
        if name not in drawn:
            if not isinstance(reading.value, bool | int | float):
                continue
            if len(drawn) >= MOST:
                left_out.add(name)
                continue
            drawn.add(name)
        yield reading
