"""Receipts: what the broker has taken and the receiver has not confirmed, and when that is sent again.

A PUBACK only says that the broker has a batch; with `acknowledge = "receiver"` it settles nothing. What waits for
its receipt is kept here as ranges, in two ages: `old`, and `young`, taken since a certain moment. A receipt for
something young shows that the way to the receiver is open behind everything old: what is old and still has no
receipt was lost on the way. That tells a loss from a receiver that is only slow, or has a long queue at its
broker. Where no receipt comes at all, nothing is known, and only a few batches are tried now and then.
"""

from typing import Annotated, NamedTuple

import msgspec

from edgegw.domain.ranges import Ranges
from edgegw.errors import EdgegwError

FIRST_S = 30.0
"""How long a receipt is waited for at first."""
MOST_S = 600.0
WITHOUT_BATCHES = 1000
WITHOUT_BYTES = 64 * 1024**2
"""The backlog that may be without receipt: no more of it is sent then."""
MOST_RANGES = 4096
"""Ranges in one receipt."""

_Seq = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class ReceiptError(EdgegwError):
    """A receipt that says nothing about this journal; it is passed over."""


class _Receipt(msgspec.Struct, frozen=True):
    stream: str
    ranges: Annotated[list[tuple[_Seq, _Seq]], msgspec.Meta(max_length=MOST_RANGES)]


_decoder = msgspec.json.Decoder(_Receipt)


def read(payload: bytes, stream: str, head: int) -> Ranges:
    """Return what a receipt confirms of a stream, up to its head; raise ReceiptError with the reason."""
    try:
        receipt = _decoder.decode(payload)
    except (ValueError, RecursionError) as error:
        raise ReceiptError(f"no receipt: {error}"[:200]) from error
    if receipt.stream != stream:
        raise ReceiptError(f"of stream {receipt.stream[:40]!r}; this journal's is {stream}")
    if upside_down := next((pair for pair in receipt.ranges if pair[0] > pair[1]), None):
        raise ReceiptError(f"no receipt: a range from {upside_down[0]} to {upside_down[1]}")
    return Ranges((first, min(last, head)) for first, last in receipt.ranges if first <= head)


class Overdue(NamedTuple):
    """What to send again: all of it, or a window's worth from its beginning, to try."""

    ranges: Ranges
    probe: bool


class Receipts:
    """What of one stream waits for its receipt, over any number of connections."""

    def __init__(self, stream: str, now_s: float) -> None:
        self.stream = stream
        self.silent_since_s: float | None = None
        self._old = Ranges()
        self._young = Ranges()
        self._young_since_s = now_s
        self._passed = False
        self._again = Ranges()
        self._pace_s = FIRST_S
        self._heard_s = now_s
        self._patience_s = FIRST_S
        self._backlog: dict[int, tuple[int, int]] = {}
        self._backlog_bytes = 0

    @property
    def full(self) -> bool:
        """Whether as much of the backlog is without receipt as may be."""
        return len(self._backlog) >= WITHOUT_BATCHES or self._backlog_bytes >= WITHOUT_BYTES

    @property
    def awaited(self) -> Ranges:
        """What the broker has taken and nobody confirmed."""
        awaited = self._old.copy()
        for seqs in self._young:
            awaited.add(*seqs)
        return awaited

    def taken(self, first: int, last: int, size: int, now_s: float, *, live: bool) -> None:
        """Note that the broker has taken a batch, for the first time or once more."""
        if not (self._old or self._young):
            self._heard_s = now_s  # from now on one is waited for
        self._old.remove(first, last)
        self._young.add(first, last)
        if not live and first not in self._backlog:
            self._backlog[first] = last, size
            self._backlog_bytes += size

    def confirmed(self, batches: Ranges, now_s: float) -> None:
        """Note that a receipt came, and which batches it settled."""
        self._heard_s, self._patience_s, self.silent_since_s = now_s, FIRST_S, None
        self._passed = self._passed or any(self._young.overlaps(*seqs) for seqs in batches)
        if any(self._again.overlaps(*seqs) for seqs in batches):
            self._pace_s = FIRST_S
        self._forget(batches)

    def due(self, settled: Ranges, now_s: float) -> Overdue | None:
        """Return what is to be sent again now, if anything; what is settled by now is waited for no longer."""
        self._forget(settled)
        if not (self._old or self._young):
            self._heard_s, self._patience_s, self.silent_since_s = now_s, FIRST_S, None
            return None
        if self._passed and now_s - self._young_since_s >= self._pace_s:
            return self._lost(now_s)
        if now_s - self._heard_s >= self._patience_s:
            if self.silent_since_s is None:
                self.silent_since_s = self._heard_s
            self._heard_s = now_s
            self._patience_s = min(MOST_S, 2 * self._patience_s)
            self._old = self.awaited
            self._begin_young(now_s)
            return Overdue(self._old.copy(), probe=True)
        return None

    def _lost(self, now_s: float) -> Overdue | None:
        """Give up waiting for what is old; what was sent again before is sent again at longer and longer times."""
        lost, self._old = self._old, self._young
        self._begin_young(now_s)
        if not lost:
            return None
        known = all(self._again.covers(*seqs) for seqs in lost)
        self._pace_s = min(MOST_S, 2 * self._pace_s) if known else FIRST_S
        for seqs in lost:
            self._again.add(*seqs)
        self._leave_backlog(lost)
        return Overdue(lost, probe=False)

    def _begin_young(self, now_s: float) -> None:
        self._young, self._young_since_s, self._passed = Ranges(), now_s, False

    def _forget(self, batches: Ranges) -> None:
        for seqs in batches:
            for held in (self._old, self._young, self._again):
                held.remove(*seqs)
        self._leave_backlog(batches)

    def _leave_backlog(self, batches: Ranges) -> None:
        for first, (last, size) in list(self._backlog.items()):
            if batches.covers(first, last):
                del self._backlog[first]
                self._backlog_bytes -= size
