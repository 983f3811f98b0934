"""Requests about many nodes, which are encoded once and not anew for each poll."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncua import ua
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.ua_binary import struct_to_binary

_ITEM = struct.Struct("<iIdBBBI?")
"""Of an item, behind its node: mode, handle, sampling interval, no filter, size of the queue, and which ones go."""


class Encoded:
    """The elements of an array, each encoded.

    asyncua writes a byte string as its length and then `+` itself. Here the length is the number of elements, and
    what is added are their bytes: so an array stands on the wire (OPC UA Part 6, 5.2.5).
    """

    __slots__ = ("_elements",)

    def __init__(self, elements: Sequence[bytes]) -> None:
        self._elements = elements

    def __len__(self) -> int:
        return len(self._elements)

    def __radd__(self, before: bytes) -> bytes:
        return before + b"".join(self._elements)


@dataclass(slots=True, kw_only=True)
class ReadEncoded:
    """ua.ReadRequest, with nodes that are encoded already (OPC UA Part 4, 5.11.2)."""

    TypeId: ua.NodeId = field(default_factory=lambda: ua.ReadRequest().TypeId)
    RequestHeader: ua.RequestHeader = field(default_factory=ua.RequestHeader)
    MaxAge: ua.Double = field(default_factory=lambda: ua.Double(0.0))
    TimestampsToReturn: ua.TimestampsToReturn = ua.TimestampsToReturn.Source
    NodesToRead: ua.ByteString


@dataclass(slots=True, kw_only=True)
class CreateItemsEncoded:
    """ua.CreateMonitoredItemsRequest, with items that are encoded already (OPC UA Part 4, 5.13.2)."""

    TypeId: ua.NodeId = field(default_factory=lambda: ua.CreateMonitoredItemsRequest().TypeId)
    RequestHeader: ua.RequestHeader = field(default_factory=ua.RequestHeader)
    SubscriptionId: ua.IntegerId
    TimestampsToReturn: ua.TimestampsToReturn = ua.TimestampsToReturn.Source
    ItemsToCreate: ua.ByteString


def encode_node(node: ua.NodeId) -> bytes:
    """Return how the value of a node is asked for."""
    asked = ua.ReadValueId(NodeId=node, AttributeId=ua.IntegerId(AttributeIds.Value))
    encoded: bytes = struct_to_binary(asked)
    return encoded


def encode_item(node: bytes, place: int, every_ms: float, queue: int) -> bytes:
    """Return how an encoded node is asked to be reported, as `place` (OPC UA Part 4, 5.13.2 and 7.21).

    The server keeps the latest `queue` values until it can publish them.
    """
    return node + _ITEM.pack(ua.MonitoringMode.Reporting, place, every_ms, 0, 0, 0, queue, True)


def read_request(nodes: Sequence[bytes]) -> ReadEncoded:
    """Return the request for the values of encoded nodes."""
    return ReadEncoded(NodesToRead=_array(nodes))


def items_request(subscription: int, items: Sequence[bytes]) -> CreateItemsEncoded:
    """Return the request to report encoded items."""
    return CreateItemsEncoded(SubscriptionId=ua.IntegerId(subscription), ItemsToCreate=_array(items))


def _array(elements: Sequence[bytes]) -> ua.ByteString:
    encoded: ua.ByteString = Encoded(elements)  # type: ignore[assignment]
    return encoded
