"""A site for control on real wires: Modbus units that hold what is written and keep every write frame."""

import asyncio
import json
import signal
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
from field import Field, field, frame
from gateway_rig import config, gateway, until
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from rig import DEADLINE_S, Process, free_port

from edgegw.domain.batch import Kind
from edgegw.errors import JournalError
from edgegw.journal.store import Reader, unpack

METER, BATTERY = 1, 2
KW, SETPOINT, PLAIN, RELAY = 0, 10, 20, 3
"""Addresses: the meter's power, the battery's limited setpoint, one without limits, and a coil."""


class Frame(NamedTuple):
    """A write as it came over the wire."""

    at_s: float
    unit: int
    function: int
    address: int
    data: bytes

    @property
    def value(self) -> Any:
        """What was written, as its tag has it."""
        return self.data == b"\xff\x00" if self.function == 5 else struct.unpack(">f", self.data)[0]


class Site:
    """Two units on one field: a meter, and a battery that does as it is told."""

    def __init__(self, made: Field) -> None:
        self.field = made
        self.frames: list[Frame] = []
        self.seen: Callable[[Frame], None] = lambda written: None
        self.scans: dict[int, list[float]] = {METER: [], BATTERY: []}
        self.registers = {METER: bytearray(128), BATTERY: bytearray(128)}
        self.coils = {METER: bytearray(16), BATTERY: bytearray(16)}
        for unit in (METER, BATTERY):
            made.behave[unit] = self.answer

    def set(self, value: float, unit: int = METER, address: int = KW) -> None:
        """Have the plant show a value from now on."""
        self.registers[unit][2 * address : 2 * address + 4] = struct.pack(">f", value)

    def get(self, unit: int = BATTERY, address: int = SETPOINT) -> float:
        """Return what the plant holds."""
        return float(struct.unpack(">f", self.registers[unit][2 * address : 2 * address + 4])[0])

    async def answer(self, tid: int, unit: int, pdu: bytes) -> bytes:
        """Answer reads and writes as a healthy device does."""
        function, address, count = struct.unpack(">BHH", pdu[:5])
        if function in (5, 6, 16):
            data = pdu[6:] if function == 16 else pdu[3:5]
            written = Frame(time.monotonic(), unit, function, address, data)
            self.frames.append(written)
            self.seen(written)
            if function == 5:
                self.coils[unit][address] = data[0] & 1
            else:
                self.registers[unit][2 * address : 2 * address + len(data)] = data
            return frame(tid, unit, pdu[:5])
        if function == 1:
            bits = sum(self.coils[unit][address + i] << i for i in range(count))
            return frame(tid, unit, bytes((1, (count + 7) // 8)) + bits.to_bytes((count + 7) // 8, "little"))
        if unit == METER or count > 2:  # a scan, not the reading back of one tag
            self.scans[unit].append(time.monotonic())
        data = bytes(self.registers[unit][2 * address : 2 * (address + count)])
        return frame(tid, unit, bytes((function, len(data))) + data)

    async def scanned(self, count: int = 2, unit: int = METER) -> None:
        """Wait for so many more scans of a unit."""
        wanted = len(self.scans[unit]) + count
        await until(lambda: len(self.scans[unit]) >= wanted, f"{count} scans of unit {unit}")

    def values(self, address: int = SETPOINT) -> list[Any]:
        """Return all that was written to a place of the battery."""
        return [round(f.value, 3) for f in self.frames if (f.unit, f.address) == (BATTERY, address)]


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    """Run a site on a port of the loopback."""
    async with field() as made:
        yield Site(made)


def configuration(
    made: Site, rules: dict[str, Any], *, broker_port: int | None = None, every: str = "50ms",
    limits: dict[str, Any] | None = None, **sections: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return a configuration of the site. Rules are patient with a slow machine: stale_after is 30 s."""
    url = f"tcp://127.0.0.1:{made.field.port}"
    base = {"driver": "modbus", "url": url, "every": every, "timeout": "300ms"}
    setpoint = {
        "address": f"holding:{SETPOINT}",
        "type": "float32",
        "writable": True,
        "min": -50.0,
        "max": 50.0,
    }
    setpoint |= {"safe": 0.0} if limits is None else limits
    devices = {
        "meter": base | {"unit": METER, "tags": {"kw": {"address": f"holding:{KW}", "type": "float32"}}},
        "battery": base
        | {
            "unit": BATTERY,
            "tags": {
                "setpoint": setpoint,
                "plain": {"address": f"holding:{PLAIN}", "type": "float32", "writable": True},
                "hidden": {"address": f"holding:{PLAIN + 2}", "type": "float32"},
                "relay": {"address": f"coil:{RELAY}", "type": "bool", "writable": True, "safe": False},
            },
        },
    }
    patient = {name: {"stale_after": "30s"} | rule for name, rule in rules.items()}
    return config(broker_port or free_port(), devices, rule=patient, **sections)


def running(folder: Path, made: dict[str, Any], *prefix: str) -> Process:
    """Start the gateway in a folder."""
    return gateway(folder, made, *prefix)


def records(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Return the events that are durable in the journal by now, all or those of a name."""
    reader = Reader(folder / "journal.db")
    try:
        found = [b for b in reader.batches(1, 1 << 62, limit=100_000) if b.kind is Kind.EVENT]
        events = [record for batch in found for record in msgspec.json.decode(unpack(batch))["records"]]
    finally:
        reader.close()
    return [event for event in events if name is None or event["event"] == name]


async def event(
    folder: Path, name: str, count: int = 1, deadline_s: float = DEADLINE_S, **fields: Any
) -> dict[str, Any]:
    """Wait until so many events of a name, with these fields, are durable; return the last."""

    def found() -> list[dict[str, Any]]:
        try:
            events = records(folder, name)
        except JournalError:
            return []  # it is just being made
        return [e for e in events if all(e.get(key) == value for key, value in fields.items())]

    await until(lambda: len(found()) >= count, f"{count} {name} {fields}", deadline_s)
    return found()[-1]


async def kill(process: Process) -> None:
    """Kill the gateway, as a power cut does, and wait until it is gone."""
    process.send(signal.SIGKILL)
    await asyncio.to_thread(process.end)


async def stop(process: Process) -> None:
    """End the gateway in good order."""
    process.send(signal.SIGTERM)
    code, _ = await asyncio.to_thread(process.end)
    assert code == 0, process.lines


def command(name: str, write: dict[str, Any], *, expires_ms: int = 60_000, **more: Any) -> bytes:
    """Return a command's message."""
    message = {"id": name, "write": write, "expires": round(time.time() * 1000) + expires_ms} | more
    return json.dumps(message).encode()


class Operator:
    """Sends commands over a real broker, and keeps the answers."""

    def __init__(self, port: int) -> None:
        self.answers: list[tuple[str, dict[str, Any], bytes | None]] = []
        self._ready = threading.Event()
        client = self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        client.on_connect = lambda *_: client.subscribe([("edgegw/site-7/reply", 1), ("answers/#", 1)])
        client.on_subscribe = lambda *_: self._ready.set()
        client.on_message = self._on_message
        client.connect("127.0.0.1", port)
        client.loop_start()

    def __enter__(self) -> Self:
        assert self._ready.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        self.answers.append((message.topic, json.loads(message.payload), correlation))

    def send(
        self, payload: bytes, *, retain: bool = False, answer_to: str = "", correlation: bytes = b""
    ) -> None:
        """Publish a command and wait until the broker has it."""
        properties = Properties(PacketTypes.PUBLISH)
        if answer_to:
            properties.ResponseTopic = answer_to
            properties.CorrelationData = correlation
        info = self._client.publish("edgegw/site-7/cmd", payload, 1, retain, properties)
        info.wait_for_publish(DEADLINE_S)

    async def ask(self, payload: bytes, **options: Any) -> dict[str, Any]:
        """Send a command and return the next answer on the gateway's reply topic."""
        before = len(self.replies)
        self.send(payload, **options)
        await until(lambda: len(self.replies) > before, "an answer")
        return self.replies[before]

    @property
    def replies(self) -> list[dict[str, Any]]:
        """The answers on the gateway's own topic."""
        return [answer for topic, answer, _ in self.answers if topic == "edgegw/site-7/reply"]
