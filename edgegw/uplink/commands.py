"""Commands from the broker: a bounded number is under way at once, and a bounded rate begins.

What comes faster waits. An MQTT 5 broker sends no more than the Receive Maximum before the first is acknowledged,
which happens when it is answered: so commands of QoS 1 wait at the broker, and none is lost. Nothing holds back
those of QoS 0; what does not fit is discarded and counted. The connection itself is never left unread for long:
behind a flood there are the acknowledgements of batches.
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
"""Commands that may be under way at once."""
UNANSWERED = 32
"""Messages of the outbox that may be unacknowledged for a further command to begin."""
RATE = 100.0
"""Commands that begin in a second, in the long run."""
BURST = 64.0
"""Commands that may begin at once after a while without any."""
WAITING = 64
"""Commands of QoS 0 that may wait."""
WAITING_BYTES = 4 * 1024**2
"""Waiting commands, in bytes: more than any Receive Maximum's worth that is held to."""
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
        """Take one token; False if there is none."""
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
    """Has commands obeyed and answered, over one connection after the other."""

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
        """Forget what waits: the connection is gone. What is under way goes on, without an answer."""
        self._connection = self._outbox = None
        self._waiting.clear()
        self._waiting_bytes = 0

    def arrived(self, incoming: Incoming) -> None:
        """Have a command obeyed, at once or when its turn comes."""
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
        """Begin as many of the waiting commands as may be under way."""
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
                "uplink %s: commands come faster than they can be answered; those of QoS 0 that find no room are "
                "discarded", url,
            )  # fmt: skip

    def check_deadlines(self) -> None:
        """Say when a flood is over, and how many commands it cost."""
        if (over := self._flood.over(clock.mono_s())) is not None:
            log.warning("uplink: %d commands of QoS 0 were discarded in %.0f s", *over)
