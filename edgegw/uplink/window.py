"""The window: batches that were published over one connection and are not acknowledged yet. Pure.

A broker acknowledges QoS 1 messages in the order in which they came (MQTT 5.0, 4.6; 3.1.1, 4.6). A PUBACK for a later
message than one that is still open therefore hints that the open one, or its PUBACK, was lost: a broker over its
quota does that, and a proxy may. Some brokers reorder, so the hint is trusted only after a while.
"""

from enum import Enum
from typing import NamedTuple

from edgegw.domain.batch import Batch

PATIENCE_S = 10.0
"""How much later than an open message an acknowledged one must have been sent for the open one to count as lost."""
SILENCE_S = 30.0
"""How long a message may be open at the most."""
MAX_WRITTEN_OFF = 64
"""Messages that may count as lost on one connection: paho keeps each until the connection ends."""


class Way(Enum):
    """Why a batch is sent."""

    LIVE = "live"
    BACKLOG = "backlog"
    AGAIN = "again"


class InFlight(NamedTuple):
    """A batch that was published at `sent_s` in a payload of `size` bytes and is not acknowledged yet."""

    batch: Batch
    way: Way
    sent_s: float
    size: int


class Window:
    """What is in flight over one connection, oldest first, by the message id of each."""

    def __init__(self, inflight: int, receive_maximum: int) -> None:
        self.size = max(1, min(inflight, receive_maximum))
        self.not_live = 0
        self._receive_maximum = receive_maximum
        self._open: dict[int, InFlight] = {}
        self._written_off: set[int] = set()
        self._newest_s = 0.0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def full(self) -> bool:
        """Whether nothing more may be published; what was written off still counts for the broker."""
        return len(self._open) >= min(self.size, self._receive_maximum - len(self._written_off))

    @property
    def sizes(self) -> list[int]:
        """The sizes of what is in flight, in bytes."""
        return [sent.size for sent in self._open.values()]

    def publish(self, mid: int, sent: InFlight) -> None:
        """Note that a batch was published with this message id."""
        self._written_off.discard(mid)
        self._open[mid] = sent
        self.not_live += sent.way is not Way.LIVE

    def acknowledge(self, mid: int) -> InFlight | None:
        """Return the batch that a PUBACK is for; None if there is none any more."""
        self._written_off.discard(mid)
        sent = self._open.pop(mid, None)
        if sent is not None:
            self.not_live -= sent.way is not Way.LIVE
            self._newest_s = max(self._newest_s, sent.sent_s)
        return sent

    def write_off(self, now_s: float) -> list[InFlight]:
        """Take out and return what was lost: a message sent later was acknowledged, and there was time to."""
        lost: list[InFlight] = []
        while self._open:
            mid, sent = next(iter(self._open.items()))
            passed_s = self._newest_s - sent.sent_s
            if passed_s < PATIENCE_S and (passed_s <= 0 or now_s - sent.sent_s < SILENCE_S):
                break  # what follows was sent later still
            del self._open[mid]
            self._written_off.add(mid)
            self.not_live -= sent.way is not Way.LIVE
            lost.append(sent)
        return lost

    def dead(self, now_s: float) -> str | None:
        """Return why the connection is of no use any more, None if it is."""
        if len(self._written_off) >= min(MAX_WRITTEN_OFF, self._receive_maximum):
            return f"{len(self._written_off)} messages were not acknowledged, though later ones were"
        oldest = next(iter(self._open.values()), None)
        if oldest is not None and now_s - oldest.sent_s > SILENCE_S:
            return f"no acknowledgement in {SILENCE_S:.0f} s"
        return None
