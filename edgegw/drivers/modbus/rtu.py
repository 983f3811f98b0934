"""RTU over TCP and serial lines, through pymodbus's clients."""

import asyncio
import logging
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient
from pymodbus.exceptions import ModbusException
from pymodbus.framer import FramerType
from pymodbus.pdu import ModbusPDU

from edgegw.drivers import delivery
from edgegw.drivers.modbus.connecting import network_failure, serial_failure
from edgegw.drivers.modbus.probes import Probes
from edgegw.errors import BadAnswer, NoAnswer, NotConnected, NotSent

logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # what goes wrong is said once, by the scanner


MAX_UNREQUESTED_BYTES = 64 * 1024
"""Bytes over TCP since the last request, more of which end a connection.

A converter may pass on what other masters read: 11.5 kB/s at 115,200 baud, which ends one now and then without harm.
"""


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
        self._probes = Probes()
        self._loop = asyncio.get_running_loop()
        self._received = 0
        self.violation: NotConnected | None = None

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        return self._client is not None and bool(self._client.connected)

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        self.close()
        self.violation = None
        client = _client(self._url, timeout_s)
        cause = _kept_cause(client)
        if not self._url.startswith("serial:"):
            self._bound(client)
        try:
            done = await client.connect()
            _still_wanted()
        except (OSError, ModbusException) as error:
            raise NotConnected("unreachable", str(error).lower()) from None
        except asyncio.CancelledError:
            client.close()
            raise
        if not done:
            why = cause[0] if cause else TimeoutError()
            if self._url.startswith("serial:"):
                raise serial_failure(urlsplit(self._url).path, why, timeout_s)
            raise network_failure(why, timeout_s)
        self._client = client

    async def call(self, unit: int, pdu: bytes, timeout_s: float) -> bytes:
        """Send a request PDU and return the PDU that answers it; raise DeviceError."""
        if (late_s := self._late_until.get(unit, 0.0) - self._loop.time()) > 0:
            await asyncio.sleep(late_s)
        async with self._turn:
            client = self._client
            if client is None or not client.connected:
                raise NotSent("not-connected", "no connection")
            client.ctx.comm_params.timeout_connect = timeout_s
            sent_s = self._loop.time()
            response: Any = None
            self._received = 0
            try:
                response = await client.execute(False, _RawRequest(unit, pdu))
                _still_wanted()
            except ModbusException as error:
                if self.violation is not None:
                    raise self.violation from None
                if "No response" in str(error):
                    self._probes.failed(unit, "timeout", self._loop.time(), sent_s)
                    raise NoAnswer("timeout", f"no answer in {timeout_s} s") from None
                raise BadAnswer("garbage", str(error).lower()) from None
            finally:
                if response is None:
                    self._late_until[unit] = self._loop.time() + timeout_s
                    self.close()
            rest = (response.exception_code,) if response.isError() else response.body
            got = bytes((response.function_code,)) + bytes(rest)
            self._probes.heard(unit, got, self._loop.time(), sent_s)
            return got

    def check(self, unit: int) -> None:
        """Return if a unit may be read now; raise NoAnswer if it is failing and would delay its neighbours."""
        self._probes.check(unit, self._loop.time())

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        client, self._client = self._client, None
        if client is not None:
            if isinstance(client, AsyncModbusTcpClient) and client.ctx.transport is not None:
                delivery.discard(cast(asyncio.Transport, client.ctx.transport))
            client.close()

    def _bound(self, client: Any) -> None:
        """End the connection on more bytes without a request than a serial line can carry in that time."""
        receive = client.ctx.data_received

        def received(data: bytes) -> None:
            self._received += len(data)
            if self._received <= MAX_UNREQUESTED_BYTES:
                receive(data)
                return
            what = f"found {self._received} bytes since the last request; expected one answer of 256 at most"
            self.violation = NotConnected("unrequested", f"{what}; is there a serial line behind it?")
            waiting = client.ctx.response_future
            self.close()
            if self._turn.locked() and not waiting.done():
                waiting.set_exception(ModbusException("unrequested"))

        client.ctx.data_received = received

    def recall(self) -> None:
        """Do nothing: a request without an answer has ended the connection already."""


def _kept_cause(client: Any) -> list[OSError]:
    """Return a list that gets the error on which the client cannot connect; pymodbus only logs it."""
    causes: list[OSError] = []
    create = client.ctx.call_create

    async def kept() -> Any:
        try:
            return await create()
        except OSError as error:
            causes.append(error)
            raise

    client.ctx.call_create = kept
    return causes


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
