"""Makes readings and scans of values that came together, a column at a time."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from math import isfinite
from operator import itemgetter
from typing import Any, NamedTuple

from asyncua import ua

from edgegw.config.schema import OpcUaTag
from edgegw.domain.record import Scan
from edgegw.domain.tag import Value
from edgegw.drivers.decimals import as_decimals
from edgegw.drivers.opcua import values
from edgegw.drivers.opcua.values import Raw

_FLOAT, _DOUBLE = ua.VariantType.Float.value, ua.VariantType.Double.value
_SINGLE = bytes(kind == _FLOAT for kind in range(256))
_FLOATING = bytes(kind in (_FLOAT, _DOUBLE) for kind in range(256))
"""For bytes.translate: which of the kinds of a block are of the type."""
_TYPES = {kind.value: name for kind, name in values.TYPES.items()}


class Block(NamedTuple):
    """Values as they came from a server, in columns."""

    places: Sequence[int]
    """Where the tag of each stands among all."""
    kinds: bytes
    """The built-in type of each number (OPC UA Part 6, 5.1.2), 0 for all else."""
    raws: Sequence[Raw]
    """A number as it was sent, a Float in full; all else in its plain form."""
    statuses: Sequence[int]
    ticks: Sequence[int]
    """The source's time in 100 ns since 1601. What is not there is empty or 0."""


class Readings(NamedTuple):
    """A block as its tags take it; `qualities` has those that are not good, by their index."""

    names: list[str]
    values: list[Value]
    qualities: dict[int, str]


def columns(data: ua.DataValue) -> tuple[Raw, int, int]:
    """Return raw, status and ticks of a value that asyncua has decoded."""
    return values.raw(data.Value), values.status(data), values.ticks(data.SourceTimestamp)


def block_of(places: Sequence[int], found: Sequence[ua.DataValue]) -> Block:
    """Return values that asyncua has decoded as a block."""
    raws, statuses, ticks = zip(*map(columns, found), strict=True) if found else ((), (), ())
    return Block(places, bytes(len(found)), raws, statuses, ticks)


def joined(blocks: Sequence[Block]) -> Block:
    """Return blocks as one, the places of each behind those of the one before it."""
    if len(blocks) == 1:
        return blocks[0]
    kinds = b"".join(block.kinds for block in blocks)
    raws, statuses, ticks = (list(chain.from_iterable(map(itemgetter(i), blocks))) for i in (2, 3, 4))
    return Block(range(len(kinds)), kinds, raws, statuses, ticks)


class Points:
    """The tags of a device in their order; what they have in common is done for all at once."""

    def __init__(self, device: str, tags: Mapping[str, OpcUaTag]) -> None:
        self.names = list(tags)
        self._device = device
        self._tags = list(tags.values())
        scaled = [tag.scale != 1.0 or tag.offset != 0.0 for tag in self._tags]
        self._wanted = [None if odd else tag.type for tag, odd in zip(self._tags, scaled, strict=True)]

    def scans(self, block: Block, now_ms: int, *, by_source: bool) -> list[Scan]:
        """Return a block as scans in the order of their times, one for each millisecond.

        The time is the source's if `by_source` and it gave one, else `now_ms`. A tag that has several values at
        one time has the later ones in further scans of that time.
        """
        names, found, qualities = self.readings(block)
        times = {at: values.unix_ms(at or 0) for at in set(block.ticks)} if by_source else {}
        stamps = {now_ms if ms is None else ms for ms in times.values()} or {now_ms}
        if len(stamps) == 1:
            whole = dict(zip(names, found, strict=True))
            if len(whole) == len(names):
                quality = {names[i]: why for i, why in qualities.items()}
                return [Scan(stamps.pop(), self._device, whole, quality or None)] if whole else []
        each = [now_ms if (ms := times.get(at)) is None else ms for at in block.ticks]
        return self._parted(names, found, qualities, each)

    def readings(self, block: Block) -> Readings:
        """Return what each tag takes of a block."""
        taken: list[Any] = list(block.raws)
        singles = list(compress(range(len(taken)), block.kinds.translate(_SINGLE)))
        for i, decimal in zip(singles, as_decimals([taken[i] for i in singles]), strict=True):
            taken[i] = decimal
        qualities = {}
        for i in self._apart(block):
            tag = self._tags[block.places[i]]
            taken[i], quality = values.finish(tag, taken[i], block.statuses[i] or 0)
            if quality is not None:
                qualities[i] = quality
        return Readings([self.names[place] for place in block.places], taken, qualities)

    def _apart(self, block: Block) -> Iterable[int]:
        """Return which values must be looked at one by one, since they may not be taken just as they are."""
        places, kinds, raws, statuses, _ = block
        pairs = [(self._wanted[place], kind) for place, kind in zip(places, kinds, strict=True)]
        unfit = {(wanted, kind) for wanted, kind in set(pairs) if not _fits(wanted, kind)}
        apart = {i for i, status in enumerate(statuses) if status} if any(statuses) else set()
        if unfit:
            apart.update(i for i, pair in enumerate(pairs) if pair in unfit)
        if not isfinite(sum(compress(raws, kinds.translate(_FLOATING)))):  # type: ignore[arg-type]
            apart.update(i for i, raw in enumerate(raws) if isinstance(raw, float) and not isfinite(raw))
        return sorted(apart)

    def _parted(
        self,
        names: Iterable[str],
        found: Iterable[Value],
        qualities: Mapping[int, str],
        stamps: Iterable[int],
    ) -> list[Scan]:
        scans: dict[tuple[int, int], tuple[dict[str, Value], dict[str, str]]] = {}
        turns: dict[tuple[int, str], int] = {}
        for i, (name, value, ts_ms) in enumerate(zip(names, found, stamps, strict=True)):
            turn = turns.get((ts_ms, name), 0)
            turns[ts_ms, name] = turn + 1
            taken, why = scans.setdefault((ts_ms, turn), ({}, {}))
            taken[name] = value
            if i in qualities:
                why[name] = qualities[i]
        return [
            Scan(ts_ms, self._device, taken, why or None)
            for (ts_ms, _), (taken, why) in sorted(scans.items(), key=itemgetter(0))
        ]


def _fits(wanted: str | None, kind: int) -> bool:
    """Tell whether a tag takes every finite number of a built-in type just as it is."""
    return wanted is not None and kind in _TYPES and values.holds(wanted, _TYPES[kind])
