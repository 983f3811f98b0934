"""What comes from a broker that does what it must not, and where answers go."""

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop
from control_field import Operator, command, configuration, event, running, site, stop
from gateway_rig import config, device, gateway, until
from mqtt_proxy import make_packet, read_packet
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from rig import free_port, mosquitto, needs_mosquitto

from edgegw.errors import UplinkError
from edgegw.uplink.login import Login
from edgegw.uplink.mqtt import MAX_INCOMING_BYTES, MAX_QUEUED_PACKETS, Connection
from edgegw.uplink.negotiation import connect
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


class HostileBroker:
    """Speaks enough MQTT 5 to be subscribed at, and then sends something that it must not."""

    def __init__(self, hostile: bytes) -> None:
        self.hostile = hostile
        self.connections = self.ended = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                packet = await read_packet(reader)
                if packet[0] >> 4 == 1:
                    writer.write(b"\x20\x03\x00\x00\x00")
                elif packet[0] >> 4 == 8:
                    writer.write(b"\x90\x04" + packet[2:4] + b"\x00\x01" + self.hostile)
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
        (
            make_packet(0x30, struct.pack(">H", 4) + b"\xff\xfe\xfd\xfc" + b"\x00{}"),
            "a topic that is not UTF-8",
        ),
        (make_packet(0x34, PUBLISHED + b"\x00\x07\x00{}"), "a message of QoS 2"),
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


# -- anything at all ---------------------------------------------------------------------------------------

CMD = struct.pack(">H", len(f"{BASE}/cmd")) + f"{BASE}/cmd".encode()


def sound(v5: bool) -> list[bytes]:
    """Return a packet of each kind that a broker sends, and of some that it must not."""
    none = b"\0" if v5 else b""
    return [
        make_packet(0x30, CMD + none + b"{}"),
        make_packet(0x32, CMD + b"\0\7" + none + b"{}"),
        make_packet(0x30, CMD + b"\x07\x26\x00\x01a\x00\x01b{}"),
        make_packet(0x30, CMD + b"\x05\x08\x00\x02ab{}"),
        make_packet(0x34, CMD + b"\0\7" + none),
        make_packet(0x40, b"\0\1"),
        make_packet(0x40, b"\0\1\x10\0"),
        make_packet(0x50, b"\0\1"),
        make_packet(0x62, b"\0\1"),
        make_packet(0x70, b"\0\1"),
        make_packet(0x90, b"\0\1" + none + b"\1"),
        make_packet(0xB0, b"\0\1" + none + b"\0"),
        make_packet(0xD0, b""),
        make_packet(0xC0, b""),
        make_packet(0x20, b"\0\0" + none),
        make_packet(0x20, b"\0\x87\0"),
        make_packet(0xE0, b""),
        make_packet(0xE0, b"\x8e\0"),
        make_packet(0xF0, b"\x18\0"),
    ]


def malformed(chance: random.Random, v5: bool) -> bytes:
    """Return a packet with bytes changed, left out or put in, or one of random bytes."""
    if chance.random() < 0.3:
        return make_packet(
            chance.randrange(256), chance.randbytes(chance.choice((0, 1, 2, 3, 4, 5, 50, 300)))
        )
    made = bytearray(chance.choice(sound(v5)))
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(made))
        made[at : at + chance.choice((0, 1, 1))] = chance.randbytes(chance.choice((0, 1, 1)))
        made = made or bytearray(1)
    return bytes(made)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_p4_whatever_a_broker_sends_the_connection_goes_on_or_ends_in_good_order(version: str) -> None:
    v5 = version == "5"
    escaped: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
    sent = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            await read_packet(reader)
            writer.write(make_packet(0x20, b"\0\0\0" if v5 else b"\0\0"))
            await read_packet(reader)
            writer.write(sent)
            writer.write_eof()
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for seed in range(300):
            chance = random.Random(seed)
            sent = b"".join(malformed(chance, v5) for _ in range(5))
            connection = Connection(url, version, Login("edgegw-site-7"), None)
            await connection.open()
            connection.subscribe(f"{BASE}/cmd", connection.confirm)
            connection.publish(f"{BASE}/data", b"{}")
            async with asyncio.timeout(20.0):
                await connection.lost
            assert connection.unsent <= 2 + 5
            connection.drop()
            assert not escaped, (seed, sent, escaped)


async def test_p4_a_broker_that_asks_for_answers_and_reads_none_loses_the_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            await read_packet(reader)
            writer.write(b"\x20\x03\x00\x00\x00")
            while True:
                writer.write(make_packet(0xC0, b"") * 1000)  # pings
                await writer.drain()
        writer.close()

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    async with await asyncio.start_server(serve, sock=listener, limit=1024) as server:
        connection = Connection(f"mqtt://127.0.0.1:{listener.getsockname()[1]}", "5", Login("x"), None)
        await connection.open()
        connection._client.socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with asyncio.timeout(60.0):
            assert await connection.lost == "the broker asks for answers and does not read them"
        assert connection.unsent <= MAX_QUEUED_PACKETS + 1
        connection.drop()
        server.close()


def test_a_connection_that_is_reset_at_once_is_lost_in_good_order_whatever_the_loop_makes_of_it() -> None:
    """Under uvloop, as in the daemon: it gives up its handle of a socket that is reset, and tells nobody."""
    listener = socket.create_server(("127.0.0.1", 0))
    rounds = 200

    def serve() -> None:
        numbers = random.Random(3)
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                with one, suppress(OSError):
                    one.recv(4096)
                    one.sendall(b"\x20\x03\x00\x00\x00" + numbers.choice((b"", b"\xd0\x00" * 50)))
                    time.sleep(numbers.choice((0.0, 0.0005, 0.002)))
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def use() -> tuple[int, list[dict[str, object]]]:
        faults: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        url, lost = f"mqtt://127.0.0.1:{listener.getsockname()[1]}", 0
        for number in range(rounds):
            with suppress(UplinkError):
                connection = await connect(url, "5", Login(f"c{number}", "", "", "", "", ""))
                connection.publish("a", b"x" * 200_000)
                connection.publish("a", b"x")
                async with asyncio.timeout(60.0):
                    await asyncio.wait([connection.lost])
                connection.drop()
                lost += 1
        return lost, faults

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            lost, faults = runner.run(use())
    finally:
        listener.close()
    assert faults == []
    assert lost > rounds // 4, "so many were open when they were reset"
