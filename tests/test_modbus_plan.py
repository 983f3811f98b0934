"""Which requests read a device's tags: data-only cases, and what holds for every plan."""

import random
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegw.config.schema import ModbusTag
from edgegw.drivers.modbus.plan import Block, plan, split

CASES = tomllib.loads((Path(__file__).parent / "cases" / "modbus_plan.toml").read_text())["case"]


def tags_of(written: dict[str, str]) -> dict[str, ModbusTag]:
    """Return the tags of a case, rows of tags written out."""
    tags = {}
    for name, text in written.items():
        address, kind, *row = text.split()
        tag = ModbusTag(address=address, type=kind)
        if not row:
            tags[name] = tag
            continue
        table, _, first = address.partition(":")
        step = int(row[1].removeprefix("/")) if len(row) > 1 else tag.registers
        for i in range(int(row[0].removeprefix("x"))):
            place = f"{table}:{int(first) + i * step}"
            tags[f"{name}{i}"] = ModbusTag(address=place, type=kind)
    return tags


def names_of(read: str) -> list[str]:
    """Return the tags that a line of `reads` names."""
    names = []
    for word in read.split()[1:]:
        row = re.fullmatch(r"([a-z]+)(\d+)\.\.(\d+)", word)
        names += [f"{row[1]}{i}" for i in range(int(row[2]), int(row[3]) + 1)] if row else [word]
    return names


def spelt(block: Block) -> tuple[str, list[str]]:
    """Return a block as a case writes it."""
    return f"{block.table}:{block.start}+{block.size}", [placed.name for placed in block.tags]


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_a_case(case: dict[str, Any]) -> None:
    tags = tags_of(case["tags"])
    limits = {key: case[key] for key in ("max_block", "max_gap") if key in case}
    expected = [(read.split()[0], names_of(read)) for read in case["reads"]]
    shuffled = random.Random(1).sample(list(tags), len(tags))
    for order in (list(tags), list(reversed(tags)), shuffled):
        blocks = plan({name: tags[name] for name in order}, **limits)
        assert [spelt(block) for block in blocks] == expected


@st.composite
def devices(draw: st.DrawFn) -> tuple[dict[str, ModbusTag], int, int]:
    """Any tags, crowded together so that they overlap and stand at limits, with limits that fit them."""
    tags = {}
    for i in range(draw(st.integers(1, 60))):
        table = draw(st.sampled_from(["coil", "discrete", "holding", "holding", "input"]))
        start = draw(st.integers(0, 400) | st.integers(65_000, 65_400))
        if table in ("coil", "discrete"):
            address, kind = f"{table}:{start * draw(st.sampled_from([1, 1, 20])) % 65_536}", "bool"
        else:
            kind = draw(st.sampled_from(["uint16", "float32", "float64", "string:7", "string:90", "bool"]))
            address = f"{table}:{start}" + (".3" if kind == "bool" else "")
        tags[f"t{i}"] = ModbusTag(address=address, type=kind)
    widest = max(tag.registers for tag in tags.values())
    return tags, draw(st.integers(widest, 125)), draw(st.integers(0, 124))


@settings(max_examples=200, deadline=None)
@given(device=devices(), chance=st.randoms(use_true_random=False))
def test_every_plan_reads_each_tag_whole_and_once_within_the_limits(
    device: tuple[dict[str, ModbusTag], int, int], chance: random.Random
) -> None:
    tags, max_block, max_gap = device
    blocks = plan(tags, max_block, max_gap)
    assert sorted(placed.name for block in blocks for placed in block.tags) == sorted(tags)
    for block in blocks:
        bits = block.table in ("coil", "discrete")
        assert 1 <= block.size <= (min(2000, max_block * 16) if bits else max_block)
        used = set()
        for placed in block.tags:
            tag = tags[placed.name]
            assert placed.tag is tag
            assert (tag.address.table, tag.address.start) == (block.table, block.start + placed.at)
            assert placed.at + tag.registers <= block.size, "a value is torn"
            used.update(range(placed.at, placed.at + tag.registers))
        assert {0, block.size - 1} <= used, "an end of the block is read for nothing"
        vain = longest = 0
        for place in range(block.size):
            vain = 0 if place in used else vain + 1
            longest = max(longest, vain)
        assert longest <= max_gap * (16 if bits else 1)
    names = list(tags)
    chance.shuffle(names)
    assert plan({name: tags[name] for name in names}, max_block, max_gap) == blocks


@settings(max_examples=50, deadline=None)
@given(device=devices())
def test_a_block_that_is_split_reads_each_tag_by_itself(
    device: tuple[dict[str, ModbusTag], int, int],
) -> None:
    for block in plan(*device):
        singles = split(block)
        assert [single.tags[0].name for single in singles] == [placed.name for placed in block.tags]
        for single in singles:
            (placed,) = single.tags
            assert (single.table, single.start) == tuple(placed.tag.address[:2])
            assert (placed.at, single.size) == (0, placed.tag.registers)
