"""Reads one message's payload into a checked batch: what is beyond any gateway's bounds is no batch."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import msgspec
import zstandard

from edgegw.domain.batch import Kind, Link, Message, decode, digest
from edgegw.domain.tag import Scalar, Value
from edgegw.errors import EdgegwError
from edgegw.receiver.dedupe import Key, NamedGap, Outline
from edgegw.runtime.text import printable

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_MESSAGE = 16 * 1024**2
"""The largest `uplink.max_message` that a gateway can have: no batch's JSON is longer."""
PERIOD_S = 60
"""The period of a summary that names none."""
MAX_INT = 2**63 - 1
"""The greatest integer that the databases hold."""

MAX_COUNT = 2**31 - 1
"""The most records that a summary may stand for."""
MAX_PERIOD_S = 366 * 86_400
FIRST_MS, LAST_MS = -62_135_596_800_000, 253_402_300_799_999
"""The years 1 to 9999: what every database and language has a type for."""

Ts = Annotated[int, msgspec.Meta(ge=FIRST_MS, le=LAST_MS)]
Name = Annotated[str, msgspec.Meta(max_length=255)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]

_GATEWAY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STREAM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_DIGITS = bytes(ord("0") if chr(byte).isdecimal() else ord(" ") for byte in range(256))
"""Turns every digit into a zero: 20 of them in a row hold an integer beyond 64 bits, and hardly anything else."""


class MalformedError(EdgegwError):
    """A payload is no batch; it will not get better by being sent again."""


class DataRecord(msgspec.Struct, frozen=True, gc=False):
    """A scan, or a device's status."""

    ts: Ts
    device: Name
    values: dict[Name, Value] | None = None
    quality: dict[Name, Text] | None = None
    status: Name | None = None
    reason: Text | None = None


class SummaryRecord(msgspec.Struct, frozen=True, gc=False):
    """A period of one device: for each tag its figures."""

    ts: Ts
    device: Name
    values: dict[Name, dict[Name, Scalar | None]]


class EventRecord(msgspec.Struct, frozen=True, gc=False):
    """What every event has; the rest stays in its JSON."""

    ts: Ts
    event: Name


class _GapRecord(msgspec.Struct, frozen=True, gc=False):
    """A gap event's particulars."""

    first: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)] = msgspec.field(name="from")
    last: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)] = msgspec.field(name="to")
    reason: Text = ""
    last_prev: str | None = None
    stream: str | None = None
    summary: bool = False


class Batch(msgspec.Struct, frozen=True):
    """A batch that has passed every check that needs no other batch.

    Of `data`, `summaries` and `events` the one that `kind` says is filled; `raw` has the JSON of each record.
    `period_s` is that of a summary, else 0.
    """

    key: Key
    seq: int
    count: int
    kind: Kind
    period_s: int
    body: bytes
    digest: bytes
    data: list[DataRecord]
    summaries: list[SummaryRecord]
    events: list[EventRecord]
    raw: list[msgspec.Raw]
    link: Link

    @property
    def last(self) -> int:
        """The number of the last record."""
        return self.seq + self.count - 1

    @property
    def readings(self) -> int:
        """How many readings the records hold."""
        return sum(len(record.values) for record in self.data if record.values)

    @property
    def outline(self) -> Outline:
        """What tells it from others, and how it stands to them."""
        return Outline(self.seq, self.count, self.period_s, self.digest)


_data = msgspec.json.Decoder(list[DataRecord])
_summaries = msgspec.json.Decoder(list[SummaryRecord])
_events = msgspec.json.Decoder(list[EventRecord])
_gap = msgspec.json.Decoder(_GapRecord)
_raw = msgspec.json.Decoder(list[msgspec.Raw])


def unpack(payload: bytes, max_bytes: int = MAX_MESSAGE) -> bytes:
    """Return a payload's JSON bytes, as they are or out of a zstd frame; raise MalformedError."""
    if not payload.startswith(ZSTD_MAGIC):
        _check_size(len(payload), max_bytes)
        return payload
    try:
        _check_size(zstandard.frame_content_size(payload), max_bytes)
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=max_bytes)
    except zstandard.ZstdError as error:
        raise MalformedError(f"no zstd frame of at most {max_bytes} bytes: {error}") from error


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MalformedError(f"found {size} bytes of JSON; expected {max_bytes} at most (--max-message)")


def link(message: Message, own: bytes) -> Link:
    """Return a message's link of the chain, `own` being its digest; raise ValueError if its hashes are none.

    A summary stands for the batches it replaced: what follows it carries the hash of the last of those.
    """
    prev, summary = _hash(message.prev), message.kind is Kind.SUMMARY
    if summary:
        if message.last_prev is None:
            raise ValueError("a summary without last_prev")
        own = _hash(message.last_prev)
    return Link(message.seq, message.seq + message.count - 1, prev, own, summary)


def period_s(message: Message) -> int:
    """Return the period of a message if it is a summary, else 0."""
    if message.kind is not Kind.SUMMARY:
        return 0
    return PERIOD_S if message.period is None else message.period


def outline(body: bytes) -> Outline:
    """Return the outline of a batch that `read` has passed before."""
    message = decode(body)
    return Outline(message.seq, message.count, period_s(message), digest(body))


def read(payload: bytes, max_bytes: int = MAX_MESSAGE) -> Batch:
    """Read a payload whose JSON has `max_bytes` at most; raise MalformedError with the reason.

    The records are decoded by type first: what is none ends it before a list of millions has been made.
    """
    body = unpack(payload, max_bytes)
    try:
        body.decode()
        message = decode(body)
        own = digest(body)
        chain_link = link(message, own)
        data = _data.decode(message.records) if message.kind is Kind.DATA else []
        summaries = _summaries.decode(message.records) if message.kind is Kind.SUMMARY else []
        events = _events.decode(message.records) if message.kind is Kind.EVENT else []
        raw = _raw.decode(message.records)
        if b"0" * 20 in bytes(message.records).translate(_DIGITS):
            _check_numbers(msgspec.json.decode(message.records))
    except (ValueError, RecursionError) as error:
        raise MalformedError(printable(f"no batch: {error}")) from error
    _check(message, len(raw), data)
    if b"\\" in body or b"\x7f" in body or not body.isascii():
        _check_names(data, summaries, events)
    return Batch(
        Key(message.gateway, message.stream), message.seq, message.count, message.kind, period_s(message),
        body, own, data, summaries, events, raw, chain_link,
    )  # fmt: skip


def read_gap(key: Key, record: bytes) -> tuple[Key, NamedGap]:
    """Read a gap event that came in a stream: what it names, and of which stream; raise MalformedError."""
    try:
        gap = _gap.decode(record)
        last_prev = None if gap.last_prev is None else _hash(gap.last_prev)
    except ValueError as error:
        raise MalformedError(f"no gap event: {error}") from error
    if gap.last < gap.first:
        raise MalformedError(f"no gap event: from {gap.first} to {gap.last}")
    if gap.stream is not None:
        _check_stream(gap.stream)
    return key._replace(stream=gap.stream or key.stream), NamedGap(
        gap.first, gap.last, gap.reason, last_prev, gap.summary
    )  # fmt: skip


def _check(message: Message, records: int, data: list[DataRecord]) -> None:
    if message.v != 1:
        raise MalformedError(f"v is {message.v}; this version reads 1")
    if not _GATEWAY.fullmatch(message.gateway):
        raise MalformedError(
            f"gateway is {message.gateway[:80]!r}; expected letters, digits, . _ or -, at most 64"
        )
    _check_stream(message.stream)
    if message.seq < 1 or message.count < 1 or message.seq + message.count > MAX_INT:
        raise MalformedError(
            f"seq {message.seq}, count {message.count}; expected both from 1, within 63 bits"
        )
    if message.kind is Kind.SUMMARY and message.count > MAX_COUNT:
        raise MalformedError(f"count is {message.count}; expected {MAX_COUNT} at most")
    if message.kind is Kind.SUMMARY and not 0 < period_s(message) <= MAX_PERIOD_S:
        raise MalformedError(f"period is {message.period}; expected seconds, from 1 to {MAX_PERIOD_S}")
    if message.kind is not Kind.SUMMARY and records != message.count:
        raise MalformedError(f"count is {message.count}; found {records} records")
    if any(record.values is None and record.status is None for record in data):
        raise MalformedError("a record with neither values nor status")


def _check_stream(stream: str) -> None:
    if not _STREAM.fullmatch(stream):
        raise MalformedError(f"stream is {stream[:80]!r}; expected a UUID")


def _check_names(data: list[DataRecord], summaries: list[SummaryRecord], events: list[EventRecord]) -> None:
    """Raise MalformedError if a name or a word has characters that no reader shows; text values may have any."""
    for name in _names(data, summaries, events):
        if not name.isprintable():
            raise MalformedError(f"found the name {name[:80]!r}; expected no control characters")


def _names(
    data: list[DataRecord], summaries: list[SummaryRecord], events: list[EventRecord]
) -> Iterator[str]:
    yield from (event.event for event in events)
    for record in data:
        yield from (record.device, *(record.values or {}), record.status or "", record.reason or "")
        for tag, quality in (record.quality or {}).items():
            yield from (tag, quality)
    for summary in summaries:
        yield summary.device
        for tag, figures in summary.values.items():
            yield from (tag, *figures)


def _check_numbers(value: Any) -> None:
    """Raise MalformedError if an integer is neither an int64 nor a uint64: no database has a type for it."""
    if isinstance(value, int) and not -MAX_INT - 1 <= value < 2**64:
        raise MalformedError(f"found an integer of {value.bit_length()} bits; expected 64 at most")
    parts: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    for part in parts:
        _check_numbers(part)


def _hash(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != 32:
        raise ValueError(f"found {text[:80]!r}; expected 64 hex digits")
    return value
