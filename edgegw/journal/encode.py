"""Records to batches: the one place where a record becomes bytes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import zstandard

from edgegw.domain import batch as batches
from edgegw.domain.batch import Batch, Kind
from edgegw.domain.quality import BAD_TEXT, TOO_LARGE
from edgegw.domain.record import Event, Record, Scan, wire
from edgegw.domain.tag import Value

_encoder = msgspec.json.Encoder()


class Group(NamedTuple):
    """Encoded records that will be one batch, once they get their numbers."""

    kind: Kind
    ts: int
    records: list[bytes]
    size: int


def group(records: Iterable[Record], max_message: int) -> list[Group]:
    """Encode records and group them into batches of at most `max_message` bytes of JSON.

    Events come first, then data, each in their order. A scan too large for a message is split; a single value
    too large for one, or that JSON cannot hold, is left out and marked so.
    """
    limit = max_message - batches.HEAD_ROOM
    events: list[Record] = []
    data: list[Record] = []
    for record in records:
        (events if isinstance(record, Event) else data).append(record)
    return [*_pack(Kind.EVENT, events, limit), *_pack(Kind.DATA, data, limit)]


def _pack(kind: Kind, records: list[Record], limit: int) -> Iterator[Group]:
    parts: list[bytes] = []
    size = ts = 0
    for record in records:
        whole = _encode(record)
        for part_ts, part in (
            ((record.ts, whole),) if whole and len(whole) < limit else _shrunk(record, limit)
        ):
            if size + len(part) + 1 > limit and parts:
                yield Group(kind, ts, parts, size)
                parts, size, ts = [], 0, 0
            parts.append(part)
            size += len(part) + 1
            if part_ts > ts:
                ts = part_ts
    if parts:
        yield Group(kind, ts, parts, size)


def _encode(record: Record) -> bytes | None:
    """Return the record's JSON, None if it holds something that JSON cannot, such as half a surrogate pair."""
    try:
        return _encoder.encode(wire(record))
    except (TypeError, ValueError):
        return None


def _shrunk(record: Record, limit: int) -> list[tuple[int, bytes]]:
    """Encode a record that a message cannot take as it is, as several that it can."""
    if isinstance(record, Scan):
        return [(record.ts, part) for part in _split(record, limit)]
    note = {
        "ts": record.ts,
        "event": getattr(record, "event", "config"),
        "error": "left out: too large for a message, or nothing that JSON can hold",
    }
    return [(record.ts, _encoder.encode(note))]


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
        self._compress = zstandard.ZstdCompressor(level=1).compress

    def seal(self, made: Group, clock: str) -> tuple[Batch, bytes]:
        """Return the next batch of the stream and its JSON bytes."""
        seq, count = self.head + 1, len(made.records)
        head = batches.head(self._gateway, self._stream, seq, count, made.kind, self.digest, clock)
        body = b"".join((head, b",".join(made.records), batches.TAIL))
        self.digest = batches.digest(body)
        self.head += count
        return Batch(self._stream, seq, count, made.kind, self.digest, len(body), self._compress(body)), body

    def skip(self, count: int) -> tuple[int, int]:
        """Pass over seqs whose records are lost; return the first and the last of them."""
        first = self.head + 1
        self.head += count
        return first, self.head
