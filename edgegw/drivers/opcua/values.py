"""Turns what an OPC UA server sends into values and qualities.

Status codes are those of OPC UA Part 4, 7.39: the two top bits say good, uncertain or bad.
"""

import math
import re
import uuid
from datetime import UTC, datetime
from typing import NamedTuple

from asyncua import ua
from asyncua.ua.status_codes import code_to_name_doc

from edgegw.config.schema import OpcUaTag
from edgegw.domain.quality import BAD_TEXT, NOT_A_NUMBER, bad, is_bad, uncertain
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.decimals import as_decimals
from edgegw.drivers.scaling import scaling

NO_VALUE = bad("no-value")
TYPE_MISMATCH = bad("type-mismatch")
UNSUPPORTED_TYPE = bad("unsupported-type")
UNUSABLE = (TYPE_MISMATCH, UNSUPPORTED_TYPE)
"""What only another configuration can mend."""
TYPES = {
    ua.VariantType.SByte: "int8", ua.VariantType.Byte: "uint8", ua.VariantType.Int16: "int16",
    ua.VariantType.UInt16: "uint16", ua.VariantType.Int32: "int32", ua.VariantType.UInt32: "uint32",
    ua.VariantType.Int64: "int64", ua.VariantType.UInt64: "uint64", ua.VariantType.Float: "float32",
    ua.VariantType.Double: "float64", ua.VariantType.Boolean: "bool", ua.VariantType.String: "string",
}  # fmt: skip
"""The types of single numbers, booleans and texts, as the contract names them."""

_EPOCH, _MEANINGLESS = (ua.datetime_to_win_epoch(datetime(year, 1, 1)) for year in (1970, 9999))
_TICKS_A_MS = 10_000
_RANGES = {f"uint{bits}": range(1 << bits) for bits in (8, 16, 32, 64)} | {
    f"int{bits}": range(-1 << bits - 1, 1 << bits - 1) for bits in (8, 16, 32, 64)
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|\d+")
_REASONS = {code: "-".join(_WORD.findall(name)[1:]).lower() for code, (name, _) in code_to_name_doc.items()}
CODE_BITS = 0xFFFF0000
"""The part of a status that is its code; the rest are flags."""
_OVERFLOW = 0x0480
"""InfoType DataValue with the overflow bit: the server threw older values of this item away."""


class Reading(NamedTuple):
    """One tag's value, its quality (None is good) and the source's time (None if it gave none)."""

    value: Value
    quality: str | None
    ts_ms: int | None


class WrongError(Exception):
    """There is no value; the argument is the quality to give instead."""


Raw = Scalar | list[Scalar] | WrongError | None
"""A value as the server sent it, in a plain form, or why it has none."""


def decode(tag: OpcUaTag, data: ua.DataValue) -> Reading:
    """Return what a server said about a tag, scaled, and None with a bad quality where that is no value."""
    return Reading(*finish(tag, raw(data.Value), status(data)), unix_ms(ticks(data.SourceTimestamp)))


def finish(tag: OpcUaTag, sent: Raw, code: int) -> tuple[Value, str | None]:
    """Return the engineering value of a tag and its quality, by what was sent for it."""
    quality = status_quality(code)
    if is_bad(quality):
        return None, quality
    try:
        return _tag_value(tag, _present(sent)), quality
    except WrongError as wrong:
        return None, str(wrong)


def shown(data: ua.DataValue) -> str:
    """Return what a server said about any variable, as a line of text."""
    quality = status_quality(status(data))
    try:
        text = str(plain(data.Value))
    except WrongError as wrong:
        return str(wrong)
    return quality if quality and is_bad(quality) else f"{text} ({quality})" if quality else text


def status(data: ua.DataValue) -> int:
    """Return the status of a value, 0 if it has none."""
    return data.StatusCode.value if data.StatusCode is not None else 0


def status_quality(code: int) -> str | None:
    """Return the quality that a status stands for; None is good."""
    severity = code >> 30
    if not severity:
        return None
    return (uncertain if severity == 1 else bad)(reason(code))


def reason(code: int) -> str:
    """Return the short word for a status code: `node-id-unknown` for BadNodeIdUnknown."""
    return _REASONS.get(code & CODE_BITS) or f"status-{code:08x}"


def overflowed(code: int) -> bool:
    """Tell whether the server threw away values of this item that it had before this one."""
    return code & _OVERFLOW == _OVERFLOW


def raw(variant: ua.Variant | None) -> Raw:
    """Return a variant as a plain value, or why it has none."""
    try:
        return plain(variant)
    except WrongError as wrong:
        return wrong


def plain(variant: ua.Variant | None) -> Scalar | list[Scalar]:
    """Return a variant as a plain value; raise for what has no such form."""
    raw = variant.Value if variant is not None else None
    if raw is None:
        raise WrongError(NO_VALUE)
    if variant is not None and variant.VariantType is ua.VariantType.Float:
        several = as_decimals(raw if isinstance(raw, list) else [raw])
        return list(several) if isinstance(raw, list) else several[0]
    if isinstance(raw, list):
        return [_scalar(item) for item in raw]
    return _scalar(raw)


def _scalar(raw: object) -> Scalar:
    match raw:
        case bool() | float():
            return raw
        case int():
            return int(raw)  # also what came as an enumeration
        case str():
            return _text(str(raw))
        case ua.LocalizedText():
            return _text(raw.Text or "")
        case datetime():
            return _aware(raw).isoformat().replace("+00:00", "Z")
        case bytes():
            return raw.hex()
        case uuid.UUID():
            return str(raw)
        case _:
            raise WrongError(UNSUPPORTED_TYPE)


def _text(text: str) -> str:
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise WrongError(BAD_TEXT)  # asyncua keeps bytes that are not UTF-8 as lone surrogates
    return text


def _present(sent: Raw) -> Scalar | list[Scalar]:
    if isinstance(sent, WrongError):
        raise sent
    if sent is None:
        raise WrongError(NO_VALUE)
    return _text(sent) if isinstance(sent, str) else sent


def _tag_value(tag: OpcUaTag, raw: Scalar | list[Scalar]) -> Value:
    kind = tag.type.removesuffix("[]")
    if tag.type and isinstance(raw, list) != tag.type.endswith("[]"):
        raise WrongError(TYPE_MISMATCH)
    if isinstance(raw, list):
        return [_finished(tag, _typed(kind, item)) for item in raw]
    return _finished(tag, _typed(kind, raw))


def _typed(kind: str, raw: Scalar) -> Scalar:
    """Return the scalar as the configured type, where that loses nothing."""
    match kind, raw:
        case ("", _) | ("bool", bool()) | ("string", str()):
            return raw
        case ("float32" | "float64", float()):
            return raw
        case ("float32" | "float64", int()) if not isinstance(raw, bool) and abs(raw) <= 2**53:
            return float(raw)
        case (_, int()) if kind in _RANGES and not isinstance(raw, bool):
            if in_range(kind, raw):
                return raw
    raise WrongError(TYPE_MISMATCH)


def in_range(kind: str, raw: int) -> bool:
    """Tell whether an integer type holds a number."""
    return raw in _RANGES[kind]


def holds(wanted: str, sent: str) -> bool:
    """Tell whether each finite value of a type that is sent is one of the type that is wanted, as it stands."""
    if wanted in _RANGES and sent in _RANGES:
        inner, outer = _RANGES[sent], _RANGES[wanted]
        return inner[0] in outer and inner[-1] in outer
    return wanted in ("", sent) or {wanted, sent} == {"float32", "float64"}


def _finished(tag: OpcUaTag, raw: Scalar) -> Scalar:
    """Return the engineering value."""
    if tag.scale != 1.0 or tag.offset != 0.0:
        if isinstance(raw, bool | str):
            raise WrongError(TYPE_MISMATCH)
        applied = scaling(tag.scale, tag.offset)
        raw = applied.whole(raw) if isinstance(raw, int) else applied.real(raw)
    if isinstance(raw, float) and not math.isfinite(raw):
        raise WrongError(NOT_A_NUMBER)
    return raw


def _aware(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def ticks(at: datetime | None) -> int:
    """Return a time as it goes over the wire, in 100 ns since 1601; 0 stands for none."""
    return 0 if at is None else int(ua.datetime_to_win_epoch(at))


def unix_ms(at_ticks: int) -> int | None:
    """Return a time in whole milliseconds since the epoch, None for what stands for none.

    A server without a clock sends the null time of 1601 or the last of 9999 (OPC UA Part 6, 5.2.2.5).
    """
    return (at_ticks - _EPOCH) // _TICKS_A_MS if _EPOCH <= at_ticks < _MEANINGLESS else None
