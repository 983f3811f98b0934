"""Finds readings and events in the journal by name and time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import msgspec

from edgegw.domain.batch import Batch, Kind
from edgegw.domain.tag import Value
from edgegw.errors import JournalDamaged
from edgegw.journal.period import Period, walk
from edgegw.journal.store import Reader, unpack
from edgegw.journal.thin import Figures


class Reading(NamedTuple):
    """One tag's value at one time, or the figures of several; then `value` is their mean and `samples` their number.

    Good is a quality of None.
    """

    ts: int
    device: str
    tag: str
    value: Value
    quality: str | None = None
    low: Value = None
    high: Value = None
    last: Value = None
    samples: int | None = None

    @property
    def name(self) -> str:
        """The full name."""
        return f"{self.device}.{self.tag}"


class EventFound(NamedTuple):
    """An event with its number."""

    ts: int
    seq: int
    event: str
    body: dict[str, Any]


class Looked:
    """What a query has looked at so far."""

    def __init__(self, damaged: Callable[[str], None]) -> None:
        self.batches = 0
        self.json_bytes = 0
        self.found = 0
        self.damaged = damaged

    def body(self, batch: Batch) -> bytes | None:
        """Unpack a batch; one that is damaged is told, and None."""
        try:
            body = unpack(batch)
        except JournalDamaged as error:
            self.damaged(str(error))
            return None
        self.batches += 1
        self.json_bytes += len(body)
        return body


class Wanted:
    """The tags asked for: `device.tag`, `device` or either with `*`; none is all."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [pattern.partition(".")[::2] for pattern in patterns or ["*"]]
        self._devices: dict[str, Callable[[str], bool] | None] = {}
        exact = {device for device, _ in self._patterns}
        self._named = [] if any("*" in device for device in exact) else sorted(exact)

    def of(self, device: str) -> Callable[[str], bool] | None:
        """Return what tells whether a tag of a device is asked for, None if none of them is."""
        if device not in self._devices:
            tags = [tag or "*" for name, tag in self._patterns if fnmatchcase(device, name)]
            self._devices[device] = _any_of(tags) if tags else None
        return self._devices[device]

    def matches(self, device: str, tag: str) -> bool:
        """Tell whether a tag is asked for."""
        asked = self.of(device)
        return asked is not None and asked(tag)

    def possibly_in(self, body: bytes) -> bool:
        """Tell whether a batch can hold any of it; most of those that do not are found out without decoding."""
        return not self._named or any(f'"device":"{name}"'.encode() in body for name in self._named)


def _any_of(patterns: list[str]) -> Callable[[str], bool]:
    if "*" in patterns:
        return lambda tag: True
    if not any("*" in pattern for pattern in patterns):
        return frozenset(patterns).__contains__
    return lambda tag: any(fnmatchcase(tag, pattern) for pattern in patterns)


class _Record(msgspec.Struct, gc=False):
    ts: int
    device: str
    values: msgspec.Raw = msgspec.Raw(b"{}")
    quality: msgspec.Raw = msgspec.Raw(b"null")


class _Body(msgspec.Struct, gc=False):
    records: list[_Record]
    period: int = 0


_bodies = msgspec.json.Decoder(_Body)
_values = msgspec.json.Decoder(dict[str, Value])
_summaries = msgspec.json.Decoder(dict[str, Figures])
_qualities = msgspec.json.Decoder(dict[str, str] | None)


def readings(reader: Reader, period: Period, wanted: Wanted, looked: Looked) -> Iterator[Reading]:
    """Yield the readings of a period, in the order in which they were journaled; never more than a batch is held."""
    for batch in walk(reader, period):
        if batch.kind is Kind.EVENT or (body := looked.body(batch)) is None or not wanted.possibly_in(body):
            continue
        content = _bodies.decode(body)
        find = _summarised if batch.kind is Kind.SUMMARY else _read
        from_ms = period.from_ms - max(0, content.period * 1000 - 1)
        for record in content.records:
            if from_ms <= record.ts < period.to_ms and (asked := wanted.of(record.device)) is not None:
                found = find(record, asked)
                looked.found += len(found)
                yield from found


def _read(record: _Record, asked: Callable[[str], bool]) -> list[Reading]:
    quality = _qualities.decode(record.quality) or {}
    return [
        Reading(record.ts, record.device, tag, value, quality.get(tag))
        for tag, value in _values.decode(record.values).items()
        if asked(tag)
    ]


def _summarised(record: _Record, asked: Callable[[str], bool]) -> list[Reading]:
    quality = _qualities.decode(record.quality) or {}
    return [
        Reading(
            record.ts, record.device, tag, made.last if made.mean is None else made.mean, quality.get(tag),
            made.min, made.max, made.last, made.count,
        )
        for tag, made in _summaries.decode(record.values).items()
        if asked(tag)
    ]  # fmt: skip


def events(reader: Reader, period: Period, names: Iterable[str], looked: Looked) -> Iterator[EventFound]:
    """Yield the events of a period whose names match any of `names` (`rule-*`); none is all."""
    patterns = list(names) or ["*"]
    for batch in walk(reader, period):
        if batch.kind is not Kind.EVENT or (body := looked.body(batch)) is None:
            continue
        for seq, fields in enumerate(msgspec.json.decode(body)["records"], batch.seq):
            ts, event = int(fields.pop("ts")), str(fields.pop("event", ""))
            if period.from_ms <= ts < period.to_ms and any(fnmatchcase(event, name) for name in patterns):
                looked.found += 1
                yield EventFound(ts, seq, event, fields)
