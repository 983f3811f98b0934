"""What the bytes of a block come to: data-only cases, and properties against an independent reference."""

import math
import random
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegw.config.schema import ModbusTag
from edgegw.config.units import ModbusAddress
from edgegw.drivers.decimals import as_decimals
from edgegw.drivers.modbus.plan import Block, plan
from edgegw.drivers.modbus.registers import compile_block

CASES = tomllib.loads((Path(__file__).parent / "cases" / "modbus_decode.toml").read_text())
ORDERS = {
    2: {"ABCD": "AB", "CDAB": "AB", "BADC": "BA", "DCBA": "BA"},
    4: {"ABCD": "ABCD", "CDAB": "CDAB", "BADC": "BADC", "DCBA": "DCBA"},
    8: {"ABCD": "ABCDEFGH", "CDAB": "GHEFCDAB", "BADC": "BADCFEHG", "DCBA": "HGFEDCBA"},
}
"""The letters of a value of each size, A the most significant byte, as each order puts them on the wire."""
FORMATS = {
    "int16": ">h", "uint16": ">H", "int32": ">i", "uint32": ">I", "int64": ">q", "uint64": ">Q",
    "float32": ">f", "float64": ">d",
}  # fmt: skip

Memory = dict[str, bytes]
"""Each table from address 0 on: two bytes a register, or eight coils a byte."""


def answer(memory: Memory, block: Block) -> bytes:
    """Return the data bytes with which a device of this memory answers a block's request."""
    held = memory[block.table]
    if block.table in ("coil", "discrete"):
        bits = int.from_bytes(held, "little") >> block.start & ((1 << block.size) - 1)
        return bits.to_bytes((block.size + 7) // 8, "little")
    data = held[block.start * 2 : (block.start + block.size) * 2]
    assert len(data) == block.size * 2, "the case's bytes do not reach its tags"
    return data


def read(memory: Memory, tags: Mapping[str, ModbusTag], **limits: int) -> dict[str, str]:
    """Plan, answer and decode; return each tag's value, to the type and the bit, or its quality."""
    got: dict[str, str] = {}
    for block in plan(tags, **limits):
        values, quality = compile_block(block)(answer(memory, block))
        for placed, value in zip(block.tags, values, strict=True):
            bad = (quality or {}).get(placed.name)
            assert (value is None) == (bad is not None), (placed.name, value, bad)
            got[placed.name] = bad or f"{type(value).__name__} {value!r}"
    return got


def wanted(case: Mapping[str, Any]) -> str:
    """Return what a case expects, in the words of `read`."""
    return str(case["quality"]) if "quality" in case else f"{type(case['value']).__name__} {case['value']!r}"


def tag_of(keys: Mapping[str, Any]) -> ModbusTag:
    """Return a tag as the configuration makes it."""
    return ModbusTag(**{"address": "holding:0", **keys})


def named(cases: list[dict[str, Any]]) -> list[Any]:
    """Return the cases as parameters, each with its name."""
    assert len({case["name"] for case in cases}) == len(cases), "two cases of one name"
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.mark.parametrize("case", named(CASES["case"]))
def test_a_case_by_itself(case: dict[str, Any]) -> None:
    tag = tag_of(case["tag"])
    memory = {tag.address.table: bytes.fromhex(case["bytes"])}
    assert read(memory, {"tag": tag}) == {"tag": wanted(case)}


@pytest.mark.parametrize("seed", range(8))
def test_all_cases_side_by_side_in_shared_blocks(seed: int) -> None:
    """Every case stands somewhere in one device's tables, with gaps of rubbish, in another order each time."""
    chance = random.Random(seed)
    registers, coils = {"holding": b"", "input": b""}, {"coil": 0, "discrete": 0}
    ends = dict.fromkeys(coils, 0)
    tags, expected = {}, {}
    for i, case in enumerate(chance.sample(CASES["case"], len(CASES["case"]))):
        tag, data = tag_of(case["tag"]), bytes.fromhex(case["bytes"])
        table, start, bit = tag.address
        if table in coils:
            at = ends[table] + chance.choice([0, 0, 1, 13])
            coils[table] |= (int.from_bytes(data, "little") >> start & 1) << at
            ends[table] = at + 1
        else:
            registers[table] += chance.randbytes(2 * chance.choice([0, 0, 1, 9]))
            at = len(registers[table]) // 2
            registers[table] += data
        tags[f"t{i}"] = replace(tag, address=ModbusAddress(table, at, bit))
        expected[f"t{i}"] = wanted(case)
    memory = registers | {table: bits.to_bytes(99, "little") for table, bits in coils.items()}
    assert read(memory, tags, max_block=chance.choice([125, 126 - seed])) == expected


@pytest.mark.parametrize("case", named(CASES["layout"]))
def test_a_layout(case: dict[str, Any]) -> None:
    tags = {name: tag_of(keys) for name, keys in case["tags"].items()}
    table, start, _ = ModbusAddress.parse(case["start"])
    data = bytes.fromhex(case["bytes"])
    image = b"\xa5\xa5" * start + data
    expected = {name: f"{type(value).__name__} {value!r}" for name, value in case["values"].items()}
    expected |= case.get("quality", {})
    assert read(dict.fromkeys(("holding", "input", "coil", "discrete"), image), tags) == expected, table


def encode(kind: str, order: str, value: float) -> bytes:
    """Write a value as a device of this order does."""
    plain = struct.pack(FORMATS[kind], value)
    return bytes(plain["ABCDEFGH".index(letter)] for letter in ORDERS[len(plain)][order])


def decode(kind: str, order: str, data: bytes) -> float:
    """Read a value as a device of this order writes it."""
    letters = ORDERS[len(data)][order]
    return struct.unpack(FORMATS[kind], bytes(data[letters.index(a)] for a in sorted(letters)))[0]


def shown(kind: str, value: float) -> str:
    """Return a value in the words of `read`: a float32 as the decimal that is meant by it."""
    meant = as_decimals([value])[0] if kind == "float32" else value
    return f"{type(meant).__name__} {meant!r}"


@st.composite
def written(draw: st.DrawFn) -> tuple[str, str, float, int]:
    """A type, an order, a value that the type holds, and a gap before it."""
    kind = draw(st.sampled_from(list(FORMATS)))
    width = int(kind.lstrip("uintfloa"))
    if kind.startswith("float"):
        value: float = draw(st.floats(width=width, allow_nan=False, allow_infinity=False))
    else:
        least = 0 if kind.startswith("u") else -(2 ** (width - 1))
        value = draw(st.integers(least, least + 2**width - 1))
    return kind, draw(st.sampled_from(list(ORDERS[2]))), value, draw(st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(layout=st.lists(written(), min_size=1, max_size=40), max_block=st.integers(4, 125))
def test_what_a_device_writes_is_read_back(layout: list[tuple[str, str, float, int]], max_block: int) -> None:
    image, tags, expected = b"", {}, {}
    for i, (kind, order, value, gap) in enumerate(layout):
        image += b"\xff" * 2 * gap
        tags[f"t{i}"] = tag_of({"address": f"input:{len(image) // 2}", "type": kind, "order": order})
        expected[f"t{i}"] = shown(kind, value)
        image += encode(kind, order, value)
    assert read({"input": image}, tags, max_block=max_block) == expected


@settings(max_examples=150, deadline=None)
@given(
    image=st.binary(min_size=24, max_size=24),
    picks=st.lists(
        st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(list(ORDERS[2])), st.integers(0, 8)),
        min_size=1, max_size=12,
    ),
)  # fmt: skip
def test_tags_that_overlap_each_read_their_own_bytes(image: bytes, picks: list[tuple[str, str, int]]) -> None:
    tags, expected = {}, {}
    for i, (kind, order, at) in enumerate(picks):
        tags[f"t{i}"] = tag_of({"address": f"holding:{at}", "type": kind, "order": order})
        value = decode(kind, order, image[at * 2 : at * 2 + struct.calcsize(FORMATS[kind])])
        good = math.isfinite(value)
        expected[f"t{i}"] = shown(kind, value) if good else "bad:not-a-number"
    assert read({"holding": image}, tags) == expected


@settings(max_examples=80, deadline=None)
@given(
    data=st.binary(min_size=2, max_size=40).filter(lambda data: len(data) % 2 == 0),
    length=st.integers(1, 40),
    swapped=st.booleans(),
)
def test_text_is_what_stands_before_the_first_nul_or_bad(data: bytes, length: int, swapped: bool) -> None:
    length = min(length, len(data))
    image = b"".join(data[i : i + 2][::-1] if swapped else data[i : i + 2] for i in range(0, len(data), 2))
    tag = tag_of({"type": f"string:{length}", "order": "BADC" if swapped else "ABCD"})
    before = bytearray()
    for byte in data[:length]:
        if byte == 0:
            break
        before.append(byte)
    try:
        expected = f"str {before.decode().rstrip(' ')!r}"
    except UnicodeDecodeError:
        expected = "bad:not-text"
    assert read({"holding": image}, {"text": tag}) == {"text": expected}
