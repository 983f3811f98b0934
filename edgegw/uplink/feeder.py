"""The feeder: keeps at hand, read from the journal a little at a time, what was not sent as it was made.

There are two kinds. The backlog is what the journal holds and nobody has sent over this connection or confirmed;
it is read in order, once. What is sent again was sent before: replays that were asked for, and tries where no
receipt comes; it changes nothing about what is still to be sent.
"""

import asyncio
import logging
from collections import deque
from typing import NamedTuple

from edgegw import clock
from edgegw.domain.batch import Batch
from edgegw.domain.ranges import Ranges
from edgegw.errors import JournalError
from edgegw.journal.journal import Found, Journal
from edgegw.uplink.replay import Replays

log = logging.getLogger(__name__)

READ_BATCHES = 128
AGAIN_BATCHES = 8
"""Batches of a replay read at once."""


class Waiting(NamedTuple):
    """A batch at hand, and its JSON bytes."""

    batch: Batch
    body: bytes


class Feeder:
    """Reads ahead for one connection. `sent` is what needs no sending over it, or is on its way already."""

    def __init__(self, journal: Journal, sent: Ranges, replays: Replays, window: int) -> None:
        self.stream = journal.stream
        self.sent = sent
        self.backlog: deque[Waiting] = deque()
        self.again: deque[Waiting] = deque()
        self.hungry = asyncio.Event()
        self.something = asyncio.Event()
        self.hold_until_s = 0.0
        self._journal = journal
        self._replays = replays
        self._repeating = Ranges()
        self._try: tuple[int, int] | None = None
        self._window = window

    @property
    def held(self) -> bool:
        """Whether nothing is to be sent but live batches for now."""
        return self.hold_until_s > clock.mono_s()

    async def run(self) -> None:
        """Read whenever there is room, until cancelled."""
        while True:
            await self.hungry.wait()
            self.hungry.clear()
            if self.held:
                continue
            try:
                await self._feed_again()
                await self._feed_backlog()
            except JournalError as error:
                log.error("%s; the backlog waits", error)
                await asyncio.sleep(1.0)

    def probe(self, first: int, last: int) -> None:
        """Have a window's worth of batches from `first` on sent again."""
        self._try = first, last
        self.hungry.set()

    def unsent(self, ranges: Ranges) -> None:
        """Have these seqs sent as the backlog, whatever was sent of them before, but for what is settled."""
        settled = self._journal.settled()
        for seqs in ranges:
            for first, last in settled.gaps(*seqs):
                self.sent.remove(first, last)
        self.hungry.set()

    def drop(self) -> None:
        """Let go of what is at hand; it will be read again."""
        for batch, _ in self.backlog:
            self.sent.remove(batch.seq, batch.last)
        for batch, _ in self.again:
            self._repeating.remove(batch.seq, batch.last)
        self._journal.release([batch for batch, _ in (*self.backlog, *self.again)])
        self.backlog.clear()
        self.again.clear()
        self.hungry.set()

    def repeated(self, batch: Batch, *, taken: bool) -> None:
        """Note what became of a batch that was sent again; one that was not taken is read again."""
        if taken:
            self._replays.sent(self.stream, batch.seq, batch.last)
        self._repeating.remove(batch.seq, batch.last)
        self._journal.release([batch])
        self.hungry.set()

    async def _feed_backlog(self) -> None:
        if len(self.backlog) >= self._window:
            return
        gap = next(self.sent.gaps(1, self._journal.head), None)
        if gap is None:
            return
        found = await self._read(*gap, READ_BATCHES)
        expected = gap[0]
        for batch, body in found.batches:
            if batch.seq > expected:
                self.sent.add(expected, batch.seq - 1)  # the journal has no such batch: nothing to send
            expected = batch.last + 1
            if self.sent.covers(batch.seq, batch.last):
                continue  # it went out as live meanwhile
            self.sent.add(batch.seq, batch.last)
            if body is not None:
                self.backlog.append(Waiting(batch, body))
        if expected <= found.through:
            self.sent.add(expected, found.through)
        self.something.set()

    async def _read(self, first: int, last: int, limit: int) -> Found:
        """Read batches and take them in hand, so that none is thinned while it waits to be sent."""
        while True:
            found = await self._journal.read(first, last, limit)
            if self._journal.hold([batch for batch, _ in found.batches], found.generation):
                return found

    async def _feed_again(self) -> None:
        """Read what is to be tried, else the next of a replay."""
        if self.again:
            return
        if self._try is not None:
            (first, last), limit, self._try = self._try, self._window, None
        elif (following := self._replays.following(self.stream, self._repeating)) is not None:
            (first, last), limit = following, AGAIN_BATCHES
        else:
            return
        found = await self._read(first, last, limit)
        expected = first
        for batch, body in found.batches:
            self._replays.sent(self.stream, expected, batch.seq - 1)  # no such batch any more
            expected = batch.last + 1
            if body is None:
                self._replays.sent(self.stream, batch.seq, batch.last)
                continue
            self._repeating.add(batch.seq, batch.last)
            self.again.append(Waiting(batch, body))
        self._replays.sent(self.stream, expected, found.through)
        self.something.set()
        if not found.batches:
            self.hungry.set()
