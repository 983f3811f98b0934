"""The OPC UA driver: keeps a connection to a server, and reads its tags by poll or subscription."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from asyncua import ua
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from edgegw import clock
from edgegw.config.schema import OpcUaDevice, OpcUaTag
from edgegw.domain import quality
from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.opcua import request, values, writing
from edgegw.drivers.opcua.block import Block, Points, block_of
from edgegw.drivers.opcua.connection import Connection
from edgegw.errors import DeviceError, NotConnected, Unconfirmed

log = logging.getLogger(__name__)

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
QUEUE_MOST = 100_000
"""Published readings that may wait to be taken by `scan`."""


class OpcUaDriver:
    """One OPC UA server.

    A task of its own connects, and connects again with jittered exponential back-off whenever the connection
    is lost; each connection subscribes anew, so that the present values come after every loss.
    """

    def __init__(self, name: str, config: OpcUaDevice, *, queue_most: int = QUEUE_MOST) -> None:
        self.period_s: float | None = config.every.s if config.mode == "poll" else None
        self.on_connected: Callable[[], None] = lambda: None
        self._name = name
        self._config = config
        self._points = Points(name, config.tags)
        self._nodes = [
            request.encode_node(ua.NodeId.from_string(tag.address)) for tag in config.tags.values()
        ]
        self._numbers = {
            name: ua.NodeId.from_string(tag.address)
            for name, tag in config.tags.items()
            if tag.writable and (not tag.type or tag.type.startswith("float"))
        }
        self.held_types: Mapping[str, str] = {}
        self._where = f"device.{name} ({config.url})"
        self._queue_most = queue_most
        self._queue: deque[tuple[int, Block] | DeviceError] = deque()
        self._queued = 0
        self._overflowing: set[str] = set()
        self._unusable: set[str] = set()
        self._connection: Connection | None = None
        self._failure: DeviceError | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep(), name=f"opcua {self._name}")
        self._task.add_done_callback(lambda _: self._news.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        while not self._task.done():  # asyncio.wait_for of Python 3.11 can swallow a cancellation
            self._task.cancel()
            await asyncio.wait([self._task], timeout=2 * self._config.timeout.s)
        if not self._task.cancelled():
            self._task.result()

    async def scan(self) -> Sequence[Scan]:
        """Poll: read all tags now. Subscribe: wait for what the server publishes, and return all there is.

        Without a connection a poll raises DeviceError at once; a subscription raises it once for each loss
        and each failed attempt to connect, in its place between what was published before and after.
        """
        return await (self._published() if self.period_s is None else self._poll())

    async def write(self, tag: str, value: Scalar) -> Value:
        """Write one tag, at most once, and return what reading it back gives; raise DeviceError."""
        point = self._config.tags[tag]
        node = ua.NodeId.from_string(point.address)
        try:
            connection = await self._connected()
        except DeviceError as error:
            raise NotConnected(error.reason, f"{error}; {tag} was not written") from error
        try:
            kind = await connection.node_type(node)
            await connection.write(node, writing.encode(point, value, kind))
            return await self._read_back(connection, point, node)
        except DeviceError as error:
            raise error.located(f"{self._where}: {tag}") from error

    async def _read_back(self, connection: Connection, point: OpcUaTag, node: ua.NodeId) -> Value:
        try:
            (data,) = await connection.read([node])
        except DeviceError as error:
            raise Unconfirmed("read-back", f"written, but not read back: {error}") from error
        reading = values.decode(point, data)
        if quality.is_bad(reading.quality):
            raise Unconfirmed("read-back", f"written, but reads back as {reading.quality}")
        return reading.value

    async def read(self) -> Sequence[Scan]:
        """Read all tags once, whatever the mode; raise DeviceError."""
        return await self._poll()

    async def _poll(self) -> Sequence[Scan]:
        connection = await self._connected()
        now_ms = clock.wall_ms()
        return self._scans(now_ms, await self._read(connection))

    async def _read(self, connection: Connection) -> Block:
        try:
            return await connection.poll(self._nodes)
        except DeviceError as error:
            raise self._located(error) from error

    async def _connected(self) -> Connection:
        """Return the connection, wait for the first attempt to make one, or raise why there is none."""
        while self._connection is None:
            if self._failure is not None:
                raise self._located(self._failure)
            await self._wait()
        return self._connection

    async def _published(self) -> Sequence[Scan]:
        while not self._queue:
            await self._wait()
        scans: list[Scan] = []
        while self._queue:
            entry = self._queue[0]
            if isinstance(entry, DeviceError):
                if scans:
                    break
                self._queue.popleft()
                raise self._located(entry)
            self._queue.popleft()
            now_ms, block = entry
            self._queued -= len(block.raws)
            scans += self._scans(now_ms, block)
        return scans

    async def _wait(self) -> None:
        if self._task is None or self._task.cancelled():
            raise NotConnected(
                "not-connected", f"{self._where}: no connection; the device is not being scanned right now"
            )
        if self._task.done():
            self._task.result()
        self._news.clear()
        await self._news.wait()

    def _scans(self, now_ms: int, block: Block) -> list[Scan]:
        scans = self._points.scans(block, now_ms, by_source=self._config.timestamp == "source")
        for scan in scans:
            if scan.quality:
                self._log_unusable(scan.quality)
        return scans

    def _log_unusable(self, qualities: Mapping[str, str]) -> None:
        """Log once for each connection which tags cannot represent their values."""
        new = {
            tag: why for tag, why in qualities.items() if why in values.UNUSABLE and tag not in self._unusable
        }
        if not new:
            return
        self._unusable |= new.keys()
        named = [f"{tag} ({why.removeprefix('bad:')})" for tag, why in new.items()]
        log.warning(
            "%s: found values that tags cannot represent: %s%s; expected the configured type, no matrix or structure",
            self._where, ", ".join(named[:5]), f" and {len(named) - 5} more" if len(named) > 5 else "",
        )  # fmt: skip

    async def _keep(self) -> None:
        """Connect, and again whenever the connection is lost, until cancelled."""
        while True:
            retrying = AsyncRetrying(
                retry=retry_if_exception_type(DeviceError),
                wait=wait_random_exponential(multiplier=RETRY_FIRST_S, max=RETRY_MOST_S),
            )
            async for attempt in retrying:
                with attempt:
                    await self._live()

    async def _live(self) -> None:
        """Use one connection until it is lost; raise DeviceError if it lasted too briefly."""
        connection = Connection(self._config.url, self._config.timeout.s)
        try:
            await connection.connect()
            self._unusable.clear()
            await self._learn(connection)
            if self.period_s is None:
                await self._subscribe(connection)
            up_s = clock.mono_s()
            self._up(connection)
            self.on_connected()
            error = await connection.lost()
            self._down(error)
        except DeviceError as failed:
            self._down(failed)
            raise
        finally:
            self._connection = None
            await connection.close()
        if clock.mono_s() - up_s < RETRY_MOST_S:
            raise error

    async def _learn(self, connection: Connection) -> None:
        """Learn how finely the server holds what may be written, before anything is."""
        if self._numbers:
            types = await connection.learn_types(list(self._numbers.values()))
            self.held_types = {
                name: values.TYPES[types[node]] for name, node in self._numbers.items() if node in types
            }

    async def _subscribe(self, connection: Connection) -> None:
        def published(block: Block) -> None:
            self._enqueue(connection, block)

        found = await connection.subscribe(self._nodes, self._config.every.s, published)
        wrong = {
            place: ua.DataValue(StatusCode=s) for place, s in enumerate(found.statuses) if not s.is_good()
        }
        if wrong:
            self._enqueue(connection, block_of(list(wrong), list(wrong.values())))
        if found.polled:
            log.warning(
                "%s: %d of %d tags are polled: the server has room for no more in %d subscriptions",
                self._where, len(found.polled), len(self._nodes), found.subscriptions,
            )  # fmt: skip
        elif found.subscriptions > 1:
            log.info("%s: %d tags in %d subscriptions", self._where, len(self._nodes), found.subscriptions)

    def _enqueue(self, connection: Connection, block: Block) -> None:
        waiting = self._queued + len(block.raws)
        if waiting > self._queue_most:
            what = f"{waiting} readings wait to be taken; expected {self._queue_most} at most"
            hint = "disconnected: values are lost until the present ones come; make `every` longer"
            connection.lose(NotConnected("overload", f"{what}; {hint}"))
            return
        if any(block.statuses):
            self._note_overflow(block)
        self._queue.append((clock.wall_ms(), block))
        self._queued = waiting
        self._news.set()

    def _note_overflow(self, block: Block) -> None:
        lost = {
            self._points.names[place]
            for place, status in zip(block.places, block.statuses, strict=True)
            if status and values.overflowed(status)
        }
        if new := lost - self._overflowing:
            self._overflowing |= new
            log.warning(
                "%s: the server discards unpublished values of %s; a shorter `every` keeps them",
                self._where,
                ", ".join(sorted(new)),
            )

    def _up(self, connection: Connection) -> None:
        self._connection = connection
        self._failure = None
        self._news.set()

    def _down(self, error: DeviceError) -> None:
        self._connection = None
        self._failure = error
        if self.period_s is None:
            if self._queue and isinstance(self._queue[-1], DeviceError):
                self._queue.pop()
            self._queue.append(error)
        self._news.set()

    def _located(self, error: DeviceError) -> DeviceError:
        return error.located(self._where)
