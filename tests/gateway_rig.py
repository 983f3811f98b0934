"""Real `edgegw run` processes, and a subscriber that keeps what it gets, for the tests of the promises."""

import asyncio
import json
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from rig import DEADLINE_S, MOSQUITTO, PROTOCOL, Process

from edgegw.domain import batch as batches
from edgegw.domain.batch import Gap
from edgegw.domain.ranges import Ranges
from edgegw.journal.store import Reader
from edgegw.receiver.wire import link

TAGS = {"n": {"address": "holding:0", "type": "uint32"}, "f": {"address": "holding:2", "type": "float32"}}


def toml(value: dict[str, Any]) -> str:
    """Return a configuration as TOML."""

    def inline(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f'"{key}" = {inline(entry)}' for key, entry in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(inline(entry) for entry in item) + "]"
        return json.dumps(item)

    lines = [f"{name} = {inline(section)}" for name, section in value.items()]
    text = "\n".join(lines) + "\n"
    assert tomllib.loads(text) == value
    return text


def config(broker_port: int, devices: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with quick commits and no waiting after a loss; sections are merged in."""
    made: dict[str, Any] = {
        "gateway": {"id": "site-7"},
        "journal": {"commit_interval": "100ms"},
        "uplink": {"url": f"mqtt://127.0.0.1:{broker_port}", "reconnect_jitter": "0s", "island_after": "2s"},
        "status": {"http": ""},
        "device": devices,
    }
    if not MOSQUITTO:
        made["uplink"]["protocol"] = (
            "3.1.1"  # amqtt is silent to MQTT 5, and waiting for that is tested elsewhere
        )
    for name, section in sections.items():
        made[name] = made.get(name, {}) | section
    return made


def device(port: int, unit: int = 1, every: str = "50ms", **more: Any) -> dict[str, Any]:
    """Return a device of the test field."""
    base = {
        "driver": "modbus",
        "url": f"tcp://127.0.0.1:{port}",
        "unit": unit,
        "every": every,
        "timeout": "300ms",
    }
    return base | {"tags": TAGS} | more


def gateway(folder: Path, configuration: dict[str, Any], *prefix: str, program: str = "") -> Process:
    """Start `edgegw run` in a folder, perhaps under another program, or by a Python program of the test's own."""
    path = folder / "config.toml"
    path.write_text(toml(configuration))
    start = ("-c", program) if program else ("-m", "edgegw")
    return Process(*prefix, sys.executable, *start, "run", "-c", str(path))


async def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition without standing in the way of the test's own servers."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not in {deadline_s} s: {what}"
        await asyncio.sleep(0.01)


class Message(NamedTuple):
    """One message as it came."""

    topic: str
    body: bytes
    at_ms: float

    @property
    def batch(self) -> batches.Message:
        """The batch it holds."""
        return batches.decode(self.body)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The batch's records."""
        return list(json.loads(self.body)["records"])


class Subscriber:
    """Subscribes to everything of the gateway and keeps it."""

    def __init__(
        self,
        port: int,
        topic: str = "edgegw/site-7/#",
        protocol: int = PROTOCOL,
        username: str | None = None,
    ) -> None:
        self.messages: list[Message] = []
        self.subscribed = threading.Event()
        client = self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        client.username_pw_set(username)
        client.on_connect = lambda *_: client.subscribe(topic, qos=1)
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.on_message = self._on_message
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", port)
        client.loop_start()

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        self.messages.append(Message(message.topic, message.payload, time.time() * 1000))

    def batches(self, *topics: str) -> list[Message]:
        """Return the batches that came, on these topics or on all three."""
        wanted = {f"edgegw/site-7/{topic}" for topic in topics or ("data", "event", "backfill")}
        return [message for message in list(self.messages) if message.topic in wanted]

    def __enter__(self) -> Self:
        assert self.subscribed.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Union(NamedTuple):
    """What all received batches come to."""

    stream: str
    covered: Ranges
    bodies: dict[int, bytes]
    chain: batches.ChainReport
    repeats: int

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of a name, in order."""
        return [r for r in self.records() if r.get("event") == name]

    def records(self) -> list[dict[str, Any]]:
        """Return every record, in order of its number."""
        return [record for _, body in sorted(self.bodies.items()) for record in json.loads(body)["records"]]


def union(messages: list[Message]) -> Union:
    """Put received batches together; equal seqs must be equal bytes (promise 2)."""
    bodies: dict[int, bytes] = {}
    covered = Ranges()
    repeats = 0
    streams = set()
    for message in messages:
        batch = message.batch
        streams.add(batch.stream)
        if batch.seq in bodies:
            assert bodies[batch.seq] == message.body, f"seq {batch.seq} came with other bytes"
            repeats += 1
            continue
        assert not covered.overlaps(batch.seq, batch.seq + batch.count - 1), f"bounds moved at {batch.seq}"
        bodies[batch.seq] = message.body
        covered.add(batch.seq, batch.seq + batch.count - 1)
    assert len(streams) == 1, streams
    return Union(streams.pop(), covered, bodies, chain(bodies), repeats)


def chain(bodies: dict[int, bytes]) -> batches.ChainReport:
    """Verify a chain from the messages alone."""
    links, gaps = [], []
    for _, body in sorted(bodies.items()):
        message = batches.decode(body)
        links.append(link(message, batches.digest(body)))
        gaps += [
            Gap(record["from"], record["to"], bytes.fromhex(record["last_prev"]))
            for record in json.loads(body)["records"]
            if record.get("event") == "gap"
        ]
    return batches.verify(links, gaps)


def journal_head(folder: Path) -> int:
    """Return the journal's head, read from its file."""
    reader = Reader(folder / "journal.db")
    try:
        return reader.tip().head
    finally:
        reader.close()


class Proxy:
    """A TCP way round: slow, or silent without closing, as a radio link is."""

    def __init__(self, to_port: int, bytes_s: float | None = None, port: int = 0) -> None:
        self.port = port
        self.frozen = False
        self._to_port = to_port
        self._bytes_s = bytes_s
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", self.port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=8 * 1024)
        self.port = listener.getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))
        except OSError:
            pass
        finally:
            up_writer.close()
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(4096):
            if self.frozen:
                continue
            if self._bytes_s:
                await asyncio.sleep(len(data) / self._bytes_s)
            sink.write(data)
            await sink.drain()
        sink.close()
