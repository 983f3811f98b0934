"""What comes from a broker that does what it must not, and where answers go."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from control_field import Operator, command, configuration, event, running, site, stop
from gateway_rig import config, device, gateway, until
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from rig import free_port, mosquitto, needs_mosquitto

from edgegw.uplink.mqtt import MAX_INCOMING_BYTES
from edgegw.uplink.reply_topics import OWN_LEVELS, reply_topics

BASE = "edgegw/site-7"
PUBLISHED = struct.pack(">H", 17) + b"edgegw/site-7/cmd"


@pytest.mark.parametrize(
    ("response_topic", "prefix", "answered"),
    [
        (None, "", False),
        ("", "", False),
        (f"{BASE}/reply", "", False),
        (f"{BASE}/reply/me", "", True),
        (f"{BASE}/answers/me", "", True),
        (f"{BASE}/+/me", "", False),
        (f"{BASE}/x\0y", "", False),
        (f"{BASE}/{'x' * 2000}", "", False),
        ("edgegw/site-70/reply", "", False),
        ("plant/breaker/trip", "", False),
        ("answers/me", "answers/", True),
        ("answers/#", "answers/", False),
        ("", "answers/", False),
        ("answer", "answers/", False),
        *((f"{BASE}/{level}", "", False) for level in sorted(OWN_LEVELS)),
        (f"{BASE}/latest/meter1", f"{BASE}/", False),
    ],
)
def test_an_answer_goes_where_it_may(response_topic: str | None, prefix: str, answered: bool) -> None:
    assert reply_topics(BASE, response_topic, prefix) == [
        f"{BASE}/reply",
        *([response_topic] if answered else []),
    ]


@needs_mosquitto
async def test_a_response_topic_that_is_not_allowed_costs_neither_the_link_nor_the_reply(
    tmp_path: Path,
) -> None:
    port = free_port()
    async with site() as plant:
        made = configuration(plant, {}, broker_port=port)
        with mosquitto(tmp_path, port), Operator(port) as operator, running(tmp_path, made) as run:
            await event(tmp_path, "link", state="online")
            for number, topic in enumerate(("answers/me", f"{BASE}/data", "answers/me")):
                wrong = command(f"c{number}", {"battery.none": 1.0})
                assert not (await operator.ask(wrong, answer_to=topic, correlation=b"1"))["ok"]
            await stop(run)
            assert not run.said("records stay in the journal"), "the link was never lost"
    assert {topic for topic, _, _ in operator.answers} == {f"{BASE}/reply"}


def packet(kind: int, body: bytes) -> bytes:
    """Return an MQTT packet."""
    length, rest = b"", len(body)
    while True:
        rest, byte = rest >> 7, rest & 0x7F
        length += bytes((byte | (0x80 if rest else 0),))
        if not rest:
            return bytes((kind,)) + length + body


class HostileBroker:
    """Speaks enough MQTT 5 to be subscribed at, and then sends something that it must not."""

    def __init__(self, hostile: bytes) -> None:
        self.hostile = hostile
        self.connections = self.ended = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                kind = (await reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    if not byte & 0x80:
                        break
                body = await reader.readexactly(length)
                if kind >> 4 == 1:
                    writer.write(b"\x20\x03\x00\x00\x00")
                elif kind >> 4 == 8:
                    writer.write(b"\x90\x04" + body[:2] + b"\x00\x01" + self.hostile)
        except (asyncio.IncompleteReadError, OSError):
            self.ended += 1
        finally:
            writer.close()


@asynccontextmanager
async def hostile_broker(hostile: bytes, port: int) -> AsyncIterator[HostileBroker]:
    broker = HostileBroker(hostile)
    async with await asyncio.start_server(broker.serve, "127.0.0.1", port):
        yield broker


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (packet(0x30, struct.pack(">H", 4) + b"\xff\xfe\xfd\xfc" + b"\x00{}"), "a topic that is not UTF-8"),
        (packet(0x34, PUBLISHED + b"\x00\x07\x00{}"), "a message of QoS 2"),
        (b"\x30\xff\xff\xff\x7f" + PUBLISHED, f"a message of more than {MAX_INCOMING_BYTES} bytes"),
    ],
    ids=["topic", "qos 2", "size"],
)
async def test_p4_what_a_broker_must_not_send_ends_the_connection(
    tmp_path: Path, hostile: bytes, said: str
) -> None:
    port = free_port()
    async with hostile_broker(hostile, port) as broker:
        made = config(port, {"m": device(free_port())}, uplink={"protocol": "5"})
        with gateway(tmp_path, made) as run:
            await until(lambda: broker.ended >= 2, "the connection to be ended, and the next one")
            await stop(run)
    assert run.said(said), run.lines
    assert not run.said("Traceback")
    assert len(run.lines) < 20 + 4 * broker.connections, "a line or two for each connection"


@needs_mosquitto
@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_p4_a_command_of_two_hundred_megabytes_costs_no_memory(tmp_path: Path, version: str) -> None:
    port = free_port()
    made = config(port, {"m": device(free_port())}, uplink={"protocol": version})
    with mosquitto(tmp_path, port), gateway(tmp_path, made) as run:
        sender = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
        replies: list[bytes] = []
        sender.on_message = lambda client, userdata, message: replies.append(message.payload)
        sender.on_connect = lambda client, *_: client.subscribe(f"{BASE}/reply", 1)
        sender.connect("127.0.0.1", port)
        sender.loop_start()
        async with asyncio.timeout(20.0):
            while not replies:  # until the gateway is subscribed
                sender.publish(f"{BASE}/cmd", b"{}", qos=1)
                await asyncio.sleep(0.1)
        before = peak_kib(run.pid)
        replies.clear()
        sent = sender.publish(f"{BASE}/cmd", bytes(200_000_000), qos=1)
        await until(sent.is_published, "the broker to have it", 60.0)
        sender.publish(f"{BASE}/cmd", b"{}", qos=1)
        if version == "5":
            await until(
                lambda: any(b"id: expected" in reply for reply in replies), "the next one's answer", 30.0
            )
            assert not any(b"200000000 bytes" in reply for reply in replies), "the broker discards it"
        else:
            await until(lambda: run.said("a message of more than"), "the connection to be ended", 30.0)
        sender.disconnect()
        sender.loop_stop()
        assert peak_kib(run.pid) < before + 40_000
        await stop(run)


def peak_kib(pid: int) -> int:
    """Return the most memory that a process has had, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
