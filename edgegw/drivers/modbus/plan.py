"""Plans block reads: which requests read a device's tags."""

from collections.abc import Mapping
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


def plan(tags: Mapping[str, ModbusTag], max_block: int = 125, max_gap: int = 8) -> list[Block]:
    """Group tags into as few reads as the limits allow.

    Neighbours share a read if at most `max_gap` registers between them would be read for nothing and the read
    stays within `max_block` registers; for coils and discretes both limits count sixteen bits to a register.
    A value is never split over two reads, which would tear it.
    """
    blocks: list[Block] = []
    for table in FUNCTIONS:
        bits = table in ("coil", "discrete")
        most = min(max_block * BITS_PER_REGISTER, MAX_BITS) if bits else max_block
        gap = max_gap * BITS_PER_REGISTER if bits else max_gap
        here = sorted(
            ((tag.address.start, name, tag) for name, tag in tags.items() if tag.address.table == table),
            key=lambda found: found[:2],
        )
        group: list[tuple[int, str, ModbusTag]] = []
        end = 0
        for start, name, tag in here:
            after = start + tag.registers
            if group and (start - end > gap or max(end, after) - group[0][0] > most):
                blocks.append(_block(table, group, end))
                group = []
                end = 0
            group.append((start, name, tag))
            end = max(end, after)
        if group:
            blocks.append(_block(table, group, end))
    return blocks


def split(block: Block) -> list[Block]:
    """Return one read for each tag of a block that the device refused as a whole, to find the hole."""
    return [
        Block(block.table, block.start + placed.at, placed.tag.registers, (placed._replace(at=0),))
        for placed in block.tags
    ]


def _block(table: str, group: list[tuple[int, str, ModbusTag]], end: int) -> Block:
    start = group[0][0]
    return Block(table, start, end - start, tuple(Placed(name, tag, at - start) for at, name, tag in group))
