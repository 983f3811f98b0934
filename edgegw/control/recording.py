"""Recordings of a site, from wherever they come, as moments that rules can be played through. Pure."""

import csv
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any, NamedTuple, cast

from edgegw.control.expression import did_you_mean
from edgegw.control.rule import LinkState
from edgegw.domain import quality
from edgegw.domain.record import Scan
from edgegw.domain.tag import Value

LATE_MS = 5_000
"""How much later than others of its time a record may stand: a commit puts events before scans."""
MISSING = quality.bad("missing")


class Moment(NamedTuple):
    """Something that was recorded: a scan, a device that was lost, or the link as it was from then on."""

    ts: int
    scan: Scan | None = None
    lost: str | None = None
    link: LinkState | None = None


def moments(records: Iterable[Mapping[str, Any]]) -> Iterator[Moment]:
    """Return what matters of a journal's records, in order of their times.

    Where the clock was set back by more than LATE_MS, what follows follows all the same. What a window came to in
    a time longer past is left out, as rules were not shown it either; so are summaries, which no longer tell when
    what was read.
    """
    waiting: list[tuple[int, int, Moment]] = []
    newest = 0
    for number, record in enumerate(records):
        moment = _moment(record)
        if moment is None or ("coverage" in record and moment.ts < newest - LATE_MS):
            continue
        if moment.ts < newest - LATE_MS:
            yield from _drained(waiting)
            newest = 0
        newest = max(newest, moment.ts)
        heapq.heappush(waiting, (moment.ts, number, moment))
        while waiting[0][0] < newest - LATE_MS:
            yield heapq.heappop(waiting)[2]
    yield from _drained(waiting)


def _drained(waiting: list[tuple[int, int, Moment]]) -> Iterator[Moment]:
    while waiting:
        yield heapq.heappop(waiting)[2]


def _moment(record: Mapping[str, Any]) -> Moment | None:
    ts, device = int(record["ts"]), record.get("device")
    if "values" in record:
        values = dict(record["values"])
        if any(isinstance(value, dict) for value in values.values()):
            return None  # a summary's
        if "coverage" in record:  # a window's: rules read it beside the aggregates
            values["coverage"] = record["coverage"]
        return Moment(ts, scan=Scan(ts, str(device), values, record.get("quality")))
    if record.get("status") == "bad":
        return Moment(ts, lost=str(device))
    if record.get("event") == "link":
        return Moment(ts, link=cast(LinkState, record["state"]))
    return None


def table(lines: Iterable[str], kinds: Mapping[str, str]) -> Iterator[Moment]:
    """Return the moments of a CSV: a column `ts` (milliseconds, or ISO 8601), and one for each tag or window's figure.

    `kinds` has what there may be, and of which kind (number, bool, string) it is. An empty cell is a tag that was not
    read; a device none of whose cells holds anything was not read at all. Raises ValueError with the line.
    """
    rows = csv.reader(lines)
    names = [name.strip() for name in next(rows, [])]
    if not names or names[0] != "ts":
        raise ValueError(f"line 1: found {','.join(names)[:60]!r}; expected ts,DEVICE.TAG,...")
    for name in names[1:]:
        if name not in kinds:
            raise ValueError(f"line 1: {name} is no tag of the configuration{did_you_mean(name, kinds)}")
    for row in rows:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(f"line {rows.line_num}: found {len(row)} cells; expected {len(names)}")
        try:
            yield from _row(names, row, kinds)
        except ValueError as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None


def _row(names: Sequence[str], row: Sequence[str], kinds: Mapping[str, str]) -> Iterator[Moment]:
    ts = _ts(row[0].strip())
    devices: dict[str, dict[str, Value]] = {}
    for name, cell in zip(names[1:], row[1:], strict=True):
        device, _, tag = name.partition(".")
        devices.setdefault(device, {})[tag] = _value(name, cell.strip(), kinds[name])
    for device, values in devices.items():
        if any(value is not None for value in values.values()):
            bad = {tag: MISSING for tag, value in values.items() if value is None}
            yield Moment(ts, scan=Scan(ts, device, values, bad or None))


def _ts(text: str) -> int:
    if text.removeprefix("-").isdecimal():
        return int(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"found ts {text!r}; expected milliseconds, or as in 2026-02-03T04:05:06Z") from None
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def _value(name: str, text: str, kind: str) -> Value:
    if not text:
        return None
    if kind == "string":
        return text
    if kind == "bool":
        known = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
        if text.lower() not in known:
            raise ValueError(f"{name}: found {text!r}; expected true or false")
        return known[text.lower()]
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{name}: found {text!r}; expected a number") from None
    return number if isfinite(number) else None
