"""Breaks a gateway at random for some minutes, heals all, and judges from both ends: scripts/soak MINUTES [SEED].

The same seed draws the same faults in the same order. Exit 0 if nothing was lost, doubled or written out of limits.
"""

import asyncio
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from soak_judge import Evidence, Kill, Row, Verdict, judge
from soak_site import MOODS, SETPOINT, TIMEOUT_S, HostileField, Part, Way

COMMIT_S = 0.2
KILL_COSTS_S = COMMIT_S + 3.0
"""What a SIGKILL may cost: a commit interval, and what a busy machine adds to it."""
DISK_MIB = 48
HEAL_S = 900.0
RSS_MOST_MIB = 220.0
UNITS = ["a", "b", "c", "d"]
LIMITS = {f"{unit}.setpoint": (-40.0, 40.0) for unit in UNITS}
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Soak:
    """One run: the site, what is broken now, and what must be known of it at the end."""

    def __init__(self, folder: Path, numbers: random.Random) -> None:
        self.folder = folder
        self.numbers = numbers
        self.state = folder / "state"
        self.state.mkdir()
        self.field = HostileField(UNITS, numbers)
        self.way = Way(numbers)
        self.kills: list[Kill] = []
        self.rss_mib = 0.0
        self.frozen = self.disk_full = False
        self.extra = True
        self.period_ms = 100
        self.config = folder / "config.toml"
        self.clock = folder / "clock"
        self.clock.write_text("+0     ")
        self.broker_port = free_port()
        self.database = folder / "received.db"
        self.parts: list[Part] = []

    # -- the site -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the field, the way, the broker, the receiver and the gateway."""
        await self.field.start()
        await self.way.start(self.broker_port)
        self._configure()
        broker = self.folder / "mosquitto.conf"
        broker.write_text(
            f"listener {self.broker_port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {self.folder}/\nuser root\n"
        )
        env = dict(os.environ)
        self.broker = Part("mosquitto", ["mosquitto", "-c", str(broker)], self.folder, env)
        edgegw = [sys.executable, "-m", "edgegw"]
        self.receiver = Part(
            "receiver",
            [*edgegw, "receive", "--url", f"mqtt://127.0.0.1:{self.broker_port}", "--topic", "edgegw/#", "--to",
             f"sqlite:///{self.database}"], self.folder, env,
        )  # fmt: skip
        fake = {} if FAKETIME is None else {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self.clock), "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        self.gateway = Part("gateway", [*edgegw, "run", "-c", str(self.config)], self.folder, env | fake)
        self.parts = [self.broker, self.receiver, self.gateway]
        for part in self.parts:
            part.start()

    def _configure(self) -> None:
        units = UNITS if self.extra else UNITS[:-1]
        parts = [
            f'[gateway]\nid = "soak"\n[journal]\npath = "{self.state}/journal.db"\ncommit_interval = "200ms"\n'
            f'max_size = "16MiB"\n[status]\nhttp = ""\n[uplink]\nurl = "mqtt://127.0.0.1:{self.way.port}"\n'
            'reconnect_jitter = "500ms"\nisland_after = "5s"\n'
        ]
        parts += [
            f'[device.{unit}]\ndriver = "modbus"\nurl = "tcp://127.0.0.1:{self.field.ports[unit]}"\n'
            f'every = "{self.period_ms if unit == "a" else 100}ms"\ntimeout = "{round(TIMEOUT_S * 1000)}ms"\n'
            f'[device.{unit}.tags]\nn = {{ address = "holding:0", type = "uint32" }}\n'
            'level = { address = "holding:2", type = "uint16" }\n'
            f'setpoint = {{ address = "holding:{SETPOINT}", type = "int16", writable = true, min = -40, max = 40 }}\n'
            for unit in units
        ]
        parts += [
            f'[rule.follow_{unit}]\nwhen = "{unit}.level > 30.0"\nuntil = "{unit}.level < 10.0"\nlink = "always"\n'
            f'do = {{ "{unit}.setpoint" = "clamp({unit}.level - 50.0, -40.0, 40.0)" }}\n'
            f'finally = {{ "{unit}.setpoint" = "0.0" }}\n'
            for unit in units[:2]
        ]
        self.config.write_text("\n".join(parts))

    # -- faults -------------------------------------------------------------------------------------------

    def faults(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return what may be done, by name; each turns something over, so that faults overlap."""
        found = {
            "a unit's mood": self.unit_mood, "the way to the broker": self.way_mood, "the broker": self.turn_broker,
            "SIGKILL to the gateway": self.kill_gateway, "SIGTERM to the gateway": self.stop_gateway,
            "SIGSTOP or SIGCONT": self.freeze, "a reload": self.reload, "the receiver": self.turn_receiver,
        }  # fmt: skip
        if FAKETIME is not None:
            found["a step of the clock"] = self.step_clock
        if os.path.ismount(self.state):
            found["the disk"] = self.turn_disk
        return found

    async def unit_mood(self) -> None:
        """Have a unit behave, or not."""
        unit = self.field.units[self.numbers.choice(UNITS)]
        unit.mood = "well" if unit.mood != "well" else self.numbers.choice(MOODS)

    async def way_mood(self) -> None:
        """Have the way to the broker pass, stall, refuse or babble."""
        self.way.turn(
            self.numbers.choice(("stall", "refuse", "babble")) if self.way.mood == "pass" else "pass"
        )

    async def turn_broker(self) -> None:
        """End the broker, one way or another, or start it."""
        if self.broker.pid is None:
            self.broker.start()
        else:
            await self.broker.end(self.numbers.choice((signal.SIGKILL, signal.SIGTERM)))

    async def turn_receiver(self) -> None:
        """End the receiver, one way or another, or start it."""
        if self.receiver.pid is None:
            self.receiver.start()
        else:
            await self.receiver.end(self.numbers.choice((signal.SIGKILL, signal.SIGTERM)))

    async def kill_gateway(self) -> None:
        """Kill the gateway and start it; not while its disk is full: then its memory is all there is."""
        if self.disk_full or self.frozen:
            return
        now_s = time.monotonic()
        await self.gateway.end(signal.SIGKILL)
        self.kills.append(Kill(self.field.counts(now_s - KILL_COSTS_S), self.field.counts(time.monotonic())))
        self.gateway.start()

    async def stop_gateway(self) -> None:
        """End the gateway in good order and start it; not while its disk is full."""
        if self.disk_full or self.frozen:
            return
        await self.gateway.end(signal.SIGTERM)
        if self.gateway.exit_code not in (0, -signal.SIGTERM):  # it may not have begun to listen for it
            raise AssertionError(f"SIGTERM: the gateway ended with {self.gateway.exit_code}")
        if self.gateway.exit_code:
            self.kills.append(
                Kill(self.field.counts(time.monotonic() - KILL_COSTS_S), self.field.counts(time.monotonic()))
            )
        self.gateway.start()

    async def freeze(self) -> None:
        """Stop the gateway as a debugger would, or let it go on."""
        self.gateway.send(signal.SIGCONT if self.frozen else signal.SIGSTOP)
        self.frozen = not self.frozen

    async def reload(self) -> None:
        """Change the configuration, mostly to another that is right, and have it taken up."""
        if self.numbers.random() < 0.3:
            self.config.write_text(self.config.read_text() + "\n[device.a.nonsense]\nx = 1\n")
        else:
            self.extra, self.period_ms = self.numbers.random() < 0.7, self.numbers.choice((50, 100, 200))
            self._configure()
        if self.ready:
            self.gateway.send(signal.SIGHUP)
            await asyncio.sleep(0.5)
        self._configure()

    async def step_clock(self) -> None:
        """Set the gateway's wall clock elsewhere, or right again."""
        text = self.numbers.choice(("+0", "+0", "+3600", "-3600", "+86400"))
        with self.clock.open("r+") as file:
            file.write(f"{text:<7}")  # as long as before: it is never seen half written

    async def turn_disk(self) -> None:
        """Fill the disk to the last byte, or give it back."""
        filler = self.state / "filler"
        if self.disk_full:
            filler.unlink(missing_ok=True)
        else:
            with suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(b"x" * 65536)
        self.disk_full = not self.disk_full

    # -- the end ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the gateway has come far enough to take a SIGHUP."""
        return self.gateway.pid is not None and (self.state / "journal.db.sock").exists()

    async def watch(self) -> None:
        """Keep an eye on the gateway's memory."""
        while True:
            self.rss_mib = max(self.rss_mib, rss_mib(self.gateway.pid))
            await asyncio.sleep(1.0)

    async def heal(self) -> int:
        """Make all well, wait until everything is confirmed, end in good order, and return the gateway's head."""
        for unit in self.field.units.values():
            unit.mood = "well"
        if self.frozen:
            await self.freeze()
        if self.disk_full:
            await self.turn_disk()
        self.way.turn("pass")
        for part in self.parts:
            part.start()
        deadline_s = time.monotonic() + HEAL_S
        while (status := await self._status()) is None or status["journal"]["pending_records"] > 50:
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not drained in {HEAL_S:.0f} s: {status}")
            await asyncio.sleep(1.0)
        await asyncio.sleep(2.0)
        await self.gateway.end(signal.SIGTERM)
        if self.gateway.exit_code != 0:
            raise AssertionError(f"the gateway's last end: {self.gateway.exit_code}")
        head = sqlite(self.state / "journal.db", "SELECT max(seq + count - 1) FROM batch")[0][0]
        while time.monotonic() < deadline_s:
            with suppress(sqlite3.Error):
                if sqlite(self.database, "SELECT max(seq + count - 1) FROM batches")[0][0] >= head:
                    break
            await asyncio.sleep(0.5)
        await self.receiver.end(signal.SIGTERM)
        await self.broker.end(signal.SIGTERM)
        self.field.stop()
        return int(head)

    async def _status(self) -> dict[str, dict[str, int]] | None:
        command = [sys.executable, "-m", "edgegw", "status", "--json", "-c", str(self.config)]
        made = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
        status = json.loads(made.stdout) if made.returncode == 0 else {}
        return status if status.get("running") and status["link"]["state"] == "online" else None

    def verdict(self, head: int) -> Verdict:
        """Judge from what the field gave and what the receiver has."""
        rows = [
            Row(stream, seq, count, kind, body if isinstance(body, bytes) else body.encode())
            for stream, seq, count, kind, body in sqlite(
                self.database, "SELECT stream, seq, count, kind, body FROM batches"
            )
        ]
        (conflicts,) = sqlite(self.database, "SELECT count(*) FROM conflicts")[0]
        writes = [write for unit in self.field.units.values() for write in unit.writes]
        given = {name: unit.count for name, unit in self.field.units.items()}
        verdict = judge(Evidence(rows, conflicts, head, given, self.kills, writes, LIMITS))
        log = self.gateway.log.read_text(errors="replace")
        verdict.figures |= {
            "most memory of the gateway, MiB": round(self.rss_mib),
            "lines of its log": log.count("\n"),
        }
        verdict.wrong += [
            f"gateway: {line}"
            for line in log.splitlines()
            if " crashed; " in line or line.startswith("Traceback")
        ]
        if self.rss_mib > RSS_MOST_MIB:
            verdict.wrong.append(
                f"the gateway took {self.rss_mib:.0f} MiB; expected {RSS_MOST_MIB:.0f} at most"
            )
        return verdict

    def end(self) -> None:
        """End whatever is left."""
        for part in self.parts:
            part.send(signal.SIGCONT)
            part.send(signal.SIGKILL)


def rss_mib(pid: int | None) -> float:
    """Return the memory of a process in MiB, 0 if it is not there."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2
    except (OSError, IndexError):
        return 0.0


def sqlite(path: Path, query: str) -> list[tuple[object, ...]] | list[tuple[int, ...]]:
    """Return what a query finds."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def run(soak: Soak, minutes: float) -> Verdict:
    """Break things for so long, heal, and judge."""
    await soak.start()
    watch = asyncio.create_task(soak.watch())
    await asyncio.sleep(5.0)
    began_s = time.monotonic()
    done: dict[str, int] = {}
    while time.monotonic() - began_s < minutes * 60:
        name = soak.numbers.choice(sorted(soak.faults()))
        print(f"{time.monotonic() - began_s:7.1f} s  {name}", flush=True)
        await soak.faults()[name]()
        done[name] = done.get(name, 0) + 1
        await asyncio.sleep(soak.numbers.uniform(0.5, 4.0))
    print("healing", flush=True)
    verdict = soak.verdict(await soak.heal())
    watch.cancel()
    verdict.figures |= {f"turned: {name}": count for name, count in sorted(done.items())}
    return verdict


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk, if that is allowed; tell whether it is there."""
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def main() -> None:
    """Run, print, and exit 1 if anything was wrong."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"soak: {minutes:g} minutes, seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="edgegw-soak-"))
    soak = Soak(folder, random.Random(seed))
    with disk(soak.state) as mounted:
        if not mounted:
            print("no right to mount a disk: none is filled")
        if FAKETIME is None:
            print("libfaketime is not here: no clock is set")
        try:
            verdict = asyncio.run(run(soak, minutes))
        finally:
            soak.end()
    for name, figure in verdict.figures.items():
        print(f"{name:<40} {figure:>10,}")
    for line in verdict.wrong[:50]:
        print(f"WRONG  {line}")
    print(f"seed {seed}: {'WRONG' if verdict.wrong else 'clean'}; logs and databases in {folder}")
    sys.exit(1 if verdict.wrong else 0)


if __name__ == "__main__":
    main()
