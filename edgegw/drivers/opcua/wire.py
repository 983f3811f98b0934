"""Decodes what a server answers to Read and Publish, a block of values at a time (OPC UA Part 6, 5.2).

Single numbers, booleans and texts are decoded here: one walk over a body finds the shape of each value, and one call
to `struct` then takes them all. Any other value is left to asyncua, and so is a body that says more around its
values than is usual: that it refuses, diagnostics, or another notification than of changed data.
"""

import struct
from itertools import product
from typing import NamedTuple

from asyncua import ua
from asyncua.common.utils import Buffer, NotEnoughData
from asyncua.ua.object_ids import ObjectIds
from asyncua.ua.ua_binary import Primitives1, struct_from_binary

from edgegw.drivers.opcua.block import Block, block_of, columns

_READ, _PUBLISH, _CHANGE = (
    getattr(ObjectIds, f"{name}_Encoding_DefaultBinary")
    for name in ("ReadResponse", "PublishResponse", "DataChangeNotification")
)
_STRING = ua.VariantType.String.value
_FORMS = dict(enumerate("?bBhHiIqQfd", start=ua.VariantType.Boolean.value))
"""How `struct` names the built-in types from Boolean to Double (5.1.2)."""
_VALUE, _STATUS, _SOURCE, _SERVER, _SOURCE_FINE, _SERVER_FINE = (1 << bit for bit in range(6))
"""What the mask says is there of a value (5.2.2.17)."""
_TYPE_FORM = (1, 0)
"""The head of a node id of the four-byte form and namespace 0 (5.2.2.9)."""
_RESPONSE = struct.Struct("<BBH12xIBi3s")
"""The type; past time and handle the result, the mask of diagnostics, the count of texts, and one more header."""
_MESSAGE = struct.Struct("<xI8xi")
"""Past MoreNotifications, a message's sequence number, past its time the count of notifications (Part 4, 7.26)."""
_NOTIFICATION = struct.Struct("<BBHBi")
"""The type; what the body is, 1 for bytes, and how many (5.2.2.15)."""
_ARRAY, _TYPE = 0x80, 0x3F
"""Of the second byte of a value: that it is an array, and of which type (5.2.2.16)."""
_EXTENSION = ua.VariantType.ExtensionObject.value
"""From here on a value holds others."""
MAX_SLOW_BYTES = 512 * 1024
"""Of one answer, what asyncua has to decode element by element: half a second of work at worst."""
_NESTED = 8
"""A byte of what holds others counts for so many."""
_COUNT = struct.Struct("<i")
_NOTHING = (0, -1)
"""The counts of an array without elements."""
_ID = struct.Struct("<I")


class _Shape(NamedTuple):
    """A value on the wire: the form that `struct` takes value, status and source time by, and its size in bytes."""

    form: str
    size: int


def _shape(mask: int, value: str) -> _Shape:
    status, source = "I" if mask & _STATUS else "0s", "q" if mask & _SOURCE else "0s"
    unused = sum(size for bit, size in ((_SERVER, 8), (_SOURCE_FINE, 2), (_SERVER_FINE, 2)) if mask & bit)
    form = f"{value}{status}{source}{unused}x"
    return _Shape(form, struct.calcsize("<" + form))


_MASKS = range(_VALUE, 1 << 6, 2)
_NUMBERS = {
    bytes((mask, kind)): _shape(mask, f"2x{form}") for mask, (kind, form) in product(_MASKS, _FORMS.items())
}
"""By the two bytes that a number begins with, its mask and its type."""
_TEXTS = {bytes((mask, _STRING)): _shape(mask, "") for mask in _MASKS}
"""By the same, what follows a text."""
_VALUELESS = {bytes((mask,)): _shape(mask, "x0s") for mask in range(0, 1 << 6, 2)}
"""By its mask, what comes without a value."""


class Publication(NamedTuple):
    """What a server published: changes in their order, or nothing but that it is alive."""

    subscription: int
    sequence: int
    """The message's number; that of the next one if there is nothing in this one."""
    empty: bool
    changes: list[Block]
    ended: int
    """The status with which the server ends the subscription, 0 if it does not."""


def read_response(body: bytes, expected: int | None = None) -> Block:
    """Return the values of a ReadResponse, in their order; raise failures.FOREIGN for what is none.

    Another number of values than expected is found out before any is decoded.
    """
    if _usual(body, _READ):
        (count,) = _COUNT.unpack_from(body, _RESPONSE.size)
        _check_count(count, expected)
        block, at = _block(body, _RESPONSE.size + _COUNT.size, count, "0s")
        if _COUNT.unpack_from(body, at)[0] in _NOTHING:
            return block._replace(places=range(count))
    _check_size(body)
    response = struct_from_binary(ua.ReadResponse, Buffer(body))
    response.ResponseHeader.ServiceResult.check()
    _check_count(len(response.Results), expected)
    return block_of(range(len(response.Results)), response.Results)


def _check_size(body: bytes) -> None:
    """Check what is left to asyncua as a whole: we ask for nothing that makes an answer long in an unusual way."""
    if len(body) > MAX_SLOW_BYTES // _NESTED:
        raise ValueError(
            f"found {len(body)} bytes of an unusual form; expected {MAX_SLOW_BYTES // _NESTED} at most"
        )


def _check_count(count: int, expected: int | None) -> None:
    if expected is not None and count != expected:
        raise ValueError(f"found {count} values; expected {expected}")


def publish_response(body: bytes) -> Publication:
    """Return what a PublishResponse says; raise failures.FOREIGN for what is none."""
    return (_usual(body, _PUBLISH) and _publication(body)) or _other_publication(body)


def _usual(body: bytes, kind: int) -> bool:
    """Tell whether a response has the plain header of one that succeeded and says no more (Part 4, 7.33)."""
    *found, texts, header = _RESPONSE.unpack_from(body)
    return found == [*_TYPE_FORM, kind, 0, 0] and texts in _NOTHING and header == b"\0\0\0"


def _publication(body: bytes) -> Publication | None:
    """Return what was published, None if it is not changed data alone."""
    (subscription,) = _ID.unpack_from(body, _RESPONSE.size)
    at = _past_array(body, _RESPONSE.size + _ID.size)
    sequence, count = _MESSAGE.unpack_from(body, at)
    at += _MESSAGE.size
    changes = []
    for _ in range(count):
        *found, size = _NOTIFICATION.unpack_from(body, at)
        end = at + _NOTIFICATION.size + size
        if found != [*_TYPE_FORM, _CHANGE, 1]:
            return None
        (items,) = _COUNT.unpack_from(body, at + _NOTIFICATION.size)
        block, at = _block(body, at + _NOTIFICATION.size + _COUNT.size, items, "I")
        if _COUNT.unpack_from(body, at)[0] not in _NOTHING or at + _COUNT.size != end:
            return None
        at = end
        changes.append(block)
    if _COUNT.unpack_from(body, _past_array(body, at))[0] not in _NOTHING:
        return None
    return Publication(subscription, sequence, not changes, changes, 0)


def _other_publication(body: bytes) -> Publication:
    _check_size(body)
    response = struct_from_binary(ua.PublishResponse, Buffer(body))
    response.ResponseHeader.ServiceResult.check()
    result = response.Parameters
    message = result.NotificationMessage
    changes = []
    ended = 0
    for notification in message.NotificationData:
        if isinstance(notification, ua.DataChangeNotification):
            items = notification.MonitoredItems
            changes.append(block_of([item.ClientHandle for item in items], [item.Value for item in items]))
        elif isinstance(notification, ua.StatusChangeNotification) and not notification.Status.is_good():
            ended = ended or notification.Status.value
    empty = not message.NotificationData
    return Publication(result.SubscriptionId, message.SequenceNumber, empty, changes, ended)


def _past_array(body: bytes, at: int) -> int:
    """Return where an array of four-byte elements ends."""
    count: int = _COUNT.unpack_from(body, at)[0]
    return at + _COUNT.size + 4 * max(0, count)


def _block(body: bytes, begin: int, count: int, lead: str) -> tuple[Block, int]:
    """Return so many values that follow each other, each behind a `lead`, and where they end.

    What is not there is taken with a length of nothing: each value has four fields, whatever its shape.
    """
    if count > len(body):
        raise ValueError(f"found {count} values announced in {len(body)} bytes")
    ahead = struct.calcsize("<" + lead)
    at = begin
    kinds = bytearray()
    forms = []
    others: dict[int, str | ua.DataValue | None] = {}
    slow_left = MAX_SLOW_BYTES
    for i in range(count):
        at += ahead
        head = body[at : at + 2]
        shape = _NUMBERS.get(head)
        if shape is not None:
            kinds.append(head[1])
        elif head in _TEXTS:
            kinds.append(0)
            others[i], taken = _text(body, at + len(head))
            form, size = _TEXTS[head]
            shape = _Shape(f"2x{taken}x0s{form}", len(head) + taken + size)
        elif head[:1] in _VALUELESS:
            kinds.append(0)
            others[i] = None
            shape = _VALUELESS[head[:1]]
        else:
            kinds.append(0)
            others[i], taken, cost = _slowly(body, at, slow_left)
            slow_left -= cost
            shape = _Shape(f"0s0s0s{taken}x", taken)
        form, size = shape
        forms.append(form)
        at += size
    fields = struct.unpack_from("<" + lead + lead.join(forms), body, begin) if forms else ()
    raws, statuses, ticks = (list(fields[field::4]) for field in (1, 2, 3))
    for i, other in others.items():
        if isinstance(other, ua.DataValue):
            raws[i], statuses[i], ticks[i] = columns(other)
        else:
            raws[i] = other
    return Block(fields[0::4], bytes(kinds), raws, statuses, ticks), at


def _slowly(body: bytes, at: int, slow_left: int) -> tuple[ua.DataValue, int, int]:
    """Return a value that asyncua decodes, the bytes it takes, and those to count of what may be slow."""
    left, weight = len(body) - at, _weight(body[at : at + 2])
    rest = Buffer(body, at, min(left, slow_left // weight) if weight else left)
    try:
        value = struct_from_binary(ua.DataValue, rest)
    except NotEnoughData as error:
        if len(rest) < left - (rest.cur_pos - at):
            what = "found longer lists of texts, times or structures than are decoded in one answer"
            raise ValueError(f"{what}; expected {MAX_SLOW_BYTES} bytes at most") from error
        raise
    return value, rest.cur_pos - at, weight * (rest.cur_pos - at)


def _weight(head: bytes) -> int:
    """Return how slowly asyncua decodes a value: 0 for what is single and a list of numbers, however long."""
    kind = head[1] & _TYPE if len(head) > 1 else 0
    if kind >= _EXTENSION:
        return _NESTED
    return 0 if kind in _FORMS or not head[1:] or not head[1] & _ARRAY else 1


class _NoNulls:
    """Stands for a list of nulls, which asyncua makes however long it is announced to be: none takes a byte."""

    @staticmethod
    def unpack_array(data: Buffer, length: int) -> list[None]:
        if length:
            raise ValueError(f"found a list of {length} nulls; expected none")
        return []


Primitives1.Null = _NoNulls  # type: ignore[attr-defined]  # wherever it stands; asyncua 2.1 has no bound of its own


def _text(body: bytes, at: int) -> tuple[str | None, int]:
    """Return a text, None for the null one, and the bytes it takes; bytes that are not UTF-8 become lone surrogates."""
    (length,) = _COUNT.unpack_from(body, at)
    if not -1 <= length <= len(body) - at - _COUNT.size:
        raise ValueError(f"found a text of {length} bytes; {len(body) - at - _COUNT.size} are left")
    if length == -1:
        return None, _COUNT.size
    begin = at + _COUNT.size
    return body[begin : begin + length].decode(errors="surrogateescape"), _COUNT.size + length
