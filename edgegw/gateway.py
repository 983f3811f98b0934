"""The composition root: from a configuration to running services, in order, and back."""

import asyncio
import logging
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgegw import __version__, clock
from edgegw.config.load import digest, fingerprint, journal_path
from edgegw.config.schema import AnyDevice, Config, ModbusDevice, OpcUaDevice
from edgegw.control.build import load_with_rules
from edgegw.control.command_handler import CommandHandler
from edgegw.control.controller import Controller
from edgegw.control.hand import HandService
from edgegw.control.ids import CommandIds
from edgegw.control.memory import MemoryFile
from edgegw.control.plant import Plant
from edgegw.domain.batch import decode
from edgegw.domain.command import Reply
from edgegw.domain.image import Image
from edgegw.domain.record import Event, Record
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.base import LearnsTypes
from edgegw.drivers.registry import Drivers
from edgegw.errors import ConfigError, JournalError, NotConnected
from edgegw.journal import tending
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.runtime import presence
from edgegw.runtime.lock import held
from edgegw.runtime.notify import Notifier
from edgegw.runtime.supervisor import Supervisor
from edgegw.scan.report import reporter
from edgegw.scan.scanner import Scanner
from edgegw.scan.schedule import first_delays
from edgegw.series.build import specs
from edgegw.series.windows import Windows
from edgegw.status.server import StatusServer
from edgegw.status.service import Current, StatusService
from edgegw.uplink.link import Link
from edgegw.uplink.uplink import UplinkService

log = logging.getLogger(__name__)


READ_S = 20.0
"""How long a reading that is asked for may take."""
RESTART = ("gateway", "journal", "uplink", "status")
"""Sections of the configuration that a reload does not take up."""


class Timed(msgspec.Struct):
    """When a record is of, and of which device, whatever else it holds."""

    ts: int
    device: str = ""


def own_times(records: Iterable[Timed], config: Config) -> list[int]:
    """Return the times that the gateway's own clock gave: events, and readings of devices that give none."""
    return [
        record.ts for record in records if not record.device or _timed_here(config.device.get(record.device))
    ]


def _timed_here(device: AnyDevice | None) -> bool:
    return isinstance(device, ModbusDevice) or (
        isinstance(device, OpcUaDevice) and device.timestamp == "gateway"
    )


class Gateway:
    """A gateway from its start to its end."""

    def __init__(self, config: Config, plant: Plant, config_path: Path) -> None:
        self._config = config
        self._config_path = config_path
        self._digest = digest(config_path)
        self._stale_after_s = plant.stale_after_s
        self._drivers = Drivers()
        self._learning: dict[str, LearnsTypes] = {}
        self._services = Supervisor()
        self._reload_wanted = asyncio.Event()
        self._image = Image()
        path = journal_path(config, config_path)
        self._journal = Journal(path, config.gateway.id, config.journal, config.uplink.max_message)
        self._memory = MemoryFile(path.with_name(path.name + ".control"))
        self._uplink = UplinkService(config, config_path, self._journal, self._link_changed, self._obey)
        self._control = self._controller(plant)
        ids = CommandIds(path.with_name(path.name + ".ids"))
        self._commands = CommandHandler(lambda: self._control, ids, self._journal, self._uplink)
        self._windows = Windows(
            specs(config), self._journal, self._image, lambda name: self._control.touch(name)
        )
        self._status = StatusService(
            config_path, self._current, self._journal, self._image, self._uplink, self._windows
        )
        self._hand = HandService(
            path.with_name(path.name + ".sock"),
            lambda line, by: self._commands.command(line, by=by),
            lambda tag: self._control.show(tag),
            {**tending.requests(self._journal), "status": self._answer_status, "read": self._answer_read},
        )
        self._notifier = Notifier()
        delays = first_delays(config.device)
        self._scanners = {
            name: self._scanner(name, device, delays[name]) for name, device in config.device.items()
        }

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT; raise HeldError if another process has the journal."""
        path = self._journal.path
        with held(path.with_name(path.name + ".lock"), f"journal {path}"):
            await self._run()

    async def _run(self) -> None:
        """Start sinks first, and stop sources first."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        self._services.start("reload", self._reload_when_wanted)

        self._journal.listen(self._committed)
        self._journal.start()
        began = {"version": __version__, **self._journal.era.wire()}
        self._record(Event(self._status.started_ms, "start", began))
        self._services.start("newest", self._see_newest)
        self._services.start("uplink", self._uplink.run)
        self._services.start("control", self._control.run)
        self._services.start("hand", self._hand.run)
        here = {"gateway": self._config.gateway.id, "journal": str(self._journal.path.absolute())}
        self._services.start("presence", lambda: presence.announce(self._config_path, here))
        self._services.start("windows", self._windows.run)
        for name, scanner in self._scanners.items():
            self._services.start(f"device.{name}", scanner.run)
        self._services.start("health", self._status.run)
        if self._config.status.http:
            self._services.start("status", StatusServer(self._config.status.http, self._status).run)
        if self._notifier.watchdog_s is not None:
            self._services.start("watchdog", self._watchdog)
        self._notifier.send("READY=1", "STATUS=polling")
        log.info(
            "gateway %s: %d devices, journal %s",
            self._config.gateway.id,
            len(self._scanners),
            self._journal.path,
        )

        await stop.wait()
        self._notifier.send("STOPPING=1")
        log.info("gateway %s: stopping", self._config.gateway.id)
        await self._services.stop("control")
        await self._control.settle()
        for name in list(self._scanners):
            await self._stop_device(name)
        await self._services.stop("windows")
        self._journal.append(Event(clock.wall_ms(), "stop", {}))
        try:
            async with asyncio.timeout(5.0):
                await self._journal.flush()
        except TimeoutError:
            log.error("journal: not everything is on the disk after 5 s; stopping all the same")
        else:
            await self._uplink.finish()
        await self._services.stop_all()
        if not await self._journal.close():
            raise JournalError(
                f"journal {self._journal.path}: stopped with records that could not be written"
            )

    def _scanner(self, name: str, device: AnyDevice, delay_s: float) -> Scanner:
        driver = self._drivers.make(name, device)
        if isinstance(driver, LearnsTypes):
            self._learning[name] = driver
        return Scanner(
            name,
            driver,
            self._record,
            self._image,
            lambda device: self._control.touch(device),
            reporter(device),
            delay_s,
            tags=len(device.tags),
        )

    def _record(self, record: Record) -> None:
        """Take a record of a device, or of what ends its readings: for the journal, and for windows."""
        self._journal.append(record)
        self._windows.feed(record)

    async def _see_newest(self) -> None:
        """Have commands know of the newest record of before the start: the clock cannot stand long before it."""
        await self._journal.opened.wait()
        head = self._journal.head
        for _, body in (await self._journal.read(head, head, 1)).batches if head else ():
            if body is not None:
                records = msgspec.json.decode(decode(body).records, type=list[Timed])
                for ts in own_times(records, self._config):
                    self._commands.seen(ts)
        self._commands.opened.set()

    def _committed(self, committed: Committed) -> None:
        self._windows.committed(committed)
        self._uplink.committed(committed)

    def _controller(self, plant: Plant) -> Controller:
        return Controller(
            plant, self._image, self._journal, lambda: self._uplink.link.state, self._write, self._memory,
            self._held_types,
        )  # fmt: skip

    def _held_types(self, device: str) -> Mapping[str, str] | None:
        """Return what a device has said of the types that it holds; None if its protocol has no such thing."""
        learning = self._learning.get(device)
        return None if learning is None else learning.held_types

    async def _write(self, device: str, tag: str, value: Scalar) -> Value:
        scanner = self._scanners.get(device)
        if scanner is None:
            raise NotConnected("not-configured", f"device.{device}: no longer configured")
        return await scanner.write(tag, value)

    async def _obey(self, payload: bytes, retained: bool) -> Reply:
        return await self._commands.command(payload, retained=retained)

    async def _stop_device(self, name: str) -> None:
        await self._services.stop(f"device.{name}")
        del self._scanners[name]
        self._learning.pop(name, None)
        self._image.forget(name)

    async def _reload_when_wanted(self) -> None:
        """Reload once for each SIGHUP, one reload after the other."""
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            await self._reload()

    async def _reload(self) -> None:
        """Take the configuration's devices anew; those that have not changed go on undisturbed."""
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={int(clock.mono_s() * 1e6)}")
        try:
            config, plant = load_with_rules(self._config_path)
            self._digest = digest(self._config_path)
        except ConfigError as error:
            for problem in error.problems:
                log.error("reload: %s", problem)
            log.error("reload: the configuration is wrong; the old one stays in force")
            self._journal.append(
                Event(clock.wall_ms(), "config", {"ok": False, "errors": error.problems[:20]})
            )
        else:
            await self._apply(config, plant)
        finally:
            self._notifier.send("READY=1")

    async def _apply(self, config: Config, plant: Plant) -> None:
        old = self._config
        pending = [name for name in RESTART if getattr(old, name) != getattr(config, name)]
        for section in pending:
            log.warning("reload: [%s] has changed; that takes a restart", section)
        gone = [name for name, device in old.device.items() if config.device.get(name) != device]
        come = [name for name, device in config.device.items() if old.device.get(name) != device]
        for name in gone:
            await self._stop_device(name)
        if specs(old) != specs(config):
            self._windows.reload(specs(config))
        taken = {
            "ok": True,
            "stopped": gone,
            "started": come,
            "pending_restart": pending,
            "config": self._digest,
        }
        self._record(Event(clock.wall_ms(), "config", taken))
        delays = first_delays(config.device)
        for name in come:
            self._scanners[name] = self._scanner(name, config.device[name], delays[name])
            self._services.start(f"device.{name}", self._scanners[name].run)
        if (old.device, old.rule, old.window) != (config.device, config.rule, config.window):
            await self._services.stop("control")  # it takes up what it remembers, under the new rules
            await self._control.settle()
            self._control = self._controller(plant)
            self._services.start("control", self._control.run)
        self._stale_after_s = plant.stale_after_s
        self._config = old.model_copy(
            update={"device": config.device, "rule": config.rule, "window": config.window}
        )
        log.info("reload: %d devices stopped, %d started", len(gone), len(come))

    async def _watchdog(self) -> None:
        """Show systemd that the event loop still turns."""
        assert self._notifier.watchdog_s is not None
        while True:
            self._notifier.send("WATCHDOG=1")
            await asyncio.sleep(self._notifier.watchdog_s / 3)

    def _link_changed(self, link: Link) -> None:
        self._notifier.send(f"STATUS={link.state}, {len(self._scanners)} devices")
        self._control.wake()

    # -- what is asked of it -----------------------------------------------------------------------------

    def _current(self) -> Current:
        return Current(self._config, self._digest, self._scanners, self._control, self._stale_after_s)

    async def _answer_status(self, asked: object) -> dict[str, Any]:
        """Answer a `status` request: the status document."""
        return {"ok": True, "status": msgspec.to_builtins(await self._status.snapshot())}

    async def _answer_read(self, asked: object) -> dict[str, Any]:
        """Answer a `read` request, by a device's name and its configuration's fingerprint, with a reading of now.

        `other` tells that this gateway runs no device of this configuration: the command may read it directly.
        """
        match asked:
            case {"device": str(name), "fingerprint": str(wanted)} if name in self._scanners:
                if fingerprint(self._config.device[name]) != wanted:
                    return {
                        "ok": False,
                        "other": True,
                        "error": f"device.{name}: the running gateway has another",
                    }
            case _:
                return {"ok": False, "other": True, "error": "no such device"}
        scanner = self._scanners[name]
        try:
            async with asyncio.timeout(READ_S):
                await scanner.read()
        except TimeoutError:
            return {"ok": False, "error": f"device.{name}: nothing in {READ_S:.0f} s"}
        latest = self._image.devices.get(name)
        if scanner.error is not None or latest is None:
            return {"ok": False, "error": scanner.error or f"device.{name}: not yet read"}
        return {"ok": True, "ts": latest.ts, "values": dict(latest.values), "quality": dict(latest.quality)}
