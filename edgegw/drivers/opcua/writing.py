"""Turns a value into what an OPC UA node takes: the inverse of `values`; and a write's status into what it means."""

import math
import struct
from fractions import Fraction

from asyncua import ua
from asyncua.ua.status_codes import StatusCodes

from edgegw.config.schema import OpcUaTag
from edgegw.domain.tag import Scalar
from edgegw.drivers.opcua import values
from edgegw.drivers.opcua.failures import FINAL
from edgegw.drivers.scaling import unscaled
from edgegw.errors import DeviceError, Refused, Unconfirmed

_NO_NODE = frozenset({
    StatusCodes.BadNodeIdUnknown, StatusCodes.BadNodeIdInvalid, StatusCodes.BadAttributeIdInvalid,
})  # fmt: skip
"""Status codes of a read that say that there is no such variable."""
_UNDECIDED = frozenset({
    StatusCodes.BadTimeout, StatusCodes.BadRequestTimeout, StatusCodes.BadCommunicationError,
    StatusCodes.BadOperationAbandoned, StatusCodes.BadUnexpectedError, StatusCodes.BadInternalError,
})  # fmt: skip
"""Status codes of a write that do not say that it had no effect."""


def node_type(value: ua.DataValue, data_type: ua.DataValue) -> ua.VariantType:
    """Return the type in which a node is written, from its attributes Value and DataType.

    The value at hand decides; a node without one has the type that it declares, if that is a built-in one (OPC UA
    Part 6, 5.1.2). Raises Refused for what cannot be written.
    """
    for data in (value, data_type):
        if data.StatusCode is not None and data.StatusCode.value & values.CODE_BITS in _NO_NODE:
            why = values.reason(data.StatusCode.value)
            raise Refused(why, f"the server refuses: {why}")
    variant = value.Value
    if variant is not None and variant.is_array:
        raise Refused("array", "found an array; expected a single value")
    kind = variant.VariantType if variant is not None else ua.VariantType.Null
    if kind == ua.VariantType.Null:
        declared = data_type.Value.Value if data_type.Value is not None else None
        number = declared.Identifier if isinstance(declared, ua.NodeId) and not declared.NamespaceIndex else 0
        kind = next((kind for kind in values.TYPES if kind.value == number), kind)
    if kind not in values.TYPES:
        found = getattr(kind, "name", "a type of its own")
        raise Refused("unsupported-type", f"found {found}; expected a number, a boolean or a string")
    return kind


def encode(tag: OpcUaTag, value: Scalar, node: ua.VariantType) -> ua.Variant:
    """Return a value as the variant that a node of this type takes; raise Refused if tag or node cannot hold it.

    A number is brought from the tag's unit to the raw one and, where tag or node hold integers, rounded to the
    nearest, a half to the even one.
    """
    if tag.type.endswith("[]"):
        raise Refused("array", "found an array; expected a single value")
    held = values.TYPES[node]
    raw = _raw(tag, value)
    for kind in filter(None, (tag.type, held)):
        raw = _as(kind, raw, value)
    return ua.Variant(raw, node)


def _raw(tag: OpcUaTag, value: Scalar) -> Scalar | Fraction:
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused("not-a-number", f"found {value!r}; expected a finite number")
    if tag.scale == 1.0 and tag.offset == 0.0:
        return value
    if isinstance(value, bool | str) or tag.scale == 0.0:
        raise Refused("type-mismatch", f"found {value!r}; expected a number, since the tag has a scale")
    return unscaled(value, tag.scale, tag.offset)


def _as(kind: str, raw: Scalar | Fraction, value: Scalar) -> Scalar:
    """Return a raw value as a type holds it."""
    if isinstance(raw, bool) and kind == "bool":
        return raw
    if isinstance(raw, str) and kind == "string":
        if any("\ud800" <= c <= "\udfff" for c in raw):
            raise Refused("not-text", f"found {value!r}, which has no UTF-8; expected a text")
        return raw
    if isinstance(raw, bool | str) or kind in ("bool", "string"):
        raise Refused("type-mismatch", f"found {value!r}; expected a {kind}")
    try:
        if kind in ("float32", "float64"):
            struct.pack("<f" if kind == "float32" else "<d", float(raw))  # to see whether it fits
            return float(raw)
        if values.in_range(kind, whole := round(raw)):
            return whole
    except OverflowError:
        pass
    raise Refused("out-of-type-range", f"found {value!r}; expected what {kind} holds")


def failure(status: int) -> DeviceError:
    """Return the error that the bad status of a write stands for."""
    why = values.reason(status)
    if status & values.CODE_BITS in _UNDECIDED:
        return unconfirmed(why, f"the server says {why}")
    return Refused(why, f"the server refuses: {why}", final=status & values.CODE_BITS in FINAL)


def unconfirmed(reason: str, detail: str) -> Unconfirmed:
    """Return the error for a write that was sent and not answered, or not clearly."""
    return Unconfirmed(reason, f"{detail}; whether it was written is not known")
