"""Walks the address space of an OPC UA server."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from asyncua import ua
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.object_ids import ObjectIdNames
from asyncua.ua.uaerrors import UaError

from edgegw.drivers.opcua import values
from edgegw.drivers.opcua.connection import Connection
from edgegw.errors import ConfigError

OBJECTS = "i=85"
"""The folder under which a server keeps what it is there for (OPC UA Part 5, 8.2.4)."""


class Entry(NamedTuple):
    """A node that was found; type and value are empty for what is no variable."""

    depth: int
    node: str
    name: str
    kind: str
    type: str
    value: str


async def browse(
    url: str, *, timeout_s: float, start: str = OBJECTS, depth: int = 3, most: int = 10_000
) -> AsyncIterator[Entry]:
    """Yield what lies under a node, parents first, down to a depth; `most` entries at most.

    The server's own objects (namespace 0) are named and not gone into, unless `start` is one of them. Raises
    DeviceError, and ConfigError for a start that is no node id.
    """
    try:
        begin = ua.NodeId.from_string(start)
    except (UaError, ValueError) as error:
        raise ConfigError([f"found {start!r}; expected a node id, as in i=85 or ns=2;s=Plant"]) from error
    connection = Connection(url, timeout_s)
    await connection.connect()
    try:
        into_own = begin.NamespaceIndex == 0 and start != OBJECTS
        seen = {begin.to_string()}
        left = [iter(await _children(connection, begin, 0, seen))]
        found = 0
        while left and found < most:
            entry = next(left[-1], None)
            if entry is None:
                left.pop()
                continue
            found += 1
            yield entry
            node = ua.NodeId.from_string(entry.node)
            if entry.depth + 1 < depth and (node.NamespaceIndex != 0 or into_own):
                left.append(iter(await _children(connection, node, entry.depth + 1, seen)))
    finally:
        await connection.close()


async def _children(connection: Connection, node: ua.NodeId, depth: int, seen: set[str]) -> list[Entry]:
    """Return the children that were not seen before, with type and value."""
    children: list[tuple[ua.NodeId, ua.ReferenceDescription]] = []
    for reference in await connection.browse(node):
        child = ua.NodeId(
            reference.NodeId.Identifier, reference.NodeId.NamespaceIndex, reference.NodeId.NodeIdType
        )
        if child.to_string() not in seen:
            seen.add(child.to_string())
            children.append((child, reference))
    variables = [child for child, reference in children if reference.NodeClass == ua.NodeClass.Variable]
    types = dict(zip(variables, await connection.read(variables, AttributeIds.DataType), strict=True))
    shown = dict(zip(variables, await connection.read(variables), strict=True))
    return [
        Entry(
            depth,
            child.to_string(),
            reference.BrowseName.Name or "",
            reference.NodeClass.name.lower(),
            _type_name(types[child]) if child in types else "",
            values.shown(shown[child]) if child in shown else "",
        )
        for child, reference in children
    ]


def _type_name(data: ua.DataValue) -> str:
    node = data.Value.Value if data.Value is not None else None
    if not isinstance(node, ua.NodeId):
        return ""
    number = node.Identifier
    if node.NamespaceIndex == 0 and isinstance(number, int) and number in ObjectIdNames:
        return str(ObjectIdNames[number])
    return str(node.to_string())
