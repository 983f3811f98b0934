"""The status service: judges the gateway's health each second, and makes the status document when it is asked for."""

import asyncio
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from edgegw import clock
from edgegw.config.schema import Config
from edgegw.domain.image import Image
from edgegw.journal.journal import Condition, Journal
from edgegw.status import health
from edgegw.status.health import DeviceFacts, Facts, Health
from edgegw.status.snapshot import DeviceStatus, JournalStatus, LinkStatus, Snapshot

EVERY_S = 1.0
JOURNAL_S = 2.0
"""How long the journal's figures are waited for; then the last ones are shown."""
HUNG_S = 10.0
"""How old these may be before the disk counts as hung."""
CERTIFICATES_EVERY_S = 3600.0


class Link(Protocol):
    """The state of the way to the broker, and since when."""

    @property
    def state(self) -> str: ...
    @property
    def since_ms(self) -> int: ...


class Uplink(Protocol):
    """What the status asks of the uplink."""

    acknowledgements: int
    """How many messages its brokers have confirmed since the start."""
    acknowledged_ms: int | None
    """When one did so last."""
    broker: str | None

    @property
    def link(self) -> Link: ...
    @property
    def in_flight(self) -> bool:
        """Whether batches wait for their acknowledgement."""
        ...


class Device(Protocol):
    """What the status asks of a device's scanner."""

    state: str
    reason: str | None
    last_ts: int | None
    scans: int
    errors: int
    skipped: int
    readings: int

    @property
    def bad_tags(self) -> Mapping[str, str]: ...


class Control(Protocol):
    """What the status asks of control."""

    @property
    def idle_s(self) -> float:
        """How long ago the last cycle was completed."""
        ...

    def rules(self) -> dict[str, dict[str, Any]]: ...


class Windows(Protocol):
    """What the status asks of the windows."""

    def shown(self) -> dict[str, dict[str, Any]]: ...


class Current(NamedTuple):
    """What a reload may exchange; `digest` is the configuration's SHA-256, `stale_after_s` by device."""

    config: Config
    digest: str
    devices: Mapping[str, Device]
    control: Control
    stale_after_s: Mapping[str, float]


class StatusService:
    """Health and status of a running gateway. Run it as a service; ask it from the event loop."""

    def __init__(
        self, config_path: Path, current: Callable[[], Current], journal: Journal, image: Image, uplink: Uplink,
        windows: Windows,
    ) -> None:  # fmt: skip
        self.started_ms = clock.wall_ms()
        self._folder = config_path.parent
        self._current = current
        self._journal = journal
        self._image = image
        self._uplink = uplink
        self._windows = windows
        self._history = health.History()
        self._silence = health.Silence()
        self._condition = Condition("", 0, 0, 0, 0, 0, None, None)
        self._answered_s = clock.mono_s()
        self._certificates: Mapping[str, float] = {}
        self._certificates_s = -inf

    async def run(self) -> None:
        """Judge each second until cancelled, so that `since` is right at any time."""
        while True:
            await self.health()
            await asyncio.sleep(EVERY_S)

    async def health(self) -> Health:
        """Return the gateway's health now."""
        return self._judged(self._current(), await self._journal_condition())

    async def snapshot(self) -> Snapshot:
        """Return the status document."""
        now, condition = self._current(), await self._journal_condition()
        link = self._uplink.link
        return Snapshot(
            now.config.gateway.id, now.digest, LinkStatus(link.state, link.since_ms, self._uplink.broker),
            JournalStatus(
                str(self._journal.path.absolute()), int(now.config.journal.max_size), condition.head, condition.acked,
                condition.pending_batches, condition.pending_records, condition.bytes, condition.oldest_pending_ts,
                condition.error,
            ),
            {name: _device(scanner) for name, scanner in now.devices.items()},
            stream=condition.stream, started=self.started_ms, running=True,
            clock="synced" if clock.synchronised() else "unsynced", rules=now.control.rules(),
            windows=self._windows.shown(), readings=sum(scanner.readings for scanner in now.devices.values()),
            health=self._judged(now, condition),
        )  # fmt: skip

    @property
    def acknowledged_s(self) -> float | None:
        """How many seconds ago a broker has confirmed anything; None if none has since the start."""
        at_ms = self._uplink.acknowledged_ms
        return None if at_ms is None else max(0.0, (clock.wall_ms() - at_ms) / 1000)

    def _judged(self, now: Current, condition: Condition) -> Health:
        now_s = clock.mono_s()
        online = self._uplink.link.state == "online"
        facts = Facts(
            devices={name: self._facts(name, scanner, now, now_s) for name, scanner in now.devices.items()},
            link_online=online,
            unacknowledged_s=self._silence.look(
                now_s, online=online, in_flight=self._uplink.in_flight,
                acknowledgements=self._uplink.acknowledgements,
            ),
            journal_error=condition.error, journal_share=condition.unconfirmed, disk_share=condition.disk,
            control_idle_s=now.control.idle_s, clock_synced=clock.synchronised(),
            certificates=self._valid_for_s(now.config, now_s),
        )  # fmt: skip
        return self._history.update(health.judge(facts), clock.wall_ms())

    def _facts(self, name: str, scanner: Device, now: Current, now_s: float) -> DeviceFacts:
        latest = self._image.devices.get(name)
        stale_after_s = now.stale_after_s.get(name, inf)
        return DeviceFacts(
            answers={"good": True, "bad": False}.get(scanner.state),
            tags=len(now.config.device[name].tags) if name in now.config.device else 0,
            bad_tags=len(scanner.bad_tags),
            stale=latest is not None and not latest.fresh(now_s, stale_after_s),
        )

    async def _journal_condition(self) -> Condition:
        """Return the journal's figures; where its disk hangs, the last ones, and that it does."""
        try:
            async with asyncio.timeout(JOURNAL_S):
                self._condition = await self._journal.condition()
        except TimeoutError:
            silent_s = clock.mono_s() - self._answered_s
            if silent_s > HUNG_S:
                error = f"journal {self._journal.path}: the disk has given no answer for {silent_s:.0f} s"
                return self._condition._replace(error=error)
        else:
            self._answered_s = clock.mono_s()
        return self._condition

    def _valid_for_s(self, config: Config, now_s: float) -> Mapping[str, float]:
        """Return how long the uplink's certificates are valid, looked at once an hour."""
        files = [name for name in (config.uplink.ca_file, config.uplink.cert_file) if name]
        if files and now_s - self._certificates_s > CERTIFICATES_EVERY_S:
            from edgegw.status.certificates import valid_for_s  # 6 MB of memory: only where there are any

            self._certificates_s = now_s
            paths = [self._folder / name for name in files]
            self._certificates = valid_for_s(paths, clock.wall_ms() / 1000)
        return self._certificates


def _device(scanner: Device) -> DeviceStatus:
    return DeviceStatus(
        scanner.state, scanner.reason, scanner.last_ts, scanner.scans, scanner.errors, scanner.skipped,
        len(scanner.bad_tags),
    )  # fmt: skip
