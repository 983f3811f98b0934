"""The OPC UA driver against a real server in a process of its own, which this file also is (see `serve`)."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua
from asyncua.common.utils import ServiceError
from asyncua.server.internal_session import InternalSession
from asyncua.server.monitored_item_service import MonitoredItemService
from asyncua.server.server import Server

from edgegw import clock
from edgegw.config.schema import OpcUaDevice
from edgegw.domain.record import Scan
from edgegw.drivers.opcua import connection, subscriber
from edgegw.drivers.opcua.browse import Entry, browse
from edgegw.drivers.opcua.driver import OpcUaDriver
from edgegw.errors import BadAnswer, ConfigError, DeviceError, NoAnswer, NotConnected, Refused

DEADLINE_S = 60.0
TIMEOUT_S = 0.5
BEGIN_MS = 1_748_779_200_123
MANY = 30

NODES: dict[str, tuple[Any, str]] = {
    "Voltage": (230.5, "Double"),
    "Count": (7, "Int32"),
    "On": (True, "Boolean"),
    "Name": ("meter", "String"),
    "Curve": ([1.0, 2.5], "Double"),
    "Matrix": ([[1.0, 2.5], [3.0, 4.0]], "Double"),
    **{f"N{i}": (float(i), "Double") for i in range(MANY)},
}


class Field:
    """A server process, and the pipe to tell it what to do."""

    def __init__(
        self, port: int, *, read_limit: int = 0, items_limit: int = 0, room: int = 0, subscriptions: int = 0
    ) -> None:
        self.url = f"opc.tcp://127.0.0.1:{port}/"
        self._arguments = [str(port), str(read_limit), str(items_limit), str(room), str(subscriptions)]
        self._process: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start_now(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    async def start(self) -> None:
        await asyncio.to_thread(self.start_now)

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    async def tell(self, **command: Any) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return await asyncio.to_thread(self._answer)

    async def set(
        self, node: str, value: Any, kind: str = "Double", status: str = "Good", ms: int | None = BEGIN_MS
    ) -> None:
        await self.tell(set=[node, value, kind, status, ms])

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port: int = s.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def shared_field() -> Iterator[Field]:
    field = Field(free_port())
    yield field
    field.kill()


@pytest.fixture
async def field(shared_field: Field) -> AsyncIterator[Field]:
    """A running server with the values of NODES; a test may kill or freeze it."""
    if not shared_field.running:
        shared_field.start_now()
    await shared_field.tell(reset=True)
    yield shared_field
    if shared_field.running:
        shared_field.thaw()


@pytest.fixture(scope="module")
def strict_field() -> Iterator[Field]:
    field = Field(free_port(), read_limit=7, items_limit=4)
    field.start_now()
    yield field
    field.kill()


def config(url: str, *, tags: dict[str, Any] | None = None, **keys: Any) -> OpcUaDevice:
    named = {
        name.lower(): {"address": f"ns=2;s={name}"} for name in ("Voltage", "Count", "On", "Name", "Curve")
    }
    return OpcUaDevice.model_validate(
        {"driver": "opcua", "url": url, "every": "100ms", "timeout": f"{TIMEOUT_S * 1000:.0f}ms"}
        | {"tags": named if tags is None else tags}
        | keys
    )


async def scan(driver: OpcUaDriver) -> list[Scan]:
    async with asyncio.timeout(DEADLINE_S):
        return list(await driver.scan())


async def values_once(driver: OpcUaDriver, names: set[str]) -> dict[str, Any]:
    """Scan until each tag came, and return the last value of each."""
    found: dict[str, Any] = {}
    while not names <= found.keys():
        for one in await scan(driver):
            found |= one.values
    return found


async def error_of(driver: OpcUaDriver, *, within_s: float = DEADLINE_S) -> DeviceError:
    """Scan until it fails; the driver paces subscriptions, a poll is asked at once again."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await driver.scan()
            except DeviceError as error:
                return error


async def working(driver: OpcUaDriver) -> list[Scan]:
    """Scan until it works again."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return list(await driver.scan())
            except DeviceError:
                await asyncio.sleep(0.02)  # a poll without a connection fails at once


EVERY = {"voltage": 230.5, "count": 7, "on": True, "name": "meter", "curve": [1.0, 2.5]}
MODES = pytest.mark.parametrize("mode", ["poll", "subscribe"])


@MODES
async def test_every_kind_of_value_is_read_with_its_source_time(field: Field, mode: str) -> None:
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        assert (driver.period_s is None) == (mode == "subscribe")
        assert await scan(driver) == [Scan(BEGIN_MS, "plant", EVERY)]


@MODES
async def test_gateway_time_is_when_the_value_came(field: Field, mode: str) -> None:
    async with OpcUaDriver("plant", config(field.url, mode=mode, timestamp="gateway")) as driver:
        before_ms = clock.wall_ms()
        (one,) = await scan(driver)
        assert before_ms <= one.ts <= clock.wall_ms()
        assert one.values == EVERY


@MODES
async def test_source_times_part_a_reading_into_scans(field: Field, mode: str) -> None:
    await field.set("Voltage", 231.0, ms=BEGIN_MS - 5)
    await field.set("Count", 8, "Int32", ms=None)
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        before_ms = clock.wall_ms()
        first, second, third = await scan(driver)
        assert (first.ts, first.values) == (BEGIN_MS - 5, {"voltage": 231.0})
        assert (second.ts, set(second.values)) == (BEGIN_MS, {"on", "name", "curve"})
        assert third.ts >= before_ms
        assert third.values == {"count": 8}


@MODES
async def test_bad_and_uncertain_are_kept_as_quality(field: Field, mode: str) -> None:
    await field.set("Voltage", 231.0, status="UncertainLastUsableValue")
    await field.set("Count", 8, "Int32", status="BadSensorFailure")
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        (one,) = await scan(driver)
    assert one.quality == {"voltage": "uncertain:last-usable-value", "count": "bad:sensor-failure"}
    assert one.values == EVERY | {"voltage": 231.0, "count": None}


@MODES
async def test_what_a_tag_cannot_represent_is_bad_and_logged_once_for_each_connection(
    field: Field, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A matrix, and texts where numbers are configured: the mistake of whoever wrote the configuration."""
    mistyped = {
        "float": {"type": "float64"}, "int": {"type": "int32", "scale": 0.1}, "flag": {"type": "bool"},
        "scaled": {"scale": 0.001}, "array": {"type": "float64[]"},
    }  # fmt: skip
    tags = {name: keys | {"address": "ns=2;s=Name"} for name, keys in mistyped.items()}
    tags |= {"matrix": {"address": "ns=2;s=Matrix"}, "voltage": {"address": "ns=2;s=Voltage"}}
    async with OpcUaDriver("plant", config(field.url, mode=mode, tags=tags)) as driver:
        (one,) = await scan(driver)
        assert one.values == dict.fromkeys(tags) | {"voltage": 230.5}
        assert one.quality == dict.fromkeys(mistyped, "bad:type-mismatch") | {
            "matrix": "bad:unsupported-type"
        }
        await field.set("Name", "12.5", "String")
        assert (await scan(driver))[0].values["float"] is None
        found = [line for line in caplog.messages if "cannot represent" in line]
        assert found == [
            f"device.plant ({field.url}): found values that tags cannot represent: float (type-mismatch), "
            "int (type-mismatch), flag (type-mismatch), scaled (type-mismatch), array (type-mismatch) and 1 more; "
            "expected the configured type, no matrix or structure"
        ]
        field.kill()
        await error_of(driver)
        await field.start()
        await working(driver)
        assert len([line for line in caplog.messages if "cannot represent" in line]) == 2


@MODES
async def test_an_unknown_node_harms_no_other(field: Field, mode: str) -> None:
    tags = {"gone": {"address": "ns=2;s=Gone"}, "voltage": {"address": "ns=2;s=Voltage"}}
    async with OpcUaDriver("plant", config(field.url, mode=mode, tags=tags)) as driver:
        qualities: dict[str, str] = {}
        found: dict[str, Any] = {}
        while set(found) != {"gone", "voltage"}:
            for one in await scan(driver):
                found |= one.values
                qualities |= one.quality or {}
        assert found == {"gone": None, "voltage": 230.5}
        assert qualities == {"gone": "bad:node-id-unknown"}


async def test_a_subscription_brings_every_change_and_nothing_else(field: Field) -> None:
    async with OpcUaDriver("plant", config(field.url)) as driver:
        await values_once(driver, set(EVERY))
        for i in range(3):
            await field.set("Voltage", 240.0 + i, ms=BEGIN_MS + 10 + i)
        scans: list[Scan] = []
        while len(scans) < 3:
            scans += await scan(driver)
        assert scans == [Scan(BEGIN_MS + 10 + i, "plant", {"voltage": 240.0 + i}) for i in range(3)]


async def test_tags_are_typed_and_scaled(field: Field) -> None:
    tags = {
        "kilovolt": {"address": "ns=2;s=Voltage", "scale": 0.001},
        "wrong": {"address": "ns=2;s=Name", "type": "float64"},
        "curve": {"address": "ns=2;s=Curve", "type": "float64[]", "scale": 2.0},
    }
    async with OpcUaDriver("plant", config(field.url, mode="poll", tags=tags)) as driver:
        (one,) = await scan(driver)
    assert one.values == {"kilovolt": pytest.approx(0.2305), "wrong": None, "curve": [2.0, 5.0]}
    assert one.quality == {"wrong": "bad:type-mismatch"}


@MODES
async def test_a_servers_own_limits_are_kept(strict_field: Field, mode: str) -> None:
    await strict_field.tell(reset=True)
    tags = {f"n{i}": {"address": f"ns=2;s=N{i}"} for i in range(MANY)}
    async with OpcUaDriver("plant", config(strict_field.url, mode=mode, tags=tags)) as driver:
        assert await values_once(driver, set(tags)) == {f"n{i}": float(i) for i in range(MANY)}
        calls = await strict_field.tell(calls=True)
    sizes = calls["items"] if mode == "subscribe" else [size for size in calls["read"] if size > 1]
    assert sizes == ([4] * 7 + [2] if mode == "subscribe" else [7] * 4 + [2])


@MODES
async def test_the_first_connection_is_waited_for(mode: str) -> None:
    field = Field(free_port())
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        error = await error_of(driver)
        assert isinstance(error, NotConnected)
        assert error.reason == "refused"
        assert str(error).startswith(f"device.plant ({field.url}): connection refused; expected ")
        await field.start()
        assert (await working(driver))[0].values == EVERY
    field.kill()


@MODES
async def test_a_server_killed_and_restarted_is_found_again(field: Field, mode: str) -> None:
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        await values_once(driver, set(EVERY))
        field.kill()
        error = await error_of(driver, within_s=1.0)
        assert isinstance(error, NotConnected)
        assert error.reason in ("connection-lost", "refused")
        await field.start()
        assert (await working(driver))[0].values == EVERY


@MODES
async def test_a_frozen_server_is_noticed_and_found_again_when_thawed(field: Field, mode: str) -> None:
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        await values_once(driver, set(EVERY))
        field.freeze()
        error = await error_of(driver, within_s=4 * TIMEOUT_S)
        assert isinstance(error, NoAnswer)
        assert error.reason == "timeout"
        field.thaw()
        assert (await working(driver))[0].values == EVERY


async def test_a_subscription_gone_silent_is_made_anew(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber, "KEEP_ALIVE_S", 0.2)
    async with OpcUaDriver("plant", config(field.url)) as driver:
        await values_once(driver, set(EVERY))
        await field.tell(hush=True)
        error = await error_of(driver)
        assert error.reason == "timeout"
        assert "silent" in str(error)
        assert (await working(driver))[0].values == EVERY


async def test_a_subscription_that_the_server_has_forgotten_is_made_anew(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber, "KEEP_ALIVE_S", 0.2)
    async with OpcUaDriver("plant", config(field.url)) as driver:
        await values_once(driver, set(EVERY))
        await field.tell(forget=True)
        assert (await error_of(driver)).reason in ("no-subscription", "timeout"), "whether it says so or not"
        assert (await working(driver))[0].values == EVERY


async def test_values_that_nobody_takes_end_in_an_error_and_then_the_present_values(field: Field) -> None:
    room = 3 * len(EVERY)
    async with OpcUaDriver("plant", config(field.url, timestamp="gateway"), queue_most=room) as driver:
        await values_once(driver, set(EVERY))
        sent = 0
        async with asyncio.timeout(DEADLINE_S):
            while driver._failure is None:
                sent += 1
                await field.set("Voltage", float(sent))
        taken = [one.values["voltage"] for one in await scan(driver)]
        assert taken == sorted(taken)
        assert 0 < len(taken) <= room
        error = await error_of(driver)
        assert error.reason == "overload"
        assert f"expected {room} at most" in str(error)
        assert await values_once(driver, set(EVERY)) == EVERY | {"voltage": float(sent)}


async def test_leaving_just_when_the_connection_is_lost_leaves_nothing_behind(field: Field) -> None:
    baseline = sockets()
    async with OpcUaDriver("plant", config(field.url), queue_most=len(EVERY)) as driver:
        await values_once(driver, set(EVERY))
        async with asyncio.timeout(DEADLINE_S):
            i = 0
            while driver._failure is None:
                i += 1
                await field.set("Voltage", float(i))
    await gone(baseline)


@pytest.mark.parametrize("mode", ["poll", "subscribe"])
async def test_all_tags_are_read_once_whatever_the_mode(field: Field, mode: str) -> None:
    tags = {"gone": {"address": "ns=2;s=Gone"}, "voltage": {"address": "ns=2;s=Voltage"}}
    made = OpcUaDriver("plant", config(field.url, tags=tags, mode=mode))
    async with made as driver, asyncio.timeout(DEADLINE_S):
        scans = await driver.read()
        assert {tag for scan in scans for tag in scan.values} == {"gone", "voltage"}
        assert [scan.quality for scan in scans if scan.quality] == [{"gone": "bad:node-id-unknown"}]


async def test_what_is_not_opc_ua_is_an_error_and_tried_again() -> None:
    connections = 0

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with OpcUaDriver("plant", config(f"opc.tcp://127.0.0.1:{port}/")) as driver:
        for _ in range(3):
            error = await error_of(driver)
            assert isinstance(error, NotConnected | NoAnswer | BadAnswer)
    assert connections >= 3
    server.close()


class Middleman:
    """Passes on what driver and server say, but for the first publish response to alter."""

    def __init__(self, url: str, alter: Callable[[bytearray, int], bool]) -> None:
        self._port = int(url.rsplit(":", 1)[1].strip("/"))
        self._alter = alter
        self.altered = False

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"opc.tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, back))
                group.create_task(self._pass(there, writer))
        writer.close()
        back.close()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await source.readexactly(8)
                rest = bytearray(await source.readexactly(struct.unpack("<I", head[4:])[0] - 8))
                body = rest[16:]
                if rest[16:20] == b"\1\0\x3d\3" and not self.altered:  # a publish response
                    message = 36 + 4 * max(0, struct.unpack_from("<i", body, 32)[0])
                    if struct.unpack_from("<i", body, message + 13)[0]:
                        self.altered = self._alter(body, message)
                sink.write(head + rest[:16] + body)
        finally:
            sink.close()


def put(at: int, kind: str, value: int) -> Callable[[bytearray, int], bool]:
    """Return what writes a number at a distance from the beginning of a notification message."""

    def alter(body: bytearray, message: int) -> bool:
        struct.pack_into(kind, body, message + at, value)
        return True

    return alter


def skip_one(body: bytearray, message: int) -> bool:
    """Leave the first message as it is, and number the next as the one after the next."""
    (sequence,) = struct.unpack_from("<I", body, message + 1)
    struct.pack_into("<I", body, message + 1, sequence + (sequence > 1))
    return bool(sequence > 1)


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (put(17 + 9, "<i", 2**31 - 1), "bad-answer"),  # how many items there are
        (put(17 + 9 + 4, "<I", 5), "bad-answer"),  # the first one's place, of 0 to 4
        (put(17 + 9 + 4 + 4 + 1, "<B", 0x98), "bad-answer"),  # its type: an array of variants
        (skip_one, "notification-lost"),
    ],
    ids=[
        "more items than there are bytes",
        "a value of nobody",
        "a type that it has not",
        "a message missing",
    ],
)
async def test_a_publication_that_is_not_sound_ends_the_connection_and_the_present_values_follow(
    field: Field, alter: Callable[[bytearray, int], bool], reason: str
) -> None:
    middleman = Middleman(field.url, alter)
    async with middleman as url, OpcUaDriver("plant", config(url, timestamp="gateway")) as driver:
        seen: list[Scan] = []
        error = None
        while error is None:
            try:
                seen += await scan(driver)
            except DeviceError as found:
                error = found
            else:
                await field.set("Voltage", 231.5)
        assert middleman.altered
        assert (type(error), error.reason) == (BadAnswer, reason)
        known = EVERY | {"voltage": 231.5}
        assert {(tag, str(value)) for one in seen for tag, value in one.values.items()} <= {
            (tag, str(value)) for tag, value in (*EVERY.items(), *known.items())
        }
        assert (await values_once(driver, set(EVERY)))["count"] == 7


def sockets() -> int:
    """Count this process's open sockets."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{entry}").startswith("socket:")
    return count


async def gone(baseline: int) -> None:
    """Wait until no task but this one and no socket above the baseline is left."""
    async with asyncio.timeout(DEADLINE_S):
        while len(asyncio.all_tasks()) > 1 or sockets() > baseline:  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0)


def black_hole() -> socket.socket:
    """Return a server that takes connections and never answers."""
    return socket.create_server(("127.0.0.1", 0))


@MODES
@pytest.mark.parametrize("scanning", [False, True])
async def test_leaving_while_connecting_leaves_nothing_behind(mode: str, scanning: bool) -> None:
    with black_hole() as hole:
        url = f"opc.tcp://127.0.0.1:{hole.getsockname()[1]}/"
        baseline = sockets()
        async with OpcUaDriver("plant", config(url, mode=mode)) as driver:
            while sockets() == baseline:  # noqa: ASYNC110  nothing else tells that it connects
                await asyncio.sleep(0)
            if scanning:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await driver.scan()
        await gone(baseline)


@MODES
async def test_a_black_hole_is_a_timeout(mode: str) -> None:
    with black_hole() as hole:
        url = f"opc.tcp://127.0.0.1:{hole.getsockname()[1]}/"
        async with OpcUaDriver("plant", config(url, mode=mode)) as driver:
            error = await error_of(driver, within_s=4 * TIMEOUT_S)
            assert isinstance(error, NoAnswer)


@MODES
@pytest.mark.parametrize("frozen", [False, True])
async def test_leaving_closes_in_bounded_time_and_leaves_nothing_behind(
    field: Field, mode: str, frozen: bool
) -> None:
    sessions = await field.tell(sessions=True)
    baseline = sockets()
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        await values_once(driver, set(EVERY))
        if frozen:
            field.freeze()
        begin_s = time.monotonic()
    assert time.monotonic() - begin_s < 3 * TIMEOUT_S
    await gone(baseline)
    if not frozen:
        assert await field.tell(sessions=True) <= sessions


@MODES
async def test_a_cancelled_scan_can_be_asked_again(field: Field, mode: str) -> None:
    async with OpcUaDriver("plant", config(field.url, mode=mode)) as driver:
        await values_once(driver, set(EVERY))
        scanning = asyncio.ensure_future(driver.scan())
        await asyncio.sleep(0)
        scanning.cancel()
        await asyncio.wait([scanning])
        assert scanning.cancelled()
        await field.set("Voltage", 241.0, ms=BEGIN_MS + 1)
        assert (await values_once(driver, {"voltage"}))["voltage"] == 241.0


async def test_browsing_lists_nodes_with_type_and_value(field: Field) -> None:
    found = [entry async for entry in browse(field.url, timeout_s=TIMEOUT_S)]
    assert {
        e for e in found if e.node in ("ns=2;s=Voltage", "ns=2;s=On", "ns=2;s=Plant", "ns=2;s=Depth")
    } == {
        Entry(0, "ns=2;s=Voltage", "Voltage", "variable", "Double", "230.5"),
        Entry(0, "ns=2;s=On", "On", "variable", "Boolean", "True"),
        Entry(0, "ns=2;s=Plant", "Plant", "object", "", ""),
        Entry(1, "ns=2;s=Depth", "Depth", "variable", "String", "under a folder"),
    }
    nodes = [entry.node for entry in found]
    assert nodes.index("ns=2;s=Depth") == nodes.index("ns=2;s=Plant") + 1
    assert len(nodes) == len(set(nodes))
    assert not any(entry.depth > 0 and not entry.node.startswith("ns=2;") for entry in found)


async def test_browsing_keeps_to_its_limits(field: Field) -> None:
    assert all([e.depth == 0 async for e in browse(field.url, timeout_s=TIMEOUT_S, depth=1)])
    assert len([e async for e in browse(field.url, timeout_s=TIMEOUT_S, most=4)]) == 4
    own = [e.name async for e in browse(field.url, timeout_s=TIMEOUT_S, start="i=2253", depth=1)]
    assert "ServerStatus" in own


async def test_browsing_what_is_not_there_is_refused(field: Field) -> None:
    baseline = sockets()
    with pytest.raises(Refused) as refused:
        [e async for e in browse(field.url, timeout_s=TIMEOUT_S, start="ns=2;s=Gone")]
    assert refused.value.reason.startswith("node-id-")
    with pytest.raises(ConfigError, match="found 'nonsense'"):
        [e async for e in browse(field.url, timeout_s=TIMEOUT_S, start="nonsense")]
    await gone(baseline)


def edgegw(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgegw", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_browse_command_prints_json_and_a_table(shared_field: Field) -> None:
    if not shared_field.running:
        shared_field.start_now()
    listed = edgegw("browse", shared_field.url, "--json")
    assert listed.returncode == 0
    assert {e["node"]: e["type"] for e in json.loads(listed.stdout)}["ns=2;s=Curve"] == "Double"
    table = edgegw("browse", shared_field.url, "--most", "5")
    assert table.returncode == 0
    assert len(table.stdout.splitlines()) == 6
    assert "only the first 5" in table.stderr


@pytest.mark.parametrize(
    ("device", "word"), [("meter1", "not an OPC UA device"), ("nope", "not in the configuration")]
)
def test_the_browse_command_names_the_devices_that_it_could_list(device: str, word: str) -> None:
    failed = edgegw("browse", device, "-c", str(Path(__file__).parent.parent / "config.example.toml"))
    assert failed.returncode == 2
    assert word in failed.stderr
    assert "expected one of: plant" in failed.stderr


def test_the_browse_command_fails_with_1_when_nobody_answers() -> None:
    failed = edgegw("browse", f"opc.tcp://127.0.0.1:{free_port()}/")
    assert failed.returncode == 1
    assert "connection refused" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_url_without_a_port_means_4840() -> None:
    assert connection._with_port("opc.tcp://[::1]/path") == "opc.tcp://[::1]:4840/path"
    assert connection._with_port("opc.tcp://host:1/") == "opc.tcp://host:1/"


def crowded(room: int) -> None:
    """Have a subscription take so many monitored items and refuse the rest."""
    create = MonitoredItemService.create_monitored_items

    async def limited(self: MonitoredItemService, params: Any) -> list[ua.MonitoredItemCreateResult]:
        free = max(0, room - len(self._monitored_items))
        wanted, params.ItemsToCreate = params.ItemsToCreate, params.ItemsToCreate[:free]
        refused = ua.MonitoredItemCreateResult(
            StatusCode=ua.StatusCode(ua.StatusCodes.BadTooManyMonitoredItems)
        )
        return await create(self, params) + [refused] * (len(wanted) - len(params.ItemsToCreate))

    MonitoredItemService.create_monitored_items = limited  # type: ignore[method-assign]


async def serve(port: int, read_limit: int, items_limit: int, room: int, subscriptions: int) -> None:
    """Be the server: limits are enforced with BadTooManyOperations; commands come as JSON lines."""
    if room:
        crowded(room)
    calls: dict[str, list[int]] = {"read": [], "items": []}

    def limited(name: str, kind: str, limit: int, count: Callable[[Any], int]) -> None:
        original = getattr(InternalSession, name)

        async def method(self: InternalSession, params: Any, *rest: Any) -> Any:
            if self.external:
                calls[kind].append(count(params))
                if limit and count(params) > limit:
                    raise ServiceError(ua.StatusCodes.BadTooManyOperations)
            return await original(self, params, *rest)

        setattr(InternalSession, name, method)

    limited("read", "read", read_limit, lambda params: len(params.NodesToRead))
    limited("create_monitored_items", "items", items_limit, lambda params: len(params.ItemsToCreate))
    server = Server()
    await server.init()
    if subscriptions:
        server.iserver.max_subscriptions = subscriptions
    server.set_endpoint(f"opc.tcp://127.0.0.1:{port}/")
    server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
    space = await server.register_namespace("urn:test")
    for name, limit in (("MaxNodesPerRead", read_limit), ("MaxMonitoredItemsPerCall", items_limit)):
        node = getattr(ua.ObjectIds, f"Server_ServerCapabilities_OperationLimits_{name}")
        await server.get_node(ua.NodeId(node)).write_value(ua.Variant(limit, ua.VariantType.UInt32))

    async def put(node: str, value: Any, kind: str, status: str, ms: int | None) -> None:
        at = None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)
        code = ua.StatusCode(getattr(ua.StatusCodes, status))
        data = ua.DataValue(ua.Variant(value, ua.VariantType[kind]), StatusCode=code, SourceTimestamp=at)
        await server.write_attribute_value(ua.NodeId(node, space), data)

    async def reset() -> None:
        for name, (value, kind) in NODES.items():
            await put(name, value, kind, "Good", BEGIN_MS)
        for sizes in calls.values():
            sizes.clear()

    for name, (value, kind) in NODES.items():
        await server.nodes.objects.add_variable(ua.NodeId(name, space), name, value, ua.VariantType[kind])
    folder = await server.nodes.objects.add_object(ua.NodeId("Plant", space), "Plant")
    await folder.add_variable(ua.NodeId("Depth", space), "Depth", "under a folder")
    await reset()
    async with server:
        print(json.dumps("ready"), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            done: Any = True
            if "set" in command:
                await put(*command["set"])
            elif "reset" in command:
                await reset()
            elif "calls" in command:
                done = calls
            elif "subscriptions" in command:
                done = len(server.iserver.subscription_service.subscriptions)
            elif "sessions" in command:
                done = len(server.iserver._external_sessions)
            elif "hush" in command:
                for silenced in server.iserver.subscription_service.subscriptions.values():
                    await silenced.stop()
            elif "forget" in command:
                service = server.iserver.subscription_service
                await service.delete_subscriptions(list(service.subscriptions))
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(*map(int, sys.argv[1:])))
