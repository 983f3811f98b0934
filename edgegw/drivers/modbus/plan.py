"""Plans block reads: which requests read a device's tags."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgegw.config.schema import ModbusTag

FUNCTIONS = {"coil": 1, "discrete": 2, "holding": 3, "input": 4}
"""The function code that reads each table (Modbus Application Protocol 1.1b3, 6.1 to 6.4)."""

MAX_BITS = 2000
"""Coils or discrete inputs in one request (6.1)."""

BITS_PER_REGISTER = 16


class Placed(NamedTuple):
    """A tag and where it stands in its block, in registers or bits from the block's start."""

    name: str
    tag: ModbusTag
    at: int


class Block(NamedTuple):
    """One read request: a table, a first address, a size in registers or bits, and the tags within."""

    table: str
    start: int
    size: int
    tags: tuple[Placed, ...]

    @property
    def function(self) -> int:
        """The function code."""
        return FUNCTIONS[self.table]

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.start + self.size


class Avoid(NamedTuple):
    """What a device has refused to read."""

    tags: frozenset[str] = frozenset()
    """Tags that are refused, by themselves or all together; they share no read with others."""
    cuts: frozenset[tuple[str, int]] = frozenset()
    """Tables and addresses: no read continues from below into the tag that begins there."""
    limits: frozenset[tuple[str, int]] = frozenset()
    """Tables and the most registers, or bits, that they give in one read."""


NOTHING = Avoid()


def plan(
    tags: Mapping[str, ModbusTag], max_block: int = 125, max_gap: int = 8, avoid: Avoid = NOTHING
) -> list[Block]:
    """Group tags into as few reads as the limits allow.

    Neighbours share a read if at most `max_gap` registers between them would be read for nothing and the read
    stays within `max_block` registers; for coils and discretes both limits count sixteen bits to a register.
    A value is never split over two reads, which would tear it. Nothing is read that the device is known to refuse,
    but the tags to avoid, in reads of their own.
    """
    blocks: list[Block] = []
    limits = dict(avoid.limits)
    for table in FUNCTIONS:
        bits = table in ("coil", "discrete")
        most = min(max_block * BITS_PER_REGISTER, MAX_BITS) if bits else max_block
        most = min(most, limits.get(table, most))
        gap = max_gap * BITS_PER_REGISTER if bits else max_gap
        here = sorted(
            ((tag.address.start, name, tag) for name, tag in tags.items() if tag.address.table == table),
            key=lambda found: found[:2],
        )
        group: list[tuple[int, str, ModbusTag]] = []
        end = 0
        for start, name, tag in here:
            after = start + tag.registers
            if group and (
                start - end > gap
                or max(end, after) - group[0][0] > most
                or (name in avoid.tags) != (group[0][1] in avoid.tags)
                or (start > group[0][0] and (table, start) in avoid.cuts)
            ):
                blocks.append(_block(table, group, end))
                group = []
                end = 0
            group.append((start, name, tag))
            end = max(end, after)
        if group:
            blocks.append(_block(table, group, end))
    return blocks


def halves(block: Block) -> tuple[Block, Block] | None:
    """Return reads for the lower and the upper half of a block's tags, None if all stand in the same place.

    Neither reads more than its tags need.
    """
    placed = sorted(block.tags, key=lambda one: (one.at, one.tag.registers, one.name))
    places = [(one.at, one.tag.registers) for one in placed]
    borders = [i for i in range(1, len(places)) if places[i] != places[i - 1]]
    if not borders:
        return None
    middle = borders[len(borders) // 2]
    return _part(block, placed[:middle]), _part(block, placed[middle:])


def single(block: Block, place: int) -> Block:
    """Return a read for one tag of a block."""
    return _part(block, [block.tags[place % len(block.tags)]])


def _part(block: Block, placed: Sequence[Placed]) -> Block:
    first = placed[0].at
    size = max(one.at + one.tag.registers for one in placed) - first
    tags = tuple(one._replace(at=one.at - first) for one in placed)
    return Block(block.table, block.start + first, size, tags)


def _block(table: str, group: list[tuple[int, str, ModbusTag]], end: int) -> Block:
    start = group[0][0]
    return Block(table, start, end - start, tuple(Placed(name, tag, at - start) for at, name, tag in group))
