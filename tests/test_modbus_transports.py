"""The other ways to a device: RTU over TCP, serial lines and TLS, against pymodbus's servers and a mean line."""

import asyncio
import datetime
import ipaddress
import os
import random
import ssl
import time
import tty
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from field import field, frame
from gateway_rig import until
from pymodbus.framer import FramerType
from pymodbus.server import ModbusSerialServer, ModbusTcpServer, ModbusTlsServer
from rig import free_port
from test_modbus_driver import (
    FAR,
    TABLE_TAGS,
    TABLE_VALUES,
    TABLES,
    after_reconnecting,
    config,
    drivers,
    registers,
    scanned,
)

from edgegw.errors import BadAnswer, DeviceError, NoAnswer, NotConnected

TIMEOUT_S = 0.12
Answer = Callable[[int, bytes], Awaitable[bytes | None]]
"""(unit, request PDU) to the bytes to send, None for silence."""


def rtu(unit: int, pdu: bytes) -> bytes:
    """Return an RTU frame (Modbus over Serial Line 1.02, 2.5.1; the CRC of 6.2.2 bit by bit)."""
    data = bytes((unit,)) + pdu
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return data + crc.to_bytes(2, "little")


class Line:
    """The far end of a serial line: answers reads with the number of the request, unless a unit is told otherwise."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connections = 0
        self.asked: dict[int, list[float]] = defaultdict(list)
        self.behave: dict[int, Answer] = {}
        self.open = self.most = 0
        self.send: Callable[[bytes], Any] = lambda data: None
        self._heard = b""
        self._tasks: set[asyncio.Task[None]] = set()

    async def well(self, unit: int, pdu: bytes) -> bytes:
        """Answer as a healthy device does."""
        size = pdu[4] * 2
        return rtu(unit, bytes((pdu[0], size)) + len(self.asked[unit]).to_bytes(size, "big"))

    async def silent(self, unit: int, pdu: bytes) -> None:
        """Never answer."""

    def late(self, delay_s: float) -> Answer:
        """Return a right answer, made now, that comes late."""

        async def answer(unit: int, pdu: bytes) -> bytes:
            made = await self.well(unit, pdu)
            await asyncio.sleep(delay_s)
            return made

        return answer

    def hear(self, data: bytes) -> None:
        """Take what came; a read request has eight bytes."""
        self._heard += data
        while len(self._heard) >= 8:
            request, self._heard = self._heard[:8], self._heard[8:]
            assert rtu(request[0], request[1:6]) == request
            self.asked[request[0]].append(time.monotonic())
            task = asyncio.create_task(self._answer(request[0], request[1:6]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, unit: int, pdu: bytes) -> None:
        self.open += 1
        self.most = max(self.most, self.open)
        answer = await self.behave.get(unit, self.well)(unit, pdu)
        self.open -= 1
        if answer is not None:
            self.send(answer)

    async def end(self) -> None:
        """Forget every answer that is still to come."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def over_tcp(folder: Path, port: int = 0) -> AsyncIterator[Line]:
    """Run a line behind a converter that passes every answer to whoever is connected by then."""
    port = port or free_port()
    line = Line(f"rtu+tcp://127.0.0.1:{port}")
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line.connections += 1
        writers.add(writer)
        try:
            while data := await reader.read(100):
                line.hear(data)
        except OSError:
            pass
        finally:
            writers.discard(writer)
            writer.close()

    line.send = lambda data: [writer.write(data) for writer in writers]
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield line
    finally:
        await line.end()
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()


@asynccontextmanager
async def over_serial(folder: Path, port: int = 0) -> AsyncIterator[Line]:
    """Run a line on a pseudo terminal, always behind the same path."""
    far, near = os.openpty()
    tty.setraw(near)
    path = folder / "ttyUSB0"
    path.unlink(missing_ok=True)
    path.symlink_to(os.ttyname(near))
    os.close(near)
    keep = os.open(path, os.O_RDWR | os.O_NOCTTY)  # without any user the terminal would hang up
    line = Line(f"serial://{path}?baudrate=115200")
    line.send = lambda data: os.write(far, data)
    loop = asyncio.get_running_loop()
    loop.add_reader(far, lambda: line.hear(os.read(far, 100)))
    try:
        yield line
    finally:
        await line.end()
        loop.remove_reader(far)
        os.close(far)
        os.close(keep)


@pytest.fixture(params=[over_tcp, over_serial], ids=["rtu+tcp", "serial"])
def lines(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Both kinds of line."""
    return request.param  # type: ignore[no-any-return]


def on(line: Line, tags: Any = None, **keys: Any) -> Any:
    """Return the configuration of a device on a line."""
    keys = {"timeout": f"{TIMEOUT_S * 1000:.0f}ms"} | keys
    return config(line.url, **keys) if tags is None else config(line.url, tags, **keys)


# ---- against pymodbus's servers, on both event loops


@asynccontextmanager
async def rtu_tcp_server(folder: Path) -> AsyncIterator[str]:
    port = free_port()
    server = ModbusTcpServer(TABLES, address=("127.0.0.1", port), framer=FramerType.RTU)
    await server.serve_forever(background=True)
    try:
        yield f"rtu+tcp://127.0.0.1:{port}"
    finally:
        await server.shutdown()


@asynccontextmanager
async def serial_server(folder: Path) -> AsyncIterator[str]:
    """Run pymodbus's serial server on one pseudo terminal, and join that to another."""
    pairs = [os.openpty(), os.openpty()]
    loop = asyncio.get_running_loop()
    for (far, near), (other, _) in (pairs, pairs[::-1]):
        tty.setraw(near)
        loop.add_reader(far, lambda far=far, other=other: os.write(other, os.read(far, 300)))
    server = ModbusSerialServer(TABLES, port=os.ttyname(pairs[0][1]), baudrate=115200)
    await server.serve_forever(background=True)
    try:
        yield f"serial://{os.ttyname(pairs[1][1])}?baudrate=115200&parity=N&bytesize=8&stopbits=1"
    finally:
        await server.shutdown()
        for far, near in pairs:
            loop.remove_reader(far)
            os.close(far)
            os.close(near)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("server", [rtu_tcp_server, serial_server])
def test_all_four_tables_of_a_real_rtu_server(
    tmp_path: Path, server: Callable[[Path], Any], run: Callable[[Any], Any]
) -> None:
    async def story() -> None:
        async with server(tmp_path) as url, drivers(config(url, TABLE_TAGS, timeout="1s")) as (driver,):
            for _ in range(3):
                scan = await scanned(driver)
                assert scan.values == TABLE_VALUES
                assert scan.quality is None

    run(story())


async def test_a_real_rtu_servers_refusal(tmp_path: Path) -> None:
    tags = {
        "fine": {"address": "holding:0", "type": "uint16"},
        "hole": {"address": "holding:9", "type": "uint16"},
    }
    async with rtu_tcp_server(tmp_path) as url, drivers(config(url, tags, timeout="1s")) as (driver,):
        for _ in range(2):
            assert (await scanned(driver)).quality == {"hole": "bad:illegal-address"}


# ---- a line that misbehaves


async def test_units_on_a_line_share_it_one_request_at_a_time(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    async with lines(tmp_path) as line:
        line.behave.update(dict.fromkeys((1, 2, 3), line.late(0.003)))
        async with drivers(*(on(line, FAR, unit=unit) for unit in (1, 2, 3))) as three:
            for _ in range(2):
                scans = await asyncio.gather(*(scanned(driver) for driver in three))
                assert all(len(scan.values) == 5 for scan in scans)
        assert line.most == 1
        assert line.connections in (0, 1)


async def test_a_late_answer_is_never_taken_for_the_next_ones(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    """It comes after its time-out, before, while or after the unit is asked again: each value is the asked one."""
    async with lines(tmp_path) as line, drivers(on(line)) as (driver,):
        assert (await scanned(driver)).values == {"n": 1}
        for n, late_s in enumerate((1.1, 1.5, 1.9)):
            line.behave[1] = line.late(TIMEOUT_S * late_s)
            with pytest.raises(NoAnswer, match=r"no answer in 0\.12 s") as caught:
                await scanned(driver)
            assert caught.value.reason == "timeout"
            del line.behave[1]
            asked = len(line.asked[1])
            assert (await scanned(driver)).values == {"n": asked + 1}
            assert (await scanned(driver)).values == {"n": asked + 2}, n


async def test_a_late_answer_is_never_taken_for_a_neighbours(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    async with lines(tmp_path) as line, drivers(on(line, unit=1), on(line, unit=2)) as (late, other):
        await scanned(late)
        line.behave[1] = line.late(TIMEOUT_S * 1.2)
        line.behave[2] = line.late(TIMEOUT_S * 0.6)  # the late answer comes while this one is awaited
        with pytest.raises(NoAnswer):
            await scanned(late)
        assert (await scanned(other)).values == {"n": 1}


async def test_the_answer_to_a_cancelled_request_is_not_the_next_ones(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    """A device is taken out of the configuration, or changed, while its neighbour's readings go on."""
    async with lines(tmp_path) as line, drivers(on(line), on(line, unit=2)) as (driver, other):
        await scanned(driver)
        line.behave[1] = line.late(TIMEOUT_S * 0.5)
        scan = asyncio.create_task(driver.scan())
        await until(lambda: len(line.asked[1]) == 2, "the request")
        scan.cancel()
        await asyncio.wait([scan])
        assert scan.cancelled()
        del line.behave[1]
        assert (await scanned(other)).values == {"n": 1}
        assert (await scanned(driver)).values == {"n": 3}


async def test_a_scan_can_be_cancelled_at_any_moment(tmp_path: Path, lines: Callable[..., Any]) -> None:
    """Also in the very moment that the connection is made or the answer comes."""
    async with lines(tmp_path) as line:
        for steps in range(25):
            async with asyncio.timeout(5), drivers(on(line, FAR, timeout="10ms")) as (driver,):
                scan = asyncio.create_task(driver.scan())
                for _ in range(steps):
                    await asyncio.sleep(0)
                scan.cancel()
                await asyncio.wait([scan])  # on a busy machine the time-out may have been quicker
                assert scan.cancelled() or isinstance(scan.exception(), DeviceError), steps
                assert len((await after_reconnecting(driver)).values) == 5


async def test_a_silent_unit_costs_its_neighbours_its_own_time_out_only(
    tmp_path: Path, lines: Callable[..., Any]
) -> None:
    async with lines(tmp_path) as line, drivers(on(line, unit=1), on(line, unit=9)) as (well, mute):
        await scanned(well)
        line.behave[9] = line.silent
        began_s = time.monotonic()
        asked = asyncio.create_task(scanned(mute))
        await until(lambda: line.asked[9], "the silent unit to be asked")
        assert (await scanned(well)).values == {"n": 2}
        assert time.monotonic() - began_s < TIMEOUT_S * 1.7, "the neighbour waited for what it need not"
        await asyncio.wait([asked])
        assert isinstance(asked.exception(), NoAnswer)
        with pytest.raises(NoAnswer, match="not asked for another"):
            await scanned(mute)
        assert len(line.asked[9]) == 1
        with pytest.raises(NoAnswer):
            await mute._ask(await mute._ready(), mute._reads[0])
        first, second = line.asked[9]
        assert second - first >= TIMEOUT_S * 1.95, "asked while its late answer might still come"


LIES: dict[str, tuple[Callable[[int, bytes], bytes], str]] = {
    "wrong unit": (lambda unit, pdu: rtu(unit + 1, b"\x03\x04\xde\xad\xbe\xef"), "timeout"),
    "wrong function": (lambda unit, pdu: rtu(unit, b"\x04\x04\xde\xad\xbe\xef"), "wrong-function"),
    "wrong length": (lambda unit, pdu: rtu(unit, b"\x03\x02\xde\xad"), "wrong-length"),
    "wrong checksum": (lambda unit, pdu: rtu(unit, b"\x03\x04\xde\xad\xbe\xef")[:-1] + b"\x55", "timeout"),
    "half a frame": (lambda unit, pdu: rtu(unit, b"\x03\x04\xde\xad\xbe\xef")[:5], "timeout"),
    "noise": (lambda unit, pdu: bytes(range(0, 250, 7)), "timeout"),
    "ones": (lambda unit, pdu: b"\xff" * 30, "timeout"),
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_what_does_not_answer_the_question_is_not_an_answer(
    tmp_path: Path, lines: Callable[..., Any], lie: str
) -> None:
    tell, reason = LIES[lie]

    async def answer(unit: int, pdu: bytes) -> bytes:
        return tell(unit, pdu)

    async with lines(tmp_path) as line, drivers(on(line, timeout="60ms")) as (driver,):
        line.behave[1] = answer
        with pytest.raises((BadAnswer, NoAnswer)) as caught:
            await scanned(driver)
        assert caught.value.reason == reason
        del line.behave[1]
        assert (await scanned(driver)).values == {"n": 2}


@pytest.mark.parametrize("seed", range(3))
async def test_noise_of_any_kind_is_survived(tmp_path: Path, lines: Callable[..., Any], seed: int) -> None:
    """Random bytes for an answer give a device error, and the next answer is read."""
    chance = random.Random(seed)

    async def noise(unit: int, pdu: bytes) -> bytes:
        return chance.randbytes(chance.randint(1, 300))

    async with lines(tmp_path) as line, drivers(on(line, timeout="15ms")) as (driver,):
        await after_reconnecting(driver)
        for _ in range(10):
            line.behave[1] = noise
            with pytest.raises(DeviceError):
                await scanned(driver)
            del line.behave[1]
            assert (await after_reconnecting(driver)).values == {"n": len(line.asked[1])}


@pytest.mark.parametrize(("code", "reason"), [(2, "illegal-address"), (6, "busy")])
async def test_a_refusal_makes_the_tag_bad(
    tmp_path: Path, lines: Callable[..., Any], code: int, reason: str
) -> None:
    async def refuse(unit: int, pdu: bytes) -> bytes:
        return rtu(unit, bytes((pdu[0] | 0x80, code)))

    async with lines(tmp_path) as line, drivers(on(line)) as (driver,):
        line.behave[1] = refuse
        assert (await scanned(driver)).quality == {"n": f"bad:{reason}"}
        del line.behave[1]
        assert (await scanned(driver)).values == {"n": 2}


async def test_a_line_that_goes_away_and_comes_back(tmp_path: Path, lines: Callable[..., Any]) -> None:
    """A converter that restarts, an adapter that is pulled out and put in again."""
    port = free_port()
    async with lines(tmp_path, port) as line:
        both = (on(line), on(line, unit=2))
    async with drivers(*both) as (driver, other):
        with pytest.raises(NotConnected):
            await scanned(driver)
        async with lines(tmp_path, port) as line:
            assert (await after_reconnecting(driver)).values == {"n": 1}
            assert (await after_reconnecting(other)).values == {"n": 1}
        for _ in range(2):
            with pytest.raises(DeviceError):
                await scanned(driver)
        async with lines(tmp_path, port) as line:
            assert (await after_reconnecting(driver)).values["n"] >= 1
            assert (await after_reconnecting(other)).values["n"] >= 1


# ---- TLS


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site CA")])
        self.file = folder / "ca.pem"
        certificate = self._sign(self._name, self._key.public_key(), x509.BasicConstraints(True, None))
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, subject: x509.Name, key: Any, *extensions: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject).issuer_name(self._name).public_key(key).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        )  # fmt: skip
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())

    def server(self, address: str) -> ssl.SSLContext:
        """Return the context of a server whose certificate bears this address."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meter")])
        path = self._folder / f"{address}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + self._sign(subject, key.public_key(), names).public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that SSL_CERT_FILE names."""
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.file))
    return made


@asynccontextmanager
async def tls_server(
    devices: Any, context: ssl.SSLContext, port: int = 0
) -> AsyncIterator[tuple[str, list[bool], list[Any]]]:
    """Run pymodbus's TLS server; yield its url, what came and went of connections, and every request."""
    port = port or free_port()
    seen: list[bool] = []
    requests: list[Any] = []

    def saw(sending: bool, pdu: Any) -> Any:
        if not sending:
            requests.append(pdu)
        return pdu

    server = ModbusTlsServer(
        devices, address=("127.0.0.1", port), sslctx=context, trace_connect=seen.append, trace_pdu=saw
    )
    await server.serve_forever(background=True)
    try:
        yield f"tls://127.0.0.1:{port}", seen, requests
    finally:
        await server.shutdown()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_all_four_tables_over_tls(authority: Authority, run: Callable[[Any], Any]) -> None:
    async def story() -> None:
        async with (
            tls_server(TABLES, authority.server("127.0.0.1")) as (url, _, _),
            drivers(config(url, TABLE_TAGS, timeout="2s")) as (driver,),
        ):
            for _ in range(3):
                assert (await scanned(driver)).values == TABLE_VALUES

    run(story())


async def test_units_behind_tls_share_one_connection_and_come_back_after_a_restart(
    authority: Authority,
) -> None:
    port = free_port()
    context = authority.server("127.0.0.1")
    devices = [registers(1, 0, 1), registers(2, 0, 2)]
    async with tls_server(devices, context, port) as (url, seen, _):
        made = (config(url, timeout="2s"), config(url, unit=2, timeout="2s"))
        async with drivers(*made) as both:
            for _ in range(2):
                scans = await asyncio.gather(*(scanned(driver) for driver in both))
                assert [scan.values["n"] for scan in scans] == [1, 2]
            assert seen == [True]
    async with drivers(*made) as both:
        with pytest.raises(NotConnected):
            await scanned(both[0])
        async with tls_server(devices, context, port) as (_, seen, _):
            assert [(await after_reconnecting(driver)).values["n"] for driver in both] == [1, 2]
            assert seen == [True]


async def test_a_device_of_another_authority_is_not_asked(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path / "other").file))
    async with tls_server(registers(1, 0, 1), authority.server("127.0.0.1")) as (url, _, requests):
        async with drivers(config(url, timeout="2s")) as (driver,):
            with pytest.raises(NotConnected, match=r"certificate refused: .*SSL_CERT_FILE") as caught:
                await scanned(driver)
        assert caught.value.reason == "not-trusted"
        assert requests == []


async def test_a_device_of_another_name_is_not_asked(authority: Authority) -> None:
    async with tls_server(registers(1, 0, 1), authority.server("127.0.0.2")) as (url, _, requests):
        async with drivers(config(url, timeout="2s")) as (driver,):
            with pytest.raises(NotConnected, match=r"certificate refused: IP address mismatch") as caught:
                await scanned(driver)
        assert caught.value.reason == "not-trusted"
        assert requests == []


@pytest.mark.parametrize("answer", [b"220 hello\r\n", b""], ids=["another protocol", "silence"])
async def test_a_port_that_does_not_speak_tls_is_an_error_in_time(
    authority: Authority, answer: bytes
) -> None:
    async def mumble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        while await reader.read(100):
            pass
        writer.close()

    server = await asyncio.start_server(mumble, "127.0.0.1", 0)
    url = f"tls://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with drivers(config(url, timeout="300ms")) as (driver,):
        began_s = time.monotonic()
        with pytest.raises(NotConnected) as caught:
            await scanned(driver)
        assert caught.value.reason == "unreachable"
        assert time.monotonic() - began_s < 1.0
    server.close()


# ---- a gateway that passes on what it hears, piece by piece


async def test_a_gateway_that_cuts_answers_in_pieces_may_have_a_silent_unit() -> None:
    """The pieces of an answer belong together, also where another unit's answer may still come."""
    async with field() as made:

        async def in_two(tid: int, unit: int, pdu: bytes) -> bytes:
            whole = await made.well(tid, unit, pdu)
            (writer,) = made._writers
            writer.write(whole[:8])
            await asyncio.sleep(0.005)
            return whole[8:]

        made.behave.update({1: in_two, 9: made.silent})
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url), config(url, unit=9, timeout="100ms")) as (well, mute):
            await scanned(well)
            with pytest.raises(NoAnswer):
                await scanned(mute)
            for n in range(2, 8):
                assert (await scanned(well)).values == {"n": n}
        assert made.connections == 1


async def test_half_an_answer_is_not_completed_by_another_units() -> None:
    async with field() as made:

        async def half(tid: int, unit: int, pdu: bytes) -> bytes:
            return frame(tid, unit, b"\x03\x04\xde\xad\xbe\xef")[:9]

        made.behave[9] = half
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url), config(url, unit=9, timeout="1s")) as (well, mean):
            await scanned(well)
            began_s = time.monotonic()
            scans = [asyncio.create_task(scanned(driver)) for driver in (mean, well)]
            await asyncio.wait(scans)
            assert isinstance(scans[0].exception(), DeviceError)
            assert scans[1].result().values["n"] in (2, 3)
            assert time.monotonic() - began_s < 2.5
