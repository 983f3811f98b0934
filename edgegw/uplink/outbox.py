"""The outbox: messages that are no batches (state, replies), each published until the broker has it.

It lives as long as one connection. What it holds is bounded: a reply beyond that is left out.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from edgegw import clock
from edgegw.uplink.messages import Ack
from edgegw.uplink.mqtt import Connection

log = logging.getLogger(__name__)

CAPACITY = 64
"""Messages that may be unacknowledged; more are left out."""
RESEND_S = 10.0
"""How long a PUBACK may take before a message is published again."""
MAX_TRIES = 4
MAX_LOST = 256
"""Publications that may go unanswered before the connection is given up: paho keeps each until then."""


@dataclass(slots=True)
class Notice:
    """A message; `acknowledged` is set once the broker has answered it."""

    topic: str
    payload: bytes
    retain: bool = False
    content_type: str | None = None
    correlation: bytes | None = None
    tries: int = 0
    sent_s: float = 0.0
    acknowledged: asyncio.Event = field(default_factory=asyncio.Event)


class Outbox:
    """Publishes notices over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._open: dict[int, Notice] = {}
        self._lost = 0
        self._complained = False

    def __len__(self) -> int:
        return len(self._open)

    def send(self, notice: Notice) -> None:
        """Publish a notice, unless too many are unacknowledged."""
        if len(self._open) >= CAPACITY:
            self._complain(f"{CAPACITY} messages are not acknowledged; one to {notice.topic} is left out")
            return
        notice.tries += 1
        notice.sent_s = clock.mono_s()
        mid = self._connection.publish(
            notice.topic, notice.payload, retain=notice.retain,
            content_type=notice.content_type, correlation=notice.correlation,
        )  # fmt: skip
        self._open[mid] = notice

    def acknowledge(self, mid: int, ack: Ack) -> bool:
        """Note a PUBACK; False if it is for none of these messages."""
        notice = self._open.pop(mid, None)
        if notice is None:
            return False
        notice.acknowledged.set()
        if not ack.accepted:
            self._complain(f"a message to {notice.topic} was refused: {ack.reason}")
        return True

    def resend(self) -> None:
        """Publish again what was not acknowledged for a while."""
        due_s = clock.mono_s() - RESEND_S
        for mid, notice in [(mid, notice) for mid, notice in self._open.items() if notice.sent_s <= due_s]:
            del self._open[mid]
            self._lost += 1
            if notice.tries < MAX_TRIES:
                self.send(notice)
            else:
                self._complain(f"a message to {notice.topic} was not acknowledged after {MAX_TRIES} tries")
        if self._lost > MAX_LOST:
            self._connection.drop()

    def _complain(self, what: str) -> None:
        if not self._complained:
            log.warning("uplink %s: %s", self._connection.url, what)
        self._complained = True
