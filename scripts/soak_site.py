"""The soak's surroundings: a hostile field that counts, a hostile way to the broker, and the processes between them."""

import asyncio
import contextlib
import random
import signal
import struct
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from soak_judge import Write

TIMEOUT_S = 0.5
"""How long the gateway waits for an answer; one that comes later is not taken."""
SETPOINT = 100
MOODS = ("well", "silent", "late", "exception", "garbage", "reset", "flood")


class Unit:
    """A Modbus unit: registers 0 and 1 are its next number, 2 a level of 0 to 99, SETPOINT what was written there."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.count = 0
        self.mood = "well"
        self.setpoint = b"\0\0"
        self.writes: list[Write] = []
        self._history: deque[tuple[float, int]] = deque(maxlen=20_000)

    def read(self, start: int, words: int) -> bytes:
        """Return registers from `start` on."""
        if start == SETPOINT:
            return self.setpoint
        self.count += 1
        self._history.append((time.monotonic(), self.count))
        return (struct.pack(">IH", self.count, self.count // 7 % 100) + bytes(2 * words))[: 2 * words]

    def at(self, moment_s: float) -> int:
        """Return the last number given until a moment of the monotonic clock."""
        return max((number for at_s, number in self._history if at_s <= moment_s), default=0)

    def write(self, data: bytes) -> None:
        """Take a value for the setpoint."""
        self.setpoint = data
        self.writes.append(Write(f"{self.name}.setpoint", float(struct.unpack(">h", data)[0])))


class HostileField:
    """All units, each behind a port of its own."""

    def __init__(self, names: list[str], numbers: random.Random) -> None:
        self.units = {name: Unit(name, 1) for name in names}
        self.ports: dict[str, int] = {}
        self._numbers = numbers
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen."""
        for name, unit in self.units.items():
            server = await asyncio.start_server(
                lambda r, w, unit=unit: self._serve(unit, r, w), "127.0.0.1", 0
            )
            self.ports[name] = server.sockets[0].getsockname()[1]
            self._servers.append(server)

    def counts(self, moment_s: float) -> Mapping[str, int]:
        """Return the last number that each unit had given at a moment."""
        return {name: unit.at(moment_s) for name, unit in self.units.items()}

    async def _serve(self, unit: Unit, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                tid, _, length, number = struct.unpack(">HHHB", await reader.readexactly(7))
                pdu = await reader.readexactly(length - 1)
                await self._answer(unit, writer, struct.pack(">HHHB", tid, 0, 0, number), pdu)
                await writer.drain()
        writer.close()

    async def _answer(self, unit: Unit, writer: asyncio.StreamWriter, head: bytes, pdu: bytes) -> None:
        match unit.mood:
            case "silent":
                return
            case "reset":
                writer.transport.abort()
                return
            case "late":
                await asyncio.sleep(self._numbers.uniform(1.2, 2.0) * TIMEOUT_S)
            case "exception":
                writer.write(_frame(head, bytes((pdu[0] | 0x80, self._numbers.choice((1, 2, 3, 4, 6, 11))))))
                return
            case "garbage":
                writer.write(self._numbers.randbytes(self._numbers.randrange(1, 300)))
                return
            case "flood":
                writer.write(_frame(b"\xff\xff" + head[2:], b"\x03\x02\x00\x00") * 2000)
                return
        function, address, count = struct.unpack(">BHH", pdu[:5])
        if function == 3:
            data = unit.read(address, count)
            writer.write(_frame(head, bytes((3, len(data))) + data))
        elif function in (6, 16):
            unit.write(pdu[6:8] if function == 16 else pdu[3:5])
            writer.write(_frame(head, pdu[:5]))

    def stop(self) -> None:
        """Listen no more."""
        for server in self._servers:
            server.close()


def _frame(head: bytes, pdu: bytes) -> bytes:
    return head[:4] + struct.pack(">H", len(pdu) + 1) + head[6:7] + pdu


class Way:
    """A TCP proxy between the gateway and its broker: it passes, stalls, refuses or babbles."""

    def __init__(self, numbers: random.Random) -> None:
        self.mood = "pass"
        self._passing = asyncio.Event()
        self._passing.set()
        self.port = 0
        self.to_port = 0
        self._numbers = numbers
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, to_port: int) -> None:
        """Listen, and pass to a port of this machine."""
        self.to_port = to_port
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    def turn(self, mood: str) -> None:
        """Change, for connections that are there as well."""
        self.mood = mood
        if mood == "stall":
            self._passing.clear()
        else:
            self._passing.set()
        if mood in ("refuse", "babble"):
            for writer in list(self._writers):
                if mood == "babble":
                    writer.write(self._numbers.randbytes(4096))
                writer.transport.abort() if mood == "refuse" else writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.mood == "refuse":
                return
            if self.mood == "babble":
                writer.write(b"\x20\x02\x00\x00" + self._numbers.randbytes(512))
                await writer.drain()
                return
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.to_port)
            try:
                await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
            finally:
                to_writer.close()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await self._passing.wait()
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError


class Part:
    """A process, started and ended by its own id; what it says is kept in a file."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.exit_code: int | None = None
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self.pid is None:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                    start_new_session=True,
                )  # fmt: skip

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.pid is not None and self._process is not None:
            self._process.send_signal(number)

    async def end(self, number: signal.Signals, timeout_s: float = 120.0) -> None:
        """Send a signal that ends it, and wait; what takes too long is killed, and has no exit code."""
        if self._process is None:
            return
        self.send(number)
        try:
            self.exit_code = await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self.exit_code = None
            self._process.kill()
            self._process.wait()
