"""A Modbus/TCP field for tests, well-behaved or mean, a unit at a time, in the bytes of the protocol."""

import asyncio
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Answer = Callable[[int, int, bytes], Awaitable[bytes | None]]
"""(transaction id, unit, request PDU) to the bytes to send, None for silence."""


def frame(tid: int, unit: int, pdu: bytes) -> bytes:
    """Return a Modbus/TCP frame."""
    return struct.pack(">HHHB", tid, 0, len(pdu) + 1, unit) + pdu


class Field:
    """Answers reads of registers with a count that grows with every scan, unless a unit is told otherwise.

    Register 0 and 1 hold the count as uint32, every further pair the same as float32; bits are all true.
    """

    def __init__(self) -> None:
        self.port = 0
        self.counts: dict[int, int] = defaultdict(int)
        self.asked: dict[int, list[float]] = defaultdict(list)
        self.requests: list[tuple[int, bytes]] = []
        self.connections = 0
        self.behave: dict[int, Answer] = {}
        self._writers: set[asyncio.StreamWriter] = set()

    async def well(self, tid: int, unit: int, pdu: bytes) -> bytes:
        """Answer as a healthy device does."""
        function, _, count = struct.unpack(">BHH", pdu[:5])
        if function in (1, 2):
            size = (count + 7) // 8
            return frame(tid, unit, bytes((function, size)) + b"\xff" * size)
        self.counts[unit] += 1
        n = self.counts[unit]
        registers = struct.pack(">I", n) + struct.pack(">f", n) * (count // 2)
        return frame(tid, unit, bytes((function, count * 2)) + registers[: count * 2])

    async def silent(self, tid: int, unit: int, pdu: bytes) -> None:
        """Never answer."""

    def exception(self, code: int) -> Answer:
        """Return an answer with an exception code."""

        async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
            return frame(tid, unit, bytes((pdu[0] | 0x80, code)))

        return answer

    def slow(self, delay_s: float) -> Answer:
        """Return a right answer that comes late."""

        async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
            await asyncio.sleep(delay_s)
            return await self.well(tid, unit, pdu)

        return answer

    def drop_connections(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                tid, _, length, unit = struct.unpack(">HHHB", await reader.readexactly(7))
                pdu = await reader.readexactly(length - 1)
                self.asked[unit].append(time.monotonic())
                self.requests.append((unit, pdu))
                task = asyncio.create_task(self._answer(writer, tid, unit, pdu))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (
            asyncio.IncompleteReadError,
            OSError,
            asyncio.CancelledError,
        ):  # Python 3.11 logs a task that is cancelled
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, tid: int, unit: int, pdu: bytes) -> None:
        answer = await self.behave.get(unit, self.well)(tid, unit, pdu)
        if answer is not None and not writer.is_closing():
            writer.write(answer)


@asynccontextmanager
async def field(port: int = 0) -> AsyncIterator[Field]:
    """Run a field on a port of the loopback."""
    made = Field()
    server = await asyncio.start_server(made._serve, "127.0.0.1", port)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        made.drop_connections()
        await server.wait_closed()
