"""Writes each record as one JSON line to a stream, with what memory it takes to do so once."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import msgspec

from edgegw.domain.batch import Kind, Link
from edgegw.receiver.apart import Apart, NoneApart
from edgegw.receiver.dedupe import Key, NamedGap, Outline
from edgegw.receiver.sink import Figures, SinkUnusable, Span
from edgegw.receiver.wire import Batch

REMEMBERED = 10_000
"""How many batches of a stream, and how many summaries, can still be compared with one that comes again."""

_ENVELOPE = ("gateway", "stream", "seq")


class Joined:
    """Links of a chain where those that hold onto each other are one, so that whole streams are a few.

    Summaries are joined with summaries alone, for other batches may stand beside them.
    """

    def __init__(self) -> None:
        self._links: list[Link] = []

    def add(self, link: Link) -> None:
        """Put a link in its place."""
        at = bisect_left(self._links, link.first, key=lambda other: other.first)
        self._links.insert(at, link)
        self._join(at)
        self._join(at - 1)

    def _join(self, at: int) -> None:
        if 0 <= at < len(self._links) - 1:
            one, other = self._links[at : at + 2]
            if (one.last + 1, one.digest, one.summary) == (other.first, other.prev, other.summary):
                self._links[at : at + 2] = [Link(one.first, other.last, one.prev, other.digest, one.summary)]

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)


class _Written:
    """What is remembered of one stream."""

    def __init__(self) -> None:
        self.recent: OrderedDict[tuple[int, int], Outline] = OrderedDict()
        self.summaries: OrderedDict[tuple[int, int, int], Outline] = OrderedDict()
        self.joined = Joined()
        self.figures = Figures(0, 0, 0, 0)


class NdjsonSink:
    """The port's implementation over a binary stream; it knows nothing of earlier runs."""

    def __init__(self, out: BinaryIO) -> None:
        self.apart: Apart = NoneApart()
        self._out = out
        self._written: dict[Key, _Written] = {}

    def spans(self) -> Iterable[Span]:
        return ()

    def gaps(self) -> Iterable[tuple[Key, NamedGap]]:
        return ()

    def kept(self, key: Key, seq: int, last: int) -> Sequence[Outline]:
        written = self._written[key]
        same = written.recent.get((seq, last))  # then no other but a summary can overlap
        there = [*([same] if same else written.recent.values()), *written.summaries.values()]
        return [batch for batch in there if batch.seq <= last and batch.last >= seq]

    def add(self, batch: Batch, received_ms: int, *, beside: bool = False) -> None:
        lines = [line(batch.key, seq, raw) for seq, raw in zip(_seqs(batch), batch.raw, strict=True)]
        self._write(b"".join(lines))
        written = self._written.setdefault(batch.key, _Written())
        if batch.period_s:
            written.summaries[batch.seq, batch.last, batch.period_s] = batch.outline
        else:
            written.recent[batch.seq, batch.last] = batch.outline
        for remembered in (written.recent, written.summaries):
            if len(remembered) > REMEMBERED:
                remembered.popitem(last=False)
        written.joined.add(batch.link)
        so_far = written.figures
        written.figures = Figures(
            so_far.batches + 1,
            so_far.readings + batch.readings,
            so_far.events + len(batch.events),
            so_far.conflicts,
        )

    def _write(self, lines: bytes) -> None:
        try:
            self._out.write(lines)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SinkUnusable(f"standard output: {error}") from error

    def add_conflict(self, batch: Batch, received_ms: int) -> None:
        written = self._written[batch.key]
        written.figures = written.figures._replace(conflicts=written.figures.conflicts + 1)

    def beginnings(self) -> Iterable[tuple[Key, int]]:
        return ()

    def begin(self, key: Key, seq: int) -> None:
        """Keep nothing: the next run begins anew."""

    def commit(self) -> None:
        try:
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SinkUnusable(f"standard output: {error}") from error

    def links(self, key: Key) -> Iterator[Link]:
        return iter(self._written[key].joined if key in self._written else ())

    def figures(self) -> dict[Key, Figures]:
        return {key: written.figures for key, written in self._written.items()}

    def close(self) -> None:
        """Leave the stream open: it belongs to the caller."""


def _seqs(batch: Batch) -> Iterable[int]:
    if batch.kind is Kind.SUMMARY:
        return [batch.seq] * len(batch.raw)
    return range(batch.seq, batch.seq + batch.count)


def line(key: Key, seq: int, raw: msgspec.Raw) -> bytes:
    """Return a record's line: gateway, stream and seq before the record's own keys.

    A key of an event that is one of these three (a gap may name another stream) becomes `event_KEY`.
    """
    start = msgspec.json.encode({"gateway": key.gateway, "stream": key.stream, "seq": seq})
    record = bytes(raw)
    if any(f'"{name}"'.encode() in record for name in _ENVELOPE):
        own: dict[str, Any] = msgspec.json.decode(raw)
        record = msgspec.json.encode(
            {f"event_{name}" if name in _ENVELOPE else name: value for name, value in own.items()}
        )
    return start[:-1] + b"," + record[1:] + b"\n"
