"""The Modbus driver: plans a device's reads once, then asks and decodes block by block."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import NamedTuple, Self

from edgegw import clock
from edgegw.config.schema import ModbusDevice
from edgegw.domain import quality
from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.modbus import pdu, writing
from edgegw.drivers.modbus.plan import Block, Placed, plan, split
from edgegw.drivers.modbus.registers import Decoded, compile_block
from edgegw.drivers.modbus.transport import Transport
from edgegw.drivers.session import Session, Sessions
from edgegw.errors import DeviceError, NoAnswer, NotConnected, NotSent, Refused, Spoilt, Unconfirmed

log = logging.getLogger(__name__)

_HOLES = ("illegal-function", "illegal-address", "illegal-value")
"""Refusals that say something about the block asked for, not about the device's health."""


class _Read(NamedTuple):
    """A block, ready to be asked for and decoded."""

    block: Block
    request: bytes
    head: bytes
    names: tuple[str, ...]
    decode: Callable[[bytes], Decoded]


class ModbusDriver:
    """One Modbus unit. Its connection is shared with the other units behind the same url."""

    def __init__(self, name: str, config: ModbusDevice, sessions: Sessions[Transport]) -> None:
        self.period_s: float | None = config.every.s
        self._name = name
        self._config = config
        self._sessions = sessions
        self._timeout_s = config.timeout.s
        self._reads = [_read(block) for block in plan(config.tags, config.max_block, config.max_gap)]
        self._session: Session[Transport] | None = None
        self._alone = False
        self._writing = asyncio.Lock()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._join(own=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        await self._stack.aclose()

    async def scan(self) -> Sequence[Scan]:
        """Read all tags; raise DeviceError if the device as a whole does not answer."""
        try:
            return await self._scan()
        except DeviceError as error:
            raise type(error)(error.reason, f"{self._where}: {error}") from None

    async def write(self, tag: str, value: Scalar) -> Value:
        """Write one tag, at most once, and return what reading it back gives; raise DeviceError."""
        point = self._config.tags[tag]
        table, start, _ = point.address
        read = _read(Block(table, start, point.registers, (Placed(tag, point, 0),)))
        try:
            if self._config.unit == 0 and not self._config.url.startswith(("tcp:", "tls:")):
                raise Refused(
                    "broadcast", "found unit 0, which is every device on a line; expected one of them"
                )
            request = writing.write_request(point, value)
            async with self._writing:
                transport = await self._ready()
                if point.address.bit is not None:
                    request = writing.write_request(point, value, await self._ask(transport, read))
                await self._send(transport, request)
                return await self._read_back(transport, read)
        except DeviceError as error:
            raise type(error)(error.reason, f"{self._where}: {tag}: {error}") from None

    async def check(self) -> str:
        """Connect, read once, and return a line that says what was found."""
        (scan,) = await self.scan()
        bad = [f"{tag} {why}" for tag, why in (scan.quality or {}).items()]
        reads = f"{len(scan.values)} tags in {len(self._reads)} reads"
        return f"{self._where}: {reads}" + (f"; not good: {', '.join(bad)}" if bad else "")

    @property
    def _where(self) -> str:
        return f"device.{self._name} ({self._config.url} unit {self._config.unit})"

    async def _join(self, *, own: bool) -> None:
        """Use the connection that the unit shares with its neighbours, or one of its own."""
        self._session = None  # a write meanwhile is told so, instead of waiting for one that ends
        await self._stack.aclose()
        lease = self._sessions.lease(
            self._config.url, self._timeout_s, own=self._config.unit if own else None
        )
        self._session = await self._stack.enter_async_context(lease)
        self._alone = own

    async def _scan(self) -> Sequence[Scan]:
        """Read all tags, on a second connection if the first is lost meanwhile: reading twice does no harm.

        A connection that was spoilt may have been spoilt by a neighbour, or spoil the neighbours: from then on
        the unit uses one of its own, as long as that can be had.
        """
        if self._session is None:
            await self._join(own=self._alone)  # the last scan was cancelled while it changed connections
        session = self._session
        if session is not None and session.connection.connected:
            transport = session.connection
        else:
            try:
                transport = await self._ready()
            except NotConnected:
                if self._alone:
                    await self._join(own=False)
                raise
        transport.check(self._config.unit)
        try:
            return await self._read_all(transport)
        except Spoilt:
            if not self._alone:
                await self._join(own=True)
        except NotConnected:
            pass
        return await self._read_all(await self._ready())

    async def _ready(self) -> Transport:
        if self._session is None:
            raise NotConnected("not-connected", "no connection; the device is not being scanned right now")
        return await self._session.ready()

    async def _send(self, transport: Transport, request: bytes) -> None:
        """Send a write request, the one time that it is sent, and return when the device says that it took it."""
        try:
            pdu.check_written(request, await transport.call(self._config.unit, request, self._timeout_s))
        except NotSent:
            raise
        except Refused as error:
            if error.reason == "acknowledge":  # taken, and takes its time: to send it again would be wrong
                return
            if error.reason == "gateway-target-silent":
                raise _unconfirmed(error) from None
            raise
        except asyncio.CancelledError:
            transport.recall()
            raise
        except DeviceError as error:
            transport.recall()
            raise _unconfirmed(error) from None

    async def _read_back(self, transport: Transport, read: _Read) -> Value:
        """Read one tag, on a second connection if the first is lost."""
        try:
            try:
                data = await self._ask(transport, read)
            except NotConnected:
                data = await self._ask(await self._ready(), read)
        except DeviceError as error:
            raise Unconfirmed("read-back", f"written, but not read back: {error}") from None
        (value,), bad = read.decode(data)
        if bad:
            raise Unconfirmed("read-back", f"written, but reads back as {', '.join(bad.values())}")
        return value

    async def _ask(self, transport: Transport, read: _Read) -> bytes:
        return _data(read, await transport.call(self._config.unit, read.request, self._timeout_s))

    async def _read_all(self, transport: Transport) -> Sequence[Scan]:
        values: dict[str, Value] = {}
        qualities: dict[str, str] = {}
        reads = deque(self._reads)
        while reads:
            read = reads.popleft()
            try:
                answer = await transport.call(self._config.unit, read.request, self._timeout_s)
                decoded, bad = read.decode(_data(read, answer))
            except Refused as error:
                if error.reason.startswith("gateway-"):
                    raise NoAnswer(error.reason, str(error)) from None
                if error.reason in _HOLES and len(read.names) > 1:
                    reads.extendleft(reversed(self._one_by_one(read)))
                    continue
                for name in read.names:
                    values[name] = None
                    qualities[name] = quality.bad(error.reason)
                continue
            values.update(zip(read.names, decoded, strict=True))
            if bad:
                qualities.update(bad)
        return (Scan(clock.wall_ms(), self._name, values, qualities or None),)

    def _one_by_one(self, read: _Read) -> list[_Read]:
        """Read each tag of a refused block by itself, now and from now on: find the holes."""
        singles = [_read(block) for block in split(read.block)]
        at = self._reads.index(read)
        self._reads[at : at + 1] = singles
        block = read.block
        log.warning(
            "%s: refuses to read %s %d to %d in one; its %d tags are read one by one",
            self._where, block.table, block.start, block.start + block.size - 1, len(singles),
        )  # fmt: skip
        return singles


def _read(block: Block) -> _Read:
    request = pdu.read_request(block.function, block.start, block.size)
    names = tuple(placed.name for placed in block.tags)
    return _Read(block, request, pdu.answer_head(request), names, compile_block(block))


def _data(read: _Read, answer: bytes) -> bytes:
    """Return the data of an answer to this very read; raise Refused or BadAnswer."""
    if answer[:2] == read.head and len(answer) == read.head[1] + 2:
        return answer[2:]
    raise pdu.not_an_answer(read.request, answer)


def _unconfirmed(error: DeviceError) -> Unconfirmed:
    return Unconfirmed(error.reason, f"{error}; whether it was written is not known")
