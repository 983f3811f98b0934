"""Writing of Modbus tags: bytes as data-only cases, and what goes over the wire to real servers and mean ones."""

import asyncio
import math
import socket
import struct
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from field import Answer, Field, field, frame
from gateway_rig import until
from hypothesis import given, settings
from hypothesis import strategies as st
from pymodbus.framer import FramerType
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice
from rig import free_port
from test_modbus_decode import FORMATS, ORDERS, decode, encode, named, tag_of
from test_modbus_driver import Watch, after_reconnecting, config, drivers, scanned
from test_modbus_transports import Line, lines, on, rtu

from edgegw.config.schema import ModbusTag
from edgegw.drivers.modbus import writing
from edgegw.drivers.modbus.driver import ModbusDriver
from edgegw.drivers.modbus.plan import Block, Placed
from edgegw.drivers.modbus.registers import compile_block
from edgegw.drivers.modbus.transport import Transport, open_transport
from edgegw.drivers.session import Sessions
from edgegw.errors import DeviceError, NoAnswer, NotConnected, Refused, Unconfirmed

__all__ = ["lines"]

CASES = tomllib.loads((Path(__file__).parent / "cases" / "modbus_encode.toml").read_text())

# ---- what a value comes to


def read(tag: ModbusTag, data: bytes) -> Any:
    """Return the value of a tag whose registers hold these bytes."""
    block = Block(tag.address.table, tag.address.start, tag.registers, (Placed("tag", tag, 0),))
    (value,), bad = compile_block(block)(data)
    assert not bad
    return value


def held(case: dict[str, Any]) -> bytes:
    return bytes.fromhex(case.get("held", "0000"))


@pytest.mark.parametrize("case", named(CASES["case"]))
def test_a_value_comes_to_its_bytes(case: dict[str, Any]) -> None:
    assert writing.encode(tag_of(case["tag"]), case["value"], held(case)).hex() == case["bytes"].replace(
        " ", ""
    )


@pytest.mark.parametrize("case", named(CASES["refused"]))
def test_a_value_that_a_tag_cannot_hold_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"found .*; expected ") as caught:
        writing.write_request(tag_of(case["tag"]), case["value"])
    assert caught.value.reason == case["reason"]


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        writing.encode(tag_of({"type": "string:4"}), "a\ud800")
    assert caught.value.reason == "not-text"


@pytest.mark.parametrize("case", named(CASES["request"]))
def test_a_write_is_one_request(case: dict[str, Any]) -> None:
    made = writing.write_request(tag_of(case["tag"]), case["value"], held(case))
    assert made.hex() == case["bytes"].replace(" ", "")


orders = st.sampled_from(list(ORDERS[2]))


@st.composite
def raws(draw: st.DrawFn, bits: int = 64) -> tuple[str, float]:
    """A type, and a raw value that it holds, of so many bits at most if it is an integer."""
    kind = draw(st.sampled_from(list(FORMATS)))
    width = int(kind.lstrip("uintfloa"))
    if kind.startswith("float"):
        return kind, draw(
            st.floats(width=width, allow_nan=False, allow_infinity=False)
        ) + 0.0  # minus zero is read as zero
    size = min(width, bits)
    least = 0 if kind.startswith("u") else -(2 ** (size - 1))
    return kind, draw(st.integers(least, least + 2**size - 1))


@settings(max_examples=300, deadline=None)
@given(raw=raws(), order=orders)
def test_what_is_read_is_written_back_as_the_same_bytes(raw: tuple[str, float], order: str) -> None:
    kind, value = raw
    data = encode(kind, order, value)
    tag = tag_of({"type": kind, "order": order})
    assert writing.encode(tag, read(tag, data)) == data


SCALES = st.sampled_from([1.0, 0.1, 0.001, 0.01, 1e-6, 10.0, 1000.0, -0.1, -1.0, 3.0, 1 / 3])
OFFSETS = st.sampled_from([0.0, -40.0, 273.15, 1e4])


@settings(max_examples=400, deadline=None)
@given(raw=raws(bits=32), order=orders, scale=SCALES, offset=OFFSETS)
def test_scale_and_offset_are_undone(raw: tuple[str, float], order: str, scale: float, offset: float) -> None:
    kind, value = raw
    if kind.startswith("float"):
        offset = 0.0  # an offset swallows the digits of what is much smaller
    tag = tag_of({"type": kind, "order": order, "scale": scale, "offset": offset})
    seen = value * scale + offset
    if not math.isfinite(seen):
        return
    back = decode(kind, order, writing.encode(tag, seen))
    if kind == "float64":
        assert back == pytest.approx(value, rel=1e-15, abs=1e-300)
    else:
        assert back == value


@settings(max_examples=200, deadline=None)
@given(value=st.floats(-3e3, 3e3), order=orders, scale=SCALES.filter(lambda s: abs(s) >= 0.1))
def test_an_integer_is_the_nearest_that_there_is(value: float, order: str, scale: float) -> None:
    tag = tag_of({"type": "int16", "order": order, "scale": scale})
    assert abs(read(tag, writing.encode(tag, value)) - value) <= abs(scale) / 2 * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(word=st.binary(min_size=2, max_size=2), bit=st.integers(0, 15), on=st.booleans(), order=orders)
def test_a_bit_changes_no_other(word: bytes, bit: int, on: bool, order: str) -> None:
    bits = [tag_of({"address": f"holding:0.{b}", "type": "bool", "order": order}) for b in range(16)]
    before = [read(tag, word) for tag in bits]
    written = writing.encode(bits[bit], on, word)
    assert [read(tag, written) for tag in bits] == [*before[:bit], on, *before[bit + 1 :]]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20), spare=st.integers(0, 5), order=orders)
def test_text_is_read_as_it_was_written_or_refused(text: str, spare: int, order: str) -> None:
    size = max(1, len(text.encode()) + spare)
    tag = tag_of({"type": f"string:{size}", "order": order})
    if "\0" in text or text.endswith(" "):
        with pytest.raises(Refused):
            writing.encode(tag, text)
    else:
        assert read(tag, writing.encode(tag, text)) == text


# ---- against real servers

TAGS: dict[str, dict[str, Any]] = {
    "coil": {"address": "coil:3", "type": "bool"},
    "bit": {"address": "holding:1.4", "type": "bool"},
    "word": {"address": "holding:2", "type": "int16", "scale": 0.1},
    "power": {"address": "holding:4", "type": "float32", "order": "CDAB"},
    "energy": {"address": "holding:6", "type": "int64"},
    "name": {"address": "holding:10", "type": "string:5"},
}
WRITES: list[tuple[str, Any, str]] = [
    ("coil", True, "05 0003 ff00"),
    ("bit", True, "06 0001 8011"),
    ("word", -12.3, "06 0002 ff85"),
    ("power", -12.375, "10 0004 0002 04 0000 c146"),
    ("energy", -2, "10 0006 0004 08 ffff ffff ffff fffe"),
    ("name", "abc", "10 000a 0003 06 6162 6300 0000"),
    ("coil", False, "05 0003 0000"),
    ("bit", False, "06 0001 8001"),
]


def image() -> SimDevice:
    """Return a device with coils off, and registers that hold 0x8001."""
    bits = [SimData(0, values=[False] * 16, datatype=DataType.BITS)]
    words = [SimData(0, values=[0] * 20, datatype=DataType.REGISTERS)]
    registers = [SimData(0, values=[0x8001] * 20, datatype=DataType.REGISTERS)]
    return SimDevice(1, (bits, bits, registers, words))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("scheme", ["tcp", "rtu+tcp"])
def test_every_kind_of_tag_is_written_to_a_real_server(scheme: str, run: Callable[[Any], Any]) -> None:
    async def story() -> None:
        port = free_port()
        framer = FramerType.SOCKET if scheme == "tcp" else FramerType.RTU
        sent: list[str] = []

        def saw(sending: bool, pdu: Any) -> Any:
            if not sending and pdu.function_code > 4:
                sent.append((bytes((pdu.function_code,)) + pdu.encode()).hex())
            return pdu

        server = ModbusTcpServer(image(), address=("127.0.0.1", port), framer=framer, trace_pdu=saw)
        await server.serve_forever(background=True)
        async with drivers(config(f"{scheme}://127.0.0.1:{port}", TAGS, timeout="2s")) as (driver,):
            for tag, value, _ in WRITES:
                assert await driver.write(tag, value) == value
                assert (await scanned(driver)).values[tag] == value
        await server.shutdown()
        assert sent == [request.replace(" ", "") for _, _, request in WRITES]

    run(story())


async def test_what_a_real_server_refuses_was_not_written() -> None:
    port = free_port()
    tags = {
        "there": {"address": "holding:1", "type": "int16"},
        "hole": {"address": "holding:50", "type": "int16"},
    }
    server = ModbusTcpServer(image(), address=("127.0.0.1", port))
    await server.serve_forever(background=True)
    async with drivers(config(f"tcp://127.0.0.1:{port}", tags, timeout="2s")) as (driver,):
        with pytest.raises(Refused, match=r"device\.d0 \(tcp:.* unit 1\): hole: exception 2") as caught:
            await driver.write("hole", 5)
        assert caught.value.reason == "illegal-address"
        assert await driver.write("there", 5) == 5
    await server.shutdown()


# ---- against a mean one


class Device:
    """A unit of a field that holds coils and registers, and does as it is told with the writes that it gets."""

    def __init__(self, made: Field, unit: int = 1) -> None:
        self.field = made
        self.unit = unit
        self.coils = [False] * 16
        self.registers = bytearray(200)
        self.on_write: Answer | None = None
        self.on_read: Answer | None = None
        made.behave[unit] = self.answer

    @property
    def writes(self) -> list[bytes]:
        """The write requests that came over the wire, on whatever connection."""
        return [
            pdu for unit, pdu in self.field.requests if unit == self.unit and pdu[0] in (5, 6, 15, 16, 22)
        ]

    @property
    def reads(self) -> int:
        return sum(unit == self.unit and pdu[0] <= 4 for unit, pdu in self.field.requests)

    async def answer(self, tid: int, unit: int, pdu: bytes) -> bytes | None:
        told = self.on_read if pdu[0] <= 4 else self.on_write
        return await (told or self.well)(tid, unit, pdu)

    async def well(self, tid: int, unit: int, pdu: bytes) -> bytes:
        function, start, count = struct.unpack(">BHH", pdu[:5])
        if function == 1:
            bits = sum(on << i for i, on in enumerate(self.coils[start : start + count]))
            data = bits.to_bytes((count + 7) // 8, "little")
            return frame(tid, unit, bytes((1, len(data))) + data)
        if function == 3:
            data = bytes(self.registers[start * 2 : (start + count) * 2])
            return frame(tid, unit, bytes((3, len(data))) + data)
        if function == 5:
            self.coils[start] = pdu[3] == 0xFF
        else:
            data = pdu[3:] if function == 6 else pdu[6:]
            self.registers[start * 2 : start * 2 + len(data)] = data
        return frame(tid, unit, pdu[:5])

    async def close(self, tid: int, unit: int, pdu: bytes) -> None:
        self.field.drop_connections()


SETPOINT = {
    "kw": {"address": "holding:10", "type": "float32"},
    "mode": {"address": "holding:12", "type": "uint16"},
}
ON = {f"b{i}": {"address": f"holding:3.{i}", "type": "bool"} for i in range(8)}


@asynccontextmanager
async def one(tags: Any = SETPOINT, **keys: Any) -> AsyncIterator[tuple[Device, ModbusDriver]]:
    """A device, and the driver that is connected to it."""
    async with field() as made:
        device = Device(made)
        async with drivers(config(f"tcp://127.0.0.1:{made.port}", tags, **keys)) as (driver,):
            yield device, driver


async def unconfirmed(driver: ModbusDriver, tag: str = "kw", value: Any = 12.5) -> Unconfirmed:
    with pytest.raises(Unconfirmed) as caught:
        await driver.write(tag, value)
    assert str(caught.value).startswith("device.d0 (tcp://127.0.0.1:")
    assert f": {tag}: " in str(caught.value)
    return caught.value


async def test_a_write_goes_out_once_and_is_read_back() -> None:
    async with one() as (device, driver):
        assert await driver.write("kw", 12.5) == 12.5
        assert device.registers[20:24] == struct.pack(">f", 12.5)
        assert [pdu[0] for _, pdu in device.field.requests] == [16, 3]
        assert await driver.write("mode", 7) == 7
        assert [pdu[0] for _, pdu in device.field.requests] == [16, 3, 6, 3]
        assert device.field.connections == 1


async def test_p6_a_write_without_an_answer_is_one_frame_for_ever() -> None:
    async with one() as (device, driver):
        device.on_write = device.field.silent
        assert (await unconfirmed(driver)).reason == "timeout"
        assert device.reads == 0, "what is not answered is not read back"
        device.on_write = None
        for _ in range(3):
            await scanned(driver)
        device.field.drop_connections()
        await after_reconnecting(driver)
        assert len(device.writes) == 1


async def test_p6_a_write_that_is_answered_too_late_is_one_frame_for_ever() -> None:
    async with one(timeout="60ms") as (device, driver):
        answered = asyncio.Event()
        go = asyncio.Event()

        async def late(tid: int, unit: int, pdu: bytes) -> bytes:
            await go.wait()
            answered.set()
            return await device.well(tid, unit, pdu)

        device.on_write = late
        assert (await unconfirmed(driver)).reason == "timeout"
        go.set()
        await answered.wait()
        device.on_write = None
        assert (await scanned(driver)).values["kw"] == 12.5, "it took effect after all, and shows in the scan"
        assert len(device.writes) == 1
        assert await driver.write("kw", 1.0) == 1.0, "the late answer is not taken for the next one's"


async def test_p6_a_write_on_which_the_connection_breaks_is_one_frame_for_ever() -> None:
    async with one() as (device, driver):
        await scanned(driver)
        device.on_write = device.close
        assert (await unconfirmed(driver)).reason == "connection-lost"
        await after_reconnecting(driver)
        await scanned(driver)
        assert device.field.connections == 2
        assert len(device.writes) == 1


async def test_p6_a_write_answered_with_noise_is_one_frame_for_ever() -> None:
    async def noise(tid: int, unit: int, pdu: bytes) -> bytes:
        return b"\xff" * 30

    async with one() as (device, driver):
        device.on_write = noise
        assert (await unconfirmed(driver)).reason == "garbage"
        await after_reconnecting(driver)
        assert len(device.writes) == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "illegal-function"),
        (2, "illegal-address"),
        (3, "illegal-value"),
        (4, "device-failure"),
        (6, "busy"),
        (8, "memory-parity"),
        (10, "gateway-path-unavailable"),
        (99, "exception-99"),
    ],
)
async def test_a_refused_write_is_not_repeated_and_not_read_back(code: int, reason: str) -> None:
    async with one() as (device, driver):
        device.on_write = device.field.exception(code)
        with pytest.raises(Refused) as caught:
            await driver.write("kw", 12.5)
        assert caught.value.reason == reason
        assert [pdu[0] for _, pdu in device.field.requests] == [16]
        assert device.field.connections == 1


async def test_an_acknowledged_write_is_not_repeated_and_read_back() -> None:
    async with one() as (device, driver):
        device.on_write = device.field.exception(5)
        assert await driver.write("kw", 12.5) == 0.0, "what it holds by now"
        assert [pdu[0] for _, pdu in device.field.requests] == [16, 3]


async def test_a_unit_that_was_silent_to_its_gateway_may_have_been_written() -> None:
    async with one() as (device, driver):
        device.on_write = device.field.exception(11)
        assert (await unconfirmed(driver)).reason == "gateway-target-silent"
        assert len(device.writes) == 1


ECHOES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "another value": ("mode", lambda pdu: pdu[:3] + b"\0\x09", "wrong-echo"),
    "another register": ("mode", lambda pdu: b"\x06\0\x0d" + pdu[3:], "wrong-echo"),
    "another function": ("mode", lambda pdu: b"\x10" + pdu[1:], "wrong-function"),
    "another function's exception": ("mode", lambda pdu: b"\x90\x02", "wrong-function"),
    "too short": ("mode", lambda pdu: pdu[:4], "wrong-echo"),
    "too long": ("mode", lambda pdu: pdu + b"\0", "wrong-echo"),
    "another count": ("kw", lambda pdu: pdu[:3] + b"\0\x01", "wrong-echo"),
    "another start": ("kw", lambda pdu: b"\x10\0\x0b" + pdu[3:5], "wrong-echo"),
    "the whole request": ("kw", lambda pdu: pdu, "wrong-echo"),
    "another state": ("coil", lambda pdu: pdu[:3] + b"\0\0", "wrong-echo"),
}


@pytest.mark.parametrize("echo", list(ECHOES))
async def test_a_wrong_echo_confirms_nothing(echo: str) -> None:
    tag, lie, reason = ECHOES[echo]
    value = {"mode": 7, "kw": 12.5, "coil": True}[tag]

    async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
        return frame(tid, unit, lie(pdu))

    async with one(SETPOINT | {"coil": TAGS["coil"]}) as (device, driver):
        device.on_write = answer
        assert (await unconfirmed(driver, tag, value)).reason == reason
        assert len(device.writes) == 1
        device.on_write = None
        assert await driver.write(tag, value) == value


async def test_an_echo_of_another_unit_confirms_nothing() -> None:
    async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
        return frame(tid, unit + 1, pdu[:5])

    async with one() as (device, driver):
        device.on_write = answer
        assert (await unconfirmed(driver)).reason == "wrong-unit"
        assert len(device.writes) == 1


async def test_what_is_read_back_is_returned_as_it_is() -> None:
    async with one() as (device, driver):

        async def clamp(tid: int, unit: int, pdu: bytes) -> bytes:
            device.registers[20:24] = struct.pack(">f", 10.0)
            return frame(tid, unit, pdu[:5])

        device.on_write = clamp
        assert await driver.write("kw", 12.5) == 10.0
        assert len(device.writes) == 1


@pytest.mark.parametrize(
    ("told", "word"),
    [
        (lambda device: device.field.silent, "no answer in 0.2 s"),
        (lambda device: device.field.exception(6), "exception 6"),
        (lambda device: device.field.exception(2), "exception 2"),
        (lambda device: device.close, "closed the connection"),
    ],
)
async def test_a_write_that_cannot_be_read_back_is_not_confirmed(
    told: Callable[[Device], Answer], word: str
) -> None:
    async with one() as (device, driver):
        device.on_read = told(device)
        error = await unconfirmed(driver)
        assert error.reason == "read-back"
        assert word in str(error)
        assert len(device.writes) == 1


async def test_a_value_that_reads_back_as_none_is_not_confirmed() -> None:
    async with one() as (device, driver):

        async def spoil(tid: int, unit: int, pdu: bytes) -> bytes:
            device.registers[20:24] = b"\x7f\xc0\0\0"
            return frame(tid, unit, pdu[:5])

        device.on_write = spoil
        error = await unconfirmed(driver)
        assert error.reason == "read-back"
        assert "bad:not-a-number" in str(error)


async def test_reading_back_is_tried_again_on_a_new_connection_and_the_write_is_not() -> None:
    async with one() as (device, driver):

        async def close_once(tid: int, unit: int, pdu: bytes) -> None:
            device.on_read = None
            device.field.drop_connections()

        device.on_read = close_once
        assert await driver.write("kw", 12.5) == 12.5
        assert device.field.connections == 2
        assert [pdu[0] for _, pdu in device.field.requests] == [16, 3, 3]


async def test_without_a_connection_nothing_goes_out() -> None:
    port = free_port()
    async with drivers(config(f"tcp://127.0.0.1:{port}", SETPOINT)) as (driver,):
        with pytest.raises(NotConnected) as caught:
            await driver.write("kw", 12.5)
        assert caught.value.reason == "refused"
        async with field(port) as made:
            device = Device(made)
            await after_reconnecting(driver)
            assert device.writes == []


async def test_a_write_whose_turn_comes_on_a_dead_connection_does_not_go_out() -> None:
    async with field() as made:
        device = Device(made, 2)
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url, timeout="5s"), config(url, SETPOINT, unit=2, timeout="5s")) as (
            slow,
            driver,
        ):
            made.behave[1] = made.silent
            reading = asyncio.create_task(scanned(slow))
            await until(lambda: made.requests, "the neighbour to ask")
            wire = driver._session.connection._wire  # type: ignore[union-attr]
            write = asyncio.create_task(driver.write("kw", 12.5))
            await until(lambda: wire._queue, "the write to wait for its turn")
            made.behave[1] = made.well
            made.drop_connections()
            await asyncio.wait([write])
            assert isinstance(write.exception(), NotConnected)
            assert not isinstance(write.exception(), Unconfirmed)
            await reading
            await after_reconnecting(driver)
        assert device.writes == []


async def test_a_driver_that_is_not_entered_writes_nothing() -> None:
    async with field() as made:
        device = Device(made)
        sessions: Sessions[Transport] = Sessions(open_transport)
        driver = ModbusDriver("d0", config(f"tcp://127.0.0.1:{made.port}", SETPOINT), sessions)
        with pytest.raises(NotConnected):
            await driver.write("kw", 1.0)
        async with driver:
            assert await driver.write("kw", 2.0) == 2.0
        async with asyncio.timeout(5):
            with pytest.raises(NotConnected):
                await driver.write("kw", 3.0)
        assert len(device.writes) == 1


async def test_a_write_while_the_driver_changes_connections_is_told_so() -> None:
    async with one() as (device, driver):
        await scanned(driver)
        moving = asyncio.create_task(driver._join(own=True))
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            with pytest.raises(NotConnected):
                await driver.write("kw", 1.0)
        await moving
        assert await driver.write("kw", 2.0) == 2.0
        assert len(device.writes) == 1


async def test_what_a_tag_cannot_hold_is_refused_before_anything_is_sent() -> None:
    async with one(SETPOINT | ON) as (device, driver):
        for tag, value in (("mode", 65_536), ("mode", -1), ("kw", math.nan), ("kw", "12"), ("b0", 1)):
            with pytest.raises(Refused):
                await driver.write(tag, value)
        with pytest.raises(KeyError):
            await driver.write("unheard_of", 1)
        assert device.field.requests == []


async def test_writes_take_their_turn_among_the_reads() -> None:
    async with field() as made:
        devices = [Device(made, unit) for unit in (1, 2, 3)]
        watch = Watch(made, 0.002)

        def watched(device: Device) -> Answer:
            async def answer(tid: int, unit: int, pdu: bytes) -> bytes | None:
                await watch.answer(tid, unit, b"\3\0\0\0\1")
                return await device.answer(tid, unit, pdu)

            return answer

        for device in devices:
            made.behave[device.unit] = watched(device)
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(*(config(url, SETPOINT, unit=unit) for unit in (1, 2, 3))) as three:
            for n in range(3):
                writes = [driver.write("kw", float(n)) for driver in three]
                got = await asyncio.gather(*writes, *(scanned(driver) for driver in three))
                assert got[:3] == [float(n)] * 3
        assert watch.most == 1
        assert made.connections == 1
        assert [len(device.writes) for device in devices] == [3, 3, 3]


async def test_bits_of_one_register_written_together_all_stand() -> None:
    async with one(ON, timeout="2s") as (device, driver):
        device.registers[6:8] = b"\x80\x01"
        assert await asyncio.gather(*(driver.write(f"b{i}", i % 2 == 1) for i in range(8))) == [
            i % 2 == 1 for i in range(8)
        ]
        assert device.registers[6:8] == b"\x80\xaa"
        assert len(device.writes) == 8


async def test_a_bit_whose_register_cannot_be_read_is_not_written() -> None:
    async with one(ON) as (device, driver):
        device.on_read = device.field.silent
        with pytest.raises(NoAnswer):
            await driver.write("b1", True)
        assert device.writes == []


async def test_a_write_that_is_cancelled_leaves_nothing_behind_and_is_not_sent_again() -> None:
    """At any moment: while connecting, waiting for its turn, for the answer or for the read-back."""
    async with field() as made:
        device = Device(made)
        url = f"tcp://127.0.0.1:{made.port}"
        for steps in range(25):
            made.requests.clear()
            async with drivers(config(url, SETPOINT), config(url, SETPOINT)) as (driver, neighbour):
                write = asyncio.create_task(driver.write("kw", 12.5))
                scan = asyncio.create_task(scanned(neighbour))
                for _ in range(steps):
                    await asyncio.sleep(0)
                write.cancel()
                await asyncio.wait([write, scan])
                assert write.cancelled() or write.result() == 12.5
                assert scan.result().values.keys() == SETPOINT.keys()
                assert len(device.writes) <= 1
                assert await driver.write("mode", steps) == steps
                assert len(device.writes) <= 2
                assert driver._session.connection._wire._asked is None  # type: ignore[union-attr]


async def everything(far: socket.socket) -> bytes:
    """Take what comes until the connection ends, which must be by a reset."""
    taken = b""
    async with asyncio.timeout(5):
        try:
            while data := await asyncio.get_running_loop().sock_recv(far, 1 << 16):
                taken += data
        except ConnectionResetError:
            return taken
    raise AssertionError("ended in peace")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("stuffing", [400_000, 8_000_000], ids=["in the kernel", "in the event loop"])
def test_p6_a_write_that_was_given_up_does_not_arrive_later(stuffing: int, run: Callable[[Any], Any]) -> None:
    """The far end takes nothing for a while, so that the write waits on our side; then it takes all there is."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.setblocking(False)
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            async with drivers(config(url, SETPOINT)) as (driver,):
                await driver._session.ready()  # type: ignore[union-attr]
                far, _ = await loop.sock_accept(listener)
                way = driver._session.connection._wire._transport  # type: ignore[union-attr]
                way.write(b"\xa5" * stuffing)
                assert bool(way.get_write_buffer_size()) == (stuffing > 400_000)
                assert (await unconfirmed(driver, "mode", 0x1234)).reason == "timeout"
                await driver._session.ready()  # type: ignore[union-attr]  # the old one is closed by now
                with far:
                    assert b"\x06\0\x0c\x12\x34" not in await everything(far)

    run(story())


# ---- lines, where no transaction id tells answers apart

WORD = {"n": {"address": "holding:0", "type": "uint16"}}


async def well(line: Line, unit: int, pdu: bytes) -> bytes:
    """Answer as a device that echoes its writes and whose register holds 7."""
    return rtu(unit, pdu if pdu[0] in (5, 6) else b"\3\2\0\7")


async def test_a_write_on_a_line_goes_out_once_and_is_read_back(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    async with lines(tmp_path) as line:
        asked: list[bytes] = []

        async def answer(unit: int, pdu: bytes) -> bytes:
            asked.append(pdu)
            return await well(line, unit, pdu)

        line.behave[1] = answer
        async with drivers(on(line, WORD, timeout="2s")) as (driver,):
            assert await driver.write("n", 5) == 7
        assert asked == [b"\6\0\0\0\5", b"\3\0\0\0\1"]


async def test_p6_a_write_on_a_line_without_an_answer_is_one_frame_for_ever(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    async with lines(tmp_path) as line:
        asked: list[bytes] = []

        async def answer(unit: int, pdu: bytes) -> bytes | None:
            asked.append(pdu)
            return None if pdu[0] == 6 else await well(line, unit, pdu)

        line.behave[1] = answer
        async with drivers(on(line, WORD)) as (driver,):
            with pytest.raises(Unconfirmed) as caught:
                await driver.write("n", 5)
            assert caught.value.reason == "timeout"
            assert (await after_reconnecting(driver)).values == {"n": 7}
            assert [pdu[0] for pdu in asked].count(6) == 1


async def test_a_write_to_every_device_on_a_line_is_refused(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    async with lines(tmp_path) as line, drivers(on(line, WORD, unit=0)) as (driver,):
        with pytest.raises(Refused) as caught:
            await driver.write("n", 5)
        assert caught.value.reason == "broadcast"
        assert not line.asked


async def test_unit_0_behind_an_address_of_its_own_is_written() -> None:
    async with field() as made:
        device = Device(made, 0)
        async with drivers(config(f"tcp://127.0.0.1:{made.port}", SETPOINT, unit=0)) as (driver,):
            assert await driver.write("mode", 3) == 3
        assert len(device.writes) == 1


def test_not_knowing_is_neither_a_refusal_nor_a_lost_connection() -> None:
    assert issubclass(Unconfirmed, DeviceError)
    assert not issubclass(Unconfirmed, Refused | NotConnected | NoAnswer)
