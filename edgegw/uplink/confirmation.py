"""Confirmation by the receiver over one connection: receipts settle batches, and what gets none is sent again."""

import asyncio
import logging

from edgegw import clock
from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges
from edgegw.errors import JournalError
from edgegw.journal.journal import Journal
from edgegw.uplink.feeder import Feeder
from edgegw.uplink.receipts import MAX_RESENDS, Receipts

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often to look whether receipts are overdue, at the most."""


class Confirmation:
    """Stands between receipts, which outlive connections, and one connection's feeder."""

    def __init__(self, url: str, journal: Journal, receipts: Receipts, feeder: Feeder) -> None:
        self._url = url
        self._journal = journal
        self._receipts = receipts
        self._feeder = feeder
        self._came = asyncio.Event()
        self._received = Ranges()
        self._look_at_s = 0.0
        self._aside_said = False

    @property
    def full(self) -> bool:
        """Whether the backlog must wait for receipts."""
        return self._receipts.full

    def taken(self, batch: Batch, *, live: bool) -> None:
        """Begin to wait for the receipt of a batch that the broker has, unless it has come already."""
        if not self._journal.settled().covers(batch.seq, batch.last):
            self._receipts.taken(batch.seq, batch.last, batch.size, clock.mono_s(), live=live)

    def received(self, ranges: Ranges) -> None:
        """Take what a receipt confirms."""
        for seqs in ranges:
            self._received.add(*seqs)
        self._came.set()

    async def run(self) -> None:
        """Settle what receipts confirm, until cancelled; what comes meanwhile is settled together."""
        while True:
            await self._came.wait()
            self._came.clear()
            received, self._received = self._received, Ranges()
            received = received.common(self._journal.published())  # who confirms more makes it up
            if not received:
                continue
            self._note_receiver()
            try:
                settled = await self._journal.acknowledge_ranges(self._feeder.stream, received)
            except JournalError as error:
                log.error("%s; the receipts wait", error)
                self.received(received)
                await asyncio.sleep(1.0)
            else:
                self._confirmed(settled)

    def _note_receiver(self) -> None:
        if not self._journal.end_to_end:
            log.info(
                "uplink %s: a receiver confirms this stream; from now on only its receipts settle batches",
                self._url,
            )
            self._journal.note_end_to_end()

    def _confirmed(self, settled: Ranges) -> None:
        now_s = clock.mono_s()
        if (since_s := self._receipts.silent_since_s) is not None:
            log.warning("uplink %s: receipts come again after %.0f s", self._url, now_s - since_s)
        self._receipts.confirmed(settled, now_s)
        for seqs in settled:
            self._feeder.sent.add(*seqs)
        self._feeder.something.set()

    def look(self) -> None:
        """See to what has waited for its receipt for too long."""
        now_s = clock.mono_s()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_S
        silent = self._receipts.silent_since_s is not None
        overdue = self._receipts.due(self._journal.settled(), now_s)
        if overdue is None:
            return
        if overdue.aside:
            self._say_aside(overdue.aside)
        if not overdue.ranges:
            return
        first = next(iter(overdue.ranges))
        what = f"{overdue.ranges.total()} records from {first[0]} on"
        if overdue.probe:
            if not silent:
                log.warning(
                    "uplink %s: the broker has %s, and no receipt comes; they stay in the journal", self._url, what
                )  # fmt: skip
            self._feeder.probe(*first)
        else:
            log.warning(
                "uplink %s: %s were lost between broker and receiver; they are sent again", self._url, what
            )
            self._feeder.unsent(overdue.ranges)

    def _say_aside(self, aside: Ranges) -> None:
        if self._aside_said:
            return
        self._aside_said = True
        smallest, largest = self._receipts.resent_sizes
        log.error(
            "uplink %s: %d records from %d on get no receipt, though they were sent %d times and others do (batches of "
            "%d to %d bytes); they are held aside in the journal and tried once an hour; the broker may discard "
            "messages that large, or the receiver be unable to read them",
            self._url, aside.total(), next(iter(aside))[0], MAX_RESENDS + 1, smallest, largest,
        )  # fmt: skip
