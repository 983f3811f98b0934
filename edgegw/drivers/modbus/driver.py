"""The Modbus driver: plans a device's reads once, then asks and decodes block by block."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from edgegw import clock
from edgegw.config.schema import ModbusDevice
from edgegw.domain import quality
from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.modbus import pdu, writing
from edgegw.drivers.modbus.plan import NOTHING, Avoid, Block, Placed
from edgegw.drivers.modbus.read_plan import ReadPlan, Search
from edgegw.drivers.modbus.registers import Decoded, compile_block
from edgegw.drivers.modbus.transport import Transport
from edgegw.drivers.session import Session, Sessions
from edgegw.errors import (
    BadAnswer,
    DeviceError,
    NoAnswer,
    NotConnected,
    NotSent,
    Refused,
    Spoilt,
    Unconfirmed,
)

log = logging.getLogger(__name__)

_DIVISIBLE = ("illegal-function", "illegal-address", "illegal-value", "device-failure", "wrong-length")
"""Refusals that may concern a part of the block only; the last two are what some devices answer to a hole."""

LOG_INTERVAL_S = 60.0
"""The least time between two log lines on what a device refuses."""


class _Read(NamedTuple):
    """A block, ready to be asked for and decoded."""

    block: Block
    request: bytes
    head: bytes
    names: tuple[str, ...]
    decode: Callable[[bytes], Decoded]


@dataclass(slots=True)
class _Pass:
    """A scan under way: what has been read so far, and over which connection."""

    transport: Transport
    values: dict[str, Value] = field(default_factory=dict)
    qualities: dict[str, str] = field(default_factory=dict)
    may_reconnect: bool = True
    understood: bool = False
    error: BadAnswer | None = None


class ModbusDriver:
    """One Modbus unit. Its connection is shared with the other units behind the same url."""

    def __init__(self, name: str, config: ModbusDevice, sessions: Sessions[Transport]) -> None:
        self.period_s: float | None = config.every.s
        self.on_connected: Callable[[], None] = lambda: None
        self._name = name
        self._config = config
        self._sessions = sessions
        self._unit = config.unit
        self._timeout_s = config.timeout.s
        self._plan = ReadPlan(config.tags, config.max_block, config.max_gap)
        self._blocks = self._plan.blocks
        self._reads = [_read(block) for block in self._blocks]
        self._logged: Avoid = NOTHING
        self._log_after_s = 0.0
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
            raise error.located(self._where) from None

    async def write(self, tag: str, value: Scalar) -> Value:
        """Write one tag, at most once, and return what reading it back gives; raise DeviceError."""
        point = self._config.tags[tag]
        table, start, _ = point.address
        read = _read(Block(table, start, point.registers, (Placed(tag, point, 0),)))
        try:
            if self._unit == 0 and not self._config.url.startswith(("tcp:", "tls:")):
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
            raise error.located(f"{self._where}: {tag}") from None

    async def read(self) -> Sequence[Scan]:
        """Read all tags once; raise DeviceError."""
        return await self.scan()

    @property
    def _where(self) -> str:
        return f"device.{self._name} ({self._config.url} unit {self._unit})"

    async def _join(self, *, own: bool) -> None:
        """Use the connection that the unit shares with its neighbours, or one of its own."""
        self._session = None  # a write meanwhile is told so, instead of waiting for one that ends
        await self._stack.aclose()
        lease = self._sessions.lease(
            self._config.url,
            self._timeout_s,
            lambda: self.on_connected(),
            own=self._unit if own else None,
        )
        self._session = await self._stack.enter_async_context(lease)
        self._alone = own

    async def _scan(self) -> Sequence[Scan]:
        """Read all tags in as many blocks as the device needs, and learn from what it refuses."""
        now_s = clock.mono_s()
        reads = self._plan
        try:
            under_way = _Pass(await self._connected())
            under_way.transport.check(self._unit)
            reads.begin(now_s)
            for read in self._current_reads():
                answered = await self._read(under_way, read)
                if answered is False and (search := reads.search(read.block)) is not None:
                    await self._search(under_way, search)
                elif answered and reads.avoid is not NOTHING:
                    reads.answered(read.block)
        except NotConnected:
            reads.forget()
            raise
        reads.end(now_s)
        if under_way.error is not None and not under_way.understood:
            raise under_way.error
        if reads.avoid != self._logged:
            self._log_avoided(now_s)
        return (Scan(clock.wall_ms(), self._name, under_way.values, under_way.qualities or None),)

    def _current_reads(self) -> list[_Read]:
        if self._blocks is not self._plan.blocks:
            self._blocks = self._plan.blocks
            self._reads = [_read(block) for block in self._blocks]
        return self._reads

    async def _search(self, under_way: _Pass, search: Search) -> None:
        """Read of a refused block what is not refused."""
        while (part := search.next()) is not None:
            for placed in part.tags:
                under_way.qualities.pop(placed.name, None)
            search.note(part, await self._read(under_way, _read(part)))

    async def _read(self, under_way: _Pass, read: _Read) -> bool | None:
        """Return True if a block was answered, False if refused for what it asks, None if for another reason.

        Raise DeviceError if the device did not answer.
        """
        try:
            try:
                answer = await under_way.transport.call(self._unit, read.request, self._timeout_s)
            except NotConnected as error:
                answer = await self._call_again(under_way, read, error)
            values, bad = read.decode(_data(read, answer))
        except (Refused, BadAnswer) as error:
            return _refused(under_way, read, error)
        under_way.values.update(zip(read.names, values, strict=True))
        if bad:
            under_way.qualities.update(bad)
        under_way.understood = under_way.may_reconnect = True
        return True

    async def _call_again(self, under_way: _Pass, read: _Read, error: NotConnected) -> bytes:
        """Send a read request whose connection ended a second time, on a new one: reading twice does no harm.

        Some devices end the connection after each answer. Where nothing was answered since it was made, another
        one will not help.
        """
        if not under_way.may_reconnect:
            raise error
        under_way.may_reconnect = False
        if isinstance(error, Spoilt) and not self._alone:
            await self._join(own=True)
        under_way.transport = await self._ready()
        return await under_way.transport.call(self._unit, read.request, self._timeout_s)

    async def _connected(self) -> Transport:
        """Return the connection to scan over.

        One that was spoilt may have been spoilt by a neighbour, or spoil the neighbours: from then on the unit uses
        one of its own, as long as that can be had.
        """
        if self._session is None:
            await self._join(own=self._alone)  # the last scan was cancelled while it changed connections
        session = self._session
        if session is not None and session.connection.connected:
            return session.connection
        try:
            return await self._ready()
        except NotConnected as error:
            if self._alone and not isinstance(error, Spoilt):
                await self._join(own=False)
            raise

    def _log_avoided(self, now_s: float) -> None:
        """Say in how many reads the device is read now, once that is settled."""
        if self._blocks is not self._plan.blocks or now_s < self._log_after_s:
            return
        self._logged, self._log_after_s = self._plan.avoid, now_s + LOG_INTERVAL_S
        refused = sorted(self._logged.tags)
        names = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
        log.warning(
            "%s: %d tags in %d %s now%s%s", self._where, len(self._config.tags), len(self._reads),
            "read" if len(self._reads) == 1 else "reads",
            ", since it refuses to read some of them together" if self._logged.cuts | self._logged.limits else "",
            f"; it refuses {names}" if refused else "",
        )  # fmt: skip

    async def _ready(self) -> Transport:
        if self._session is None:
            raise NotConnected("not-connected", "no connection; the device is not being scanned right now")
        return await self._session.ready()

    async def _send(self, transport: Transport, request: bytes) -> None:
        """Send a write request, the one time that it is sent, and return when the device says that it took it."""
        try:
            pdu.check_written(request, await transport.call(self._unit, request, self._timeout_s))
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
        return _data(read, await transport.call(self._unit, read.request, self._timeout_s))


def _read(block: Block) -> _Read:
    request = pdu.read_request(block.function, block.start, block.size)
    names = tuple(placed.name for placed in block.tags)
    return _Read(block, request, pdu.answer_head(request), names, compile_block(block))


def _refused(under_way: _Pass, read: _Read, error: Refused | BadAnswer) -> bool | None:
    """Make the tags of a refused block bad; return as `_read` does. Raise DeviceError if it is the device's failure."""
    if error.reason.startswith("gateway-"):
        raise NoAnswer(error.reason, str(error)) from None
    under_way.may_reconnect = True
    if isinstance(error, Refused):
        under_way.understood = True
    elif error.reason == "wrong-length":
        under_way.error = under_way.error or error
    else:
        raise error
    under_way.values.update(dict.fromkeys(read.names))
    under_way.qualities.update(dict.fromkeys(read.names, quality.bad(error.reason)))
    return False if error.reason in _DIVISIBLE else None


def _data(read: _Read, answer: bytes) -> bytes:
    """Return the data of an answer to this very read; raise Refused or BadAnswer."""
    if answer[:2] == read.head and len(answer) == read.head[1] + 2:
        return answer[2:]
    raise pdu.not_an_answer(read.request, answer)


def _unconfirmed(error: DeviceError) -> Unconfirmed:
    return Unconfirmed(error.reason, f"{error}; whether it was written is not known")
