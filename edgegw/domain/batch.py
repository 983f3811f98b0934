"""The batch: journal row, message, unit of acknowledgement and link of the hash chain at once.

Its JSON bytes are made once, by `encode`, and only moved from then on.
"""

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import msgspec

from edgegw.domain.era import Era
from edgegw.domain.ranges import Ranges

GENESIS = bytes(32)
"""What stands for the hash of the batch before the first."""


class Kind(StrEnum):
    """What a batch's records are."""

    DATA = "data"
    EVENT = "event"
    SUMMARY = "summary"


class Batch(msgspec.Struct, frozen=True, gc=False):
    """A batch as the journal holds it.

    `packed` is one zstd frame of the JSON bytes, `digest` their SHA-256, `size` their length.
    """

    stream: str
    seq: int
    count: int
    kind: Kind
    digest: bytes
    size: int
    packed: bytes

    @property
    def last(self) -> int:
        """The number of the last record."""
        return self.seq + self.count - 1


class Message(msgspec.Struct, frozen=True):
    """A batch as a receiver reads it; `records` stays bytes until someone looks into it."""

    v: int
    gateway: str
    stream: str
    seq: int
    count: int
    kind: Kind
    prev: str
    records: msgspec.Raw
    clock: str = "synced"
    mono: msgspec.Raw = msgspec.Raw()
    last_prev: str | None = None
    period: int | None = None


_decoder = msgspec.json.Decoder(Message)


def head(gateway: str, stream: str, seq: int, count: int, kind: Kind, prev: bytes, more: bytes) -> bytes:
    """Return the JSON bytes that stand before a batch's first record; `more` are further keys (see `timing`)."""
    named = names(stream, seq, count, kind).decode()
    return f'{{"v":1,"gateway":"{gateway}",{named}"prev":"{prev.hex()}",'.encode() + more + b'"records":['


def timing(era: Era) -> bytes:
    """Return the keys that say how far the records' times can be trusted, and what can correct them later."""
    if era.synced:
        return b'"clock":"synced",'
    return msgspec.json.encode(era.wire())[1:-1] + b","


def names(stream: str, seq: int, count: int, kind: Kind) -> bytes:
    """Return the part of a batch's head that says which batch it is."""
    return f'"stream":"{stream}","seq":{seq},"count":{count},"kind":"{kind.value}",'.encode()


TAIL = b"]}"
HEAD_ROOM = 64 + 36 + 2 * 64 + 36 + 5 * 20 + 250
"""The most bytes that `head` and `TAIL` take: gateway id, stream, two hashes, boot, five numbers, and the keys."""


def decode(body: bytes) -> Message:
    """Read a batch's JSON; raise `msgspec.DecodeError` or `msgspec.ValidationError` if it is none."""
    return _decoder.decode(body)


def digest(body: bytes) -> bytes:
    """Return the SHA-256 of a batch's JSON bytes: what the next batch carries as `prev`."""
    return hashlib.sha256(body).digest()


class Link(NamedTuple):
    """What the chain needs of a batch. `digest` is what follows it: a summary's is its `last_prev`."""

    first: int
    last: int
    prev: bytes
    digest: bytes
    summary: bool = False


class Gap(NamedTuple):
    """Records that are gone for good, as a gap event names them; None where it does not tell the hash."""

    first: int
    last: int
    last_prev: bytes | None


class ChainReport(NamedTuple):
    """What `verify` found: how many links hold, which seqs are missing, where the chain breaks."""

    links: int
    missing: list[tuple[int, int]]
    breaks: list[int]

    @property
    def intact(self) -> bool:
        """Whether every seq is there or named in a gap, and every link holds."""
        return not self.missing and not self.breaks


def verify(links: Iterable[Link], gaps: Iterable[Gap] = (), first: int = 1) -> ChainReport:
    """Check one stream's chain.

    `links` come in order of their seq. A hole that gap events name is none: the chain goes on from the
    `last_prev` of the gap that ends just before the next link. A summary may stand beside some of the batches whose
    place it takes, where these had been received. `first` is where checking begins; the first link's own `prev` is
    taken on trust if it begins later than 1. `missing` are holes that nothing names, `breaks` the seqs of links whose
    `prev` is not what came before.
    """
    gaps = list(gaps)
    named = {gap.last: gap.last_prev for gap in gaps}
    covered = Ranges((gap.first, gap.last) for gap in gaps)
    ends = {
        first - 1: (GENESIS if first == 1 else None, False)
    }  # of links: the hash that follows, summary or not
    following = first
    count = 0
    missing: list[tuple[int, int]] = []
    breaks: list[int] = []
    for link in links:
        if link.first > following:
            missing.extend(covered.gaps(following, link.first - 1))
        ends = {last: end for last, end in ends.items() if last >= link.first - 1}
        expected, _ = ends.get(link.first - 1, (named.get(link.first - 1), False))
        twice = (
            link.first < following and not link.summary and not any(summary for _, summary in ends.values())
        )
        if twice or (expected is not None and link.prev != expected):
            breaks.append(link.first)
        ends[link.last] = link.digest, link.summary
        following = max(following, link.last + 1)
        count += 1
    return ChainReport(count, missing, breaks)
