"""Modbus/TCP, plain or in TLS: a lean protocol over pymodbus's framer.

Its transaction ids distinguish a late answer from the awaited one.
"""

import asyncio
import ssl
import struct
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from pymodbus.framer import FramerSocket
from pymodbus.pdu import DecodePDU

from edgegw.drivers import delivery
from edgegw.drivers.modbus.connecting import network_failure
from edgegw.drivers.modbus.probes import Probes
from edgegw.errors import BadAnswer, NoAnswer, NotConnected, NotSent, Spoilt

MUTE = 3
"""Requests in a row without any answer after which a connection is taken for dead: it may well be half open."""

MAX_UNREQUESTED = 16
"""Frames in a row that answer no request, more of which end a connection: it would cost the neighbours their time."""

_HEADER = 7
_LONGEST = 254  # unit and PDU, the length field of an MBAP header (Messaging on TCP/IP 1.0b, 3.1.3)


class TcpTransport:
    """Modbus/TCP, plain or in TLS.

    TLS verifies the device's certificate and name against the system's store, or what SSL_CERT_FILE names.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "tls"
        self._host, self._port = parts.hostname or "", parts.port or (802 if self._tls else 502)
        self._wire: _Wire | None = None
        self._probes = Probes()
        self._loop = asyncio.get_running_loop()
        self._violation: NotConnected | None = None

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        return self._wire is not None and self._wire.open

    @property
    def violation(self) -> NotConnected | None:
        """Why the last connection was ended, if for what the endpoint sent over it."""
        return self._wire.violation if self._wire is not None else self._violation

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        try:
            async with asyncio.timeout(timeout_s):
                context = ssl.create_default_context() if self._tls else None
                _, self._wire = await self._loop.create_connection(
                    lambda: _Wire(self._probes), self._host, self._port, ssl=context
                )
        except OSError as error:
            raise network_failure(error, timeout_s) from None

    def call(self, unit: int, pdu: bytes, timeout_s: float) -> Awaitable[bytes]:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        if self._wire is None:
            raise NotSent("not-connected", "no connection")
        return self._wire.call(unit, pdu, timeout_s)

    def check(self, unit: int) -> None:
        """Return if a unit may be read now; raise NoAnswer if it is failing and would delay its neighbours."""
        self._probes.check(unit, self._loop.time())

    def recall(self) -> None:
        """End the connection if what was sent on it is not delivered."""
        if self._wire is not None:
            self._wire.recall()

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        wire, self._wire = self._wire, None
        if wire is not None:
            self._violation = wire.violation
            wire.fail(NotConnected("closed", "the connection was closed"))


@dataclass(slots=True)
class _Asked:
    """A request that was sent, and when it is overdue by the loop's clock."""

    tid: int
    unit: int
    answer: asyncio.Future[bytes]
    sent_s: float
    due_s: float
    timeout_s: float

    @property
    def free_s(self) -> float:
        """When a gateway is taken to be done with it at the latest, if no answer comes."""
        return self.due_s + self.timeout_s


class _Wire(asyncio.Protocol):
    """One TCP connection. Frames are cut by pymodbus's framer; whatever is no frame ends the connection.

    Requests take turns. A turn lasts until the answer or the time-out, which begins when the request is sent; while
    an earlier request that was given up may still occupy a gateway, it begins when that one's late answer comes, or
    one more time-out has passed. A frame that stays in pieces ends the connection: the next answer's bytes would
    complete it. And so do silence to MUTE requests in a row, and more than MAX_UNREQUESTED frames in a row that
    answer none. What follows in the same data is not parsed.
    """

    def __init__(self, probes: Probes) -> None:
        self.open = False
        self.violation: NotConnected | None = None
        self._probes = probes
        self._framer = FramerSocket(DecodePDU(is_server=False))
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._tid = 0
        self._asked: _Asked | None = None
        self._late: dict[int, _Asked] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = 0.0
        self._busy = False
        self._queue: deque[asyncio.Future[None]] = deque()
        self._unanswered = 0
        self._unrequested = 0
        self._useful = False

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
        received = self._buffer + data if self._buffer else data
        at = 0
        while self.open and len(received) - at >= _HEADER:
            length = int.from_bytes(received[at + 4 : at + 6], "big")
            if received[at + 2 : at + 4] != b"\0\0" or not 2 < length <= _LONGEST:
                found = received[at : at + 8].hex(" ")
                self.fail(Spoilt("garbage", f"what came is not Modbus/TCP: {found}"))
                break
            end = at + 6 + length
            if len(received) < end:
                break
            _, unit, tid, pdu = self._framer.decode(received[at:end])
            at = end
            self._answered(tid, unit, pdu)
        self._buffer = received[at:]

    def _begins_an_answer(self, data: bytes) -> bool:
        """Tell whether what should complete a frame looks like the beginning of the awaited answer."""
        asked = self._asked
        if asked is None or (len(self._buffer) > 1 and int.from_bytes(self._buffer[:2], "big") == asked.tid):
            return False
        head = struct.pack(">HH", asked.tid, 0) + data[4:6] + bytes((asked.unit,))
        return head.startswith(data[:_HEADER])

    def _answered(self, tid: int, unit: int, pdu: bytes) -> None:
        asked = self._asked
        if asked is None or asked.tid != tid or asked.answer.done():
            self._answered_late(tid)
        elif unit != asked.unit:
            wrong = f"unit {unit} answered; expected {asked.unit}"
            asked.answer.set_exception(BadAnswer("wrong-unit", wrong))
        else:
            self._unrequested = 0
            self._useful = True
            asked.answer.set_result(pdu)

    def _answered_late(self, tid: int) -> None:
        """Begin the awaited request's time-out now: the one before it no longer occupies a gateway."""
        late = self._late.pop(tid, None)
        if late is None:
            self._unrequested += 1
            if self._unrequested > MAX_UNREQUESTED:
                what = f"found {self._unrequested} answers in a row to no request; expected one to each"
                hint = "does something else use this connection, or is it no Modbus device?"
                self.fail(NotConnected("unrequested", f"{what}; {hint}"))
            return
        now_s = self._loop.time()
        self._probes.freed(late.unit, now_s, late.sent_s)
        if self._asked is not None:
            self._asked.due_s = self._free_s(now_s) + self._asked.timeout_s
            self._set_alarm(self._asked.due_s)

    def _free_s(self, now_s: float) -> float:
        """Return when earlier requests occupy a gateway no more: now, if all were answered."""
        if not self._late:
            return now_s
        self._late = {tid: late for tid, late in self._late.items() if late.free_s > now_s}
        return max((late.free_s for late in self._late.values()), default=now_s)

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        if self._busy:
            await self._turn()
        self._busy = True
        try:
            if not self.open or self._transport is None:
                raise NotSent("connection-lost", "the connection is gone; a new one is being tried")
            self._tid = tid = self._tid % 0xFFFF + 1
            now_s = self._loop.time()
            due_s = self._free_s(now_s) + timeout_s
            self._asked = asked = _Asked(tid, unit, self._loop.create_future(), now_s, due_s, timeout_s)
            if self._alarm is None or due_s < self._alarm_s:
                self._set_alarm(due_s)
            self._transport.write(self._framer.encode(pdu, unit, tid))
            try:
                got = await asked.answer
            except (NoAnswer, asyncio.CancelledError):
                self._late[tid] = asked
                raise
            if got[0] & 0x80 or unit not in self._probes.answering:
                self._probes.heard(unit, got, self._loop.time(), now_s)
            return got
        finally:
            self._asked = None
            self._pass_on()

    async def _turn(self) -> None:
        """Wait until the turn is handed over."""
        mine: asyncio.Future[None] = self._loop.create_future()
        self._queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Hand the turn to the next in the queue; nobody who comes meanwhile can take it."""
        while self._queue:
            following = self._queue.popleft()
            if not following.done():
                following.set_result(None)
                return
        self._busy = False

    def _set_alarm(self, at_s: float) -> None:
        """Check then what is overdue: one timer for the wire, since one for each request costs 3 % of all."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm, self._alarm_s = self._loop.call_at(at_s, self._check_due), at_s

    def _check_due(self) -> None:
        self._alarm = None
        asked = self._asked
        if asked is None or asked.answer.done():
            return
        if asked.due_s <= self._loop.time():
            self._expire(asked)
        else:
            self._set_alarm(asked.due_s)

    def _expire(self, asked: _Asked) -> None:
        self._unanswered += 1
        self._probes.failed(asked.unit, "timeout", self._loop.time(), asked.sent_s)
        asked.answer.set_exception(NoAnswer("timeout", f"no answer in {asked.timeout_s} s"))
        if self._buffer:
            self.fail(Spoilt("garbage", "an answer ended in the middle"))
        elif self._unanswered >= MUTE:
            self.fail(
                NotConnected("timeout", f"nothing came back for {MUTE} requests; the connection is made anew")
            )

    def recall(self) -> None:
        if self.open and self._transport is not None and delivery.undelivered(self._transport):
            self.fail(NotConnected("timeout", "nothing is taken any more; the connection is made anew"))

    def fail(self, error: NotConnected) -> None:
        """End the connection, with what it has not delivered; the request on the way gets the error.

        It is a violation if frames came that nobody asked for, or if nothing came but what is no answer: a new
        connection will not fare better.
        """
        if self.open and (error.reason == "unrequested" or (isinstance(error, Spoilt) and not self._useful)):
            self.violation = error
        self.open = False
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._transport is not None:
            delivery.discard(self._transport)
            self._transport.abort()
        if self._asked is not None and not self._asked.answer.done():
            self._asked.answer.set_exception(error)
