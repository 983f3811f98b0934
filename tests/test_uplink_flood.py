"""More commands than can be answered: what waits, what is discarded, and what goes on undisturbed."""

import asyncio
import shutil
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from control_field import Operator, command, stop
from field import Field, field
from gateway_rig import config, device, gateway, until
from hypothesis import given
from hypothesis import strategies as st
from mqtt_proxy import PUBACK, PUBLISH, make_packet, message_id, read_packet
from rig import Process, free_port, mosquitto, needs_mosquitto

from edgegw.domain.command import Reply
from edgegw.uplink import commands, outbox
from edgegw.uplink.bounded_reader import TURN_S, BoundedReader
from edgegw.uplink.commands import (
    BURST,
    CALM_S,
    RATE,
    UNDER_WAY,
    WAITING,
    WAITING_BYTES,
    Budget,
    Commands,
    Flood,
)
from edgegw.uplink.login import Login
from edgegw.uplink.messages import Ack
from edgegw.uplink.mqtt import RECEIVE_MAXIMUM, Connection
from edgegw.uplink.outbox import Outbox

BASE = "edgegw/site-7"

# -- the decisions alone -----------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 0.1), max_size=400))
def test_no_more_begin_than_the_burst_and_the_rate_allow(pauses_s: list[float]) -> None:
    now_s, begun, budget = 0.0, 0, Budget(RATE, BURST, 0.0)
    for pause_s in pauses_s:
        now_s += pause_s
        begun += budget.spend(now_s)
        assert begun <= BURST + RATE * now_s + 1e-6
    assert begun >= min(len(pauses_s), int(BURST))


def test_a_flood_is_said_when_it_begins_and_counted_when_it_is_over() -> None:
    flood = Flood()
    assert flood.over(0.0) is None
    assert [flood.discarded(at_s) for at_s in (100.0, 101.0, 105.0)] == [True, False, False]
    assert flood.over(105.0 + CALM_S / 2) is None
    assert flood.over(105.0 + CALM_S) == (3, 5.0)
    assert flood.over(1e9) is None, "once"
    assert flood.discarded(1e9), "anew"


# -- reading in turns --------------------------------------------------------------------------------------


async def test_a_full_socket_leaves_the_event_loop_free_for_as_long_as_it_holds_it() -> None:
    """Each read is a byte of many, and takes a while, so that turns have a length."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    sent = 500
    theirs.sendall(bytes(sent))
    loop = asyncio.get_running_loop()
    iteration = 0
    reads: dict[int, list[tuple[float, float]]] = {}

    def count() -> None:
        nonlocal iteration
        iteration += 1
        loop.call_soon(count)

    def read() -> bool:
        began_s = time.monotonic()
        try:
            ours.recv(1)
        except BlockingIOError:
            return False
        while time.monotonic() < began_s + TURN_S / 10:
            pass
        reads.setdefault(iteration, []).append((began_s, time.monotonic()))
        return True

    count()
    reader = BoundedReader(loop, read)
    reader.start(ours)
    await until(lambda: sum(map(len, reads.values())) == sent, "everything to be read")
    reader.stop()
    turns = list(reads.values())
    assert len(turns) >= sent / 11
    for turn, following in pairwise(turns):
        assert len(turn) <= 11, "no packet is begun when the time is over"
        assert following[0][0] - turn[-1][1] >= 0.9 * (turn[-1][1] - turn[0][0])
    ours.close()
    theirs.close()


@pytest.mark.parametrize("lasts", [0.0, 2 * TURN_S], ids=["in a turn", "at its end"])
async def test_reading_that_is_stopped_does_not_go_on(lasts: float) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(bytes(100))
    reads = 0

    def read() -> bool:
        nonlocal reads
        ours.recv(1)
        reads += 1
        ends_s = time.monotonic() + lasts
        while time.monotonic() < ends_s:
            pass
        reader.stop()
        return bool(lasts)

    reader = BoundedReader(asyncio.get_running_loop(), read)
    reader.start(ours)
    await until(lambda: reads, "reading")
    ended = asyncio.Event()
    asyncio.get_running_loop().call_later(20 * TURN_S, ended.set)
    await ended.wait()
    assert reads == 1
    ours.close()
    theirs.close()


# -- commands over a connection ----------------------------------------------------------------------------


class Broker:
    """Speaks MQTT 5, keeps what it gets, and publishes commands as it is told."""

    def __init__(self) -> None:
        self.port = 0
        self.got: list[bytes] = []
        self.acknowledges = True
        self.subscribed = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            while True:
                packet = await read_packet(reader)
                self.got.append(packet)
                if packet[0] >> 4 == 1:
                    writer.write(b"\x20\x03\x00\x00\x00")
                elif packet[0] >> 4 == 8:
                    writer.write(b"\x90\x04" + packet[2:4] + b"\x00\x01")
                    self.subscribed.set()
                elif packet[0] >> 4 == PUBLISH and self.acknowledges:
                    writer.write(b"\x40\x02" + message_id(packet))
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def publish(self, mid: int | None, payload: bytes, level: str = "cmd") -> None:
        """Send a command, of QoS 0 if it has no message id."""
        topic = f"{BASE}/{level}".encode()
        body = struct.pack(">H", len(topic)) + topic
        body += b"" if mid is None else struct.pack(">H", mid)
        body += b"\0" + payload
        assert self._writer
        self._writer.write(make_packet(0x30 if mid is None else 0x32, body))

    def of(self, kind: int) -> list[bytes]:
        """Return the packets of a kind that came."""
        return [packet for packet in self.got if packet[0] >> 4 == kind]


class Plant:
    """Obeys commands when it is let."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.go = asyncio.Event()
        self.outbox: Outbox
        self.commands: Commands

    async def obey(self, payload: bytes, retained: bool) -> Reply:
        self.begun.append(payload)
        await self.go.wait()
        return Reply("x", True)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Broker, Plant, Connection]]:
    """Have commands of a broker obeyed by a plant."""
    broker, plant = Broker(), Plant()
    async with await asyncio.start_server(broker.serve, "127.0.0.1", 0) as server:
        broker.port = server.sockets[0].getsockname()[1]
        connection = Connection(f"mqtt://127.0.0.1:{broker.port}", "5", Login("edgegw-site-7"), None)
        await connection.open()
        replies = plant.outbox = Outbox(connection)
        queue = plant.commands = Commands(BASE, "", plant.obey)

        def acknowledged(mid: int, ack: Ack) -> None:
            replies.acknowledge(mid, ack)
            queue.proceed()

        connection.acknowledged = acknowledged
        queue.begin(connection, replies)
        assert await connection.subscribe(f"{BASE}/cmd", queue.arrived) is None
        yield broker, plant, connection
        queue.end()
        connection.drop()


async def test_a_command_of_qos_1_is_acknowledged_when_it_is_answered_and_none_is_lost() -> None:
    async with connected() as (broker, plant, _):
        receive_maximum = b"\x21" + struct.pack(">H", RECEIVE_MAXIMUM)
        assert receive_maximum in broker.of(1)[0]
        for mid in range(1, RECEIVE_MAXIMUM + 1):
            broker.publish(mid, b"%d" % mid)
        await until(
            lambda: len(plant.begun) == min(UNDER_WAY, RECEIVE_MAXIMUM), "as many as may be under way"
        )
        assert not broker.of(PUBACK)
        plant.go.set()
        await until(lambda: len(broker.of(PUBACK)) == RECEIVE_MAXIMUM, "each to be acknowledged")
        assert len(broker.of(PUBLISH)) == RECEIVE_MAXIMUM
        kinds = [packet[0] >> 4 for packet in broker.got if packet[0] >> 4 in (PUBLISH, PUBACK)]
        assert all(kinds[: n + 1].count(PUBLISH) >= kinds[: n + 1].count(PUBACK) for n in range(len(kinds)))


async def test_p4_what_a_flood_of_qos_0_may_occupy_is_bounded_and_one_of_qos_1_comes_through(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connected() as (broker, plant, connection):
        for number in range(1000):
            broker.publish(None, b"flood %d" % number)
        broker.publish(1, b"mine")
        broker.publish(2, b"also mine")
        read = asyncio.Event()
        connection.subscribe(f"{BASE}/end", lambda _: read.set())
        broker.publish(None, b"", "end")
        async with asyncio.timeout(20.0):
            await read.wait()
        assert len(plant.begun) == UNDER_WAY
        plant.go.set()
        await until(lambda: plant.begun[-1] == b"also mine", "those of QoS 1")
        assert len(plant.begun) == UNDER_WAY + WAITING + 2
        await until(lambda: len(broker.of(PUBACK)) == 2, "their acknowledgement")
        assert sum("faster than they can be answered" in record.message for record in caplog.records) == 1
        assert not connection.lost.done()


async def test_p4_answers_that_are_not_acknowledged_hold_back_further_commands() -> None:
    async with connected() as (broker, plant, connection):
        broker.acknowledges = False
        plant.go.set()
        for number in range(200):
            broker.publish(None, b"%d" % number)
        await until(lambda: len(plant.begun) >= commands.UNANSWERED, "commands")
        broker.publish(7, b"the last")
        read = asyncio.Event()
        connection.subscribe(f"{BASE}/end", lambda _: read.set())
        broker.publish(None, b"", "end")
        async with asyncio.timeout(20.0):
            await read.wait()
        assert len(plant.begun) < commands.UNANSWERED + UNDER_WAY
        assert not broker.of(PUBACK)


async def test_commands_go_on_when_the_outbox_has_given_up_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "RESEND_S", 0.0)
    async with connected() as (broker, plant, connection):
        broker.acknowledges = False
        plant.go.set()
        read = asyncio.Event()
        connection.subscribe(f"{BASE}/end", lambda _: read.set())
        for number in range(commands.UNANSWERED + UNDER_WAY + 8):
            broker.publish(None, b"%d" % number)
        broker.publish(None, b"", "end")
        async with asyncio.timeout(20.0):
            await read.wait()
        begun = len(plant.begun)
        for _ in range(outbox.MAX_TRIES):
            plant.outbox.resend()
        assert len(plant.begun) == begun
        plant.commands.check_deadlines()
        await until(lambda: len(plant.begun) == commands.UNANSWERED + UNDER_WAY + 8, "the others")


async def test_p4_a_broker_that_ignores_the_receive_maximum_loses_the_connection() -> None:
    async with connected() as (broker, _, connection):
        for mid in range(1, 2 + WAITING_BYTES // 200_000 + UNDER_WAY):
            broker.publish(mid, bytes(200_000))
        async with asyncio.timeout(20.0):
            assert "unacknowledged commands" in await connection.lost


# -- on the real parts -------------------------------------------------------------------------------------

HASTY = "from edgegw.uplink import commands; commands.CALM_S = 1.0; from edgegw.cli import main; main()"
FLOOD = 40_000


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


@needs_mosquitto
async def test_p4_p6_p7_a_flood_of_commands_disturbs_neither_scans_nor_batches_nor_a_proper_command(
    tmp_path: Path, meter: Field
) -> None:
    port = free_port()
    made = config(port, {"m": device(meter.port, every="10ms", timeout="5s")})
    lines = tmp_path / "lines"
    lines.write_text("".join(f'{{"id":"f{n}","write":{{"m.none":1.0}}}}\n' for n in range(FLOOD)))
    publisher = shutil.which("mosquitto_pub")
    assert publisher
    send = f"exec {publisher} -p {port} -t {BASE}/cmd -q 0 -l < {lines}"
    with mosquitto(tmp_path, port), Operator(port) as operator, gateway(tmp_path, made, program=HASTY) as run:
        await until(lambda: run.said("online"), "the link")
        await until(lambda: meter.counts[1] > 20, "scans")
        before_kib = memory_kib(run.pid)
        counted, began_s = meter.counts[1], time.monotonic()
        with Process("/bin/sh", "-c", send) as flood:
            await until(lambda: run.said("faster than they can be answered"), "the flood")
            proper = command("proper", {"m.none": 1.0})
            await until(lambda: operator.replies, "answers")
            operator.send(proper)
            await until(
                lambda: any(reply["id"] == "proper" for reply in operator.replies), "its answer", 60.0
            )
            await asyncio.to_thread(flood.end)
        await until(lambda: run.said("were discarded in"), "the end of the flood", 60.0)
        flooded_s = time.monotonic() - began_s
        scans = meter.counts[1] - counted
        counted, began_s = meter.counts[1], time.monotonic()
        await until(lambda: time.monotonic() - began_s >= flooded_s, "as long without it", 60.0)
        undisturbed = meter.counts[1] - counted
        assert scans > undisturbed / 3, f"{scans} scans in {flooded_s:.1f} s, {undisturbed} without the flood"
        assert memory_kib(run.pid) < before_kib + 30_000
        discarded = next(line for line in run.lines if "were discarded in" in line)
        assert int(discarded.partition("uplink: ")[2].split()[0]) + len(operator.replies) >= FLOOD
        assert sum("faster than they can be answered" in line for line in run.lines) == 1
        assert not run.said("records stay in the journal"), "the link was never lost"
        assert not run.said("is left out"), "no answer"
        await stop(run)


def memory_kib(pid: int) -> int:
    """Return the most memory that a process has had, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
