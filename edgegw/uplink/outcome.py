"""What a PUBACK means for a batch, and how long the backlog waits where batches are refused. Pure.

The backlog is paused where the broker refuses batches or says that nobody is subscribed (MQTT 5.0, 3.4.2.1, 0x10).
Live batches go on and show when that is over. A dashboard may be subscribed to live batches alone: then only a change
on the live topics ends the pause, else every live batch would cost one of the backlog.
"""

from enum import Enum

from edgegw.uplink.messages import Ack

INITIAL_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0


class Outcome(Enum):
    """What became of a batch: settled, on the way to a receiver that will confirm it, or still to be sent."""

    SETTLED = "settled"
    AWAITED = "awaited"
    PENDING = "pending"


def judge(acknowledge: str, ack: Ack, *, live: bool, end_to_end: bool) -> Outcome:
    """Return what a PUBACK means with this `acknowledge`; `end_to_end`: a receiver has confirmed this stream before."""
    receipts = acknowledge == "receiver" or (acknowledge == "auto" and end_to_end)
    needs_subscriber = receipts or acknowledge == "subscriber" or not live
    if not ack.accepted or (needs_subscriber and not ack.heard):
        return Outcome.PENDING
    return Outcome.AWAITED if receipts else Outcome.SETTLED


class Refusals:
    """Whether batches get through, live ones and the others, and until when the others wait."""

    def __init__(self) -> None:
        self.paused_until_s = 0.0
        self._count = 0
        self._pauses = 0
        self._through = {True: True, False: True}  # by whether it was live: how the last one fared

    def refused(self, now_s: float, *, live: bool) -> bool:
        """Note a batch that nobody got, and pause the others; tell whether it is the first."""
        if not live or self._through[True]:
            self.paused_until_s = now_s + min(MAX_PAUSE_S, INITIAL_PAUSE_S * 2 ** min(self._pauses, 10))
            self._pauses += 1
        self._through[live] = False
        self._count += 1
        return self._count == 1

    def accepted(self, *, live: bool) -> int:
        """Note a batch that got through; return how many had not, if that is over now, else 0."""
        if not self._through[live]:
            self._through[live] = True
            self.paused_until_s = 0.0
        if not all(self._through.values()):
            return 0
        over, self._count, self._pauses = self._count, 0, 0
        return over
