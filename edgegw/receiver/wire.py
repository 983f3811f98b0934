"""Reads one message's payload into a checked batch."""

from typing import Annotated

import msgspec
import zstandard

from edgegw.domain.batch import Kind, Link, Message, decode, digest
from edgegw.domain.tag import Scalar, Value
from edgegw.errors import EdgegwError
from edgegw.receiver.dedupe import Key, NamedGap, Outline

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_BODY = 64 * 1024**2
"""The most bytes that a payload may unpack to."""
PERIOD_S = 60
"""The period of a summary that names none."""
MAX_INT = 2**63 - 1
"""The greatest integer that the databases hold."""

Int64 = Annotated[int, msgspec.Meta(ge=-MAX_INT - 1, le=MAX_INT)]


class MalformedError(EdgegwError):
    """A payload is no batch; it will not get better by being sent again."""


class DataRecord(msgspec.Struct, frozen=True, gc=False):
    """A scan, or a device's status."""

    ts: Int64
    device: str
    values: dict[str, Value] | None = None
    quality: dict[str, str] | None = None
    status: str | None = None
    reason: str | None = None


class SummaryRecord(msgspec.Struct, frozen=True, gc=False):
    """A period of one device: for each tag its figures."""

    ts: Int64
    device: str
    values: dict[str, dict[str, Scalar | None]]


class EventRecord(msgspec.Struct, frozen=True, gc=False):
    """What every event has; the rest stays in its JSON."""

    ts: Int64
    event: str


class _GapRecord(msgspec.Struct, frozen=True, gc=False):
    """A gap event's particulars."""

    first: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)] = msgspec.field(name="from")
    last: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)] = msgspec.field(name="to")
    reason: str = ""
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
_event = msgspec.json.Decoder(EventRecord)
_gap = msgspec.json.Decoder(_GapRecord)
_raw = msgspec.json.Decoder(list[msgspec.Raw])


def unpack(payload: bytes) -> bytes:
    """Return a payload's JSON bytes, as they are or out of a zstd frame; raise MalformedError."""
    if not payload.startswith(ZSTD_MAGIC):
        return payload
    try:
        size = zstandard.frame_content_size(payload)
        if size > MAX_BODY:
            raise MalformedError(f"unpacks to {size} bytes; expected {MAX_BODY} at most")
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=MAX_BODY)
    except zstandard.ZstdError as error:
        raise MalformedError(f"no zstd frame: {error}") from error


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


def read(payload: bytes) -> Batch:
    """Read a payload; raise MalformedError with the reason."""
    body = unpack(payload)
    try:
        body.decode()
        message = decode(body)
        own = digest(body)
        chain_link = link(message, own)
        raw = _raw.decode(message.records)
        data = _data.decode(message.records) if message.kind is Kind.DATA else []
        summaries = _summaries.decode(message.records) if message.kind is Kind.SUMMARY else []
        events = [_event.decode(record) for record in raw] if message.kind is Kind.EVENT else []
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"no batch: {error}") from error
    _check(message, len(raw), data)
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
    return key._replace(stream=gap.stream or key.stream), NamedGap(
        gap.first, gap.last, gap.reason, last_prev, gap.summary
    )  # fmt: skip


def _check(message: Message, records: int, data: list[DataRecord]) -> None:
    if message.v != 1:
        raise MalformedError(f"v is {message.v}; this version reads 1")
    if not (message.gateway and message.stream):
        raise MalformedError("no gateway or no stream")
    if message.seq < 1 or message.count < 1 or message.seq + message.count > MAX_INT:
        raise MalformedError(f"seq {message.seq}, count {message.count}; expected both from 1")
    if message.kind is Kind.SUMMARY and not 0 < period_s(message) <= MAX_INT:
        raise MalformedError(f"period is {message.period}; expected seconds, from 1")
    if message.kind is not Kind.SUMMARY and records != message.count:
        raise MalformedError(f"count is {message.count}; found {records} records")
    if any(record.values is None and record.status is None for record in data):
        raise MalformedError("a record with neither values nor status")


def _hash(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != 32:
        raise ValueError(f"found {text!r}; expected 64 hex digits")
    return value
