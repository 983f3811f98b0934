"""A Modbus/TCP field that answers as fast as one core can: bench_field.py PORT DEVICES REGISTERS.

Every device has a port of its own, from PORT on. The registers hold float32 values that wander as measurements
do, with the resolution of a tenth that common transducers have; each answer is the next of a few hundred made
beforehand, so that answering costs no more than copying.
"""

import asyncio
import random
import struct
import sys

import uvloop

ANSWERS = 256


def answers(registers: int, seed: int) -> list[bytes]:
    """Return answers without their transaction id."""
    walk = random.Random(seed)
    values = [walk.uniform(10.0, 500.0) for _ in range(registers // 2)]
    made = []
    for _ in range(ANSWERS):
        values = [value + walk.gauss(0.0, 0.2) for value in values]
        data = struct.pack(f">{len(values)}f", *(round(value, 1) for value in values))
        made.append(struct.pack(">HHBBB", 0, len(data) + 3, 1, 3, len(data)) + data)
    return made


class Device(asyncio.Protocol):
    """One connection; one whole request in one segment is all a gateway sends."""

    made: list[bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._at = 0

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), 12):
            self._at = (self._at + 1) % ANSWERS
            self._transport.write(data[start : start + 2] + self.made[self._at])  # type: ignore[attr-defined]


async def main(port: int, devices: int, registers: int) -> None:
    loop = asyncio.get_running_loop()
    for i in range(devices):
        kind = type("Device", (Device,), {"made": answers(registers, i)})
        await loop.create_server(kind, "127.0.0.1", port + i)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*(int(argument) for argument in sys.argv[1:4])))
