"""The drain: sends batches over one connection, live ones first and the rest beside them.

What is to be sent is what the journal holds and nobody has confirmed. A live batch comes straight from its
commit; the backlog, and what is sent again, come from the feeder. All share one window of unacknowledged
messages, of which what is not live gets as much as leaves the link free (see `pacer`).
"""

import asyncio
import logging
from collections import deque
from enum import Enum
from typing import NamedTuple

from edgegw import clock
from edgegw.config.schema import Uplink
from edgegw.domain.batch import Batch, Kind
from edgegw.domain.ranges import Ranges
from edgegw.errors import UplinkError
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.uplink.confirmation import Confirmation
from edgegw.uplink.feeder import Feeder, Waiting
from edgegw.uplink.mqtt import Ack, Connection
from edgegw.uplink.pacer import Pacer
from edgegw.uplink.receipts import Receipts
from edgegw.uplink.replay import Replays

log = logging.getLogger(__name__)

LIVE_BYTES = 4 * 1024**2
"""Live batches that may wait for the window; older ones then go the way of the backlog."""
ACK_TIMEOUT_S = 30.0
REFUSED_FIRST_S = 1.0
REFUSED_MOST_S = 30.0
PACKET_OVERHEAD = 64
"""What a PUBLISH takes beside topic and payload, at the most."""


class Way(Enum):
    """Why a batch is sent."""

    LIVE = "live"
    BACKLOG = "backlog"
    AGAIN = "again"


class _OnTheWay(NamedTuple):
    """A batch that was published and not yet acknowledged."""

    batch: Batch
    way: Way
    sent_s: float


class Drain:
    """Sends what is pending over one connection until that is lost.

    Without `receipts` the broker's word settles a batch, with them only the receiver's.
    """

    def __init__(
        self, config: Uplink, topic: str, journal: Journal, connection: Connection, commit_s: float,
        receipts: Receipts | None, replays: Replays,
    ) -> None:  # fmt: skip
        self._config = config
        self._topic = topic
        self._journal = journal
        self._connection = connection
        self._replays = replays
        self._window = max(1, min(config.inflight, connection.receive_maximum))
        self._pacer = Pacer(max(0.05, commit_s / 2), self._window - max(1, self._window // 4))
        self._stream = journal.stream  # before what is settled: it may be replaced at any moment
        sent = journal.settled()
        for seqs in receipts.awaited if receipts is not None else ():
            sent.add(*seqs)
        self._feeder = Feeder(journal, sent, replays, self._window)
        self._confirmation = (
            None if receipts is None else Confirmation(connection.url, journal, receipts, self._feeder)
        )
        self._something = self._feeder.something
        self._live: deque[Waiting] = deque()
        self._live_bytes = 0
        self._on_the_way: dict[int, _OnTheWay] = {}
        self._beside_live = 0
        self._refusals = 0
        self._too_large: set[int] = set()
        connection.acknowledged = self._acknowledged

    def committed(self, committed: Committed) -> None:
        """Take batches that have just become durable: they are live."""
        if committed.stream != self._stream:
            self._connection.drop()  # another journal took its place: begin afresh
            return
        sent = self._feeder.sent
        for batch, body in zip(committed.batches, committed.bodies, strict=True):
            if sent.overlaps(batch.seq, batch.last):
                continue  # the backlog's reader was quicker
            sent.add(batch.seq, batch.last)
            self._journal.hold([batch])
            self._live.append(Waiting(batch, body))
            self._live_bytes += batch.size
        while self._live_bytes > LIVE_BYTES and len(self._live) > 1:
            batch, _ = self._live.popleft()
            self._live_bytes -= batch.size
            sent.remove(batch.seq, batch.last)
            self._journal.release([batch])
            self._feeder.hungry.set()
        self._something.set()

    def received(self, ranges: Ranges) -> None:
        """Take what a receipt confirms."""
        if self._confirmation is not None:
            self._confirmation.received(ranges)

    def replay(self) -> None:
        """Look for replays: one has been asked for."""
        self._feeder.hungry.set()

    async def run(self) -> None:
        """Send until the connection is lost; raise UplinkError with the reason."""
        beside = [asyncio.create_task(self._feeder.run(), name="drain feeder")]
        if self._confirmation is not None:
            beside.append(asyncio.create_task(self._confirmation.run(), name="receipts"))
        lost = self._connection.lost
        lost.add_done_callback(lambda _: self._something.set())
        self._feeder.hungry.set()
        try:
            while not lost.done():
                self._something.clear()
                if self._confirmation is not None:
                    self._confirmation.look()
                self._send()
                for task in beside:
                    if task.done():
                        task.result()
                try:
                    async with asyncio.timeout(self._wait_s()):
                        await self._something.wait()
                except TimeoutError:
                    self._check_acknowledgements()
            raise UplinkError(f"uplink {self._connection.url}: {lost.result()}")
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self._journal.release()

    async def settle(self, timeout_s: float) -> None:
        """Wait until the broker has all that was committed, at most `timeout_s`."""
        deadline = clock.mono_s() + timeout_s
        while clock.mono_s() < deadline and not self._connection.lost.done():
            backlog = self._feeder.backlog and not self._waits_for_receipts
            if not (self._live or self._on_the_way or backlog):
                return
            await asyncio.sleep(0.01)

    def _wait_s(self) -> float:
        """Return how long nothing falls due by itself."""
        now_s = clock.mono_s()
        if self._feeder.held:
            return max(0.01, self._feeder.hold_until_s - now_s)
        if self._feeder.again and (pause_s := self._replays.wait_s(now_s)):
            return min(1.0, pause_s)
        return 1.0

    # -- out -----------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Publish as much as the window takes: live batches, then the backlog, then what is sent again."""
        while self._live and len(self._on_the_way) < self._window:
            batch, body = self._live.popleft()
            self._live_bytes -= batch.size
            self._publish(batch, body, Way.LIVE)
        if self._feeder.held:
            return
        backlog = self._feeder.backlog
        while backlog and self._room and not self._waits_for_receipts:
            self._publish(*backlog.popleft(), Way.BACKLOG)
        again = self._feeder.again
        while again and self._room and not self._replays.wait_s(clock.mono_s()):
            if backlog and not self._waits_for_receipts:
                break
            self._replays.goes(again[0].batch.size, clock.mono_s())
            self._publish(*again.popleft(), Way.AGAIN)
        if len(backlog) < self._window or not again:
            self._feeder.hungry.set()

    @property
    def _room(self) -> bool:
        """Whether one more may be on the way that is not live."""
        return len(self._on_the_way) < self._window and self._beside_live < self._pacer.window

    @property
    def _waits_for_receipts(self) -> bool:
        return self._confirmation is not None and self._confirmation.full

    def _publish(self, batch: Batch, body: bytes, way: Way) -> None:
        as_made = way is Way.LIVE or batch.kind is Kind.SUMMARY
        topic = f"{self._topic}/{batch.kind.value if as_made else 'backfill'}"
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
            if way is Way.AGAIN:
                self._feeder.repeated(batch, taken=True)
            return
        mid = self._connection.publish(topic, payload, content_type=content_type)
        self._journal.publish(batch)
        self._on_the_way[mid] = _OnTheWay(batch, way, clock.mono_s())
        self._beside_live += way is not Way.LIVE

    # -- back ----------------------------------------------------------------------------------------------

    def _acknowledged(self, mid: int, ack: Ack) -> None:
        sent = self._on_the_way.pop(mid, None)
        if sent is None:
            return  # the retained status, not a batch
        self._beside_live -= sent.way is not Way.LIVE
        now_s = clock.mono_s()
        taken = ack.accepted and (ack.heard or self._config.acknowledge == "broker")
        if sent.way is Way.AGAIN:
            self._feeder.repeated(sent.batch, taken=taken)
        if taken:
            self._taken(sent, now_s)
        else:
            self._refused(sent.batch, ack, now_s)
        self._something.set()

    def _taken(self, sent: _OnTheWay, now_s: float) -> None:
        """Settle a batch that the broker has, or begin to wait for its receipt if it did not come already."""
        batch = sent.batch
        if self._confirmation is None:
            self._journal.acknowledge(batch)
        else:
            self._confirmation.taken(batch, live=sent.way is Way.LIVE)
            self._journal.release([batch])
        if sent.way is not Way.LIVE:
            self._pacer.acknowledged(sent.sent_s, now_s)
        if self._refusals:
            log.warning(
                "uplink %s: takes batches again after %d refusals", self._connection.url, self._refusals
            )
            self._feeder.hold_until_s = 0.0
            self._feeder.hungry.set()
        self._refusals = 0

    def _refused(self, batch: Batch, ack: Ack, now_s: float) -> None:
        """Leave the batch pending, and hold back for a while all that is not live."""
        if not self._refusals:
            why = ack.reason if not ack.accepted else "nobody is subscribed"
            log.error(
                "uplink %s: batch %d was not taken: %s; it stays pending",
                self._connection.url,
                batch.seq,
                why,
            )
        hold_s = min(REFUSED_MOST_S, REFUSED_FIRST_S * 2 ** min(self._refusals, 10))
        self._feeder.hold_until_s = now_s + hold_s
        self._refusals += 1
        self._pacer.restart()
        self._feeder.unsent(Ranges([(batch.seq, batch.last)]))
        self._feeder.drop()

    def _check_acknowledgements(self) -> None:
        """Give the connection up if the broker has stopped to answer."""
        if not self._on_the_way:
            return
        oldest = next(iter(self._on_the_way.values()))
        if clock.mono_s() - oldest.sent_s > ACK_TIMEOUT_S:
            raise UplinkError(f"uplink {self._connection.url}: no acknowledgement in {ACK_TIMEOUT_S:.0f} s")
