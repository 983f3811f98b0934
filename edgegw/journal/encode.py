"""Records to batches: the one place where a record becomes bytes."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import msgspec
import zstandard

from edgegw.domain import batch as batches
from edgegw.domain.batch import Batch, Kind
from edgegw.domain.era import Era
from edgegw.domain.quality import BAD_TEXT, TOO_LARGE
from edgegw.domain.record import Event, Record, Scan, wire
from edgegw.domain.tag import Value
from edgegw.journal.thin import Thinned

LEVEL = 1
"""zstd's: at the next that packs noticeably better (5) it takes three times as long."""
_device = itemgetter(0)
_encoder = msgspec.json.Encoder()


class Entry(NamedTuple):
    """A record, or a part of one, as it will stand in a batch; `device` is empty for events."""

    device: str
    ts: int
    json: bytes


class Group(NamedTuple):
    """Encoded records that will be one batch, once they get their numbers; between which times they lie."""

    kind: Kind
    era: Era
    first_ts: int
    last_ts: int
    records: list[bytes]
    size: int


def encode(record: Record, max_message: int) -> list[Entry]:
    """Encode a record for messages of at most `max_message` bytes of JSON.

    A scan too large for a message is split; a single value too large for one, or that JSON cannot hold, is left out
    and marked so.
    """
    limit = max_message - batches.HEAD_ROOM
    device = "" if isinstance(record, Event) else record.device
    whole = _encode(record)
    parts = (whole,) if whole and len(whole) < limit else _shrunk(record, limit)
    return [Entry(device, record.ts, part) for part in parts]


def group(records: Iterable[Record], era: Era, max_message: int) -> list[Group]:
    """Encode records and group them into batches."""
    return group_entries(
        [entry for record in records for entry in encode(record, max_message)], era, max_message
    )


def group_entries(entries: list[Entry], era: Era, max_message: int) -> list[Group]:
    """Group encoded records into batches of at most `max_message` bytes of JSON.

    Events come first, then data, device by device: each in their order. What one device says is alike: it packs into
    two thirds.
    """
    limit = max_message - batches.HEAD_ROOM
    entries = sorted(entries, key=_device)
    events = bisect_right(entries, "", key=_device)
    return [*_pack(Kind.EVENT, entries[:events], era, limit), *_pack(Kind.DATA, entries[events:], era, limit)]


def _pack(kind: Kind, entries: list[Entry], era: Era, limit: int) -> Iterator[Group]:
    parts = [entry.json for entry in entries]
    times = [entry.ts for entry in entries]
    ends = list(accumulate([len(part) + 1 for part in parts], initial=0))
    first = 0
    while first < len(parts):
        end = max(first + 1, bisect_right(ends, ends[first] + limit) - 1)
        size = ends[end] - ends[first]
        yield Group(kind, era, min(times[first:end]), max(times[first:end]), parts[first:end], size)
        first = end


def _encode(record: Record) -> bytes | None:
    """Return the record's JSON, None if it holds something that JSON cannot, such as half a surrogate pair."""
    try:
        return _encoder.encode(wire(record))
    except (TypeError, ValueError, RecursionError):
        return None


def _shrunk(record: Record, limit: int) -> Iterable[bytes]:
    """Encode a record that a message cannot take as it is, as several that it can."""
    if isinstance(record, Scan):
        return _split(record, limit)
    note = {
        "ts": record.ts,
        "event": getattr(record, "event", "config"),
        "error": "left out: too large for a message, or nothing that JSON can hold",
    }
    return (_encoder.encode(note),)


def _split(scan: Scan, limit: int) -> Iterator[bytes]:
    encoded = _encode(scan)
    if encoded and len(encoded) < limit:
        yield encoded
    elif len(scan.values) == 1:
        (tag,) = scan.values
        why = TOO_LARGE if encoded else BAD_TEXT
        yield _encoder.encode(msgspec.structs.replace(scan, values={tag: None}, quality={tag: why}))
    else:
        items: list[tuple[str, Value]] = list(scan.values.items())
        quality = scan.quality or {}
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            bad = {tag: quality[tag] for tag, _ in half if tag in quality}
            yield from _split(Scan(scan.ts, scan.device, dict(half), bad or None), limit)


class Sealer:
    """Gives groups their numbers and links: from here on a batch never changes."""

    def __init__(self, gateway: str, stream: str, head: int, digest: bytes) -> None:
        self.head = head
        self.digest = digest
        self._gateway = gateway
        self._stream = stream
        self._compress = zstandard.ZstdCompressor(level=LEVEL).compress

    def seal(self, made: Group) -> tuple[Batch, bytes]:
        """Return the next batch of the stream and its JSON bytes."""
        seq, count = self.head + 1, len(made.records)
        timing = batches.timing(made.era)
        head = batches.head(self._gateway, self._stream, seq, count, made.kind, self.digest, timing)
        body = b"".join((head, b",".join(made.records), batches.TAIL))
        self.digest = batches.digest(body)
        self.head += count
        return Batch(self._stream, seq, count, made.kind, self.digest, len(body), self._compress(body)), body

    def summary(self, made: Thinned, period_s: int) -> Batch:
        """Return the batch that takes the place of those that were thinned."""
        count = made.last - made.first + 1
        more = b'"last_prev":"%s","period":%d,' % (made.last_prev.hex().encode(), period_s) + made.timing
        head = batches.head(
            self._gateway, self._stream, made.first, count, Kind.SUMMARY, bytes.fromhex(made.prev), more
        )
        body = b"".join((head, b",".join(made.records), batches.TAIL))
        digest = batches.digest(body)
        return Batch(self._stream, made.first, count, Kind.SUMMARY, digest, len(body), self._compress(body))

    def skip(self, count: int, link: bytes | None = None) -> tuple[int, int]:
        """Pass over seqs whose records are lost; return the first and the last of them.

        `link` is the hash of the last of their batches, None if they never were in any.
        """
        first = self.head + 1
        self.head += count
        self.digest = link or self.digest
        return first, self.head
