"""The subscriptions of a connection: as many as the server needs for the items that are wanted."""

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.status_codes import StatusCodes
from asyncua.ua.ua_binary import struct_from_binary
from asyncua.ua.uaerrors import UaStatusCodeError

from edgegw import clock
from edgegw.drivers.opcua import request, values, wire
from edgegw.drivers.opcua.block import Block
from edgegw.errors import BadAnswer, DeviceError, NotConnected

ITEM_QUEUE = 10
"""Values that the server keeps of each item until it can publish them."""
KEEP_ALIVE_S = 5.0
LIFETIME_S = 60.0
MAX_SUBSCRIPTIONS = 100
"""Of one connection; what these have no room for is polled."""

_NO_ROOM = frozenset({StatusCodes.BadTooManyMonitoredItems, StatusCodes.BadTooManySubscriptions})
"""Status codes of a server that has reached a limit."""
_T = TypeVar("_T")

Ask = Callable[[object], Awaitable[bytes]]
"""Sends a request, and returns the body of the answer; raises failures.FOREIGN."""


class Coverage(NamedTuple):
    """How the server reports what was asked for."""

    statuses: list[ua.StatusCode]
    """Of each item, good for one that is polled."""
    subscriptions: int
    polled: list[int]
    """The places of those that it has no room for in any subscription."""


@dataclass(slots=True)
class _Subscription:
    """What is known of one: the number of its last message, and for how long it may be silent."""

    silent_after_s: float
    heard_s: float
    sequence: int | None = None


class Subscriber:
    """Makes subscriptions and checks what comes of them; every message of each is there, or an error."""

    def __init__(self, ask: Ask, timeout_s: float) -> None:
        self._ask = ask
        self._timeout_s = timeout_s
        self._made: dict[int, _Subscription] = {}
        self._count = 0

    def silent_s(self) -> tuple[float, float]:
        """Return for how long the subscription that is silent next has been so, and how long is left to it."""
        now_s = clock.mono_s()
        silent = [
            (now_s - one.heard_s, one.heard_s + one.silent_after_s - now_s) for one in self._made.values()
        ]
        return min(silent, key=lambda one: one[1], default=(0.0, math.inf))

    async def subscribe(self, nodes: Sequence[bytes], every_s: float, items_limit: int) -> Coverage:
        """Have all nodes reported, as `request` encodes them; raise failures.FOREIGN.

        What a subscription has no room for goes to another one, as long as that has room for any.
        """
        self._count = len(nodes)
        statuses = [ua.StatusCode()] * len(nodes)
        left: list[int] = list(range(len(nodes)))
        while left and len(self._made) < MAX_SUBSCRIPTIONS:
            try:
                subscription = await self._create(every_s)
            except UaStatusCodeError as error:
                if not self._made or error.code not in _NO_ROOM:
                    raise
                break
            refused: list[int] = []
            for places in chunks(left, items_limit):
                found = await self._monitor(subscription, nodes, places, every_s)
                for place, status in zip(places, found, strict=True):
                    if status.value in _NO_ROOM:
                        refused.append(place)
                    else:
                        statuses[place] = status
            if len(refused) == len(left):
                await self._delete(subscription)
                break
            left = refused
        return Coverage(statuses, len(self._made), left)

    async def _create(self, every_s: float) -> int:
        wanted = ua.CreateSubscriptionRequest(
            Parameters=ua.CreateSubscriptionParameters(
                RequestedPublishingInterval=ua.Double(every_s * 1000.0),
                RequestedMaxKeepAliveCount=ua.UInt32(max(1, math.ceil(KEEP_ALIVE_S / every_s))),
                RequestedLifetimeCount=ua.UInt32(max(10, math.ceil(LIFETIME_S / every_s))),
            )
        )
        made = (await self._answer(ua.CreateSubscriptionResponse, wanted)).Parameters
        interval_s = made.RevisedPublishingInterval / 1000.0
        silent_after_s = (made.RevisedMaxKeepAliveCount + 1) * interval_s + 2 * self._timeout_s
        self._made[made.SubscriptionId] = _Subscription(silent_after_s, clock.mono_s())
        return int(made.SubscriptionId)

    async def _monitor(
        self, subscription: int, nodes: Sequence[bytes], places: Sequence[int], every_s: float
    ) -> list[ua.StatusCode]:
        """Return the status of each item, also where the server refuses them with one for all."""
        items = [request.encode_item(nodes[place], place, every_s * 1000.0, ITEM_QUEUE) for place in places]
        asked = request.items_request(subscription, items)
        try:
            made = await self._answer(ua.CreateMonitoredItemsResponse, asked)
        except UaStatusCodeError as error:
            if error.code not in _NO_ROOM:
                raise
            return [ua.StatusCode(ua.UInt32(error.code))] * len(places)
        if len(made.Results) != len(places):
            raise ValueError(f"found {len(made.Results)} monitored items; expected {len(places)}")
        return [result.StatusCode for result in made.Results]

    async def _delete(self, subscription: int) -> None:
        """End a subscription that has nothing to report; a server that refuses has one that is silent."""
        del self._made[subscription]
        ids = ua.DeleteSubscriptionsParameters(SubscriptionIds=[ua.IntegerId(subscription)])
        with contextlib.suppress(UaStatusCodeError):
            await self._ask(ua.DeleteSubscriptionsRequest(Parameters=ids))

    async def _answer(self, kind: Any, asked: object) -> Any:
        answer = struct_from_binary(kind, Buffer(await self._ask(asked)))
        answer.ResponseHeader.ServiceResult.check()
        return answer

    def heard(self, found: wire.Publication) -> list[Block]:
        """Return the changes of a message, in their order; raise DeviceError if one is missing or not sound."""
        one = self._made.get(found.subscription)
        if one is None:
            return []
        one.heard_s = clock.mono_s()
        if found.empty:
            return []
        if one.sequence is not None and found.sequence != one.sequence % 0xFFFFFFFF + 1:
            what = f"found notification {found.sequence} after {one.sequence}"
            raise BadAnswer("notification-lost", what)
        one.sequence = found.sequence
        for block in found.changes:
            if max(block.places, default=0) >= self._count:
                raise BadAnswer(
                    "bad-answer", f"found item {max(block.places)}; expected one of {self._count}"
                )
        return found.changes


def ended(found: wire.Publication) -> DeviceError | None:
    """Return why the server ends a subscription with this message, None if it does not."""
    if not found.ended:
        return None
    why = values.reason(found.ended)
    return NotConnected(why, f"the server ended the subscription: {why}")


def chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Return items in parts of a size; the last may be smaller."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
