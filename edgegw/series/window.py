"""A window: when its stretches of time are over and what they came to, told by the times of its readings alone.

The watermark is the greatest of these times, or what `advance` says when readings fall silent. A stretch that ends by
then is over. Readings that come later still revise it while the watermark is less than `lateness` behind its end.
"""

from collections.abc import Iterator
from math import inf, isclose, isfinite
from typing import NamedTuple

import msgspec

from edgegw.domain import quality
from edgegw.domain.record import DeviceStatus, Event, Record, Scan, WindowResult
from edgegw.domain.tag import Value
from edgegw.series.pane import EMPTY, Pane, aggregate, joined
from edgegw.series.signal import Signal

SLACK_MS = 60_000
"""How far out of order readings may come in a stretch that is not over, beside `lateness`: what is kept raw."""
CLOCK_SET_MS = 120_000
"""A step of time larger than any delay: the gateway's clock was set."""
NO_READING = quality.bad("no-reading")


class Input(NamedTuple):
    """A tag of a window: how long its value is held, and whether its times are not the gateway's but its source's."""

    device: str
    tag: str
    hold_ms: float
    sourced: bool = False


class Spec(NamedTuple):
    """What a window is."""

    name: str
    inputs: tuple[Input, ...]
    size_ms: int
    every_ms: int
    lateness_ms: int
    aggregates: tuple[str, ...]


class Window:
    """Takes records in the order of the journal, and gives results."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.newest_ms = 0
        self.watermark_ms = 0
        self._devices: dict[str, list[tuple[str, Signal]]] = {}
        for index, at in enumerate(spec.inputs):
            self._devices.setdefault(at.device, []).append((at.tag, Signal(index, at.hold_ms)))
        self._signals = [signal for pairs in self._devices.values() for _, signal in pairs]
        self._sourced = {at.device for at in spec.inputs if at.sourced}
        self._panes: dict[int, Pane] = {}
        self._folded_ms = 0
        self._next_ms = spec.every_ms
        self._again_ms = 0
        self._changed_ms: int | None = None
        self._made: dict[int, WindowResult] = {}

    @property
    def late(self) -> int:
        """How many readings came too late for their time."""
        return sum(signal.late for signal in self._signals)

    @property
    def due(self) -> bool:
        """Whether a stretch is over that has not been told."""
        return self.watermark_ms >= self._next_ms

    def needed(self, record: Record) -> Record:
        """Return what of a record it reads, to be kept for later."""
        if not isinstance(record, Scan):
            return record
        tags = [tag for tag, _ in self._devices[record.device] if tag in record.values]
        why = {tag: record.quality[tag] for tag in tags if tag in record.quality} if record.quality else {}
        return Scan(record.ts, record.device, {tag: record.values[tag] for tag in tags}, why or None)

    def take(self, record: Record) -> None:
        """Take a record; those that do not concern it change nothing."""
        match record:
            case Scan(ts, device, values, why):
                self._scan(ts, device, values, why or {})
            case DeviceStatus(ts, device, "bad"):
                self.lose(device, ts)
            case DeviceStatus(ts, device):
                self._resume(device, ts)
            case Event(ts, "start"):
                self._begin(None, ts)
            case Event(ts, "stop"):
                self.lose(None, ts)
            case Event(ts, "config", fields):
                for device in fields.get("stopped", ()):
                    self._begin(device, ts)

    def lose(self, device: str | None, ts: int) -> None:
        """End what is held of a device, None for all: it is not known how it went on."""
        for signal in self._of(device):
            self._note(signal.end(ts, self._open_ms))
        self._see(device, ts)

    def advance(self, ts: int) -> None:
        """Let time pass without readings."""
        self.watermark_ms = max(self.watermark_ms, ts)

    def recall(self, result: WindowResult) -> None:
        """Take a result for told: it stands in the journal."""
        self._made[result.ts] = result
        self.advance(result.ts)

    def results(self) -> list[WindowResult]:
        """Return what has come to be over, or another than was told, in the order of the ends."""
        made = [*self._revisions(), *self._closings()]
        self._fold()
        return made

    # -- records -----------------------------------------------------------------------------------------

    def _scan(self, ts: int, device: str, values: dict[str, Value], why: dict[str, str]) -> None:
        pairs = self._devices.get(device)
        if pairs is None:
            return
        self._see(device, ts, sourced=device in self._sourced)
        open_ms = self._open_ms
        for tag, signal in pairs:
            if tag in values:
                value = None if tag in why else _number(values[tag])
                self._note(signal.take(ts, value, open_ms))

    def _begin(self, device: str | None, ts: int) -> None:
        """Take a (re)start of the gateway, or of a device's scans: what was held is held no more."""
        self.lose(device, self.watermark_ms)
        self._resume(device, ts)

    def _resume(self, device: str | None, ts: int) -> None:
        """Have a subscribed device say what its tags hold, be it by readings older than this."""
        self._see(device, ts)
        for signal in self._of(device):
            if signal.hold_ms == inf:
                signal.resume(max(ts, self.watermark_ms))

    def _of(self, device: str | None) -> list[Signal]:
        if device is None:
            return self._signals
        return [signal for _, signal in self._devices.get(device, ())]

    def _note(self, changed_ms: int | None) -> None:
        """Note from when on a signal is another one, if that concerns a stretch that was over."""
        if changed_ms is not None and changed_ms < self._next_ms - self.spec.every_ms:
            self._changed_ms = changed_ms if self._changed_ms is None else min(changed_ms, self._changed_ms)

    # -- time --------------------------------------------------------------------------------------------

    @property
    def _open_ms(self) -> int:
        """From when on readings are not too late."""
        behind_ms = self.watermark_ms - self.spec.lateness_ms
        over_ms = behind_ms // self.spec.every_ms * self.spec.every_ms
        return max(self._folded_ms, over_ms, behind_ms - SLACK_MS)

    def _see(self, device: str | None, ts: int, *, sourced: bool = False) -> None:
        """Move the watermark to a record's time; where that is no mere delay, the clock was set."""
        if device is not None and device not in self._devices:
            return
        spec, ahead_ms = self.spec, ts - self.watermark_ms
        if ahead_ms > spec.size_ms + spec.lateness_ms + CLOCK_SET_MS:
            self._leap(ts)
        elif ahead_ms < -max(spec.lateness_ms, CLOCK_SET_MS) and not sourced:
            self._leap_back(ts)
        self.watermark_ms = max(self.watermark_ms, ts)
        self.newest_ms = max(self.newest_ms, ts)

    def _leap(self, ts: int) -> None:
        """Hold nothing over a time that nobody lived through; what is held without limit goes on after it."""
        for signal in self._signals:
            value = signal.held(self.watermark_ms)
            if value is not None and signal.hold_ms == inf:
                signal.end(self.watermark_ms, self._open_ms)
                signal.carry(ts, value)

    def _leap_back(self, ts: int) -> None:
        """Begin anew at an earlier time: what the clock said from then on was wrong."""
        for signal in self._signals:
            value = signal.held(self.watermark_ms)
            signal.forget()
            if value is not None:
                signal.carry(ts, value)
        every_ms = self.spec.every_ms
        self._panes = {slot: pane for slot, pane in self._panes.items() if slot < ts // every_ms}
        self._folded_ms = self.watermark_ms = self.newest_ms = ts
        self._again_ms = max(self._again_ms, self._next_ms)
        self._next_ms = self._after(ts)
        self._changed_ms = None

    def _after(self, ts: int) -> int:
        """Return the first end of a stretch after a moment."""
        return (ts // self.spec.every_ms + 1) * self.spec.every_ms

    # -- results -----------------------------------------------------------------------------------------

    def _revisions(self) -> Iterator[WindowResult]:
        if self._changed_ms is not None:
            for end_ms in range(self._after(self._changed_ms), self._next_ms, self.spec.every_ms):
                yield from self._told(end_ms, self._pane(end_ms))
        self._changed_ms = None

    def _closings(self) -> Iterator[WindowResult]:
        while self.due:
            end_ms = self._next_ms
            pane = self._pane(end_ms)
            yield from self._told(end_ms, pane)
            self._next_ms += self.spec.every_ms
            if pane.empty:  # go to where something is known again: it may be years
                known_ms = min(self.watermark_ms, self._following(end_ms))
                self._next_ms = max(self._next_ms, self._after(int(known_ms)))

    def _told(self, end_ms: int, pane: Pane) -> Iterator[WindowResult]:
        """Yield a result that is the first for its end, or another than the last, and covers no less."""
        if pane.empty:
            return
        result, before = self._result(end_ms, pane), self._made.get(end_ms)
        if before is not None:
            if result.coverage < before.coverage or _same(result, before):
                return
            result = msgspec.structs.replace(result, rev=before.rev + 1)
        elif end_ms < self._again_ms:  # it was told by a clock that has been set back
            result = msgspec.structs.replace(result, rev=1)
        self._made[end_ms] = result
        yield result

    def _result(self, end_ms: int, pane: Pane) -> WindowResult:
        spec = self.spec
        values: dict[str, Value] = {name: aggregate(pane, name) for name in spec.aggregates}
        why = {name: NO_READING for name, value in values.items() if value is None}
        coverage = round(pane.covered_ms / (spec.size_ms * len(spec.inputs)), 6)
        return WindowResult(end_ms, spec.name, values, end_ms - spec.size_ms, coverage, 0, why or None)

    def _pane(self, end_ms: int) -> Pane:
        """Return what the stretch up to a moment comes to: what is folded of it, and the rest of each signal."""
        start_ms, every_ms = end_ms - self.spec.size_ms, self.spec.every_ms
        slots = range(start_ms // every_ms, end_ms // every_ms)
        folded = [self._panes[slot] for slot in slots if slot in self._panes]
        raw_ms = max(start_ms, self._folded_ms)
        return joined([*folded, *(signal.measure(raw_ms, end_ms) for signal in self._signals)])

    def _fold(self) -> None:
        """Turn what cannot change any more into panes of at most `every`, and let go of what nobody asks for."""
        every_ms, upto_ms = self.spec.every_ms, self._open_ms
        while self._folded_ms < upto_ms:
            begin_ms = self._folded_ms
            slot, end_ms = begin_ms // every_ms, min(self._after(begin_ms), upto_ms)
            pane = joined(signal.measure(begin_ms, end_ms) for signal in self._signals)
            if not pane.empty:
                self._panes[slot] = joined((self._panes.get(slot, EMPTY), pane))
                self._folded_ms = end_ms
            else:
                self._folded_ms = max(end_ms, int(min(upto_ms, self._following(end_ms))))
        for signal in self._signals:
            signal.fold(upto_ms)
        over_ms = self.watermark_ms - self.spec.lateness_ms
        self._made = {end_ms: result for end_ms, result in self._made.items() if end_ms > over_ms}
        oldest = (self._after(over_ms) - self.spec.size_ms) // every_ms
        if self._panes and next(iter(self._panes)) < oldest:
            self._panes = {slot: pane for slot, pane in self._panes.items() if slot >= oldest}

    def _following(self, at_ms: int) -> float:
        return min(signal.following(at_ms) for signal in self._signals)


def _number(value: Value) -> float | None:
    """Return what a value counts as, None if it is no number: a bool counts as 0 or 1."""
    return float(value) if isinstance(value, bool | int | float) and isfinite(value) else None


def _same(one: WindowResult, other: WindowResult) -> bool:
    """Tell whether two results say the same, but for rounding."""
    return one.coverage == other.coverage and all(
        _close(value, other.values.get(name)) for name, value in one.values.items()
    )


def _close(value: Value, was: Value) -> bool:
    if isinstance(value, int | float) and isinstance(was, int | float):
        return isclose(value, was, rel_tol=1e-9, abs_tol=1e-12)
    return value == was
