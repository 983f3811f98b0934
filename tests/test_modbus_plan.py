"""Which requests read a device's tags: data-only cases, and what holds for every plan."""

import random
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegw.config.schema import ModbusTag
from edgegw.drivers.modbus.plan import NOTHING, Avoid, Block, halves, plan
from edgegw.drivers.modbus.read_plan import PATIENCE, RETRY_FIRST_S, RETRY_MAX_S, SAMPLES, ReadPlan

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


@settings(max_examples=100, deadline=None)
@given(device=devices())
def test_halves_read_each_tag_of_the_block_whole_and_once(
    device: tuple[dict[str, ModbusTag], int, int],
) -> None:
    for block in plan(*device):
        pair = halves(block)
        if pair is None:
            assert len({(placed.at, placed.tag.registers) for placed in block.tags}) == 1
            continue
        names = sorted(placed.name for half in pair for placed in half.tags)
        assert names == sorted(placed.name for placed in block.tags)
        places = [{(half.start + placed.at, placed.tag.registers) for placed in half.tags} for half in pair]
        assert abs(len(places[0]) - len(places[1])) <= 1
        for half in pair:
            whole_and_tight(half)


def whole_and_tight(block: Block) -> None:
    """Check that a block reads each of its tags whole, and no more at its ends."""
    ends = [placed.at + placed.tag.registers for placed in block.tags]
    assert min(placed.at for placed in block.tags) == 0
    assert max(ends) == block.size
    for placed in block.tags:
        assert placed.tag.address[:2] == (block.table, block.start + placed.at)


# ---- reads that adapt to what a device refuses


class Refusing:
    """A device that refuses reads which touch a hole, cross a border or are too long; it counts the requests."""

    def __init__(
        self, holes: Iterable[int] = (), borders: Iterable[int] = (), limit: int = 2000, on: bool = True
    ) -> None:
        self.holes, self.borders, self.limit, self.on = set(holes), set(borders), limit, on
        self.requests = 0

    def answers(self, block: Block) -> bool:
        """Tell whether a read is answered."""
        self.requests += 1
        registers = range(block.start, block.end)
        return (
            self.on
            and block.size <= self.limit
            and not any(hole in registers for hole in self.holes)
            and not any(block.start < border < block.end for border in self.borders)
        )


def scan(reads: ReadPlan, device: Refusing, now_s: float = 0.0) -> tuple[set[str], int]:
    """Scan as the driver does; return the tags that were answered, and the number of requests."""
    answered: set[str] = set()
    before = device.requests
    reads.begin(now_s)
    for block in reads.blocks:
        if device.answers(block):
            reads.answered(block)
            answered.update(placed.name for placed in block.tags)
        elif (search := reads.search(block)) is not None:
            while (part := search.next()) is not None:
                whole_and_tight(part)
                found = device.answers(part)
                search.note(part, found)
                if found:
                    answered.update(placed.name for placed in part.tags)
    reads.end(now_s)
    return answered, device.requests - before


VAIN = PATIENCE + SAMPLES
"""Requests of a search that gives up."""

ROW = {f"r{i}": ModbusTag(address=f"holding:{i}", type="uint16") for i in range(120)}
GAPPED = {
    f"r{i}": ModbusTag(address=f"holding:{i}", type="uint16") for i in range(100) if i not in (40, 41, 42)
}


@pytest.mark.parametrize(
    ("tags", "device", "first", "reads"),
    [
        pytest.param(GAPPED, Refusing(), 1, 1, id="nothing"),
        pytest.param(GAPPED, Refusing([41]), 15, 2, id="a hole between tags"),
        pytest.param(ROW, Refusing([7]), 15, 3, id="a tag that does not exist"),
        pytest.param(ROW, Refusing([0]), 15, 2, id="the first"),
        pytest.param(ROW, Refusing([119]), 15, 2, id="the last"),
        pytest.param(ROW, Refusing(range(50, 70)), 55, 3, id="twenty in a row"),
        pytest.param(ROW, Refusing([20, 80]), 29, 5, id="two"),
        pytest.param(ROW, Refusing(limit=60), 3, 2, id="half of the length"),
        pytest.param(ROW, Refusing(limit=50), 7, 4, id="less than half"),
        pytest.param(ROW, Refusing(limit=1), 240 + 4, 120, id="one at a time"),
        pytest.param(ROW, Refusing([5], limit=60), 15, 4, id="a hole and a limit"),
        pytest.param(ROW, Refusing(borders=[30]), 7, 2, id="a border"),
        pytest.param(ROW, Refusing(range(1, 120, 2)), 240 + 4, 120, id="every other"),
        pytest.param(ROW, Refusing(on=False), VAIN, 2, id="everything"),
    ],
)
def test_a_device_is_read_in_few_reads_after_a_search_of_few(
    tags: dict[str, ModbusTag], device: Refusing, first: int, reads: int
) -> None:
    made = ReadPlan(tags, 125, 8)
    wanted = {name for name, tag in tags.items() if device.on and tag.address.start not in device.holes}
    answered, requests = scan(made, device)
    assert answered == wanted, "no value is lost, not even in the first scan"
    assert requests <= first
    for _ in range(4):
        answered, requests = scan(made, device)
        assert answered == wanted
    assert requests == reads


def test_a_device_that_refuses_everything_while_it_starts_is_read_in_one_when_it_has() -> None:
    made, device = ReadPlan(ROW, 125, 8), Refusing(on=False)
    assert [scan(made, device)[1] for _ in range(4)] == [VAIN, 2, 2, 2]
    device.on = True
    for _ in range(3):
        assert scan(made, device) == (set(ROW), 1)
    assert made.avoid is NOTHING


def test_everything_is_tried_again_ever_more_rarely() -> None:
    made, device = ReadPlan(ROW, 125, 8), Refusing([7])
    scan(made, device, 0.0)
    scan(made, device, 1.0)
    tries = []
    for minute in range(1, 600):
        _, requests = scan(made, device, minute * 60.0)
        if requests > 3:
            tries.append(minute)
    assert tries[:7] == [1, 3, 7, 15, 31, 63, 123]
    assert RETRY_FIRST_S * (tries[-1] - tries[-2]) == RETRY_MAX_S
    device.holes.clear()
    for minute in range(600, 700):
        answered, requests = scan(made, device, minute * 60.0)
        assert len(answered) >= 119
    assert requests == 1


def test_everything_is_tried_again_after_an_outage() -> None:
    made, device = ReadPlan(ROW, 125, 8), Refusing(limit=60)
    for _ in range(3):
        scan(made, device)
    device.limit = 125
    made.forget()
    assert scan(made, device) == (set(ROW), 1)


def test_a_search_in_vain_goes_on_when_a_tag_is_answered_by_itself() -> None:
    """Just those tags do not exist that are tried alone, or a hole is left when the device has started."""
    for device in (Refusing({15, 46, 75, 106, 5, 35, 65, 95}), Refusing({7}, on=False)):
        made = ReadPlan(ROW, 125, 8)
        assert scan(made, device) == (set(), VAIN)
        device.on = True
        wanted = {f"r{i}" for i in range(120) if i not in device.holes}
        for _ in range(2):
            assert scan(made, device)[0] == wanted


def test_a_device_that_fails_now_and_then_is_not_searched_each_time() -> None:
    made, device = ReadPlan(ROW, 125, 8), Refusing(on=False)
    assert scan(made, device)[1] == VAIN
    for _ in range(5):
        device.on = True
        assert [scan(made, device)[1] for _ in range(2)] == [1, 1]
        device.on = False
        assert [scan(made, device)[1] for _ in range(2)] == [2, 2]


@settings(max_examples=300, deadline=None)
@given(
    device=devices(),
    holes=st.sets(st.integers(0, 420), max_size=6),
    borders=st.sets(st.integers(0, 420), max_size=3),
    limit=st.integers(1, 130),
)
def test_every_tag_that_can_be_read_by_itself_is_read_in_every_scan(
    device: tuple[dict[str, ModbusTag], int, int], holes: set[int], borders: set[int], limit: int
) -> None:
    """Whatever overlaps, in all tables; and the searches come to an end."""
    tags = device[0]
    made, field = ReadPlan(*device), Refusing(holes, borders, limit)
    alone = plan_alone(tags)
    wanted = {name for name, block in alone.items() if field.answers(block)}
    settled = tries = 0
    for _ in range(2 * len(tags) + 2):
        before = made.blocks
        answered, requests = scan(made, field)
        if made._in_vain:
            tries += 1
            assert answered <= wanted
            continue
        assert answered == wanted
        settled = settled + 1 if made.blocks is before else 0
        for block in made.blocks:
            whole_and_tight(block)
        if settled == 2:
            break
    assert sorted(placed.name for block in made.blocks for placed in block.tags) == sorted(tags)
    if made._in_vain:
        assert not wanted & made._in_vain, "what can be read is found within as many scans as there are tags"
        assert requests <= 2 * len(made.blocks)
        return
    assert settled == 2
    assert requests == len(made.blocks)
    assert made.avoid.tags == set(tags) - wanted


def plan_alone(tags: dict[str, ModbusTag]) -> dict[str, Block]:
    """Return the block that reads each tag by itself."""
    return {name: plan({name: tag}, 125, 8)[0] for name, tag in tags.items()}


def test_what_is_avoided_is_kept_apart() -> None:
    tags = {f"r{i}": ModbusTag(address=f"holding:{i}", type="uint16") for i in range(10)}
    avoid = Avoid(frozenset({"r3", "r4"}), frozenset({("holding", 7)}), frozenset({("holding", 4)}))
    assert [spelt(block)[0] for block in plan(tags, avoid=avoid)] == [
        "holding:0+3", "holding:3+2", "holding:5+2", "holding:7+3",
    ]  # fmt: skip
    assert [spelt(block)[0] for block in plan(tags, avoid=Avoid(limits=frozenset({("input", 1)})))] == [
        "holding:0+10"
    ]
