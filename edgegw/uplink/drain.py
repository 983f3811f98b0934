"""The drain: sends batches over one connection, live ones first and the backlog beside them.

What is to be sent is what the journal holds and nobody has confirmed. A live batch comes straight from its
commit; the backlog is read back from the journal, a little at a time. Both share one window of unacknowledged
messages, of which the backlog gets as much as leaves the link free (see `pacer`).
"""

import asyncio
import logging
from collections import deque
from typing import NamedTuple

from edgegw import clock
from edgegw.config.schema import Uplink
from edgegw.domain.batch import Batch
from edgegw.errors import JournalError, UplinkError
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.uplink.mqtt import Ack, Connection
from edgegw.uplink.pacer import Pacer

log = logging.getLogger(__name__)

LIVE_BYTES = 4 * 1024**2
"""Live batches that may wait for the window; older ones then go the way of the backlog."""
READ_BATCHES = 128
ACK_TIMEOUT_S = 30.0
REFUSED_FIRST_S = 1.0
REFUSED_MOST_S = 30.0
PACKET_OVERHEAD = 64
"""What a PUBLISH takes beside topic and payload, at the most."""


class _OnTheWay(NamedTuple):
    """A batch that was published and not yet acknowledged."""

    batch: Batch
    live: bool
    sent_s: float


class Drain:
    """Sends what is pending over one connection until that is lost."""

    def __init__(
        self, config: Uplink, topic: str, journal: Journal, connection: Connection, commit_s: float
    ) -> None:
        self._config = config
        self._topic = topic
        self._journal = journal
        self._connection = connection
        self._window = max(1, min(config.inflight, connection.receive_maximum))
        self._pacer = Pacer(max(0.05, commit_s / 2), self._window - max(1, self._window // 4))
        self._stream = journal.stream  # before what is settled: it may be replaced at any moment
        self._sent = journal.settled()
        self._live: deque[tuple[Batch, bytes]] = deque()
        self._live_bytes = 0
        self._backlog: deque[tuple[Batch, bytes]] = deque()
        self._on_the_way: dict[int, _OnTheWay] = {}
        self._backlog_on_the_way = 0
        self._something = asyncio.Event()
        self._hungry = asyncio.Event()
        self._hold_until_s = 0.0
        self._refusals = 0
        self._too_large: set[int] = set()
        connection.acknowledged = self._acknowledged

    def committed(self, committed: Committed) -> None:
        """Take batches that have just become durable: they are live."""
        if committed.stream != self._stream:
            self._connection.drop()  # another journal took its place: begin afresh
            return
        for batch, body in zip(committed.batches, committed.bodies, strict=True):
            if self._sent.overlaps(batch.seq, batch.last):
                continue  # the backlog's reader was quicker
            self._sent.add(batch.seq, batch.last)
            self._live.append((batch, body))
            self._live_bytes += batch.size
        while self._live_bytes > LIVE_BYTES and len(self._live) > 1:
            batch, _ = self._live.popleft()
            self._live_bytes -= batch.size
            self._sent.remove(batch.seq, batch.last)
            self._hungry.set()
        self._something.set()

    async def run(self) -> None:
        """Send until the connection is lost; raise UplinkError with the reason."""
        feeder = asyncio.create_task(self._feed(), name="drain feeder")
        lost = self._connection.lost
        lost.add_done_callback(lambda _: self._something.set())
        try:
            while not lost.done():
                self._something.clear()
                self._send()
                if feeder.done():
                    feeder.result()
                wait_s = max(0.01, self._hold_until_s - clock.mono_s()) if self._held else 1.0
                try:
                    async with asyncio.timeout(wait_s):
                        await self._something.wait()
                except TimeoutError:
                    self._check_acknowledgements()
            raise UplinkError(f"uplink {self._connection.url}: {lost.result()}")
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def settle(self, timeout_s: float) -> None:
        """Wait until all that was committed is acknowledged, at most `timeout_s`."""
        deadline = clock.mono_s() + timeout_s
        while (self._live or self._on_the_way or self._backlog) and clock.mono_s() < deadline:
            if self._connection.lost.done():
                return
            await asyncio.sleep(0.01)

    @property
    def _held(self) -> bool:
        return self._hold_until_s > clock.mono_s()

    def _send(self) -> None:
        """Publish as much as the window takes, live batches first."""
        while self._live and len(self._on_the_way) < self._window:
            batch, body = self._live.popleft()
            self._live_bytes -= batch.size
            self._publish(batch, body, f"{self._topic}/{batch.kind.value}", live=True)
        if self._held:
            return
        while (
            self._backlog
            and len(self._on_the_way) < self._window
            and self._backlog_on_the_way < self._pacer.window
        ):
            batch, body = self._backlog.popleft()
            self._publish(batch, body, f"{self._topic}/backfill", live=False)
        if len(self._backlog) < self._window:
            self._hungry.set()

    def _publish(self, batch: Batch, body: bytes, topic: str, *, live: bool) -> None:
        if self._config.compression == "zstd":
            payload, content_type = batch.packed, "application/json+zstd"
        else:
            payload, content_type = body, "application/json"
        most = self._connection.maximum_packet_size
        if most is not None and len(payload) + len(topic) + PACKET_OVERHEAD > most:
            if not self._too_large:
                log.error(
                    "uplink %s: takes messages of %d bytes at most, batch %d has %d; it stays in the journal; "
                    "raise the broker's limit, and set uplink.max_message below it",
                    self._connection.url, most, batch.seq, len(payload),
                )  # fmt: skip
            self._too_large.add(batch.seq)
            return
        mid = self._connection.publish(topic, payload, content_type=content_type)
        self._on_the_way[mid] = _OnTheWay(batch, live, clock.mono_s())
        self._backlog_on_the_way += not live

    def _acknowledged(self, mid: int, ack: Ack) -> None:
        sent = self._on_the_way.pop(mid, None)
        if sent is None:
            return  # the retained status, not a batch
        self._backlog_on_the_way -= not sent.live
        now_s = clock.mono_s()
        if ack.accepted and (ack.heard or self._config.acknowledge == "broker"):
            self._journal.acknowledge(sent.batch)
            if not sent.live:
                self._pacer.acknowledged(sent.sent_s, now_s)
            if self._refusals:
                log.warning(
                    "uplink %s: takes batches again after %d refusals", self._connection.url, self._refusals
                )
                self._hold_until_s = 0.0
                self._hungry.set()
            self._refusals = 0
        else:
            self._refused(sent.batch, ack, now_s)
        self._something.set()

    def _refused(self, batch: Batch, ack: Ack, now_s: float) -> None:
        """Leave the batch pending, and hold the backlog back for a while."""
        if not self._refusals:
            why = ack.reason if not ack.accepted else "nobody is subscribed"
            log.error(
                "uplink %s: batch %d was not taken: %s; it stays pending",
                self._connection.url,
                batch.seq,
                why,
            )
        self._hold_until_s = now_s + min(REFUSED_MOST_S, REFUSED_FIRST_S * 2 ** min(self._refusals, 10))
        self._refusals += 1
        self._pacer.restart()
        self._sent.remove(batch.seq, batch.last)
        for waiting, _ in self._backlog:
            self._sent.remove(waiting.seq, waiting.last)
        self._backlog.clear()
        self._hungry.set()

    def _check_acknowledgements(self) -> None:
        """Give the connection up if the broker has stopped to answer."""
        if not self._on_the_way:
            return
        oldest = next(iter(self._on_the_way.values()))
        if clock.mono_s() - oldest.sent_s > ACK_TIMEOUT_S:
            raise UplinkError(f"uplink {self._connection.url}: no acknowledgement in {ACK_TIMEOUT_S:.0f} s")

    async def _feed(self) -> None:
        """Keep a little of the backlog at hand, read from the journal in order."""
        while True:
            await self._hungry.wait()
            self._hungry.clear()
            if len(self._backlog) >= self._window or self._held:
                continue
            gap = next(self._sent.gaps(1, self._journal.head), None)
            if gap is None:
                continue
            try:
                found = await self._journal.read(*gap, READ_BATCHES)
            except JournalError as error:
                log.error("%s; the backlog waits", error)
                await asyncio.sleep(1.0)
                continue
            expected = gap[0]
            for batch, body in found.batches:
                if batch.seq > expected:
                    self._sent.add(expected, batch.seq - 1)  # the journal has no such batch: nothing to send
                expected = batch.last + 1
                if self._sent.overlaps(batch.seq, batch.last):
                    continue  # it went out as live meanwhile
                self._sent.add(batch.seq, batch.last)
                if body is not None:
                    self._backlog.append((batch, body))
            if expected <= found.through:
                self._sent.add(expected, found.through)
            self._something.set()
