"""The port behind which received batches are kept."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec

from edgegw.domain.batch import Link
from edgegw.errors import EdgegwError
from edgegw.receiver.apart import Apart
from edgegw.receiver.dedupe import Key, NamedGap, Outline
from edgegw.receiver.wire import Batch


class SinkError(EdgegwError):
    """What keeps the batches cannot for now; nothing was confirmed that is not kept: back off, open it anew."""


class SinkUnusable(EdgegwError):
    """What should keep the batches cannot be used as it is (wrong password, no such folder): somebody must mend it."""


class BatchError(EdgegwError):
    """The medium is well and will never keep this batch; what was not committed must be added again without it."""


class Span(msgspec.Struct, frozen=True):
    """The seqs of one kept batch, or of several that follow each other, and when they came."""

    key: Key
    seq: int
    count: int
    received_ms: int


class Figures(NamedTuple):
    """How much is kept of one stream."""

    batches: int
    readings: int
    events: int
    conflicts: int


class Sink(Protocol):
    """Keeps batches in transactions; every method raises SinkError where the medium fails.

    After any error what was not committed is undefined: close it and open it anew.
    """

    apart: Apart

    def spans(self) -> Iterable[Span]:
        """Return what is kept, for a start from there."""
        ...

    def gaps(self) -> Iterable[tuple[Key, NamedGap]]:
        """Return the gap events among what is kept."""
        ...

    def kept(self, key: Key, seq: int, last: int) -> Sequence[Outline]:
        """Return the kept batches that overlap `seq` to `last`."""
        ...

    def add(self, batch: Batch, received_ms: int, *, beside: bool = False) -> None:
        """Add a new batch, perhaps beside others of its seqs; it is safe only when `commit` has returned.

        Raises BatchError if it never can be added.
        """
        ...

    def add_conflict(self, batch: Batch, received_ms: int) -> None:
        """Take in, as evidence and apart from the rest, a batch that contradicts what is kept."""
        ...

    def beginnings(self) -> Iterable[tuple[Key, int]]:
        """Return the streams that count from a later seq than 1 on, and that seq."""
        ...

    def begin(self, key: Key, seq: int) -> None:
        """Note that a stream counts from a seq on."""
        ...

    def commit(self) -> None:
        """Make everything added safe."""
        ...

    def links(self, key: Key) -> Iterator[Link]:
        """Yield a stream's links of the chain in order of their seq."""
        ...

    def figures(self) -> dict[Key, Figures]:
        """Return what is kept of each stream."""
        ...

    def close(self) -> None:
        """Let go of the medium; what was not committed is gone."""
        ...
