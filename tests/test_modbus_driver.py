"""The Modbus driver against pymodbus's own server and a mean field: connections, turns, refusals, deadlines."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from field import Answer, Field, field, frame
from gateway_rig import until
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice
from rig import free_port

from edgegw.config.schema import ModbusDevice
from edgegw.domain.record import Scan
from edgegw.drivers.modbus.driver import ModbusDriver
from edgegw.drivers.modbus.tcp import TcpTransport
from edgegw.drivers.modbus.transport import Transport, open_transport
from edgegw.drivers.session import RETRY_FIRST_S, RETRY_MOST_S, Sessions
from edgegw.errors import BadAnswer, DeviceError, NoAnswer, NotConnected, Refused, Unconfirmed

ONE = {"n": {"address": "holding:0", "type": "uint32"}}
FAR = {f"n{i}": {"address": f"holding:{200 * i}", "type": "uint16"} for i in range(5)}
"""Tags that take a read each."""


def config(url: str, tags: dict[str, Any] = ONE, **keys: Any) -> ModbusDevice:
    """Return a device's configuration."""
    base = {"driver": "modbus", "url": url, "timeout": "200ms", "every": "100ms"}
    return ModbusDevice.model_validate(base | keys | {"tags": tags})


@asynccontextmanager
async def drivers(*configs: ModbusDevice) -> AsyncIterator[list[ModbusDriver]]:
    """Enter drivers that share their connections, as a gateway's do."""
    sessions: Sessions[Transport] = Sessions(open_transport)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(ModbusDriver(f"d{i}", made, sessions))
            for i, made in enumerate(configs)
        ]


@asynccontextmanager
async def served(
    devices: SimDevice | list[SimDevice], port: int = 0, **more: Any
) -> AsyncIterator[tuple[ModbusTcpServer, int, list[bool]]]:
    """Run pymodbus's TCP server; yield it, its port, and what came (True) and went (False) of connections."""
    port = port or free_port()
    seen: list[bool] = []
    server = ModbusTcpServer(devices, address=("127.0.0.1", port), trace_connect=seen.append, **more)
    await server.serve_forever(background=True)
    try:
        yield server, port, seen
    finally:
        await server.shutdown()


async def scanned(driver: ModbusDriver) -> Scan:
    """Return the one scan of a device."""
    (scan,) = await driver.scan()
    return scan


async def after_reconnecting(driver: ModbusDriver) -> Scan:
    """Scan until it goes well again, as a scanner does."""
    deadline_s = time.monotonic() + 2 * RETRY_MOST_S
    while True:
        try:
            return await scanned(driver)
        except DeviceError:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)


def registers(unit: int, *values: int, start: int = 0) -> SimDevice:
    """Return a device that holds these registers."""
    return SimDevice(unit, [SimData(start, values=list(values), datatype=DataType.REGISTERS)])


TABLES = SimDevice(
    1,
    (
        [SimData(0, values=[True, False] * 16, datatype=DataType.BITS)],
        [SimData(16, values=[False] * 4 + [True] * 12, datatype=DataType.BITS)],
        [
            SimData(0, values=[230.5, -1.25], datatype=DataType.FLOAT32),
            SimData(4, values=[2**63 - 1], datatype=DataType.INT64),
            SimData(8, values=[0x8001], datatype=DataType.REGISTERS),
            SimData(300, values=["EG-60 D"], datatype=DataType.STRING),
        ],
        [
            SimData(100, values=[-3], datatype=DataType.INT16),
            SimData(101, values=[4_000_000_000], datatype=DataType.UINT32),
            SimData(103, values=[1e300], datatype=DataType.FLOAT64),
        ],
    ),
)
TABLE_TAGS = {
    "c0": {"address": "coil:0", "type": "bool"},
    "c1": {"address": "coil:1", "type": "bool"},
    "c30": {"address": "coil:30", "type": "bool"},
    "d19": {"address": "discrete:19", "type": "bool"},
    "d20": {"address": "discrete:20", "type": "bool"},
    "volt": {"address": "holding:0", "type": "float32", "scale": 2.0},
    "amp": {"address": "holding:2", "type": "float32"},
    "wh": {"address": "holding:4", "type": "int64"},
    "on": {"address": "holding:8.15", "type": "bool"},
    "trip": {"address": "holding:8.1", "type": "bool"},
    "model": {"address": "holding:300", "type": "string:7"},
    "temp": {"address": "input:100", "type": "int16"},
    "count": {"address": "input:101", "type": "uint32"},
    "large": {"address": "input:103", "type": "float64"},
}
TABLE_VALUES = {
    "c0": True, "c1": False, "c30": True, "d19": False, "d20": True, "volt": 461.0, "amp": -1.25, "wh": 2**63 - 1,
    "on": True, "trip": False, "model": "EG-60 D", "temp": -3, "count": 4_000_000_000, "large": 1e300,
}  # fmt: skip


async def test_all_four_tables_of_a_real_server() -> None:
    async with (
        served(TABLES) as (_, port, _),
        drivers(config(f"tcp://127.0.0.1:{port}", TABLE_TAGS)) as (made,),
    ):
        scan = await scanned(made)
        assert scan.values == TABLE_VALUES
        assert scan.quality is None
        assert scan.device == "d0"
        assert [found.values for found in await made.read()] == [TABLE_VALUES]


async def test_units_behind_one_url_share_one_tcp_connection() -> None:
    devices = [registers(unit, 0, unit) for unit in (1, 2, 3, 247)]
    async with served(devices) as (server, port, seen):
        url = f"tcp://127.0.0.1:{port}"
        async with drivers(*(config(url, unit=unit) for unit in (1, 2, 3, 247))) as made:
            for _ in range(3):
                scans = await asyncio.gather(*(scanned(driver) for driver in made))
                assert [scan.values["n"] for scan in scans] == [1, 2, 3, 247]
            assert seen == [True]
            assert len(server.active_connections) == 1
        await until(lambda: seen == [True, False], "the connection to be closed with its last user")


async def test_a_connection_lives_as_long_as_any_of_its_users() -> None:
    async with field() as made:
        sessions: Sessions[Transport] = Sessions(open_transport)
        url = f"tcp://127.0.0.1:{made.port}"
        async with ModbusDriver("stays", config(url, unit=1), sessions) as stays:
            async with ModbusDriver("leaves", config(url, unit=2), sessions) as leaves:
                await scanned(leaves)
            await scanned(stays)
            await scanned(stays)
        assert made.connections == 1


async def test_it_is_back_after_the_server_was_restarted() -> None:
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    async with drivers(config(url, unit=1), config(url, unit=2)) as both:
        async with served([registers(1, 0, 1), registers(2, 0, 2)], port):
            assert [(await after_reconnecting(driver)).values["n"] for driver in both] == [1, 2]
        with pytest.raises(NotConnected, match=r"^device\.d0 \(tcp://127\.0\.0\.1:\d+ unit 1\): ") as caught:
            await scanned(both[0])
        assert caught.value.reason in ("refused", "connection-lost")
        async with served([registers(1, 0, 3), registers(2, 0, 4)], port) as (_, _, seen):
            assert [(await after_reconnecting(driver)).values["n"] for driver in both] == [3, 4]
            assert seen == [True], "one connection, for both"


async def test_a_lost_connection_is_tried_again_with_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts are counted against a port where nobody listens, while two scanners ask on and on."""
    attempts: list[float] = []
    connect = TcpTransport.connect

    async def counted(self: TcpTransport, timeout_s: float) -> None:
        attempts.append(time.monotonic())
        await connect(self, timeout_s)

    monkeypatch.setattr(TcpTransport, "connect", counted)
    url = f"tcp://127.0.0.1:{free_port()}"
    async with drivers(config(url, unit=1), config(url, unit=2)) as both:
        refused = 0
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            for driver in both:
                with pytest.raises(NotConnected) as caught:
                    await driver.scan()
                assert caught.value.reason == "refused"
                refused += 1
            await asyncio.sleep(0.01)
    assert refused > 20, "scans do not wait for the attempts"
    # by chance each wait may be short, but a dozen in a second and a half would be no back-off
    assert 2 <= len(attempts) <= 12, [round(at - attempts[0], 2) for at in attempts]


def test_the_back_off_has_jitter_and_an_end() -> None:
    assert 0.05 <= RETRY_FIRST_S <= 1.0
    assert RETRY_MOST_S <= 5.0


async def exception_or_well(made: Field, code: int) -> Answer:
    """Refuse registers from 100 on, answer the others."""
    refuse = made.exception(code)

    async def answer(tid: int, unit: int, pdu: bytes) -> bytes | None:
        start, count = struct.unpack(">HH", pdu[1:5])
        return await (refuse if start + count > 100 else made.well)(tid, unit, pdu)

    return answer


PARTLY = {
    "fine": {"address": "holding:0", "type": "uint32"},
    "odd": {"address": "holding:100", "type": "uint16"},
}


@pytest.mark.parametrize(
    ("code", "quality"),
    [
        (1, "bad:illegal-function"),
        (2, "bad:illegal-address"),
        (3, "bad:illegal-value"),
        (4, "bad:device-failure"),
        (5, "bad:acknowledge"),
        (6, "bad:busy"),
        (8, "bad:memory-parity"),
        (99, "bad:exception-99"),
    ],
)
async def test_a_refused_read_makes_its_own_tags_bad(code: int, quality: str) -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", PARTLY)) as (driver,):
        made.behave[1] = await exception_or_well(made, code)
        for n in (1, 2):
            scan = await scanned(driver)
            assert scan.values == {"fine": n, "odd": None}
            assert scan.quality == {"odd": quality}
        assert made.connections == 1
        made.behave.clear()
        scan = await scanned(driver)
        assert scan.quality is None, "what is refused is asked for again"


@pytest.mark.parametrize(
    ("code", "reason"), [(10, "gateway-path-unavailable"), (11, "gateway-target-silent")]
)
async def test_a_gateway_without_its_unit_is_a_device_that_does_not_answer(code: int, reason: str) -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}")) as (driver,):
        made.behave[1] = made.exception(code)
        with pytest.raises(NoAnswer) as caught:
            await scanned(driver)
        assert caught.value.reason == reason
        made.behave.clear()
        await scanned(driver)
        assert made.connections == 1, "the way to the gateway is kept"


async def test_a_real_servers_refusals() -> None:
    busy = iter([ExcCodes.DEVICE_BUSY, None])

    async def action(*_: Any) -> ExcCodes | None:
        return next(busy)

    device = registers(1, 0, 7)
    device.action = action
    async with served(device) as (_, port, _), drivers(config(f"tcp://127.0.0.1:{port}")) as (driver,):
        assert (await scanned(driver)).quality == {"n": "bad:busy"}
        assert (await scanned(driver)).values == {"n": 7}


async def test_a_request_has_a_deadline_of_its_own() -> None:
    """Every answer takes two thirds of the time-out: five reads take longer than one time-out, and are fine."""
    async with (
        field() as made,
        drivers(config(f"tcp://127.0.0.1:{made.port}", FAR, timeout="150ms")) as (driver,),
    ):
        made.behave[1] = made.slow(0.1)
        began_s = time.monotonic()
        assert len((await scanned(driver)).values) == 5
        assert time.monotonic() - began_s > 0.45
        made.behave[1] = made.silent
        began_s = time.monotonic()
        with pytest.raises(NoAnswer, match=r"no answer in 0\.15 s$") as caught:
            await scanned(driver)
        assert caught.value.reason == "timeout"
        assert 0.14 < time.monotonic() - began_s < 0.4, "the first silence ends the scan"


LIES: dict[str, tuple[Callable[[int, int, bytes], bytes], str]] = {
    "wrong unit": (lambda tid, unit, pdu: frame(tid, unit + 1, b"\x03\x04\0\0\0\x07"), "wrong-unit"),
    "wrong function": (lambda tid, unit, pdu: frame(tid, unit, b"\x04\x04\0\0\0\x07"), "wrong-function"),
    "exception of another function": (lambda tid, unit, pdu: frame(tid, unit, b"\x84\x02"), "wrong-function"),
    "exception with more behind": (
        lambda tid, unit, pdu: frame(tid, unit, b"\x83\x02\x02"),
        "wrong-function",
    ),
    "too short": (lambda tid, unit, pdu: frame(tid, unit, b"\x03\x02\0\x07"), "wrong-length"),
    "too long": (lambda tid, unit, pdu: frame(tid, unit, b"\x03\x06\0\0\0\x07\0\0"), "wrong-length"),
    "a count that lies": (lambda tid, unit, pdu: frame(tid, unit, b"\x03\x06\0\0\0\x07"), "wrong-length"),
    "no count": (lambda tid, unit, pdu: frame(tid, unit, b"\x03\x04"), "wrong-length"),
    "wrong transaction": (lambda tid, unit, pdu: frame(tid + 1, unit, b"\x03\x04\0\0\0\x07"), "timeout"),
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_what_does_not_answer_the_question_is_not_an_answer(lie: str) -> None:
    tell, reason = LIES[lie]

    async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
        return tell(tid, unit, pdu)

    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", timeout="100ms")) as (driver,):
        made.behave[1] = answer
        with pytest.raises((BadAnswer, NoAnswer)) as caught:
            await scanned(driver)
        assert caught.value.reason == reason
        made.behave.clear()
        assert (await scanned(driver)).values == {"n": 1}
        assert made.connections == 1, "the frames were whole: the connection is good"


@pytest.mark.parametrize(
    "noise",
    [
        b"\xff" * 40,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">HHH", 1, 0, 2) + b"\1\3",
        struct.pack(">HHH", 1, 0, 300) + bytes(300),
    ],
    ids=["ones", "http", "a frame without data", "a frame too long"],
)
async def test_what_is_no_modbus_ends_the_connection(noise: bytes) -> None:
    async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
        return noise

    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}")) as (driver,):
        made.behave[1] = answer
        with pytest.raises(NotConnected) as caught:
            await scanned(driver)
        assert caught.value.reason == "garbage"
        made.behave.clear()
        assert (await after_reconnecting(driver)).values == {"n": 1}
        assert made.connections > 1


async def test_an_answer_in_many_pieces_is_one_answer() -> None:
    async with field() as made:

        async def crumbs(tid: int, unit: int, pdu: bytes) -> None:
            (writer,) = made._writers
            for byte in await made.well(tid, unit, pdu):
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.001)

        made.behave[1] = crumbs
        async with drivers(config(f"tcp://127.0.0.1:{made.port}", timeout="2s")) as (driver,):
            assert (await scanned(driver)).values == {"n": 1}
        assert made.connections == 1


async def test_two_answers_in_one_piece_are_two_answers() -> None:
    """The late answer of a request given up and the next one's come together."""
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", timeout="100ms")) as (driver,):
        given_up: list[bytes] = []

        async def keep(tid: int, unit: int, pdu: bytes) -> None:
            given_up.append(frame(tid, unit, b"\x03\x04\xde\xad\xbe\xef"))

        async def both(tid: int, unit: int, pdu: bytes) -> bytes:
            return given_up[0] + await made.well(tid, unit, pdu)

        made.behave[1] = keep
        with pytest.raises(NoAnswer):
            await scanned(driver)
        made.behave[1] = both
        assert (await scanned(driver)).values == {"n": 1}


async def test_a_scan_that_is_cancelled_leaves_nothing_behind() -> None:
    """At any moment of a scan: while connecting, waiting for its turn, for an answer, or leaving a spoilt way."""
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        before = asyncio.all_tasks()
        for steps in range(40):
            made.behave[1] = made.slow(0.003)
            async with drivers(config(url, FAR, unit=1), config(url, FAR, unit=2)) as (one, two):
                scans = [asyncio.create_task(driver.scan()) for driver in (one, two)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                for scan in scans:
                    scan.cancel()
                await asyncio.wait(scans)
                assert all(scan.cancelled() for scan in scans)
                wire = two._session.connection._wire  # type: ignore[union-attr]
                if wire is not None:
                    assert wire._asked is None
                    assert not wire._busy
                made.behave.clear()
                assert len((await scanned(two)).values) == 5
                assert len((await scanned(one)).values) == 5
            assert asyncio.all_tasks() == before | {
                task for task in asyncio.all_tasks() if "Field" in repr(task.get_coro())
            }


async def test_leaving_a_spoilt_connection_can_be_cancelled() -> None:
    """The cancellation may not be lost while the old session ends."""
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}")) as (driver,):
        await scanned(driver)
        moving = asyncio.create_task(driver._join(own=True))
        await asyncio.sleep(0)
        moving.cancel()
        await asyncio.wait([moving])
        assert moving.cancelled()


async def test_a_connection_that_fails_in_an_unforeseen_way_is_heard_of() -> None:
    """A bug crashes the scan, to be restarted and logged; it does not leave it waiting for ever."""

    class Broken:
        connected = False
        tries = 0

        async def connect(self, timeout_s: float) -> None:
            Broken.tries += 1
            raise ZeroDivisionError("a bug")

        async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
            raise AssertionError

        def close(self) -> None: ...

    sessions: Sessions[Transport] = Sessions(lambda url: Broken())
    made = config("tcp://127.0.0.1:9")
    async with asyncio.timeout(5), ModbusDriver("waits", made, sessions) as waits:
        for tries in (1, 2, 3):
            async with ModbusDriver("d", made, sessions) as driver:
                with pytest.raises(ZeroDivisionError, match="a bug"):
                    await driver.scan()
            assert Broken.tries == tries, "a driver that starts again begins with a new session"
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await waits.scan()


async def test_transaction_ids_wrap() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", timeout="5s")) as (driver,):
        await scanned(driver)
        wire = driver._session.connection._wire  # type: ignore[union-attr]
        tids: list[int] = []

        async def note(tid: int, unit: int, pdu: bytes) -> bytes:
            tids.append(tid)
            return await made.well(tid, unit, pdu)

        made.behave[1] = note
        wire._tid = 0xFFFE
        for _ in range(3):
            await scanned(driver)
        assert tids == [0xFFFF, 1, 2]


class Watch:
    """A field's answers, each after a moment, and how many requests of its units were open at once."""

    def __init__(self, made: Field, delay_s: float) -> None:
        self.most = self.open = 0
        self._made, self._delay_s = made, delay_s

    async def answer(self, tid: int, unit: int, pdu: bytes) -> bytes:
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(self._delay_s)
        self.open -= 1
        return await self._made.well(tid, unit, pdu)


async def test_healthy_units_take_turns_one_request_at_a_time() -> None:
    units = range(1, 7)
    async with field() as made:
        watch = Watch(made, 0.002)
        made.behave.update(dict.fromkeys(units, watch.answer))
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(*(config(url, FAR, unit=unit) for unit in units)) as all_six:
            for _ in range(3):
                await asyncio.gather(*(scanned(driver) for driver in all_six))
        assert made.connections == 1
    assert watch.most == 1


async def test_a_unit_with_many_reads_lets_the_others_in_between() -> None:
    """Turns go round: who waits is asked next, not when the unit before it has read all its blocks."""
    async with field() as made:
        watch = Watch(made, 0.002)
        made.behave.update(dict.fromkeys((1, 2, 3), watch.answer))
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(*(config(url, FAR, unit=unit) for unit in (1, 2, 3))) as three:
            await asyncio.gather(*(scanned(driver) for driver in three))
            made.requests.clear()
            await asyncio.gather(*(scanned(driver) for driver in three))
        assert [unit for unit, _ in made.requests] == [1, 2, 3] * 5
    assert watch.most == 1


async def test_who_leaves_the_queue_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next in line is cancelled in the very moment that it is handed the turn."""
    async with field() as made:
        made.behave[1] = made.slow(0.05)
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(*(config(url, unit=unit) for unit in (1, 2, 3))) as (one, two, three):
            await scanned(one)
            wire = one._session.connection._wire  # type: ignore[union-attr]
            first, second, third = (asyncio.create_task(scanned(driver)) for driver in (one, two, three))
            await until(lambda: len(wire._queue) == 2, "two to wait")
            pass_on = wire._pass_on
            monkeypatch.setattr(wire, "_pass_on", lambda: (pass_on(), second.cancel()))
            async with asyncio.timeout(10):
                await asyncio.wait([first, second, third])
        assert second.cancelled()
        assert first.result().values["n"] == 2
        assert third.result().values["n"] == 1


async def test_a_turn_lasts_until_the_answer_or_the_time_out() -> None:
    """A silent unit is waited for; its neighbours are asked as soon as its time-out is over."""
    async with field() as made:
        made.behave[9] = made.silent
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url, unit=9, timeout="400ms"), config(url, unit=1)) as (mute, well):
            asking = asyncio.create_task(scanned(mute))
            await until(lambda: made.asked[9], "the silent unit to be asked")
            assert (await scanned(well)).values == {"n": 1}
            assert made.asked[1][0] - made.asked[9][0] >= 0.39
            await asyncio.wait([asking])
            assert isinstance(asking.exception(), NoAnswer)
        assert made.connections == 1


async def test_a_failing_unit_is_left_alone_for_the_sake_of_its_neighbours() -> None:
    """Asked all the time, it occupies the connection once in a while only; a write is sent nevertheless."""
    async with field() as made:
        made.behave[9] = made.silent
        url = f"tcp://127.0.0.1:{made.port}"
        tags = {"n": {"address": "holding:0", "type": "uint16", "writable": True}}
        async with drivers(config(url, tags, unit=9), config(url, unit=1)) as (mute, well):
            await scanned(well)
            refused = 0
            while len(made.asked[1]) < 50:
                with pytest.raises(NoAnswer) as caught:
                    await scanned(mute)
                assert caught.value.reason == "timeout"
                refused += "not asked for another" in str(caught.value)
                await scanned(well)
            first, *later = made.asked[9]
            assert len(later) == 50 - 1 - refused - 1
            assert refused > 40
            assert all(at - first > 0.8 for at in later), "the first pause is four time-outs"
            asked = len(made.asked[9])
            with pytest.raises(Unconfirmed):
                await mute.write("n", 1)
            assert len(made.asked[9]) == asked + 1
        assert made.connections == 1


async def test_a_device_that_shares_its_connection_with_nobody_is_asked_again_at_once() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", timeout="50ms")) as (driver,):
        await scanned(driver)
        made.behave[1] = made.silent
        for _ in range(2):
            with pytest.raises(NoAnswer, match="no answer in"):
                await scanned(driver)
        made.behave.clear()
        assert (await scanned(driver)).values == {"n": 2}


async def test_units_of_which_none_answers_are_asked_again_at_once() -> None:
    """A bus that was interrupted: nobody is delayed by asking, and all are found when it is mended."""
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        made.behave.update({1: made.exception(11), 2: made.exception(11)})
        async with drivers(config(url, unit=1), config(url, unit=2)) as both:
            for n in (1, 2, 3):
                for driver in both:
                    with pytest.raises(NoAnswer):
                        await scanned(driver)
                assert [len(made.asked[unit]) for unit in (1, 2)] == [n, n]


async def test_a_unit_that_answers_again_takes_turns_again() -> None:
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url, unit=1), config(url, unit=2)) as (one, two):
            made.behave[1] = made.silent
            with pytest.raises(NoAnswer):
                await scanned(one)
            made.behave.clear()
            await scanned(one)
            watch = Watch(made, 0.002)
            made.behave.update(dict.fromkeys((1, 2), watch.answer))
            for _ in range(3):
                await asyncio.gather(scanned(one), scanned(two))
        assert watch.most == 1


async def test_a_connection_on_which_nothing_comes_any_more_is_made_anew() -> None:
    """A half-open connection, or a gateway that forgot it: writes go out, nothing comes back, no error tells."""
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url, unit=1, timeout="50ms"), config(url, unit=2, timeout="50ms")) as (
            one,
            two,
        ):
            await scanned(one)
            stuck = set(made._writers)

            async def only_new(tid: int, unit: int, pdu: bytes) -> bytes | None:
                return await made.well(tid, unit, pdu) if made.connections > 1 else None

            made.behave.update({1: only_new, 2: only_new})
            assert stuck
            for driver in (one, two):
                await after_reconnecting(driver)
        assert made.connections == 2


async def test_a_silent_unit_beside_a_healthy_one_does_not_cost_the_connection() -> None:
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        made.behave[2] = made.silent
        async with drivers(config(url, unit=1), config(url, unit=2, timeout="20ms")) as (one, mute):
            for _ in range(8):
                with pytest.raises(NoAnswer):
                    await mute._ask(await mute._ready(), mute._reads[0])
                await scanned(one)
        assert len(made.asked[2]) == 8
        assert made.connections == 1


async def test_whoever_spoils_a_shared_connection_gets_one_of_its_own() -> None:
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url, unit=1), config(url, unit=2)) as (well, mean):
            await scanned(well)

            async def noise(tid: int, unit: int, pdu: bytes) -> bytes:
                return b"\xff" * 30

            made.behave[2] = noise
            with pytest.raises(NotConnected):
                await scanned(mean)
            assert (await scanned(well)).values
            assert mean._alone
            assert not well._alone
            kept = well._session.connection._wire  # type: ignore[union-attr]
            for _ in range(2):
                with pytest.raises(NotConnected):
                    await scanned(mean)
                await scanned(well)
            assert kept is well._session.connection._wire, "the others keep theirs"  # type: ignore[union-attr]


async def test_a_device_refuses_politely_and_the_error_names_it() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", PARTLY)) as (driver,):
        made.behave[1] = await exception_or_well(made, 2)
        (found,) = await driver.read()
        assert found.quality == {"odd": "bad:illegal-address"}
    assert issubclass(Refused, DeviceError)
