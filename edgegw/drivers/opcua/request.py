"""Reads of many nodes, which are encoded once and not anew for each poll."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncua import ua
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.ua_binary import struct_to_binary


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


def encode_node(node: ua.NodeId) -> bytes:
    """Return how the value of a node is asked for."""
    asked = ua.ReadValueId(NodeId=node, AttributeId=ua.IntegerId(AttributeIds.Value))
    encoded: bytes = struct_to_binary(asked)
    return encoded


def read_request(nodes: Sequence[bytes]) -> ReadEncoded:
    """Return the request for the values of encoded nodes."""
    encoded: ua.ByteString = Encoded(nodes)  # type: ignore[assignment]
    return ReadEncoded(NodesToRead=encoded)
