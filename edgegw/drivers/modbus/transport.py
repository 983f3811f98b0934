"""Transports: how a request's bytes reach a unit and the answer's come back.

TCP has a lean protocol of its own over pymodbus's framer, since transaction ids let several requests be on the
way and tell every answer's request. TLS, RTU over TCP and serial lines use pymodbus's clients, strictly one
request at a time; where no transaction id tells a late answer from a wanted one, a timeout ends the connection.
"""

import asyncio
import logging
import ssl
from collections import deque
from typing import Any, Protocol, cast
from urllib.parse import parse_qs, urlsplit

from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient, AsyncModbusTlsClient
from pymodbus.exceptions import ModbusException
from pymodbus.framer import FramerSocket, FramerType
from pymodbus.pdu import DecodePDU, ModbusPDU

from edgegw.errors import BadAnswer, DeviceError, NoAnswer, NotConnected, Spoilt

logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # what goes wrong is said once, by the scanner

TURN_S = 0.2
"""How long a request on a shared connection keeps the others waiting."""

_HEADER = 7
_LONGEST = 254  # unit and PDU, the length field of an MBAP header (Messaging on TCP/IP 1.0b, 3.1.3)


class Transport(Protocol):
    """A connection to one endpoint, shared by the units behind it."""

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        ...

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        ...

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        ...

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        ...


def open_transport(url: str) -> Transport:
    """Return the transport for a device's url."""
    scheme = urlsplit(url).scheme
    return TcpTransport(url) if scheme == "tcp" else ClientTransport(url)


class TcpTransport:
    """Modbus/TCP: any number of requests on the way, told apart by their transaction ids."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 502
        self._wire: _Wire | None = None

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        return self._wire is not None and self._wire.open

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, self._wire = await loop.create_connection(_Wire, self._host, self._port)
        except TimeoutError:
            raise NotConnected("unreachable", f"no connection in {timeout_s} s") from None
        except ConnectionRefusedError:
            raise NotConnected(
                "refused", "connection refused; is it switched on, and is the port right?"
            ) from None
        except OSError as error:
            raise NotConnected("unreachable", (error.strerror or str(error)).lower()) from None

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        if self._wire is None:
            raise NotConnected("not-connected", "no connection")
        return await self._wire.call(unit, pdu, timeout_s)

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.fail(NotConnected("closed", "the connection was closed"))


class _Wire(asyncio.Protocol):
    """One TCP connection. Frames are cut by pymodbus's framer; whatever is no frame ends the connection.

    Requests take turns, since many a gateway minds more than one at a time. A turn ends with the answer, or
    after TURN_S so that a silent unit does not hold up its neighbours; one that was silent last time has none.
    A frame that stays in pieces ends the connection too: the next answer's bytes would complete it.
    """

    def __init__(self) -> None:
        self.open = False
        self._framer = FramerSocket(DecodePDU(is_server=False))
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._tid = 0
        self._waiting: dict[int, tuple[int, asyncio.Future[bytes]]] = {}
        self._holder = 0
        self._held_since = 0.0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._silent: set[int] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(NotConnected("connection-lost", "the device closed the connection"))

    def data_received(self, data: bytes) -> None:
        if self._buffer and len(self._waiting) > 1:
            self.fail(Spoilt("garbage", "an answer came in pieces while others were on the way"))
            return
        buffer = self._buffer + data if self._buffer else data
        while len(buffer) >= _HEADER:
            length = int.from_bytes(buffer[4:6], "big")
            if buffer[2:4] != b"\0\0" or not 2 < length <= _LONGEST:
                self.fail(Spoilt("garbage", f"what came is not Modbus/TCP: {buffer[:8].hex(' ')}"))
                return
            if len(buffer) < 6 + length:
                break
            used, unit, tid, pdu = self._framer.decode(buffer[: 6 + length])
            buffer = buffer[used:]
            self._answered(tid, unit, pdu)
        self._buffer = buffer

    def _answered(self, tid: int, unit: int, pdu: bytes) -> None:
        asked = self._waiting.get(tid)
        if asked is None or asked[1].done():
            return  # its request was given up: it answers nothing any more
        asked_unit, answer = asked
        if unit != asked_unit:
            answer.set_exception(BadAnswer("wrong-unit", f"unit {unit} answered; expected {asked_unit}"))
        else:
            answer.set_result(pdu)

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        if self._holder:
            await self._turn()
        if not self.open or self._transport is None:
            raise NotConnected("connection-lost", "the connection is gone; a new one is being tried")
        self._tid = tid = self._tid % 0xFFFF + 1
        if tid in self._waiting:
            raise NoAnswer("overrun", "65535 requests are on the way")
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting[tid] = (unit, answer)
        timer = self._loop.call_later(timeout_s, self._expire, unit, answer, timeout_s)
        if unit not in self._silent:
            self._holder = tid
            self._held_since = self._loop.time()
        try:
            self._transport.write(self._framer.encode(pdu, unit, tid))
            got = await answer
            self._silent.discard(unit)
            return got
        finally:
            timer.cancel()
            del self._waiting[tid]
            self._pass_on(tid)

    async def _turn(self) -> None:
        """Wait until whoever holds the turn is answered or has held it long enough."""
        while self._holder:
            left_s = self._held_since + TURN_S - self._loop.time()
            if left_s <= 0:
                self._holder = 0
                return
            mine: asyncio.Future[None] = self._loop.create_future()
            self._queue.append(mine)
            timer = self._loop.call_later(left_s, _wake, mine)
            try:
                await mine
            finally:
                timer.cancel()

    def _pass_on(self, tid: int) -> None:
        """End the turn of this request, if it still has it; the next in the queue may go."""
        if self._holder != tid:
            return
        self._holder = 0
        while self._queue:
            following = self._queue.popleft()
            if not following.done():
                following.set_result(None)
                return

    def _expire(self, unit: int, answer: asyncio.Future[bytes], timeout_s: float) -> None:
        if answer.done():
            return
        self._silent.add(unit)
        answer.set_exception(NoAnswer("timeout", f"no answer in {timeout_s} s"))
        if self._buffer:
            self.fail(Spoilt("garbage", "an answer ended in the middle"))

    def fail(self, error: DeviceError) -> None:
        """End the connection; every request on the way gets the error."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()
        for _, answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class _RawRequest(ModbusPDU):
    """A request whose bytes are already there."""

    def __init__(self, unit: int, pdu: bytes) -> None:
        super().__init__(dev_id=unit)
        self.function_code = pdu[0]
        self._rest = pdu[1:]

    def encode(self) -> bytes:
        return self._rest


def _raw_response(function: int) -> type[ModbusPDU]:
    """Return a response class that keeps the bytes as they came, for pymodbus to decode nothing one by one."""

    class RawResponse(ModbusPDU):
        function_code = function
        rtu_byte_count_pos = 2 if function <= 4 else 0
        rtu_frame_size = 0 if function <= 4 else 8
        body = b""

        def decode(self, data: bytes) -> None:
            self.body = data

    return RawResponse


class ClientTransport:
    """TLS, RTU over TCP and serial lines through pymodbus's clients, one request at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Any = None
        self._turn = asyncio.Lock()
        self._late_until = 0.0
        self._has_ids = urlsplit(url).scheme == "tls"

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        return self._client is not None and bool(self._client.connected)

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected. After a timeout it first waits until a late answer can be late no more."""
        loop = asyncio.get_running_loop()
        if (wait_s := self._late_until - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        self.close()
        client = _client(self._url, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                done = await client.connect()
        except (TimeoutError, OSError, ModbusException) as error:
            client.close()
            raise NotConnected(
                "unreachable", str(error).lower() or f"no connection in {timeout_s} s"
            ) from None
        if not done:
            client.close()
            raise NotConnected("refused", "no connection; is it switched on, and is the address right?")
        self._client = client

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        async with self._turn:
            client = self._client
            if client is None or not client.connected:
                raise NotConnected("not-connected", "no connection")
            client.ctx.comm_params.timeout_connect = timeout_s
            try:
                response = await client.execute(False, _RawRequest(unit, pdu))
            except ModbusException as error:
                if not self._has_ids:
                    self._late_until = asyncio.get_running_loop().time() + timeout_s
                self.close()
                if "No response" in str(error):
                    raise NoAnswer("timeout", f"no answer in {timeout_s} s") from None
                raise BadAnswer("garbage", str(error).lower()) from None
            if response.isError():
                return bytes((response.function_code, response.exception_code))
            return bytes((response.function_code,)) + bytes(response.body)

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


def _client(url: str, timeout_s: float) -> Any:
    parts = urlsplit(url)
    common: dict[str, Any] = {"timeout": timeout_s, "retries": 0, "reconnect_delay": 0, "name": "edgegw"}
    client: Any
    if parts.scheme == "serial":
        options = {key: found[-1] for key, found in parse_qs(parts.query).items()}
        client = AsyncModbusSerialClient(
            parts.path,
            framer=FramerType.RTU,
            baudrate=int(options.get("baudrate", 9600)),
            bytesize=int(options.get("bytesize", 8)),
            parity=options.get("parity", "N"),
            stopbits=int(options.get("stopbits", 1)),
            **common,
        )
    elif parts.scheme == "rtu+tcp":
        client = AsyncModbusTcpClient(
            parts.hostname or "", port=parts.port or 502, framer=FramerType.RTU, **common
        )
    else:
        client = AsyncModbusTlsClient(
            parts.hostname or "", port=parts.port or 802, sslctx=ssl.create_default_context(), **common
        )
    for function in (1, 2, 3, 4, 5, 6, 15, 16):
        client.register(_raw_response(function))
    return client
