"""Receipts: what the broker has taken and the receiver has not confirmed, and when that is sent again.

A PUBACK only says that the broker has a batch; with `acknowledge = "receiver"` it settles nothing. What waits for
its receipt is kept here as ranges, in two ages: `old`, and `young`, taken since a certain moment. A receipt for
something young shows that the way to the receiver is open behind everything old: what is old and still has no
receipt was lost on the way. That tells a loss from a receiver that is only slow, or has a long queue at its
broker. Where no receipt comes at all, nothing is known, and only a few batches are tried now and then.

What was sent several times and still gets no receipt, while others do, is held aside and tried once an hour: brokers
acknowledge and discard what is too large for them (MQTT 3.1.1 has no other answer), and a receiver may be unable to
read something.
"""

from typing import Annotated, NamedTuple

import msgspec

from edgegw.domain.ranges import Ranges
from edgegw.errors import EdgegwError

FIRST_S = 30.0
"""How long a receipt is waited for at first."""
MOST_S = 600.0
MAX_RESENDS = 3
"""How often a batch is sent again before it is held aside."""
ASIDE_S = 3600.0
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
    """What to send again: all of it, or a window's worth from its beginning, to try.

    `aside` is what is held aside from now on.
    """

    ranges: Ranges
    probe: bool
    aside: Ranges


class Receipts:
    """What of one stream waits for its receipt, over any number of connections."""

    def __init__(self, stream: str, now_s: float) -> None:
        self.stream = stream
        self.silent_since_s: float | None = None
        self._old = Ranges()
        self._young = Ranges()
        self._young_since_s = now_s
        self._passed = False
        self._resent = [Ranges() for _ in range(MAX_RESENDS)]  # at least once, at least twice, ...
        self.resent_sizes: list[
            int
        ] = []  # the smallest and the largest that was sent again so often, bytes of JSON
        self._aside = Ranges()
        self._try_aside_s = 0.0
        self._free_aside = False
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
        for seqs in (*self._young, *self._aside):
            awaited.add(*seqs)
        return awaited

    def taken(self, first: int, last: int, size: int, now_s: float, *, live: bool) -> None:
        """Note that the broker has taken a batch, for the first time or once more."""
        if not (self._old or self._young):
            self._heard_s = now_s  # from now on one is waited for
        self._old.remove(first, last)
        if self._aside.covers(first, last):
            return  # it was only tried
        if self._resent[-1].covers(first, last):
            sizes = [*self.resent_sizes, size]
            self.resent_sizes = [min(sizes), max(sizes)]
        self._young.add(first, last)
        if not live and first not in self._backlog:
            self._backlog[first] = last, size
            self._backlog_bytes += size

    def confirmed(self, batches: Ranges, now_s: float) -> None:
        """Note that a receipt came, and which batches it settled."""
        self._heard_s, self._patience_s, self.silent_since_s = now_s, FIRST_S, None
        self._passed = self._passed or any(self._young.overlaps(*seqs) for seqs in batches)
        if any(self._resent[0].overlaps(*seqs) for seqs in batches):
            self._pace_s = FIRST_S
        self._free_aside = self._free_aside or any(self._aside.overlaps(*seqs) for seqs in batches)
        self._forget(batches)

    def due(self, settled: Ranges, now_s: float) -> Overdue | None:
        """Return what is to be sent again now, if anything; what is settled by now is waited for no longer."""
        self._forget(settled)
        if self._aside and (self._free_aside or now_s >= self._try_aside_s):
            return self._retry_aside(now_s)
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
            return Overdue(self._old.copy(), probe=True, aside=Ranges())
        return None

    def _retry_aside(self, now_s: float) -> Overdue:
        """Try some of what is held aside or, after a receipt for any of it, send all of it again."""
        self._try_aside_s = now_s + ASIDE_S
        aside = self._aside.copy()
        if self._free_aside:
            self._free_aside = False
            self._forget(aside)
            return Overdue(aside, probe=False, aside=Ranges())
        return Overdue(aside, probe=True, aside=Ranges())

    def _lost(self, now_s: float) -> Overdue | None:
        """Give up waiting for what is old; what was sent again before is sent again at longer and longer times."""
        lost, self._old = self._old, self._young
        self._begin_young(now_s)
        if not lost:
            return None
        known = all(self._resent[0].covers(*seqs) for seqs in lost)
        self._pace_s = min(MOST_S, 2 * self._pace_s) if known else FIRST_S
        self._leave_backlog(lost)
        aside = lost.common(self._resent[-1])
        for seqs in aside:
            lost.remove(*seqs)
            self._aside.add(*seqs)
        if aside:
            self._try_aside_s = now_s + ASIDE_S
        self._count(lost)
        return Overdue(lost, probe=False, aside=aside)

    def _count(self, lost: Ranges) -> None:
        """Count once more what is sent again."""
        for resent in self._resent:
            before = lost.common(resent)
            for seqs in lost:
                resent.add(*seqs)
            lost = before

    def _begin_young(self, now_s: float) -> None:
        self._young, self._young_since_s, self._passed = Ranges(), now_s, False

    def _forget(self, batches: Ranges) -> None:
        for seqs in batches:
            for held in (self._old, self._young, self._aside, *self._resent):
                held.remove(*seqs)
        self._leave_backlog(batches)

    def _leave_backlog(self, batches: Ranges) -> None:
        for first, (last, size) in list(self._backlog.items()):
            if batches.covers(first, last):
                del self._backlog[first]
                self._backlog_bytes -= size
