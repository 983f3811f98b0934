"""What the machine could do without a gateway: the ceilings that the benchmarks' figures stand beside.

Reading loops over the same field, the same bodies inserted into a bare SQLite table, the same payloads published by a
bare paho client; each as readings a second of one process that does nothing else.
"""

import asyncio
import struct
import threading
import time
from pathlib import Path

import apsw
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from pymodbus.client import AsyncModbusTcpClient

from edgegw.domain.batch import Batch
from edgegw.domain.record import Scan
from edgegw.journal.encode import Sealer, group
from edgegw.journal.timekeeper import present

INFLIGHT = 32


async def pymodbus(port: int, devices: int, tags: int, seconds: float) -> float:
    """Read with one pymodbus client a device, each asking again as soon as it has its answer."""
    decode = struct.Struct(f">{tags}f").unpack
    count = 0
    stop = time.monotonic() + seconds

    async def read(device: int) -> None:
        nonlocal count
        client = AsyncModbusTcpClient("127.0.0.1", port=port + device)
        await client.connect()
        while time.monotonic() < stop:
            answer = await client.read_holding_registers(0, count=2 * tags, device_id=1)
            count += len(decode(struct.pack(f">{2 * tags}H", *answer.registers)))
        client.close()

    await asyncio.gather(*(read(device) for device in range(devices)))
    return count / seconds


async def wire(port: int, devices: int, tags: int, seconds: float) -> float:
    """Read with nothing but a protocol that asks again as soon as it has its answer."""
    request = struct.pack(">HHHBBHH", 1, 0, 6, 1, 3, 0, 2 * tags)
    decode = struct.Struct(f">9x{tags}f").unpack
    loop = asyncio.get_running_loop()
    stop = loop.time() + seconds
    count = 0

    class Reader(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._write = transport.write  # type: ignore[attr-defined]
            self._write(request)

        def data_received(self, data: bytes) -> None:
            nonlocal count
            count += len(decode(data))
            if loop.time() < stop:
                self._write(request)

    made = [await loop.create_connection(Reader, "127.0.0.1", port + device) for device in range(devices)]
    await asyncio.sleep(seconds)
    for transport, _ in made:
        transport.abort()
    return count / seconds


def batches(answers: list[list[bytes]], tags: int, scans: int) -> tuple[list[tuple[Batch, bytes]], int]:
    """Return the batches that the gateway would make of some commits, and how many readings these hold."""
    decode = struct.Struct(f">9x{tags}f").unpack
    names = [f"t{i:02}" for i in range(tags)]
    era, sealer = present(), Sealer("bench", "0" * 36, 0, bytes(32))
    records = [
        Scan(
            1_700_000_000_000 + i, f"d{device:03}", dict(zip(names, map(_tenth, decode(own[i])), strict=True))
        )
        for i in range(scans)
        for device, own in enumerate(answers)
    ]
    return [sealer.seal(made) for made in group(records, era, 128 * 1024)], len(records) * tags


def _tenth(value: float) -> float:
    return round(value, 1)


def sqlite(folder: Path, made: list[tuple[Batch, bytes]], readings: int, seconds: float) -> float:
    """Insert the bodies, packed, a commit of about 1 MiB of JSON at a time, with synchronous=FULL."""
    db = apsw.Connection(str(folder / "bare.db"))
    db.pragma("journal_mode", "wal")
    db.pragma("synchronous", "FULL")
    db.execute("CREATE TABLE body (seq INTEGER PRIMARY KEY, packed BLOB)")
    commits = [made[i : i + 8] for i in range(0, len(made), 8)]
    count, seq, began = 0, 0, time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        for commit in commits:
            with db:
                db.executemany(
                    "INSERT INTO body VALUES (?, ?)", [(seq + i, b.packed) for i, (b, _) in enumerate(commit)]
                )
            seq += len(commit)
        count += readings
    db.close()
    return count / took


def paho(port: int, made: list[tuple[Batch, bytes]], readings: int, seconds: float) -> float:
    """Publish the bodies with QoS 1, `INFLIGHT` of them unacknowledged at the most."""
    room = threading.Semaphore(INFLIGHT)
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    client.max_inflight_messages_set(INFLIGHT)
    client.on_publish = lambda *_: room.release()
    client.connect("127.0.0.1", port)
    client.loop_start()
    count, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        for _, body in made:
            room.acquire()
            client.publish("edgegw/bare/data", body, qos=1)
        count += readings
    client.disconnect()
    client.loop_stop()
    return count / took
