"""Thinning: what stands for many readings where there is no room for each. Pure.

A run of batches that nobody upstream has becomes a few summaries that take the place of the same seqs: for each
period, device and tag its mean, least, greatest and last value, and how many there were. The mean counts every
reading alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from edgegw.domain.batch import Kind, Message
from edgegw.domain.tag import Value

FINER = {60: 0, 900: 60}
"""For each period that a summary may have, in seconds, the period of what it is made of; 0 are readings."""
COARSER = {finer: period for period, finer in FINER.items()}


class Figures(msgspec.Struct, frozen=True, gc=False):
    """A tag's figures; `count` readings were not bad. What has no order (a text, an array) has no mean, min, max."""

    mean: float | None
    min: Value
    max: Value
    last: Value
    count: int


class _Record(msgspec.Struct, frozen=True, gc=False):
    """A scan; of a device's status there is nothing to keep, for events tell of it."""

    ts: int
    device: str
    values: dict[str, Value] | None = None
    quality: dict[str, str] | None = None


class _Time(msgspec.Struct, frozen=True, gc=False):
    ts: int


class SummaryRecord(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One period of one device, which begins at `ts`; `quality` is the last that was not good."""

    ts: int
    device: str
    values: dict[str, Figures]
    quality: dict[str, str] | None = None


class Source(NamedTuple):
    """A batch to be thinned: where it stands, the hash that the next one carries, and what it says."""

    first: int
    last: int
    link: bytes
    message: Message


class Thinned(NamedTuple):
    """A summary to be: which seqs it covers, the hashes on either side, its encoded records and the time that these
    stand for, both ends included."""

    first: int
    last: int
    prev: str
    last_prev: bytes
    timing: bytes
    first_ts: int
    last_ts: int
    records: list[bytes]


_times = msgspec.json.Decoder(list[_Time])
_readings = msgspec.json.Decoder(list[_Record])
_summaries = msgspec.json.Decoder(list[SummaryRecord])
_encode = msgspec.json.Encoder().encode


def thin(runs: Sequence[Sequence[Source]], period_s: int, limit: int) -> list[Thinned]:
    """Return the summaries that stand for some runs of batches; those of a run follow on each other.

    Together they hold what stands for all of the runs. Each has at most `limit` bytes of records; a run has at least
    one, which may be empty, for what lies between the runs keeps its place. The last ones tell: what the upstream has
    already, though its answer was lost, is the beginning of a run, and what it confirms later must not be all there is.
    There are none if there are not enough
    batches to take the place of. Raises `msgspec.DecodeError` if a batch does not hold what its kind says.
    """
    records = summarise((source.message for run in runs for source in run), period_s * 1000)
    chunks = list(_chunks((part for record in records for part in _parts(record, limit)), limit))
    places = _places(runs, len(chunks))
    if len(chunks) > len(places):
        return []
    chunks[:0] = [[]] * (len(places) - len(chunks))
    thinned = []
    first_ts = last_ts = _begins(runs[0][0].message)
    for place, chunk in zip(places, chunks, strict=True):
        begin, end = place[0], place[-1]
        if chunk:  # those that are empty stand where all begins
            first_ts, last_ts = chunk[0][0], chunk[-1][0] + 1000 * period_s - 1
        thinned.append(
            Thinned(
                begin.first, end.last, begin.message.prev, end.link, timing(begin.message), first_ts, last_ts,
                [part for _, part in chunk],
            )
        )  # fmt: skip
    return thinned


def _begins(message: Message) -> int:
    """Return the time of the first record, 0 if there is none."""
    records = _times.decode(message.records)
    return records[0].ts if records else 0


def _places(runs: Sequence[Sequence[Source]], wanted: int) -> list[Sequence[Source]]:
    """Divide the runs into as many parts as are wanted, or as can be; a run is one at least."""
    places: list[Sequence[Source]] = []
    left = wanted - len(runs)
    for run in runs:
        parts = min(len(run), 1 + max(0, left))
        left -= parts - 1
        places += [run[i * len(run) // parts : (i + 1) * len(run) // parts] for i in range(parts)]
    return places


def timing(message: Message) -> bytes:
    """Return the keys of a batch that say how its times are to be read, as they stand in it."""
    clock = b'"clock":"%s",' % message.clock.encode()
    mono = bytes(message.mono)
    return clock + b'"mono":' + mono + b"," if mono else clock


def summarise(messages: Iterable[Message], period_ms: int) -> list[SummaryRecord]:
    """Return the records that stand for those of the messages, by time and device."""
    scans: dict[tuple[int, str], list[_Record]] = {}
    finer: dict[tuple[int, str], list[SummaryRecord]] = {}
    for message in messages:
        if message.kind is Kind.SUMMARY:
            for summary in _summaries.decode(message.records):
                at = summary.ts - summary.ts % period_ms
                finer.setdefault((at, summary.device), []).append(summary)
        else:
            for record in _readings.decode(message.records):
                if record.values is not None:
                    at = record.ts - record.ts % period_ms
                    scans.setdefault((at, record.device), []).append(record)
    made = [
        SummaryRecord(ts, device, {tag: _figures(column) for tag, column in _columns(some).items()}, _quality(some))
        for (ts, device), some in scans.items()
    ]  # fmt: skip
    made += [
        SummaryRecord(ts, device, {tag: _joined(column) for tag, column in _columns(some).items()}, _quality(some))
        for (ts, device), some in finer.items()
    ]  # fmt: skip
    return sorted(made, key=lambda record: (record.ts, record.device))


def _columns(records: Sequence[Any]) -> dict[str, list[Any]]:
    """Return each tag's values in order."""
    rows = [record.values for record in records]
    tags = rows[0].keys()
    if all(row.keys() == tags for row in rows):
        return {tag: [row[tag] for row in rows] for tag in tags}
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for tag, value in row.items():
            columns.setdefault(tag, []).append(value)
    return columns


def _quality(records: Sequence[_Record] | Sequence[SummaryRecord]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for record in records:
        if record.quality:
            found |= record.quality
    return found or None


def _figures(column: list[Any]) -> Figures:
    good = [value for value in column if value is not None]
    if not good:
        return Figures(None, None, None, None, 0)
    try:
        mean = float(sum(good)) / len(good)
    except TypeError:  # texts or arrays
        return Figures(None, None, None, good[-1], len(good))
    return Figures(_short(mean), min(good), max(good), good[-1], len(good))


def _joined(column: list[Figures]) -> Figures:
    good = [one for one in column if one.count]
    if not good:
        return Figures(None, None, None, None, 0)
    count, last = sum(one.count for one in good), good[-1].last
    if any(one.mean is None for one in good):
        return Figures(None, None, None, last, count)
    rows: list[Any] = good
    mean = sum(one.mean * one.count for one in rows) / count
    return Figures(_short(mean), min(one.min for one in rows), max(one.max for one in rows), last, count)


def _short(mean: float) -> float:
    """Return a mean without the digits that mean nothing."""
    return float(f"{mean:.9g}")


def _parts(record: SummaryRecord, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield a record's time and JSON, in several parts if a message cannot take it whole."""
    encoded = _encode(record)
    if len(encoded) < limit or len(record.values) < 2:
        yield record.ts, encoded
        return
    tags = list(record.values)
    for half in (tags[: len(tags) // 2], tags[len(tags) // 2 :]):
        quality = {tag: why for tag, why in (record.quality or {}).items() if tag in half}
        values = {tag: record.values[tag] for tag in half}
        yield from _parts(SummaryRecord(record.ts, record.device, values, quality or None), limit)


def _chunks(parts: Iterable[tuple[int, bytes]], limit: int) -> Iterator[list[tuple[int, bytes]]]:
    chunk: list[tuple[int, bytes]] = []
    size = 0
    for part in parts:
        length = len(part[1]) + 1
        if size + length > limit and chunk:
            yield chunk
            chunk, size = [], 0
        chunk.append(part)
        size += length
    if chunk:
        yield chunk
