"""A Modbus/TCP gateway to a serial bus, in bytes: it serves one request at a time, whatever connection it came by."""

import asyncio
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from field import frame


class SerialGateway:
    """Answers each read after `delay_s`, in the order of arrival; a dead unit gets exception 11 after `dead_s`.

    `most` is how many requests were in it at once: more than one have come too soon.
    """

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.dead_s = 0.0
        self.dead: set[int] = set()
        self.port = 0
        self.scans: dict[int, int] = defaultdict(int)
        self.asked: dict[int, list[float]] = defaultdict(list)
        self.most = self._inside = 0
        self._bus = asyncio.Lock()
        self._writers: set[asyncio.StreamWriter] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                tid, _, length, unit = struct.unpack(">HHHB", await reader.readexactly(7))
                pdu = await reader.readexactly(length - 1)
                self.asked[unit].append(time.monotonic())
                task = asyncio.create_task(self._answer(writer, tid, unit, pdu))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, tid: int, unit: int, pdu: bytes) -> None:
        self._inside += 1
        self.most = max(self.most, self._inside)
        try:
            async with self._bus:
                await asyncio.sleep(self.dead_s if unit in self.dead else self.delay_s)
        finally:
            self._inside -= 1
        if unit in self.dead:
            writer.write(frame(tid, unit, bytes((pdu[0] | 0x80, 11))))
            return
        self.scans[unit] += 1
        size = pdu[4] * 2
        writer.write(frame(tid, unit, bytes((pdu[0], size)) + self.scans[unit].to_bytes(size, "big")))


@asynccontextmanager
async def serial_gateway(delay_s: float) -> AsyncIterator[SerialGateway]:
    """Run a gateway on a port of the loopback."""
    made = SerialGateway(delay_s)
    server = await asyncio.start_server(made._serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for writer in made._writers:
            writer.transport.abort()
        await server.wait_closed()
