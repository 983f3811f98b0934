"""The scanner: one service for each device, from its driver to the journal and the image."""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence

from edgegw import clock
from edgegw.domain.image import Image
from edgegw.domain.record import DeviceStatus, Event, Record, Scan
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.base import Driver
from edgegw.errors import DeviceError
from edgegw.runtime.pause import Pause
from edgegw.scan import schedule
from edgegw.scan.bad_tags import BadTags
from edgegw.scan.report import Reporter

log = logging.getLogger(__name__)

RETRY_FIRST_S = 0.25
RETRY_MOST_S = 5.0


class Scanner:
    """Scans one device for ever; what goes wrong with it stays with it."""

    def __init__(
        self, name: str, driver: Driver, append: Callable[[Record], None], image: Image,
        touched: Callable[[str], None], reporter: Reporter | None = None, delay_s: float = 0.0, *, tags: int = 0,
    ) -> None:  # fmt: skip
        self.name = name
        self.state = "unknown"
        self.reason: str | None = None
        self.error: str | None = None
        """What went wrong last, in full, while the device does not answer."""
        self.last_ts: int | None = None
        self.scans = self.errors = self.skipped = self.readings = 0
        self._driver = driver
        self._append = append
        self._image = image
        self._touched = touched
        self._reporter = reporter
        self._delay_s = delay_s
        self._failures = 0
        self._down_since = 0.0
        self._bad = BadTags(tags)
        self._wanted: list[tuple[float, asyncio.Future[None]]] = []
        self._pauses: tuple[Pause, ...] = ()

    @property
    def bad_tags(self) -> Mapping[str, str]:
        """The tags that are bad in the latest readings, with their quality, while the device answers."""
        return self._bad.tags

    async def run(self) -> None:
        """Scan until cancelled."""
        period_s = self._driver.period_s
        pause, retry = Pause(), Pause()
        self._driver.on_connected = retry.end
        self._pauses = (pause, retry)
        async with self._driver as driver:
            due = schedule.Due(clock.mono_s() + self._delay_s, 0)
            while True:
                if period_s is not None and not self._wanted:
                    await pause(due.at_s - clock.mono_s())
                began_s = clock.mono_s()
                try:
                    scans = await driver.scan()
                except DeviceError as error:
                    self._failed(error)
                else:
                    self._scanned(scans, began_s)
                if self._wanted:
                    self._answer(began_s)
                if period_s is None:  # a subscription says once for each attempt that it failed
                    continue
                if self._failures and not self._wanted:
                    await retry(self._pause_s(period_s))
                if began_s > due.at_s - period_s / 2:  # else it was asked for, in between
                    due = schedule.following(due.at_s, clock.mono_s(), period_s)
                    if not self._failures:
                        self.skipped += due.skipped

    async def read(self) -> None:
        """Read the device now, and return when that is done, whatever came of it.

        A subscription is not asked: what is known of it is as new as can be.
        """
        if self._driver.period_s is None:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanted.append((clock.mono_s(), done))
        for pause in self._pauses:
            pause.end()
        await done

    def _answer(self, began_s: float) -> None:
        """End the waiting for a scan, where one has begun since it was asked for."""
        for wanted_s, done in self._wanted:
            if wanted_s <= began_s and not done.done():
                done.set_result(None)
        self._wanted = [(wanted_s, done) for wanted_s, done in self._wanted if not done.done()]

    async def write(self, tag: str, value: Scalar) -> Value:
        """Write one tag, once, and return what reading it back gives; raise DeviceError."""
        return await self._driver.write(tag, value)

    def _scanned(self, scans: Sequence[Scan], began_s: float) -> None:
        """Pass scans on. What was polled may be as old as the poll: a write meanwhile may be newer."""
        if self._failures or self.state == "unknown":
            self._answered()
        held = self._driver.period_s is None
        now_s = clock.mono_s()
        at_s = now_s if held else began_s
        for scan in scans:
            self._image.take(scan, at_s, held=held, seen_s=now_s)
            self.readings += len(scan.values)
            self.last_ts = scan.ts
        if scans and (line := self._bad.read(self._image.devices[self.name].quality, now_s)) is not None:
            log.warning("device.%s: %s", self.name, line)
        self._touched(self.name)  # control first: it must not wait for anything else
        for scan in scans if self._reporter is None else self._reporter.report(scans, at_s):
            self._append(scan)
        self.scans += len(scans)

    def _answered(self) -> None:
        if self.state == "bad":
            now_ms = clock.wall_ms()
            down_s = clock.mono_s() - self._down_since
            log.warning("device.%s: back after %d failures, %.0f s", self.name, self._failures, down_s)
            self._append(DeviceStatus(now_ms, self.name, "good"))
            self._append(Event(now_ms, "device-up", {"device": self.name}))
        self.state, self.reason, self.error, self._failures = "good", None, None, 0

    def _failed(self, error: DeviceError) -> None:
        self.errors += 1
        self._failures += 1
        if self.state != "bad":
            now_ms = clock.wall_ms()
            log.warning("%s; trying again", error)
            self._append(DeviceStatus(now_ms, self.name, "bad", error.reason))
            self._append(Event(now_ms, "device-down", {"device": self.name, "reason": error.reason}))
            self._down_since = clock.mono_s()
        self.state, self.reason, self.error = "bad", error.reason, str(error)
        self._bad.forget()
        if self._reporter is not None:
            self._reporter.forget()
        self._image.lost(self.name, clock.mono_s())
        self._touched(self.name)

    def _pause_s(self, period_s: float) -> float:
        """Return how long to leave a failing device alone, unless it is connected again: ever longer, with jitter."""
        longest = min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(self._failures, 10))
        return random.uniform(longest / 2, longest) if longest > period_s else 0.0
