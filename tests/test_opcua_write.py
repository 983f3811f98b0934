"""Writing of OPC UA nodes: types as tables, and a real server in a process of its own (see `serve`) that counts."""

import asyncio
import contextlib
import json
import math
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua
from asyncua.common.utils import ServiceError
from asyncua.server.internal_session import InternalSession
from asyncua.server.server import Server
from gateway_rig import config as gateway_config
from gateway_rig import gateway, toml, until
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Process
from test_opcua_driver import (
    DEADLINE_S,
    MODES,
    TIMEOUT_S,
    config,
    free_port,
    gone,
    sockets,
    values_once,
    working,
)
from test_opcua_driver import Field as ReadField

from edgegw.config.schema import OpcUaTag
from edgegw.control.hand import address
from edgegw.drivers.opcua import values, writing
from edgegw.drivers.opcua.driver import OpcUaDriver
from edgegw.errors import NotConnected, Refused, Unconfirmed

V = ua.VariantType


def tag(**keys: Any) -> OpcUaTag:
    return OpcUaTag(**({"address": "ns=2;s=X"} | keys))


# ---- what a value comes to

ENCODED: list[tuple[Any, ua.VariantType, dict[str, Any], Any]] = [
    (7, V.Int16, {}, 7),
    (7.0, V.Int16, {}, 7),
    (2.5, V.Int32, {}, 2),
    (3.5, V.Int32, {}, 4),
    (-0.4, V.UInt16, {}, 0),
    (127, V.SByte, {}, 127),
    (255, V.Byte, {}, 255),
    (-(2**63), V.Int64, {}, -(2**63)),
    (2**64 - 1, V.UInt64, {}, 2**64 - 1),
    (7, V.Double, {}, 7.0),
    (0.1, V.Double, {}, 0.1),
    (-0.0, V.Double, {}, -0.0),
    (7, V.Float, {}, 7.0),
    (True, V.Boolean, {}, True),
    ("", V.String, {}, ""),
    ("ein\nZähler ", V.String, {}, "ein\nZähler "),
    (12.3, V.Int16, {"scale": 0.1}, 123),
    (12.34, V.Int16, {"scale": 0.1}, 123),
    (20, V.UInt16, {"scale": 0.5, "offset": -40.0}, 120),
    (12.5, V.Double, {"scale": 0.001}, 12500.0),
    (3 * (2**53 + 1), V.Int64, {"scale": 3.0}, 2**53 + 1),
    (12.4, V.Int32, {"type": "int16"}, 12),
    (7, V.Int32, {"type": "float64"}, 7),
    (True, V.Boolean, {"type": "bool"}, True),
    ("on", V.String, {"type": "string"}, "on"),
]


@pytest.mark.parametrize(("value", "kind", "keys", "expected"), ENCODED)
def test_a_value_is_written_in_the_nodes_own_type(
    value: Any, kind: ua.VariantType, keys: dict[str, Any], expected: Any
) -> None:
    variant = writing.encode(tag(**keys), value, kind)
    assert variant.VariantType == kind
    assert repr(variant.Value) == repr(expected)
    ua.ua_binary.variant_to_binary(variant)


REFUSED: list[tuple[Any, ua.VariantType, dict[str, Any], str]] = [
    (32_768, V.Int16, {}, "out-of-type-range"),
    (32_767.5, V.Int16, {}, "out-of-type-range"),
    (-1, V.UInt32, {}, "out-of-type-range"),
    (256, V.Byte, {}, "out-of-type-range"),
    (-129, V.SByte, {}, "out-of-type-range"),
    (2**64, V.UInt64, {}, "out-of-type-range"),
    (3.5e38, V.Float, {}, "out-of-type-range"),
    (10**400, V.Double, {}, "out-of-type-range"),
    (3276.8, V.Int16, {"scale": 0.1}, "out-of-type-range"),
    (1e30, V.Double, {"scale": 1e-300}, "out-of-type-range"),
    (70_000, V.Int32, {"type": "uint16"}, "out-of-type-range"),
    (math.nan, V.Double, {}, "not-a-number"),
    (-math.inf, V.Int16, {"scale": 0.1}, "not-a-number"),
    (True, V.Int16, {}, "type-mismatch"),
    (True, V.Double, {"scale": 2.0}, "type-mismatch"),
    (1, V.Boolean, {}, "type-mismatch"),
    (1, V.String, {}, "type-mismatch"),
    ("1", V.Float, {}, "type-mismatch"),
    ("1", V.String, {"scale": 2.0}, "type-mismatch"),
    (1.0, V.Double, {"type": "bool"}, "type-mismatch"),
    (True, V.Boolean, {"type": "float32"}, "type-mismatch"),
    ("a\ud800", V.String, {}, "not-text"),
    (1.0, V.Double, {"type": "float64[]"}, "array"),
]


@pytest.mark.parametrize(("value", "kind", "keys", "reason"), REFUSED)
def test_what_a_node_or_its_tag_cannot_hold_is_refused(
    value: Any, kind: ua.VariantType, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refused, match=r"^found .*; expected ") as caught:
        writing.encode(tag(**keys), value, kind)
    assert caught.value.reason == reason


def single(value: float) -> float:
    """Return a number as a Float on the wire holds it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


INTEGERS = {V.SByte: 8, V.Int16: 16, V.UInt16: 16, V.Int32: 32, V.UInt32: 32, V.Int64: 50, V.Byte: 8}


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([*INTEGERS, V.Float, V.Double]),
    scale=st.sampled_from([1.0, 0.1, 0.001, 10.0, -0.5]),
    offset=st.sampled_from([0.0, -40.0]),
    data=st.data(),
)
def test_what_is_read_is_written_back_as_it_was(
    kind: ua.VariantType, scale: float, offset: float, data: st.DataObject
) -> None:
    point = tag(scale=scale, offset=offset)
    if kind in INTEGERS:
        bits, signed = INTEGERS[kind], not kind.name.startswith(("U", "B"))
        least = -(2 ** (bits - 1)) if signed else 0
        raw: Any = data.draw(st.integers(least, least + 2**bits - 1))
    else:
        raw = data.draw(st.floats(-(2.0**100), 2.0**100, width=32 if kind == V.Float else 64))
    value = values.decode(point, ua.DataValue(ua.Variant(raw, kind))).value
    assert isinstance(value, int | float)
    back = writing.encode(point, value, kind).Value
    if kind in INTEGERS or (scale, offset) == (1.0, 0.0):
        assert (single(back) if kind == V.Float else back) == raw
    else:
        exact = (Fraction(str(value)) - Fraction(str(offset))) / Fraction(str(scale))
        assert back == float(exact)


def seen(value: Any, kind: ua.VariantType | None, status: str = "Good") -> ua.DataValue:
    return ua.DataValue(ua.Variant(value, kind), StatusCode=ua.StatusCode(getattr(ua.StatusCodes, status)))


def declared(number: int, space: int = 0) -> ua.DataValue:
    return seen(ua.NodeId(number, space), V.NodeId)


def test_the_type_is_that_of_the_value_or_else_the_declared_one() -> None:
    nothing = ua.DataValue(StatusCode=ua.StatusCode(ua.StatusCodes.BadNotReadable))
    assert writing.node_type(seen(1, V.Int16), declared(26)) == V.Int16, "declared a number, holds an Int16"
    assert writing.node_type(seen(None, None), declared(11)) == V.Double
    assert writing.node_type(nothing, declared(10)) == V.Float
    assert writing.node_type(seen(None, V.String), declared(12)) == V.String


@pytest.mark.parametrize(
    ("value", "data_type", "reason"),
    [
        (seen([1.0], V.Double), declared(11), "array"),
        (seen([], V.Double), declared(11), "array"),
        (seen(b"x", V.ByteString), declared(15), "unsupported-type"),
        (seen(None, None), declared(26), "unsupported-type"),
        (seen(None, None), declared(11, 2), "unsupported-type"),
        (seen(None, None, "BadNodeIdUnknown"), seen(None, None, "BadNodeIdUnknown"), "node-id-unknown"),
        (seen(None, None, "BadAttributeIdInvalid"), declared(11), "attribute-id-invalid"),
    ],
)
def test_a_node_that_takes_no_single_value_is_refused(
    value: ua.DataValue, data_type: ua.DataValue, reason: str
) -> None:
    with pytest.raises(Refused) as caught:
        writing.node_type(value, data_type)
    assert caught.value.reason == reason


# ---- against a real server

NODES: dict[str, tuple[Any, str]] = {
    "Int16": (1, "Int16"),
    "Byte": (1, "Byte"),
    "UInt64": (1, "UInt64"),
    "Float": (1.0, "Float"),
    "Double": (1.0, "Double"),
    "Boolean": (False, "Boolean"),
    "String": ("old", "String"),
    "Array": ([1.0, 2.0], "Double"),
    "ReadOnly": (1.0, "Double"),
}
TAGS: dict[str, Any] = {
    **{name.lower(): {"address": f"ns=2;s={name}"} for name in NODES},
    "scaled": {"address": "ns=2;s=Int16", "scale": 0.1},
    "gone": {"address": "ns=2;s=Gone"},
}


class Field(ReadField):
    """A server that counts what is written, and answers writes as it is told."""

    def start_now(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._arguments[0]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    async def on_write(self, *what: str) -> None:
        """Answer writes with `status NAME`, `fault NAME` or `close`, `spoil NAME` the node first, or `well`."""
        await self.tell(on_write=what)

    async def writes(self) -> list[Any]:
        """Return the writes that came, each as node, type and value."""
        return list((await self.tell(seen=True))["writes"])


@pytest.fixture(scope="module")
def shared_field() -> Iterator[Field]:
    made = Field(free_port())
    yield made
    made.kill()


@pytest.fixture
async def field(shared_field: Field) -> AsyncIterator[Field]:
    """A running server with the values of NODES; a test may kill or freeze it."""
    if not shared_field.running:
        shared_field.start_now()
    await shared_field.tell(reset=True)
    yield shared_field
    if shared_field.running:
        shared_field.thaw()


@asynccontextmanager
async def connected(field: Field, mode: str = "poll", url: str = "") -> AsyncIterator[OpcUaDriver]:
    """A driver that is connected and has scanned once."""
    async with OpcUaDriver("plant", config(url or field.url, tags=TAGS, mode=mode)) as driver:
        async with asyncio.timeout(DEADLINE_S):
            await values_once(driver, set(TAGS))
        yield driver


@MODES
async def test_the_type_of_each_node_is_kept_and_the_value_read_back(field: Field, mode: str) -> None:
    async with connected(field, mode) as driver:
        assert await driver.write("int16", 12.4) == 12
        assert await driver.write("scaled", 26.9) == 26.9
        assert await driver.write("byte", 255) == 255
        assert await driver.write("uint64", 2**64 - 1) == 2**64 - 1
        assert await driver.write("float", 0.1) == 0.1
        assert await driver.write("double", 7) == 7.0
        assert await driver.write("boolean", True) is True
        assert await driver.write("string", "Zähler") == "Zähler"
        assert await field.writes() == [
            ["Int16", "Int16", 12],
            ["Int16", "Int16", 269],
            ["Byte", "Byte", 255],
            ["UInt64", "UInt64", 2**64 - 1],
            ["Float", "Float", single(0.1)],
            ["Double", "Double", 7.0],
            ["Boolean", "Boolean", True],
            ["String", "String", "Zähler"],
        ]


@MODES
async def test_the_types_of_writable_numbers_are_learnt_before_anything_is_read(
    field: Field, mode: str
) -> None:
    """A node that cannot be written as a single value is not learnt, and harms no other."""
    types = {"Int16": "", "Double": "float64", "Float": "", "Array": "", "Gone": ""}
    tags = {
        name.lower(): {"address": f"ns=2;s={name}", "type": kind, "writable": True}
        for name, kind in types.items()
    }
    async with OpcUaDriver("plant", config(field.url, tags=tags, mode=mode)) as driver:
        await working(driver)
        assert (
            driver.held_types.items() >= {"int16": "int16", "double": "float64", "float": "float32"}.items()
        )
        assert "nothing" not in driver.held_types


@MODES
async def test_p8_what_arrives_in_an_integer_node_is_within_the_limits_also_where_the_type_is_not_configured(
    field: Field, tmp_path: Path, mode: str
) -> None:
    limits = {"writable": True, "min": -46.0, "max": 49.6, "max_step": 20.5}
    device = {"driver": "opcua", "url": field.url, "every": "100ms", "mode": mode}
    tags = {"setpoint": {"address": "ns=2;s=Int16"} | limits}
    with gateway(tmp_path, gateway_config(free_port(), {"plant": device | {"tags": tags}})) as run:
        await until(lambda: (tmp_path / "journal.db.sock").exists(), "the socket")
        with address(tmp_path / "journal.db.sock") as name:
            reader, writer = await asyncio.open_unix_connection(name)

        async def ask(line: dict[str, Any]) -> dict[str, Any]:
            writer.write(json.dumps(line).encode() + b"\n")
            return dict(json.loads(await asyncio.wait_for(reader.readline(), DEADLINE_S)))

        async def holds(value: float | None) -> None:
            async with asyncio.timeout(DEADLINE_S):
                while (await ask({"show": "plant.setpoint"}))["value"] != value:
                    pass

        await holds(1)
        command = {
            "id": "hand-1",
            "write": {"plant.setpoint": 49.6},
            "expires": round(time.time() * 1000) + 30_000,
        }
        assert (await ask(command))["ok"]
        await holds(49)
        writer.close()
        run.send(signal.SIGTERM)
        await asyncio.to_thread(run.end)
    assert await field.writes() == [["Int16", "Int16", value] for value in (21, 41, 49)]


@MODES
async def test_p8_a_write_without_a_daemon_reads_the_node_before_and_after_and_keeps_within_its_limits(
    field: Field, tmp_path: Path, mode: str
) -> None:
    tags = {"setpoint": {"address": "ns=2;s=Int16", "writable": True, "max": 9.6}}
    device = {"driver": "opcua", "url": field.url, "every": "100ms", "mode": mode, "tags": tags}
    (tmp_path / "config.toml").write_text(toml(gateway_config(free_port(), {"plant": device})))
    words = ["write", "plant.setpoint", "9.6", "--yes", "--json", "-c", str(tmp_path / "config.toml")]
    with Process(sys.executable, "-m", "edgegw", *words) as made:
        code, out = await asyncio.to_thread(made.end)
    assert (code, json.loads(out)["value"]) == (0, 9), made.lines
    assert await field.writes() == [["Int16", "Int16", 9]]


async def test_the_type_is_asked_once_for_each_connection(field: Field) -> None:
    async with connected(field) as driver:
        for value in (1.5, 2.5):
            assert await driver.write("double", value) == value
        assert (await field.tell(seen=True))["types"] == 1
        field.kill()
        await field.start()
        await working(driver)
        assert await driver.write("double", 3.5) == 3.5
        assert (await field.tell(seen=True))["types"] == 1, "the new server was asked, once"


async def test_what_cannot_be_written_is_refused_and_not_sent(field: Field) -> None:
    async with connected(field) as driver:
        for name, value, reason in [
            ("gone", 1.0, "node-id-unknown"),
            ("array", 1.0, "array"),
            ("int16", 40_000, "out-of-type-range"),
            ("double", "7", "type-mismatch"),
            ("boolean", 1, "type-mismatch"),
        ]:
            with pytest.raises(Refused) as caught:
                await driver.write(name, value)
            assert caught.value.reason == reason
            assert str(caught.value).startswith(f"device.plant ({field.url}): {name}: ")
        with pytest.raises(KeyError):
            await driver.write("unheard_of", 1)
        assert await field.writes() == []


async def test_a_servers_own_refusal(field: Field) -> None:
    async with connected(field) as driver:
        with pytest.raises(Refused, match="the server refuses: ") as caught:
            await driver.write("readonly", 7.0)
        assert caught.value.reason in ("user-access-denied", "not-writable")
        assert len(await field.writes()) == 1


@pytest.mark.parametrize("how", ["status", "fault"])
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("BadOutOfRange", "out-of-range"),
        ("BadNotWritable", "not-writable"),
        ("BadTooManyOperations", "too-many-operations"),
    ],
)
async def test_a_bad_status_is_a_refusal_and_nothing_is_repeated(
    field: Field, how: str, status: str, reason: str
) -> None:
    async with connected(field) as driver:
        await field.on_write(how, status)
        with pytest.raises(Refused) as caught:
            await driver.write("double", 7.0)
        assert caught.value.reason == reason
        assert caught.value.final == (reason != "too-many-operations")
        assert len(await field.writes()) == 1
        await field.on_write("well")
        assert await driver.write("double", 8.0) == 8.0, "on the same connection"
        assert (await field.tell(seen=True))["types"] == 1


@pytest.mark.parametrize("how", ["status", "fault"])
@pytest.mark.parametrize(
    ("status", "reason"), [("BadTimeout", "timeout"), ("BadCommunicationError", "communication-error")]
)
async def test_a_status_that_leaves_it_open_is_not_confirmed(
    field: Field, how: str, status: str, reason: str
) -> None:
    async with connected(field) as driver:
        await field.on_write(how, status)
        with pytest.raises(Unconfirmed) as caught:
            await driver.write("double", 7.0)
        assert caught.value.reason == reason
        assert len(await field.writes()) == 1


async def test_a_session_that_the_server_ended_wrote_nothing_and_is_made_anew(field: Field) -> None:
    async with connected(field) as driver:
        await field.on_write("fault", "BadSessionIdInvalid")
        with pytest.raises(NotConnected) as caught:
            await driver.write("double", 7.0)
        assert caught.value.reason == "connection-lost"
        await field.on_write("well")
        await working(driver)
        assert len(await field.writes()) == 1


@pytest.mark.parametrize(
    "status", ["GoodClamped", "GoodCompletesAsynchronously", "UncertainNoCommunicationLastUsableValue"]
)
async def test_what_is_taken_with_a_reservation_is_returned_as_it_reads_back(
    field: Field, status: str
) -> None:
    async with connected(field) as driver:
        await field.on_write("status", status)
        assert await driver.write("double", 7.0) == 1.0
        assert len(await field.writes()) == 1


async def test_what_reads_back_as_bad_is_not_confirmed(field: Field) -> None:
    async with connected(field) as driver:
        await field.on_write("spoil", "BadSensorFailure")
        with pytest.raises(Unconfirmed, match=r"reads back as bad:sensor-failure$") as caught:
            await driver.write("double", 7.0)
        assert caught.value.reason == "read-back"
        await field.on_write("spoil", "UncertainSensorNotAccurate")
        assert await driver.write("float", 7.0) == 7.0
        assert len(await field.writes()) == 2


@MODES
async def test_p6_a_write_to_a_frozen_server_is_one_write_for_ever(field: Field, mode: str) -> None:
    async with connected(field, mode) as driver:
        assert await driver.write("double", 2.0) == 2.0
        field.freeze()
        with pytest.raises(Unconfirmed) as caught:
            async with asyncio.timeout(4 * TIMEOUT_S):
                await driver.write("double", 3.0)
        assert caught.value.reason == "timeout"
        connection = driver._connection
        assert connection is not None
        await connection.lost()
        field.thaw()
        await working(driver)
        async with asyncio.timeout(DEADLINE_S):
            while driver._connection in (None, connection):
                await driver._wait()
        assert await driver.write("double", 4.0) == 4.0
        sent = [value for _, _, value in await field.writes()]
        assert sent in ([2.0, 3.0, 4.0], [2.0, 4.0]), (
            "whether the one given up is done is the server's choice"
        )


@MODES
async def test_p6_a_write_on_which_the_connection_breaks_is_one_write_for_ever(
    field: Field, mode: str
) -> None:
    async with connected(field, mode) as driver:
        await field.on_write("close")
        with pytest.raises(Unconfirmed) as caught:
            await driver.write("double", 3.0)
        assert caught.value.reason == "connection-lost"
        await field.on_write("well")
        await working(driver)
        assert await driver.write("double", 4.0) == 4.0
        assert [value for _, _, value in await field.writes()] == [3.0, 4.0]


async def test_without_a_connection_nothing_goes_out(field: Field) -> None:
    async with connected(field) as driver:
        field.kill()
        assert driver._connection is not None
        with pytest.raises(NotConnected):
            await driver.write("double", 3.0)
        await field.start()
        await working(driver)
        assert await field.writes() == []


async def test_a_server_that_never_was_there_is_not_connected() -> None:
    url = f"opc.tcp://127.0.0.1:{free_port()}/"
    async with OpcUaDriver("plant", config(url, tags=TAGS)) as driver:
        with pytest.raises(NotConnected, match=r"^device\.plant \(.*double was not written$") as caught:
            await driver.write("double", 3.0)
        assert caught.value.reason == "refused"


async def test_a_driver_that_is_not_entered_writes_nothing(field: Field) -> None:
    driver = OpcUaDriver("plant", config(field.url, tags=TAGS))
    with pytest.raises(NotConnected):
        await driver.write("double", 3.0)
    async with driver:
        assert await driver.write("double", 4.0) == 4.0
    with pytest.raises(NotConnected):
        await driver.write("double", 5.0)
    assert len(await field.writes()) == 1


async def test_a_write_that_waits_for_a_connection_ends_with_the_driver() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        url = f"opc.tcp://127.0.0.1:{hole.getsockname()[1]}/"
        async with OpcUaDriver("plant", config(url, tags=TAGS)) as driver:
            write = asyncio.create_task(driver.write("double", 3.0))
            await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait([write])
        assert isinstance(write.exception(), NotConnected), "not cancelled along with it"


async def test_a_write_that_is_cancelled_leaves_nothing_behind(field: Field) -> None:
    baseline = sockets()
    async with connected(field) as driver:
        for steps in range(0, 24, 3):
            write = asyncio.create_task(driver.write("double", float(steps)))
            for _ in range(steps):
                await asyncio.sleep(0)
            write.cancel()
            await asyncio.wait([write])
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(
                    NotConnected
                ):  # the last one was not yet delivered when it was cancelled
                    assert await driver.write("double", 99.0) == 99.0
                    break
                await asyncio.sleep(0)
        sent = [value for _, _, value in await field.writes()]
        assert len(sent) == len(set(sent)), "none was sent twice"
    await gone(baseline)


class Relay:
    """Passes bytes on between a client and a server, until it is told to take no more from the client."""

    def __init__(self, port: int) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.listener.setblocking(False)
        self.url = f"opc.tcp://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.sent = b""
        self.answer_to: dict[bytes, bytes] = {}
        self._port = port

    async def accept(self) -> None:
        """Take one client."""
        loop = asyncio.get_running_loop()
        self.near, _ = await loop.sock_accept(self.listener)
        self.far = socket.create_connection(("127.0.0.1", self._port))
        self.far.setblocking(False)
        self.outward = asyncio.create_task(self._pass(self.near, self.far))
        self.inward = asyncio.create_task(self._pass(self.far, self.near))

    async def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 1 << 16):
            if source is self.near:
                self.sent += data
                for marker, answer in self.answer_to.items():
                    if marker in data:
                        await loop.sock_sendall(self.near, answer)
                        return
            await loop.sock_sendall(sink, data)

    async def stop(self) -> None:
        """Take no more."""
        self.outward.cancel()
        await asyncio.wait([self.outward])

    async def everything(self) -> bytes:
        """Take all that still comes, until a reset."""
        taken = b""
        async with asyncio.timeout(DEADLINE_S):
            try:
                while data := await asyncio.get_running_loop().sock_recv(self.near, 1 << 16):
                    taken += data
            except ConnectionResetError:
                return taken
        raise AssertionError("ended in peace")

    async def close(self) -> None:
        self.inward.cancel()
        await asyncio.wait([self.inward])
        for one in (self.listener, self.near, self.far):
            one.close()


async def test_neither_status_nor_time_is_written(field: Field) -> None:
    """Many a server refuses a write that brings them (OPC UA Part 6, 5.2.2.17: the mask says what follows)."""
    relay = Relay(int(field._arguments[0]))
    accepting = asyncio.create_task(relay.accept())
    async with connected(field, url=relay.url) as driver:
        await accepting
        assert await driver.write("double", 7.25) == 7.25
        double = 11
        assert bytes((1, double)) + struct.pack("<d", 7.25) in relay.sent
    await relay.close()


async def test_a_connection_that_the_server_ends_with_an_error_refuses_nothing(field: Field) -> None:
    """The error message of OPC UA Part 6, 7.1.2.5 is about the connection: the write may have been done."""
    relay = Relay(int(field._arguments[0]))
    accepting = asyncio.create_task(relay.accept())
    async with connected(field, url=relay.url) as driver:
        await accepting
        error = struct.pack("<II", ua.StatusCodes.BadTcpInternalError, 0xFFFFFFFF)
        relay.answer_to[b"the last words"] = b"ERRF" + struct.pack("<I", 8 + len(error)) + error
        with pytest.raises(Unconfirmed) as caught:
            await driver.write("string", "the last words")
        assert caught.value.reason == "tcp-internal-error"
    await relay.close()


async def test_a_write_on_a_connection_that_has_just_ended_does_not_go_out(field: Field) -> None:
    async with connected(field) as driver:
        assert await driver.write("double", 2.0) == 2.0
        connection = driver._connection
        assert connection is not None
        connection._client.uaclient.protocol.transport.abort()
        with pytest.raises(NotConnected):
            await driver.write("double", 3.0)
        assert driver._connection is connection, "nobody has noticed yet"
        await working(driver)
        assert [value for _, _, value in await field.writes()] == [2.0]


async def test_p6_a_write_that_was_given_up_does_not_arrive_later(field: Field) -> None:
    """The way takes nothing for a while, so that the write waits in our kernel behind a heap of reads."""
    relay = Relay(int(field._arguments[0]))
    accepting = asyncio.create_task(relay.accept())
    async with connected(field, url=relay.url) as driver:
        await accepting
        assert await driver.write("string", "first") == "first"
        await relay.stop()
        connection = driver._connection
        assert connection is not None
        heap = [asyncio.create_task(connection.poll(driver._nodes * 90)) for _ in range(20)]
        await asyncio.sleep(0)
        with pytest.raises(Unconfirmed) as caught:
            await driver.write("string", "the one given up")
        assert caught.value.reason == "timeout"
        assert connection._failure is not None, "at once, not when its health is checked"
        await asyncio.gather(*heap, return_exceptions=True)
        assert (await connection.lost()).reason == "timeout"
        async with asyncio.timeout(DEADLINE_S):
            again, _ = await asyncio.get_running_loop().sock_accept(
                relay.listener
            )  # so the old one is closed
        again.close()
        taken = await relay.everything()
        assert b"the one given up" not in taken
    await relay.close()


async def serve(port: int) -> None:
    """Be the server: count what sessions from outside write and how often they ask for a type."""
    writes: list[Any] = []
    types = 0
    told = ["well"]
    original_write, original_read = InternalSession.write, InternalSession.read
    server = Server()

    async def write(self: InternalSession, params: Any) -> Any:
        if not self.external:
            return await original_write(self, params)
        for item in params.NodesToWrite:
            variant = item.Value.Value
            writes.append([item.NodeId.Identifier, variant.VariantType.name, variant.Value])
        match told:
            case ["status", name]:
                return [ua.StatusCode(getattr(ua.StatusCodes, name))]
            case ["fault", name]:
                raise ServiceError(getattr(ua.StatusCodes, name))
            case ["close"]:
                for client in list(server.bserver.clients):
                    client.transport.abort()
                return [ua.StatusCode()]
            case ["spoil", name]:
                params.NodesToWrite[0].Value.StatusCode = ua.StatusCode(getattr(ua.StatusCodes, name))
        return await original_write(self, params)

    async def read(self: InternalSession, params: Any) -> Any:
        nonlocal types
        if self.external:
            types += sum(item.AttributeId == ua.AttributeIds.DataType for item in params.NodesToRead)
        return await original_read(self, params)

    InternalSession.write = write  # type: ignore[method-assign]
    InternalSession.read = read  # type: ignore[method-assign]
    await server.init()
    server.set_endpoint(f"opc.tcp://127.0.0.1:{port}/")
    server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
    space = await server.register_namespace("urn:test")
    for name, (value, kind) in NODES.items():
        made = await server.nodes.objects.add_variable(
            ua.NodeId(name, space), name, value, ua.VariantType[kind]
        )
        if name != "ReadOnly":
            await made.set_writable()
    async with server:
        print(json.dumps("ready"), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            done: Any = True
            if "reset" in command:
                told[:] = ["well"]
                writes.clear()
                types = 0
                for name, (value, kind) in NODES.items():
                    data = ua.DataValue(ua.Variant(value, ua.VariantType[kind]))
                    await server.write_attribute_value(ua.NodeId(name, space), data)
            elif "on_write" in command:
                told[:] = command["on_write"]
            elif "seen" in command:
                done = {"writes": writes, "types": types}
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(int(sys.argv[1])))
