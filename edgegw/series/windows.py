"""The service of all windows: feeds them what is journaled, and tells journal and control what they come to."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgegw import clock
from edgegw.domain.image import Image
from edgegw.domain.record import Event, Record, Scan, WindowResult
from edgegw.errors import JournalError
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.series.history import AHEAD_MS, History
from edgegw.series.window import Spec, Window

log = logging.getLogger(__name__)

TICK_S = 0.5
"""How often silence is looked at, and what came late is told."""
GRACE_MS = 1_000
"""How long after its end a stretch is over if nothing says so: what was read in it may be on its way."""
INBOX = 20_000
"""Records that may wait for this service; of more the oldest go."""
WAITING = 100_000
"""Records that may wait for a window's history; with more, the window begins without it."""


@dataclass(slots=True)
class _Running:
    """A window, what waits for it while its history is read, and what it last came to.

    `newest_ms` is the greatest time that it has seen, since `seen_s` by the monotonic clock.
    """

    window: Window
    waiting: list[Record] | None = field(default_factory=list)
    newest_ms: int = 0
    seen_s: float = 0.0
    last: WindowResult | None = None
    early: int = 0


class Windows:
    """All windows, with one inbox: `feed`, `committed`, `reload`."""

    def __init__(
        self, specs: Mapping[str, Spec], journal: Journal, image: Image, touched: Callable[[str], None]
    ) -> None:
        self._journal = journal
        self._image = image
        self._touched = touched
        self._running: dict[str, _Running] = {}
        self._readers: dict[str, list[_Running]] = {}
        self._inbox: deque[Record] = deque(maxlen=INBOX)
        self._news = asyncio.Event()
        self._head: int | None = None
        self._take_up(specs)

    def feed(self, record: Record) -> None:
        """Take what was given to the journal."""
        if isinstance(record, Event) or record.device in self._readers:
            self._inbox.append(record)
            self._news.set()

    def committed(self, committed: Committed) -> None:
        """Note where the journal ended when it was opened, from the first commit."""
        if self._head is None:
            self._head = committed.batches[0].seq - 1

    def reload(self, specs: Mapping[str, Spec]) -> None:
        """Take up other windows; those that have not changed go on."""
        self._take_up(specs)
        self._head = self._journal.head
        self._news.set()

    def _take_up(self, specs: Mapping[str, Spec]) -> None:
        known = {name: one for name, one in self._running.items() if one.window.spec == specs.get(name)}
        for name in self._running.keys() - known.keys():
            self._image.forget(name)
        self._running = {name: known.get(name) or _Running(Window(spec)) for name, spec in specs.items()}
        self._readers = {}
        for running in self._running.values():
            for device in {at.device for at in running.window.spec.inputs}:
                self._readers.setdefault(device, []).append(running)

    def shown(self) -> dict[str, dict[str, Any]]:
        """Return each window's state for the status."""
        return {
            name: {
                "end": running.last.ts if running.last else None,
                "coverage": running.last.coverage if running.last else None,
                "late": running.window.late,
                "early": running.early,
                "reading_back": running.waiting is not None,
            }
            for name, running in self._running.items()
        }

    async def run(self) -> None:
        """Serve until cancelled."""
        reading: asyncio.Task[None] | None = None
        tick_s = clock.mono_s()
        try:
            while True:
                self._deliver()
                if clock.mono_s() >= tick_s:
                    self._tick()
                    tick_s = clock.mono_s() + TICK_S
                if reading is not None and reading.done():
                    reading.result()
                    reading = None
                if reading is None and (fresh := self._fresh()):
                    reading = asyncio.create_task(self._read_back(fresh), name="windows history")
                await self._pause(tick_s)
        finally:
            if reading is not None:
                reading.cancel()

    async def _pause(self, until_s: float) -> None:
        """Wait for news, or until the next tick if there are windows at all."""
        try:
            async with asyncio.timeout(max(0.0, until_s - clock.mono_s()) if self._running else None):
                await self._news.wait()
        except TimeoutError:
            return

    # -- what comes in -----------------------------------------------------------------------------------

    def _deliver(self) -> None:
        self._news.clear()
        while self._inbox:
            record = self._inbox.popleft()
            if isinstance(record, Event):
                readers: Iterable[_Running] = self._running.values()
            else:
                readers = self._readers.get(record.device, ())
            early = isinstance(record, Scan) and record.ts > clock.wall_ms() + AHEAD_MS
            for running in readers:
                if early:
                    running.early += 1
                elif running.waiting is None:
                    self._tell(running, self._take(running, record))
                else:
                    self._keep(running, running.waiting, record)

    def _keep(self, running: _Running, waiting: list[Record], record: Record) -> None:
        """Keep a record until the window's history has been read."""
        waiting.append(running.window.needed(record))
        if len(waiting) > WAITING:
            name = running.window.spec.name
            log.warning("window.%s: its history takes too long to read; it begins without", name)
            self._join(running, running.window, [])

    def _take(self, running: _Running, record: Record) -> list[WindowResult]:
        window = running.window
        window.take(record)
        if window.newest_ms != running.newest_ms:
            running.newest_ms, running.seen_s = window.newest_ms, clock.mono_s()
        return window.results() if window.due else []

    def _tick(self) -> None:
        """Let time pass by the monotonic clock, from the last that was heard of a window's inputs."""
        for running in self._running.values():
            if running.waiting is None and running.newest_ms:
                silent_ms = round((clock.mono_s() - running.seen_s) * 1000)
                running.window.advance(running.newest_ms + silent_ms - GRACE_MS)
                self._tell(running, running.window.results())

    # -- history -----------------------------------------------------------------------------------------

    def _fresh(self) -> list[_Running]:
        return [running for running in self._running.values() if running.waiting is not None]

    async def _read_back(self, fresh: list[_Running]) -> None:
        """Play the journal, as it was when it was opened, into windows; then let them take what waits."""
        await self._journal.opened.wait()
        await asyncio.sleep(TICK_S)  # the first commit, if there is one, tells where it ended
        head = self._journal.head if self._head is None else self._head
        windows = [Window(running.window.spec) for running in fresh]
        history = History(self._journal.path, head, windows, clock.wall_ms())
        try:
            while await asyncio.to_thread(history.step):
                pass
        except JournalError as error:
            log.warning("%s; windows begin without all of their history", error)
        for running, window in zip(fresh, windows, strict=True):
            if running.waiting is not None and self._running.get(window.spec.name) is running:
                untold = history.finish(window)
                running.last = history.last(window)
                self._join(running, window, untold)

    def _join(self, running: _Running, window: Window, untold: list[WindowResult]) -> None:
        """Have a window take what waited for it, and go on live."""
        waiting, running.waiting, running.window = running.waiting or [], None, window
        running.newest_ms, running.seen_s = window.newest_ms, clock.mono_s()
        for record in waiting:
            untold += self._take(running, record)
        if running.last is not None:
            self._show(running, running.last)
        self._tell(running, untold)

    # -- what goes out -----------------------------------------------------------------------------------

    def _tell(self, running: _Running, results: Iterable[WindowResult]) -> None:
        for result in results:
            self._journal.append(result)
            last_ms = running.last.ts if running.last else 0
            if result.ts >= last_ms or last_ms > running.window.watermark_ms:  # the clock was set back
                running.last = result
                self._show(running, result)

    def _show(self, running: _Running, result: WindowResult) -> None:
        """Put a result into the image, as old as it is by its window's own time."""
        age_s = max(0, running.window.watermark_ms - result.ts) / 1000
        values = {**result.values, "coverage": result.coverage}
        scan = Scan(result.ts, result.device, values, result.quality)
        self._image.take(scan, clock.mono_s() - age_s)
        self._touched(result.device)
