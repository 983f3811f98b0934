"""Turns a value into the request that writes it: the exact inverse of `registers`."""

import struct
from fractions import Fraction
from math import isfinite

from edgegw.config.schema import ModbusTag
from edgegw.domain.tag import Scalar
from edgegw.drivers.modbus import pdu
from edgegw.drivers.modbus.registers import CODES, byte_places
from edgegw.drivers.scaling import unscaled
from edgegw.errors import Refused

MOST_REGISTERS = 123
"""Registers in one write (Modbus Application Protocol 1.1b3, 6.12)."""


def write_request(tag: ModbusTag, value: Scalar, held: bytes = b"\0\0") -> bytes:
    """Return the PDU that writes a tag: function 5 for a coil, 6 for one register, 16 for several.

    `held` is what the register of a single bit holds, whose other bits are kept. Raises Refused if the tag cannot
    hold the value.
    """
    table, start, _ = tag.address
    if table == "coil":
        return pdu.write_coil_request(start, _on(value))
    if table != "holding":
        raise Refused("read-only", f"found {tag.address}; expected a coil or a holding register to write")
    if tag.registers > MOST_REGISTERS:
        raise Refused(
            "too-long",
            f"found a tag of {tag.registers} registers; expected {MOST_REGISTERS} at most to be written in one",
        )
    return pdu.write_registers_request(start, encode(tag, value, held))


def encode(tag: ModbusTag, value: Scalar, held: bytes = b"\0\0") -> bytes:
    """Return the bytes of a tag's registers as they go over the wire; raise Refused if it cannot hold the value.

    A number is brought from the tag's unit to the raw one, in decimals, and for an integer type rounded to the
    nearest, a half to the even one. A text is filled up with NUL.
    """
    size = tag.registers * 2
    places = byte_places(tag, size)
    if tag.type == "bool":
        word = int.from_bytes(bytes(held[place] for place in places), "big")
        mask = 1 << (tag.address.bit or 0)
        plain = (word | mask if _on(value) else word & ~mask).to_bytes(2, "big")
    elif tag.type.startswith("string:"):
        plain = _text(value, int(tag.type[7:])).ljust(size, b"\0")
    else:
        plain = _number(tag, value)
    placed = bytearray(size)
    for place, byte in zip(places, plain, strict=True):
        placed[place] = byte
    return bytes(placed)


def _on(value: Scalar) -> bool:
    if not isinstance(value, bool):
        raise Refused("type-mismatch", f"found {value!r}; expected true or false")
    return value


def _text(value: Scalar, most: int) -> bytes:
    if not isinstance(value, str):
        raise Refused("type-mismatch", f"found {value!r}; expected a text")
    try:
        data = value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("not-text", f"found {value!r}, which has no UTF-8; expected a text") from None
    if b"\0" in data or data.endswith(b" "):
        raise Refused("not-text", f"found {value!r}; expected no NUL in it and no space at its end")
    if len(data) > most:
        raise Refused("too-long", f"found {len(data)} bytes of text; expected {most} at most")
    return data


def _number(tag: ModbusTag, value: Scalar) -> bytes:
    if isinstance(value, bool | str):
        raise Refused("type-mismatch", f"found {value!r}; expected a number")
    if isinstance(value, float) and not isfinite(value):
        raise Refused("not-a-number", f"found {value!r}; expected a finite number")
    raw: int | float | Fraction = value
    if tag.scale != 1.0 or tag.offset != 0.0:
        raw = unscaled(value, tag.scale, tag.offset)
    try:
        exact = float(raw) if tag.type.startswith("float") else round(raw)
        return struct.pack(">" + CODES[tag.type], exact)
    except (struct.error, OverflowError):
        scaled = "" if raw is value else ", as it is before scale and offset"
        raise Refused(
            "out-of-type-range", f"found {value!r}; expected what {tag.type} holds{scaled}"
        ) from None
