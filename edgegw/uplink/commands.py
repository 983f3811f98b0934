"""Commands from the broker: bounded concurrency and rate, backpressure for QoS 1, and a count of what is discarded.

A QoS 1 command is acknowledged when it is answered, and an MQTT 5 broker sends no more than the Receive Maximum before
that: the rest waits at the broker, and none is lost. QoS 0 has no backpressure; commands beyond the queue are
discarded and counted. Reading never stops for long, since the acknowledgements of batches arrive behind the commands.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec

from edgegw import clock
from edgegw.domain.command import Reply
from edgegw.uplink.messages import Incoming
from edgegw.uplink.mqtt import Connection
from edgegw.uplink.outbox import Notice, Outbox
from edgegw.uplink.reply_topics import reply_topics

log = logging.getLogger(__name__)

UNDER_WAY = 16
"""Commands in progress at once."""
UNANSWERED = 32
"""Unacknowledged messages in the outbox from which on no command begins."""
RATE = 100.0
"""Commands a second, on average."""
BURST = 64.0
"""Commands that may begin at once after a pause."""
WAITING = 64
"""QoS 0 commands that may be queued."""
WAITING_BYTES = 4 * 1024**2
"""Payloads that may be queued: more than a broker sends that keeps to the Receive Maximum."""
CALM_S = 10.0
"""How long after the last discarded command a flood is over."""

Obey = Callable[[bytes, bool], Awaitable[Reply]]
"""Acts on a command's payload, given whether it was retained."""


class Budget:
    """A token bucket: at most `burst` at once, and `rate` a second in the long run. Pure."""

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at_s = burst, now_s

    def spend(self, now_s: float) -> bool:
        """Consume one token; False if there is none."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Flood:
    """Counts discarded commands, from the first one to CALM_S after the last. Pure."""

    def __init__(self) -> None:
        self._count = 0
        self._since_s = self._last_s = 0.0

    def discarded(self, now_s: float) -> bool:
        """Count a command; tell whether a flood begins with it."""
        begins = self._count == 0
        if begins:
            self._since_s = now_s
        self._count += 1
        self._last_s = now_s
        return begins

    def over(self, now_s: float) -> tuple[int, float] | None:
        """Return how many were discarded in how many seconds, once, when the flood is over."""
        if not self._count or now_s - self._last_s < CALM_S:
            return None
        count, self._count = self._count, 0
        return count, self._last_s - self._since_s


class Commands:
    """Executes and answers commands, over one connection after the other."""

    def __init__(self, base: str, reply_prefix: str, obey: Obey) -> None:
        self._base = base
        self._reply_prefix = reply_prefix
        self._obey = obey
        self._connection: Connection | None = None
        self._outbox: Outbox | None = None
        self._waiting: deque[Incoming] = deque()
        self._waiting_bytes = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self._budget = Budget(RATE, BURST, clock.mono_s())
        self._flood = Flood()
        self._later: asyncio.TimerHandle | None = None

    def begin(self, connection: Connection, outbox: Outbox) -> None:
        """Answer over this connection from now on."""
        self._connection, self._outbox = connection, outbox

    def end(self) -> None:
        """Clear the queue: the connection is gone. Commands in progress continue, without an answer."""
        self._connection = self._outbox = None
        self._waiting.clear()
        self._waiting_bytes = 0

    def arrived(self, incoming: Incoming) -> None:
        """Queue a command, and begin it at once if possible."""
        if self._connection is None:
            return
        if incoming.mid is None and len(self._waiting) >= WAITING:
            self._discard(self._connection.url)
            return
        self._waiting.append(incoming)
        self._waiting_bytes += len(incoming.payload)
        if self._waiting_bytes > WAITING_BYTES:
            self._connection.end(
                f"the broker sent more than {WAITING_BYTES} bytes of unacknowledged commands"
            )
            return
        self.proceed()

    def proceed(self) -> None:
        """Begin queued commands as far as the limits allow."""
        while (
            self._waiting
            and self._outbox is not None
            and len(self._under_way) < UNDER_WAY
            and len(self._outbox) < UNANSWERED
        ):
            if not self._budget.spend(clock.mono_s()):
                if self._later is None:
                    self._later = asyncio.get_running_loop().call_later(1.0 / RATE, self._proceed_later)
                return
            incoming = self._waiting.popleft()
            self._waiting_bytes -= len(incoming.payload)
            task = asyncio.create_task(self._answer(self._outbox, incoming))
            self._under_way.add(task)
            task.add_done_callback(self._done)

    def _proceed_later(self) -> None:
        self._later = None
        self.proceed()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self.proceed()

    async def _answer(self, outbox: Outbox, incoming: Incoming) -> None:
        reply = await self._obey(incoming.payload, incoming.retained)
        if outbox is not self._outbox or self._connection is None:
            return  # the connection that asked is gone
        body = msgspec.json.encode(reply.wire())
        for topic in reply_topics(self._base, incoming.answer_to, self._reply_prefix):
            outbox.send(
                Notice(topic, body, content_type="application/json", correlation=incoming.correlation)
            )
        self._connection.confirm(incoming)

    def _discard(self, url: str) -> None:
        if self._flood.discarded(clock.mono_s()):
            log.warning(
                "uplink %s: commands arrive faster than they can be answered; QoS 0 commands beyond the queue are "
                "discarded", url,
            )  # fmt: skip

    def check_deadlines(self) -> None:
        """Log the end of a flood; begin commands that waited for answers the outbox has given up."""
        self.proceed()
        if (over := self._flood.over(clock.mono_s())) is not None:
            log.warning("uplink: %d commands of QoS 0 were discarded in %.0f s", *over)
