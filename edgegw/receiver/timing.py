"""What an unsynchronised clock should have said: which batches to correct, by how much, and which records. Pure.

A batch of a clock that is not synchronised names its era: when the boot's monotonic clock stood at `ms` the wall
clock said `ts`. The events `start` and `clock-step` name the eras that begin with them. Of the same boot, the
first synchronised era after a batch tells by how much its clock was wrong; if there is none, the last one before.
"""

from typing import Annotated, NamedTuple

import msgspec

from edgegw.domain.batch import Kind
from edgegw.domain.era import Era
from edgegw.receiver.wire import Batch

UNSYNCED = '"clock":"unsynced"'
HEAD_BYTES = 600
"""Where in a batch's JSON `UNSYNCED` stands, if at all."""
NAMING = frozenset({"start", "clock-step"})
"""The events that name an era."""
BEFORE_MS = 600_000
AFTER_MS = 1_000
"""How far from its era's moments a record may lie: what lies farther is a source's own time, not the gateway's."""
SUMMARY_BEFORE_MS = 900_000
"""Instead of BEFORE_MS for a summary's records, which bear the beginning of a period: the longest there is."""
LATEST_MS = 2**53

_Ms = Annotated[int, msgspec.Meta(ge=-LATEST_MS, le=LATEST_MS)]


class _Mono(msgspec.Struct, frozen=True):
    boot: str
    ts: _Ms
    ms: _Ms


class _Timed(msgspec.Struct, frozen=True):
    clock: str
    mono: _Mono


_timed = msgspec.json.Decoder(_Timed)


def read_era(text: bytes) -> Era | None:
    """Return the era that a batch or an event names, None if it names none or makes no sense."""
    try:
        timed = _timed.decode(text)
    except (ValueError, RecursionError):
        return None
    if timed.clock not in ("synced", "unsynced") or not timed.mono.boot:
        return None
    return Era(timed.clock == "synced", timed.mono.boot, timed.mono.ts, timed.mono.ms)


def unsynced_era(body: bytes) -> Era | None:
    """Return the era of a batch whose clock was not synchronised, None of any other."""
    if UNSYNCED.encode() not in body[:HEAD_BYTES]:
        return None
    era = read_era(body)
    return None if era is None or era.synced else era


class Move(NamedTuple):
    """By how much to move records of an era, and when it ended by the monotonic clock; None: it goes on."""

    delta_ms: int
    end_ms: int | None


class Eras:
    """The eras heard of, by gateway and boot."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], set[Era]] = {}

    @property
    def gateways(self) -> set[str]:
        """The gateways of which a synchronised era is known."""
        return {gateway for (gateway, _), eras in self._known.items() if any(era.synced for era in eras)}

    def add(self, gateway: str, era: Era) -> bool:
        """Take an era in; False if it is known."""
        eras = self._known.setdefault((gateway, era.boot), set())
        if era in eras:
            return False
        eras.add(era)
        return True

    def move(self, gateway: str, of: Era) -> Move | None:
        """Return what corrects records of an era, None while no synchronised one of the boot is known."""
        eras = self._known.get((gateway, of.boot), set())
        synced = [(era.mono_ms, era.wall_ms) for era in eras if era.synced]
        later = min((moment for moment in synced if moment[0] >= of.mono_ms), default=None)
        found = later or max(synced, default=None)
        if found is None:
            return None
        end_ms = min((era.mono_ms for era in eras if era.mono_ms > of.mono_ms), default=None)
        return Move(found[1] - found[0] - of.offset_ms, end_ms)


def moved(batch: Batch, era: Era, move: Move) -> tuple[Batch, int]:
    """Return a batch with the times of its records moved, and how many were; its body stays as it came."""
    first = era.wall_ms - (SUMMARY_BEFORE_MS if batch.kind is Kind.SUMMARY else BEFORE_MS)
    last = LATEST_MS if move.end_ms is None else move.end_ms + era.offset_ms + AFTER_MS
    count = 0

    def at(ts: int) -> int:
        nonlocal count
        if not first <= ts <= last:
            return ts
        count += 1
        return ts + move.delta_ms

    replace = msgspec.structs.replace
    if batch.kind is Kind.DATA:
        new = replace(batch, data=[replace(record, ts=at(record.ts)) for record in batch.data])
    elif batch.kind is Kind.EVENT:
        new = replace(batch, events=[replace(record, ts=at(record.ts)) for record in batch.events])
    else:
        new = replace(batch, summaries=[replace(record, ts=at(record.ts)) for record in batch.summaries])
    return (new, count) if move.delta_ms else (batch, 0)
