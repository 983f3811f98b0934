"""One connection to an OPC UA server: asyncua's calls, bounded in time, with our errors.

A connection is used once: when it is lost, a new one is made. asyncua's own reconnection is left off. Its
health check stays on: it reads the server's state every `timeout`, so a server that is frozen or behind a
dead link is found out within two of them.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

from asyncua import ua
from asyncua.client.client import Client
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.object_ids import ObjectIds
from asyncua.ua.uaerrors import BadTimeout, UaStatusCodeError

from edgegw import clock
from edgegw.drivers import delivery
from edgegw.drivers.opcua import failures, framing, request, subscriber, wire, writing
from edgegw.drivers.opcua.block import Block, joined
from edgegw.drivers.opcua.subscriber import Coverage, Subscriber, chunks
from edgegw.errors import BadAnswer, DeviceError, NoAnswer, NotConnected, Refused

PORT = 4840
"""The port of OPC UA, for a URL without one."""
SESSION_S = 60.0
"""How long a server keeps the session of a gateway that died; asyncua's hour would hold a slot for long."""
CALL_NODES = 1000
"""Nodes a call where the server names no limit of its own."""
_CONNECT_STEPS = 5

Published = Callable[[Block], None]
"""Takes what the server published, by the places of the nodes in the list subscribed to."""


class Connection:
    """A session with a server, from `connect` until it is lost or closed."""

    def __init__(self, url: str, timeout_s: float) -> None:
        logging.getLogger("asyncua").setLevel(logging.CRITICAL + 1)  # what it has to say is said here, once
        self._timeout_s = timeout_s
        self._client = Client(_with_port(url), timeout=timeout_s, watchdog_intervall=max(timeout_s, 0.5))
        framing.bound(self._client.uaclient, timeout_s, self._violated)
        self._client.session_timeout = int(max(SESSION_S, 4 * timeout_s) * 1000)
        self._client.connection_lost_callback = self._health_lost
        self._gone = asyncio.Event()
        self._failure: DeviceError | None = None
        self._subscriber = Subscriber(self._ask, timeout_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._types: dict[ua.NodeId, ua.VariantType] = {}
        self.read_limit = CALL_NODES
        self.items_limit = CALL_NODES

    async def connect(self) -> None:
        """Connect, open a session and learn the server's limits; raise DeviceError."""
        try:
            with self._errors("connecting"):
                async with asyncio.timeout(_CONNECT_STEPS * self._timeout_s):
                    await self._client.connect()
                    self.read_limit = await self._limit("MaxNodesPerRead")
                    self.items_limit = await self._limit("MaxMonitoredItemsPerCall")
        except BaseException as error:
            if isinstance(error, DeviceError):
                self.lose(error)
            await self.close()
            raise

    async def read(
        self, nodes: Sequence[ua.NodeId], attribute: AttributeIds = AttributeIds.Value
    ) -> list[ua.DataValue]:
        """Read an attribute of nodes, with the quality and time of each; raise DeviceError."""
        found: list[ua.DataValue] = []
        with self._errors("reading"):
            for chunk in chunks(nodes, self.read_limit):
                answer = await self._client.uaclient.session.read_attributes(list(chunk), attribute)
                if len(answer) != len(chunk):
                    self._distrust(f"found {len(answer)} values; expected {len(chunk)}")
                found += answer
        return found

    async def poll(self, nodes: Sequence[bytes]) -> Block:
        """Read the values of nodes as `request` encodes them; raise DeviceError."""
        blocks = []
        with self._errors("reading"):
            for chunk in chunks(nodes, self.read_limit):
                body = await self._ask(request.read_request(chunk))
                blocks.append(wire.read_response(body, len(chunk)))
        return joined(blocks)

    async def node_type(self, node: ua.NodeId) -> ua.VariantType:
        """Return the type in which a node is written, asked once; raise DeviceError."""
        if node not in self._types:
            (value,) = await self.read([node])
            (data_type,) = await self.read([node], AttributeIds.DataType)
            self._types[node] = writing.node_type(value, data_type)
        return self._types[node]

    async def learn_types(self, nodes: Sequence[ua.NodeId]) -> dict[ua.NodeId, ua.VariantType]:
        """Return the types of those nodes that can be written, asked for together; raise DeviceError."""
        found = zip(nodes, await self.read(nodes), await self.read(nodes, AttributeIds.DataType), strict=True)
        for node, value, data_type in found:
            with contextlib.suppress(Refused):  # a write says why
                self._types[node] = writing.node_type(value, data_type)
        return self._types

    async def write(self, node: ua.NodeId, value: ua.Variant) -> None:
        """Write a node's value, the one time that it is sent.

        Raises Unconfirmed if it may have been written, another DeviceError if it was not. Neither status nor time
        is sent, which many a server refuses to take (OPC UA Part 4, 5.10.4).
        """
        if not self._usable:
            raise NotConnected("connection-lost", "the connection is gone; a new one is being tried")
        data = ua.DataValue(value, StatusCode=None)
        try:
            statuses = await self._client.uaclient.session.write_attributes([node], [data])
        except asyncio.CancelledError:
            self._recall()
            raise
        except failures.FOREIGN as error:
            raise self._write_failed(error) from error
        if len(statuses) != 1:
            self.lose(BadAnswer("bad-answer", f"found {len(statuses)} statuses; expected 1"))
            raise writing.unconfirmed("bad-answer", f"found {len(statuses)} statuses; expected 1")
        if statuses[0].is_bad():
            raise writing.failure(statuses[0].value)

    async def subscribe(self, nodes: Sequence[bytes], every_s: float, published: Published) -> Coverage:
        """Have the server publish changes of nodes as `request` encodes them; raise DeviceError.

        Nodes that it has no room for are polled as often.
        """
        with self._errors("subscribing"):
            coverage = await self._subscriber.subscribe(nodes, every_s, self.items_limit)
        if coverage.subscriptions:
            self._start(self._publish(published))
        if coverage.polled:
            self._start(self._poll(nodes, coverage.polled, every_s, published))
        return coverage

    async def browse(self, node: ua.NodeId) -> list[ua.ReferenceDescription]:
        """Return what a node refers to hierarchically: objects and variables; raise DeviceError."""
        session = self._client.uaclient.session
        wanted = ua.BrowseDescription(
            NodeId=node,
            BrowseDirection=ua.BrowseDirection.Forward,
            ReferenceTypeId=ua.NodeId(ua.Int32(ObjectIds.HierarchicalReferences)),
            IncludeSubtypes=True,
            NodeClassMask=ua.UInt32(ua.NodeClass.Object | ua.NodeClass.Variable),
            ResultMask=ua.UInt32(ua.BrowseResultMask.All),
        )
        found: list[ua.ReferenceDescription] = []
        with self._errors("browsing"):
            (result,) = await session.browse(ua.BrowseParameters(NodesToBrowse=[wanted]))
            result.StatusCode.check()
            found += result.References or []
            while result.ContinuationPoint:
                more = ua.BrowseNextParameters(
                    ReleaseContinuationPoints=False, ContinuationPoints=[result.ContinuationPoint]
                )
                (result,) = await session.browse_next(more)
                result.StatusCode.check()
                found += result.References or []
        return found

    async def lost(self) -> DeviceError:
        """Wait until the connection is lost; return why."""
        while self._failure is None:
            for task in self._tasks:
                if task.done():
                    task.result()
            _, left_s = self._subscriber.silent_s()
            try:
                async with asyncio.timeout(None if math.isinf(left_s) else max(0.0, left_s)):
                    await self._gone.wait()
            except TimeoutError:
                silent_s, left_s = self._subscriber.silent_s()
                if left_s <= 0.0:
                    what = f"subscription silent for {silent_s:.1f} s; expected a keep-alive"
                    self.lose(NoAnswer("timeout", what))
        return self._failure

    def lose(self, failure: DeviceError) -> None:
        """Give the connection up for a reason; the first one counts."""
        if self._failure is None:
            self._failure = failure
            self._gone.set()

    async def close(self) -> None:
        """Close session and socket, in bounded time also if the server is dead; nothing is left behind."""
        protocol = self._client.uaclient.protocol
        transport = protocol.transport if protocol is not None else None
        if self._failure is not None and transport is not None:
            delivery.discard(transport)
            transport.abort()  # nobody will answer a farewell
            await asyncio.sleep(0)
        # in a task of its own: asyncua swallows a cancellation that comes while it winds up its tasks
        closing = asyncio.create_task(self._client.disconnect())
        ending = [closing, *self._tasks]
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(ending, timeout=self._timeout_s)
        finally:
            if transport is not None:
                delivery.discard(transport)
                transport.abort()
            closing.cancel()
            await asyncio.wait(ending)
            with contextlib.suppress(asyncio.CancelledError, *failures.FOREIGN):
                closing.result()  # the server forgets the session by itself after SESSION_S

    @property
    def _usable(self) -> bool:
        protocol = self._client.uaclient.protocol
        transport = protocol.transport if protocol is not None else None
        return self._failure is None and transport is not None and not transport.is_closing()

    def _write_failed(self, error: Exception) -> DeviceError:
        """Return our error for a write; a service that the server refused on a sound connection was not done."""
        ours = failures.ours(error, "writing", self._timeout_s)
        usable = self._usable
        if isinstance(ours, NotConnected | BadAnswer):
            self.lose(ours)
        if isinstance(error, UaStatusCodeError) and usable:
            return ours if isinstance(ours, NotConnected) else writing.failure(error.code)
        self._recall()
        return writing.unconfirmed(ours.reason, str(ours))

    def _recall(self) -> None:
        """Give the connection up if what was sent on it is not delivered: it must not arrive later."""
        protocol = self._client.uaclient.protocol
        transport = protocol.transport if protocol is not None else None
        if transport is not None and delivery.undelivered(transport):
            self.lose(NotConnected("timeout", "nothing is taken any more; the connection is made anew"))

    async def _limit(self, name: str) -> int:
        node: int = getattr(ObjectIds, f"Server_ServerCapabilities_OperationLimits_{name}")
        (found,) = await self._client.uaclient.session.read_attributes(
            [ua.NodeId(ua.Int32(node))], AttributeIds.Value
        )
        limit = found.Value.Value if found.Value is not None else None
        return min(limit, CALL_NODES) if isinstance(limit, int) and limit > 0 else CALL_NODES

    async def _health_lost(self, error: Exception) -> None:
        self.lose(failures.ours(error, "waiting", self._timeout_s))

    async def _ask(self, asked: object, timeout_s: float | None = None) -> bytes:
        """Return the body of the answer to a request; raise failures.FOREIGN. A timeout of 0 is none."""
        protocol = self._client.uaclient.protocol
        if protocol is None:
            raise ConnectionError("the connection is not open")
        return bytes(await protocol.send_request(asked, timeout_s))

    def _start(self, running: Coroutine[Any, Any, None]) -> None:
        """Run a task for as long as the connection lasts; its end is noticed in `lost`."""
        task = asyncio.create_task(running, name="opcua subscribed")
        task.add_done_callback(lambda _: self._gone.set())
        self._tasks.append(task)

    async def _publish(self, published: Published) -> None:
        """Take what the server publishes until the connection is lost."""
        heard: list[ua.SubscriptionAcknowledgement] = []
        while self._failure is None:
            asked = ua.PublishRequest(Parameters=ua.PublishParameters(SubscriptionAcknowledgements=heard))
            heard = []
            try:
                found = wire.publish_response(await self._ask(asked, timeout_s=0.0))
            except BadTimeout:
                continue  # this server does not hold a request for longer
            except failures.FOREIGN as error:
                self.lose(failures.ours(error, "waiting", self._timeout_s))
                break
            if self._failure is None:
                heard = self._heard(found, published)

    def _heard(self, found: wire.Publication, published: Published) -> list[ua.SubscriptionAcknowledgement]:
        """Pass on what was published; return what to acknowledge."""
        try:
            changes = self._subscriber.heard(found)
        except DeviceError as error:
            self.lose(error)
            return []
        for block in changes:
            published(block)
        if (failure := subscriber.ended(found)) is not None:
            self.lose(failure)
        if found.empty:
            return []
        return [ua.SubscriptionAcknowledgement(ua.IntegerId(found.subscription), ua.Counter(found.sequence))]

    async def _poll(
        self, nodes: Sequence[bytes], places: Sequence[int], every_s: float, published: Published
    ) -> None:
        """Read nodes in each period, and pass them on as if they were published, until the connection is lost."""
        polled = [nodes[place] for place in places]
        due_s = clock.mono_s()
        while self._failure is None:
            try:
                block = await self.poll(polled)
            except DeviceError as error:
                self.lose(error)
                break
            published(block._replace(places=places))
            due_s = max(due_s + every_s, clock.mono_s())
            await asyncio.sleep(due_s - clock.mono_s())

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn asyncua's errors into ours, and give the connection up where it is not to be trusted."""
        try:
            yield
        except failures.FOREIGN as error:
            ours = failures.ours(error, doing, self._timeout_s)
            if isinstance(ours, NotConnected | BadAnswer):
                self.lose(ours)
                ours = self._failure or ours  # what ended the connection, not what followed from it
            raise ours from error

    def _violated(self, error: ValueError) -> None:
        self.lose(BadAnswer("bad-answer", str(error)))

    def _distrust(self, what: str) -> NoReturn:
        failure = BadAnswer("bad-answer", what)
        self.lose(failure)
        raise failure


def _with_port(url: str) -> str:
    parts = urlsplit(url)
    return url if parts.port is not None else urlunsplit(parts._replace(netloc=f"{parts.netloc}:{PORT}"))
