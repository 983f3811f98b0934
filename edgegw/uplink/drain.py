"""The drain: sends batches over one connection, live ones first and the rest beside them.

What is to be sent is what the journal holds and nobody has confirmed. A live batch comes straight from its
commit; the backlog, and what is sent again, come from the feeder. All share one window of unacknowledged
messages, of which what is not live gets as much as leaves the link free (see `pacer`).
"""

import asyncio
import logging
from collections import deque
from contextlib import suppress

from edgegw import clock
from edgegw.config.schema import Uplink
from edgegw.domain.batch import Batch, Kind
from edgegw.domain.ranges import Ranges
from edgegw.errors import UplinkError
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.uplink.confirmation import Confirmation
from edgegw.uplink.feeder import Feeder, Waiting
from edgegw.uplink.messages import Ack
from edgegw.uplink.mqtt import Connection
from edgegw.uplink.outbox import Outbox
from edgegw.uplink.outcome import Outcome, Refusals, judge
from edgegw.uplink.pacer import Pacer
from edgegw.uplink.receipts import Receipts
from edgegw.uplink.replay import Replays
from edgegw.uplink.sizes import Fate, Sizes, largest_json
from edgegw.uplink.window import InFlight, Way, Window

log = logging.getLogger(__name__)

LIVE_BYTES = 4 * 1024**2
"""Live batches that may wait for the window; older ones then go the way of the backlog."""


class Drain:
    """Sends what is pending over one connection until that is lost.

    Without `receipts` only the broker's word settles a batch.
    """

    def __init__(
        self, config: Uplink, topic: str, journal: Journal, connection: Connection, commit_s: float,
        receipts: Receipts | None, replays: Replays, sizes: Sizes, outbox: Outbox,
    ) -> None:  # fmt: skip
        self._config = config
        self._topic = topic
        self._journal = journal
        self._connection = connection
        self._replays = replays
        self._window = Window(config.inflight, connection.receive_maximum)
        size = self._window.size
        self._pacer = Pacer(max(0.05, commit_s / 2), size - max(1, size // 4))
        self._stream = journal.stream  # before what is settled: it may be replaced at any moment
        sent = journal.settled()
        for seqs in receipts.awaited if receipts is not None else ():
            sent.add(*seqs)
        self._feeder = Feeder(journal, sent, replays, size)
        self._confirmation = (
            None if receipts is None else Confirmation(connection.url, journal, receipts, self._feeder)
        )
        self._something = self._feeder.something
        self._live: deque[Waiting] = deque()
        self._live_bytes = 0
        self._refusals = Refusals()
        self._outbox = outbox
        self._sizes = sizes
        sizes.connected(connection.maximum_packet_size, len(f"{topic}/backfill"))
        journal.limit_message(largest_json(sizes.limit, packed=self._packs))
        self._aside = Ranges()
        self._alone: tuple[deque[Waiting], Way] | None = None  # whose first waits for an empty window

    @property
    def in_flight(self) -> list[int]:
        """The payloads' sizes of what is published and not acknowledged, in bytes."""
        return self._window.sizes

    @property
    def _packs(self) -> bool:
        return self._config.compression == "zstd"

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

    def wake(self) -> None:
        """Look whether something can be sent: an acknowledgement came that is not for a batch."""
        self._something.set()

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
                self._check_acknowledgements()
                self._send()
                for task in beside:
                    if task.done():
                        task.result()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._wait_s()):
                        await self._something.wait()
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
            if not (self._live or self._window or backlog):
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
        if self._alone is not None and not self._full:
            (waiting, way), self._alone = self._alone, None
            if waiting:
                self._send_first(waiting, way)
        while self._live and not self._full:
            if not self._send_first(self._live, Way.LIVE):
                return
        if self._feeder.held:
            return
        backlog = self._feeder.backlog
        while backlog and self._room and not self._waits_for_receipts:
            if not self._send_first(backlog, Way.BACKLOG):
                return
        again = self._feeder.again
        while again and self._room and not self._replays.wait_s(clock.mono_s()):
            if backlog and not self._waits_for_receipts:
                break
            batch = again[0].batch
            if not self._send_first(again, Way.AGAIN):
                return
            self._replays.goes(batch.size, clock.mono_s())
        if len(backlog) < self._window.size or not again:
            self._feeder.hungry.set()

    @property
    def _room(self) -> bool:
        """Whether one more may be on the way that is not live."""
        return not self._full and self._window.not_live < self._pacer.window

    @property
    def _full(self) -> bool:
        """Whether nothing more may be on the way, be it that one must be alone there."""
        waits = self._alone is not None and len(self._window) > 0
        return self._window.full or waits or self._sizes.trial is not None

    @property
    def _waits_for_receipts(self) -> bool:
        return self._confirmation is not None and self._confirmation.full

    def _send_first(self, waiting: deque[Waiting], way: Way) -> bool:
        """Publish the first of a queue, or hold it aside; False if it must wait until it can go alone."""
        batch, body = waiting[0]
        payload = batch.packed if self._packs else body
        fate = self._sizes.fate(len(payload), clock.mono_s())
        if fate is Fate.ALONE:
            if self._window or self._outbox:
                self._alone = waiting, way
                return False
            self._sizes.try_alone(len(payload), clock.mono_s())
        waiting.popleft()
        self._live_bytes -= batch.size if way is Way.LIVE else 0
        if fate is Fate.ASIDE:
            self._hold_aside(batch, len(payload), way)
        else:
            self._publish(batch, payload, way)
        return True

    def _publish(self, batch: Batch, payload: bytes, way: Way) -> None:
        as_made = way is Way.LIVE or batch.kind is Kind.SUMMARY
        topic = f"{self._topic}/{batch.kind.value if as_made else 'backfill'}"
        content_type = "application/json+zstd" if self._packs else "application/json"
        mid = self._connection.publish(topic, payload, content_type=content_type)
        self._journal.publish(batch)
        self._window.publish(mid, InFlight(batch, way, clock.mono_s(), len(payload)))

    def _hold_aside(self, batch: Batch, size: int, way: Way) -> None:
        """Leave a batch that the broker does not accept in the journal, while all others are sent."""
        if not self._sizes.too_large(size):
            self._aside.add(batch.seq, batch.last)  # it may be tried again over this connection
        self._journal.release([batch])
        if way is Way.AGAIN:
            self._feeder.repeated(batch, taken=True)
        self._journal.limit_message(self._sizes.limit)  # also where it had been expected to pack better
        if self._sizes.reported == self._sizes.limit:
            return
        self._sizes.reported = self._sizes.limit
        packed = len(batch.packed)
        helps = not self._packs and self._sizes.fate(packed, clock.mono_s()) is not Fate.ASIDE
        log.error(
            "uplink %s: %s; batch %d has %d and is held aside in the journal, the others are sent; %sraise the "
            "broker's limit", self._connection.url, self._sizes.describe(size), batch.seq, size,
            f'set uplink.compression = "zstd", with which it has {packed}, or ' if helps else "",
        )  # fmt: skip

    # -- back ----------------------------------------------------------------------------------------------

    def acknowledge(self, mid: int, ack: Ack) -> None:
        """Note what the broker says to a publish."""
        sent = self._window.acknowledge(mid)
        if sent is None:
            return  # it came late: the batch is sent again
        now_s = clock.mono_s()
        self._sizes.answered(sent.size, now_s, accepted=ack.accepted)
        live = sent.way is Way.LIVE
        outcome = judge(self._config.acknowledge, ack, live=live, end_to_end=self._journal.end_to_end)
        if sent.way is Way.AGAIN:
            self._feeder.repeated(sent.batch, taken=outcome is not Outcome.PENDING)
        if outcome is Outcome.SETTLED:
            self._journal.acknowledge(sent.batch)
        elif outcome is Outcome.AWAITED:
            self._await_receipt(sent)
        else:
            self._send_later(sent)
        if ack.accepted and ack.heard:
            self._got_through(sent, now_s)
        else:
            self._pause(sent, ack, now_s)
        self._something.set()

    def _await_receipt(self, sent: InFlight) -> None:
        assert self._confirmation is not None
        self._confirmation.taken(sent.batch, live=sent.way is Way.LIVE)
        self._journal.release([sent.batch])
        if self._config.acknowledge == "auto":
            self._journal.note_delivered(sent.batch)

    def _send_later(self, sent: InFlight) -> None:
        """Have a batch sent as the backlog; nothing keeps it from being thinned until it is read again."""
        self._feeder.unsent(Ranges([(sent.batch.seq, sent.batch.last)]))
        self._journal.release([sent.batch])

    def _got_through(self, sent: InFlight, now_s: float) -> None:
        live = sent.way is Way.LIVE
        if not live:
            self._pacer.acknowledged(sent.sent_s, now_s)
        if over := self._refusals.accepted(live=live):
            log.warning("uplink %s: batches get through again after %d refusals", self._connection.url, over)
        self._pause_until(self._refusals.paused_until_s)

    def _pause(self, sent: InFlight, ack: Ack, now_s: float) -> None:
        """Hold back for a while all that is not live."""
        if self._refusals.refused(now_s, live=sent.way is Way.LIVE):
            why = "nobody is subscribed" if ack.accepted else ack.reason
            log.error(
                "uplink %s: batch %d did not get through: %s; the backlog waits",
                self._connection.url, sent.batch.seq, why,
            )  # fmt: skip
        self._pause_until(self._refusals.paused_until_s)
        if self._feeder.held:
            self._pacer.restart()
            self._feeder.drop()

    def _pause_until(self, until_s: float) -> None:
        if until_s != self._feeder.hold_until_s:
            self._feeder.hold_until_s = until_s
            self._feeder.hungry.set()

    def _check_acknowledgements(self) -> None:
        """Send again what was lost on the way; give the connection up if the broker has stopped answering."""
        now_s = clock.mono_s()
        if lost := self._window.write_off(now_s):
            log.warning(
                "uplink %s: %d batches from %d on were not acknowledged, though later ones were; sent again",
                self._connection.url, len(lost), lost[0].batch.seq,
            )  # fmt: skip
            self._pacer.restart()
        self._sizes.settle(now_s)
        for sent in lost:
            self._sizes.answered(sent.size, now_s, accepted=False)
            if sent.way is Way.AGAIN:
                self._feeder.repeated(sent.batch, taken=False)
            self._send_later(sent)
        if self._aside and (self._sizes.refused is None or self._sizes.retry_due(now_s)):
            aside, self._aside = self._aside, Ranges()
            self._feeder.unsent(aside)
        if (reason := self._window.dead(now_s)) is not None:
            raise UplinkError(f"uplink {self._connection.url}: {reason}")
