"""Turns the bytes of a block into values, all at once.

A block's layout is compiled once into a `struct.Struct` that yields its values in one call. Values that do not
stand most significant byte first are brought there by one gather of the block's bytes; scale, bits and text
touch only the tags that have them.
"""

import struct
from collections.abc import Callable, Sequence
from math import isfinite
from operator import itemgetter
from typing import Any

from edgegw.config.schema import ModbusTag
from edgegw.domain.quality import BAD_TEXT, NOT_A_NUMBER
from edgegw.domain.tag import Value
from edgegw.drivers.decimals import as_decimals
from edgegw.drivers.modbus.plan import Block
from edgegw.drivers.scaling import scaling

CODES = {
    "bool": "H", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q",
    "float32": "f", "float64": "d",
}  # fmt: skip
"""What `struct` calls each type."""

Decoded = tuple[Sequence[Value], dict[str, str] | None]
"""The values in the order of the block's tags, and the quality of those that are not good."""


def compile_block(block: Block) -> Callable[[bytes], Decoded]:
    """Return what decodes the data bytes of a block's answer (without the byte count).

    The data has two bytes a register, or one bit a coil, least significant first in each byte
    (Modbus Application Protocol 1.1b3, 6.1 and 6.3).
    """
    bits = block.table in ("coil", "discrete")
    return _compile_bits(block) if bits else _compile_registers(block)


def _compile_bits(block: Block) -> Callable[[bytes], Decoded]:
    places = [(placed.at // 8, 1 << (placed.at % 8)) for placed in block.tags]

    def decode(data: bytes) -> Decoded:
        return [bool(data[byte] & mask) for byte, mask in places], None

    return decode


def _compile_registers(block: Block) -> Callable[[bytes], Decoded]:
    layout, gather = _layout(block)
    unpack = layout.unpack
    names = [placed.name for placed in block.tags]
    floats = [i for i, placed in enumerate(block.tags) if _may_be_infinite(placed.tag)]
    only_floats = len(floats) == len(names)
    singles = [i for i, placed in enumerate(block.tags) if placed.tag.type == "float32"]
    only_singles = len(singles) == len(names)
    finish = [(i, step) for i, placed in enumerate(block.tags) if (step := _finish(placed.tag)) is not None]

    def decode(data: bytes) -> Decoded:
        values: Sequence[Any] = unpack(gather(data) if gather else data)
        quality: dict[str, str] | None = None
        if only_singles:
            values = as_decimals(values)
        elif singles:
            values = list(values)
            for i, value in zip(singles, as_decimals([values[i] for i in singles]), strict=True):
                values[i] = value
        if finish:
            values = list(values)
            for i, step in finish:
                try:
                    values[i] = step(values[i])
                except UnicodeDecodeError:
                    values[i] = None
                    quality = {**(quality or {}), names[i]: BAD_TEXT}
        if floats and not isfinite(sum(values) if only_floats else sum([values[i] for i in floats])):
            # some value is not a number, or together they overflow: look at each
            values = list(values)
            for i in floats:
                if not isfinite(values[i]):
                    values[i] = None
                    quality = {**(quality or {}), names[i]: NOT_A_NUMBER}
        return values, quality

    return decode


def _may_be_infinite(tag: ModbusTag) -> bool:
    """Tell whether a value can come out that is no finite number: any float, or an integer scaled far up."""
    if tag.type in ("float32", "float64"):
        return True
    scaled = tag.scale != 1.0 or tag.offset != 0.0
    return scaled and not isfinite(2.0 ** (16 * tag.registers) * abs(tag.scale) + abs(tag.offset))


def _layout(block: Block) -> tuple[struct.Struct, Callable[[bytes], bytes] | None]:
    """Return the struct that yields the block's values, and the gather before it if one is needed."""
    pieces: list[str] = []
    order: list[int] = []
    end = 0
    plain = True
    for placed in block.tags:
        size = placed.tag.registers * 2
        start = placed.at * 2
        plain = plain and start >= end and placed.tag.order == "ABCD"
        if start > end:
            pieces.append(f"{start - end}x")
        pieces.append(_code(placed.tag))
        order += [start + i for i in byte_places(placed.tag, size)]
        end = start + size
    if plain:
        if block.size * 2 > end:
            pieces.append(f"{block.size * 2 - end}x")
        return struct.Struct(">" + "".join(pieces)), None
    # overlapping tags or other byte orders: put every value's bytes one behind the other first
    pick = itemgetter(*order)
    return struct.Struct(">" + "".join(_code(placed.tag) for placed in block.tags)), lambda data: bytes(
        pick(data)
    )


def _code(tag: ModbusTag) -> str:
    return f"{tag.registers * 2}s" if tag.type.startswith("string:") else CODES[tag.type]


def byte_places(tag: ModbusTag, size: int) -> list[int]:
    """Return where each byte of a value, most significant first, stands in its `size` bytes of registers.

    `ABCD` is as Modbus means it. `BADC` swaps the bytes of each register, `CDAB` turns the registers round,
    `DCBA` both. Text has no most significant end, so only the swap of bytes concerns it.
    """
    swapped = tag.order in ("BADC", "DCBA")
    turned = tag.order in ("CDAB", "DCBA") and not tag.type.startswith("string:")
    registers = range(0, size, 2)
    places = []
    for register in reversed(registers) if turned else registers:
        places += [register + 1, register] if swapped else [register, register + 1]
    return places


def _finish(tag: ModbusTag) -> Callable[[Any], Value] | None:
    """Return the last step from a raw value to the engineering value, None if there is none."""
    if tag.type == "bool":
        mask = 1 << (tag.address.bit or 0)
        return lambda raw: bool(raw & mask)
    if tag.type.startswith("string:"):
        length = int(tag.type[7:])
        return lambda raw: raw[:length].split(b"\0", 1)[0].decode("utf-8").rstrip(" ")
    if tag.scale == 1.0 and tag.offset == 0.0:
        return None
    applied = scaling(tag.scale, tag.offset)
    return applied.real if tag.type.startswith("float") else applied.whole
