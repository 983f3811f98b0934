"""Transports: how a request's bytes reach a unit and the answer's come back.

TCP, plain or in TLS, has a lean protocol of its own over pymodbus's framer, since transaction ids let several
requests be on the way and tell every answer's request. RTU over TCP and serial lines use pymodbus's clients,
strictly one request at a time, since no transaction id tells a late answer from a wanted one.
"""

import asyncio
import logging
import ssl
import struct
from collections import deque
from collections.abc import Awaitable
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import parse_qs, urlsplit

from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient
from pymodbus.exceptions import ModbusException
from pymodbus.framer import FramerSocket, FramerType
from pymodbus.pdu import DecodePDU, ModbusPDU

from edgegw.drivers import delivery
from edgegw.errors import BadAnswer, DeviceError, NoAnswer, NotConnected, NotSent, Spoilt

logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # what goes wrong is said once, by the scanner

TURN_S = 0.2
"""How long a request on a shared connection keeps the others waiting."""

MUTE = 3
"""Requests in a row without any answer after which a connection is taken for dead: it may well be half open."""

_HANDED_OVER = -1
"""Holds the turn, in place of a transaction id, until the next in the queue has come to take it."""

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

    def call(self, unit: int, pdu: bytes, timeout_s: float) -> Awaitable[bytes]:
        """Send a request PDU and return the PDU that answers it; raise DeviceError, NotSent if nothing went out."""
        ...

    def recall(self) -> None:
        """Have nothing that was sent and has not been delivered arrive later, at the price of the connection."""
        ...

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        ...


def open_transport(url: str) -> Transport:
    """Return the transport for a device's url."""
    return TcpTransport(url) if urlsplit(url).scheme in ("tcp", "tls") else RtuTransport(url)


class TcpTransport:
    """Modbus/TCP, plain or in TLS: any number of requests on the way, told apart by their transaction ids.

    TLS verifies the device's certificate and name against the system's store, or what SSL_CERT_FILE names.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "tls"
        self._host, self._port = parts.hostname or "", parts.port or (802 if self._tls else 502)
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
                context = ssl.create_default_context() if self._tls else None
                _, self._wire = await loop.create_connection(_Wire, self._host, self._port, ssl=context)
        except TimeoutError:
            raise NotConnected("unreachable", f"no connection in {timeout_s} s") from None
        except ConnectionRefusedError:
            raise NotConnected(
                "refused", "connection refused; is it switched on, and is the port right?"
            ) from None
        except ssl.SSLCertVerificationError as error:
            raise NotConnected(
                "not-trusted",
                f"certificate refused: {error.verify_message}; is its CA in the system's store or in SSL_CERT_FILE?",
            ) from None
        except OSError as error:
            raise NotConnected("unreachable", (error.strerror or str(error)).lower()) from None

    def call(self, unit: int, pdu: bytes, timeout_s: float) -> Awaitable[bytes]:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        if self._wire is None:
            raise NotSent("not-connected", "no connection")
        return self._wire.call(unit, pdu, timeout_s)

    def recall(self) -> None:
        """End the connection if what was sent on it is not delivered."""
        if self._wire is not None:
            self._wire.recall()

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.fail(NotConnected("closed", "the connection was closed"))


class _Asked(NamedTuple):
    """A request on the way, and when it is overdue by the loop's clock."""

    unit: int
    answer: asyncio.Future[bytes]
    due_s: float
    timeout_s: float


class _Wire(asyncio.Protocol):
    """One TCP connection. Frames are cut by pymodbus's framer; whatever is no frame ends the connection.

    Requests take turns, since many a gateway minds more than one at a time. A turn ends with the answer, or
    after TURN_S so that a silent unit does not hold up its neighbours; one that was silent last time has none.
    A frame that stays in pieces ends the connection too: the next answer's bytes would complete it. And so does
    silence to MUTE requests in a row.
    """

    def __init__(self) -> None:
        self.open = False
        self._framer = FramerSocket(DecodePDU(is_server=False))
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._tid = 0
        self._waiting: dict[int, _Asked] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = 0.0
        self._holder = 0
        self._held_since = 0.0
        self._queue: deque[asyncio.Future[bool]] = deque()
        self._silent: set[int] = set()
        self._unanswered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(NotConnected("connection-lost", "the device closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        if self._buffer and self._begins_an_answer(data):
            self.fail(Spoilt("garbage", "an answer ended in the middle of another's"))
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

    def _begins_an_answer(self, data: bytes) -> bool:
        """Tell whether what should complete a frame looks like the beginning of another request's answer."""
        partial = int.from_bytes(self._buffer[:2], "big") if len(self._buffer) > 1 else None
        return any(
            tid != partial
            and (struct.pack(">HH", tid, 0) + data[4:6] + bytes((unit,))).startswith(data[:_HEADER])
            for tid, (unit, *_) in self._waiting.items()
        )

    def _answered(self, tid: int, unit: int, pdu: bytes) -> None:
        asked = self._waiting.get(tid)
        if asked is None or asked.answer.done():
            return  # its request was given up: it answers nothing any more
        if unit != asked.unit:
            wrong = f"unit {unit} answered; expected {asked.unit}"
            asked.answer.set_exception(BadAnswer("wrong-unit", wrong))
        else:
            asked.answer.set_result(pdu)

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        if self._holder:
            await self._turn()
        if not self.open or self._transport is None:
            self._pass_on()
            raise NotSent("connection-lost", "the connection is gone; a new one is being tried")
        self._tid = tid = self._tid % 0xFFFF + 1
        if tid in self._waiting:
            self._pass_on()
            raise NoAnswer("overrun", "65535 requests are on the way")
        answer: asyncio.Future[bytes] = self._loop.create_future()
        now_s = self._loop.time()
        self._waiting[tid] = _Asked(unit, answer, now_s + timeout_s, timeout_s)
        if self._alarm is None or now_s + timeout_s < self._alarm_s:
            self._set_alarm(now_s + timeout_s)
        if unit in self._silent:
            self._pass_on()
        else:
            self._holder = tid
            self._held_since = now_s
        try:
            self._transport.write(self._framer.encode(pdu, unit, tid))
            got = await answer
            self._silent.discard(unit)
            return got
        finally:
            del self._waiting[tid]
            if self._holder == tid:
                self._pass_on()

    async def _turn(self) -> None:
        """Wait until the turn is handed over, or whoever holds it has held it long enough."""
        while self._holder and (left_s := self._held_since + TURN_S - self._loop.time()) > 0:
            mine: asyncio.Future[bool] = self._loop.create_future()
            self._queue.append(mine)
            timer = self._loop.call_later(left_s, _wake, mine)
            try:
                if await mine:
                    return
            except asyncio.CancelledError:
                if not mine.cancelled() and mine.result():
                    self._pass_on()
                raise
            finally:
                timer.cancel()

    def _pass_on(self) -> None:
        """Hand the turn to the next in the queue; nobody who comes meanwhile can take it."""
        self._holder = 0
        while self._queue:
            following = self._queue.popleft()
            if not following.done():
                self._holder = _HANDED_OVER
                self._held_since = self._loop.time()
                following.set_result(True)
                return

    def _set_alarm(self, at_s: float) -> None:
        """Look for what is overdue then: one timer for the wire, since one for each request costs 3 % of all."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm, self._alarm_s = self._loop.call_at(at_s, self._look), at_s

    def _look(self) -> None:
        self._alarm = None
        now_s = self._loop.time()
        for unit, answer, due_s, timeout_s in list(self._waiting.values()):
            if due_s <= now_s and not answer.done():
                self._expire(unit, answer, timeout_s)
        later = [asked.due_s for asked in self._waiting.values() if asked.due_s > now_s]
        if later:
            self._set_alarm(min(later))

    def _expire(self, unit: int, answer: asyncio.Future[bytes], timeout_s: float) -> None:
        self._silent.add(unit)
        self._unanswered += 1
        answer.set_exception(NoAnswer("timeout", f"no answer in {timeout_s} s"))
        if self._buffer:
            self.fail(Spoilt("garbage", "an answer ended in the middle"))
        elif self._unanswered >= MUTE:
            self.fail(
                NotConnected("timeout", f"nothing came back for {MUTE} requests; the connection is made anew")
            )

    def recall(self) -> None:
        if self.open and self._transport is not None and delivery.undelivered(self._transport):
            self.fail(NotConnected("timeout", "nothing is taken any more; the connection is made anew"))

    def fail(self, error: DeviceError) -> None:
        """End the connection, with what it has not delivered; every request on the way gets the error."""
        self.open = False
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._transport is not None:
            delivery.discard(self._transport)
            self._transport.abort()
        for asked in self._waiting.values():
            if not asked.answer.done():
                asked.answer.set_exception(error)


def _wake(waiting: asyncio.Future[bool]) -> None:
    """Let one who waits look again; the turn is not handed over."""
    if not waiting.done():
        waiting.set_result(False)


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


class RtuTransport:
    """RTU over TCP and serial lines through pymodbus's clients, one request at a time.

    A request that was not answered, or was given up, ends the connection, and the same unit is not asked again
    until its answer can be late no more: nothing would tell that from the next one. Another unit's bears the
    other's number, so the neighbours do not wait.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Any = None
        self._turn = asyncio.Lock()
        self._late_until: dict[int, float] = {}

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        return self._client is not None and bool(self._client.connected)

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        self.close()
        client = _client(self._url, timeout_s)
        try:
            done = await client.connect()
            _still_wanted()
        except (OSError, ModbusException) as error:
            raise NotConnected("unreachable", str(error).lower()) from None
        except asyncio.CancelledError:
            client.close()
            raise
        if not done:
            raise NotConnected("refused", "no connection; is it switched on, and is the address right?")
        self._client = client

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        loop = asyncio.get_running_loop()
        if (late_s := self._late_until.get(unit, 0.0) - loop.time()) > 0:
            await asyncio.sleep(late_s)
        async with self._turn:
            client = self._client
            if client is None or not client.connected:
                raise NotSent("not-connected", "no connection")
            client.ctx.comm_params.timeout_connect = timeout_s
            response: Any = None
            try:
                response = await client.execute(False, _RawRequest(unit, pdu))
                _still_wanted()
            except ModbusException as error:
                if "No response" in str(error):
                    raise NoAnswer("timeout", f"no answer in {timeout_s} s") from None
                raise BadAnswer("garbage", str(error).lower()) from None
            finally:
                if response is None:
                    self._late_until[unit] = loop.time() + timeout_s
                    self.close()
            if response.isError():
                return bytes((response.function_code, response.exception_code))
            return bytes((response.function_code,)) + bytes(response.body)

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        client, self._client = self._client, None
        if client is not None:
            if isinstance(client, AsyncModbusTcpClient) and client.ctx.transport is not None:
                delivery.discard(cast(asyncio.Transport, client.ctx.transport))
            client.close()

    def recall(self) -> None:
        """Do nothing: a request without an answer has ended the connection already."""


def _still_wanted() -> None:
    """Raise the cancellation that asyncio.wait_for, which pymodbus uses, may have swallowed (cpython gh-86296).

    It can go with Python 3.11.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


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
    else:
        client = AsyncModbusTcpClient(
            parts.hostname or "", port=parts.port or 502, framer=FramerType.RTU, **common
        )
    for function in (1, 2, 3, 4, 5, 6, 15, 16):
        client.register(_raw_response(function))
    return client
