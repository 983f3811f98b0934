"""Turns what an OPC UA server sends into values, qualities and scans.

Status codes are those of OPC UA Part 4, 7.39: the two top bits say good, uncertain or bad.
"""

import math
import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import NamedTuple

from asyncua import ua
from asyncua.ua.status_codes import code_to_name_doc

from edgegw.config.schema import OpcUaTag
from edgegw.domain.quality import BAD_TEXT, NOT_A_NUMBER, bad, uncertain
from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.decimals import decimals

NO_VALUE = bad("no-value")
TYPE_MISMATCH = bad("type-mismatch")
UNSUPPORTED_TYPE = bad("unsupported-type")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MEANINGLESS_YEAR = 9999
_RANGES = {f"{sign}int{bits}": (bits, sign == "") for bits in (8, 16, 32, 64) for sign in ("", "u")}
CODE_BITS = 0xFFFF0000
"""The part of a status that is its code; the rest are flags."""
_OVERFLOW = 0x0480
"""InfoType DataValue with the overflow bit: the server threw older values of this item away."""


class Reading(NamedTuple):
    """One tag's value, its quality (None is good) and the source's time (None if it gave none)."""

    value: Value
    quality: str | None
    ts_ms: int | None


class _WrongError(Exception):
    """There is no value; the argument is the quality to give instead."""


def decode(tag: OpcUaTag, data: ua.DataValue) -> Reading:
    """Return what a server said about a tag, scaled, and None with a bad quality where that is no value."""
    ts_ms = _ms(data.SourceTimestamp)
    quality = status_quality(data.StatusCode)
    if quality is not None and quality.startswith("bad:"):
        return Reading(None, quality, ts_ms)
    try:
        return Reading(_tag_value(tag, plain(data.Value)), quality, ts_ms)
    except _WrongError as wrong:
        return Reading(None, str(wrong), ts_ms)


def shown(data: ua.DataValue) -> str:
    """Return what a server said about any variable, as a line of text."""
    quality = status_quality(data.StatusCode)
    try:
        text = str(plain(data.Value))
    except _WrongError as wrong:
        return str(wrong)
    return quality if quality and quality.startswith("bad:") else f"{text} ({quality})" if quality else text


def status_quality(status: ua.StatusCode | None) -> str | None:
    """Return the quality that a status code stands for; None is good."""
    if status is None or status.is_good():
        return None
    make = uncertain if status.is_uncertain() else bad
    return make(reason(status.value))


def reason(code: int) -> str:
    """Return the short word for a status code: `node-id-unknown` for BadNodeIdUnknown."""
    name, _ = code_to_name_doc.get(code & CODE_BITS, ("", ""))
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|\d+", name)
    return "-".join(words[1:]).lower() or f"status-{code:08x}"


def overflowed(data: ua.DataValue) -> bool:
    """Tell whether the server threw away values of this item that it had before this one."""
    return data.StatusCode is not None and data.StatusCode.value & _OVERFLOW == _OVERFLOW


def group(
    device: str, readings: Iterable[tuple[str, Reading]], now_ms: int, *, by_source: bool
) -> list[Scan]:
    """Return readings as scans in the order of their times, one for each millisecond.

    The time is the source's if `by_source` and it gave one, else `now_ms`. A tag that has several values at
    one time has the later ones in further scans of that time.
    """
    scans: dict[tuple[int, int], tuple[dict[str, Value], dict[str, str]]] = {}
    seen: dict[tuple[int, str], int] = {}
    for tag, (value, quality, source_ms) in readings:
        ts_ms = source_ms if by_source and source_ms is not None else now_ms
        turn = seen.get((ts_ms, tag), 0)
        seen[ts_ms, tag] = turn + 1
        values, qualities = scans.setdefault((ts_ms, turn), ({}, {}))
        values[tag] = value
        if quality is not None:
            qualities[tag] = quality
    return [
        Scan(key[0], device, values, qualities or None)
        for key, (values, qualities) in sorted(scans.items(), key=itemgetter(0))
    ]


def plain(variant: ua.Variant | None) -> Scalar | list[Scalar]:
    """Return a variant as a plain value; raise for what has no such form."""
    raw = variant.Value if variant is not None else None
    if raw is None:
        raise _WrongError(NO_VALUE)
    if variant is not None and variant.VariantType is ua.VariantType.Float:
        several, _ = decimals(raw if isinstance(raw, list) else [raw])
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
            raise _WrongError(UNSUPPORTED_TYPE)


def _text(text: str) -> str:
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise _WrongError(BAD_TEXT)  # asyncua keeps bytes that are not UTF-8 as lone surrogates
    return text


def _tag_value(tag: OpcUaTag, raw: Scalar | list[Scalar]) -> Value:
    kind = tag.type.removesuffix("[]")
    if tag.type and isinstance(raw, list) != tag.type.endswith("[]"):
        raise _WrongError(TYPE_MISMATCH)
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
    raise _WrongError(TYPE_MISMATCH)


def in_range(kind: str, raw: int) -> bool:
    """Tell whether an integer type holds a number."""
    bits, signed = _RANGES[kind]
    low = -1 << bits - 1 if signed else 0
    return low <= raw < low + (1 << bits)


def _finished(tag: OpcUaTag, raw: Scalar) -> Scalar:
    """Return the engineering value."""
    if tag.scale != 1.0 or tag.offset != 0.0:
        if isinstance(raw, bool | str):
            raise _WrongError(TYPE_MISMATCH)
        raw = raw * tag.scale + tag.offset
    if isinstance(raw, float) and not math.isfinite(raw):
        raise _WrongError(NOT_A_NUMBER)
    return raw


def _aware(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _ms(at: datetime | None) -> int | None:
    """Return a time in whole milliseconds since the epoch, None for none and for what stands for none.

    A server without a clock sends the null time of 1601 or the last of 9999 (OPC UA Part 6, 5.2.2.5).
    """
    if at is None or (at := _aware(at)) < _EPOCH or at.year >= _MEANINGLESS_YEAR:
        return None
    return (at - _EPOCH) // timedelta(milliseconds=1)
