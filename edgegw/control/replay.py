"""Plays a recording through the rules on a virtual clock, and tells what they would have done. Pure.

What the rules write is taken to work: from then on a setpoint holds it, whatever the recording says of it. All else
is as recorded: how the site would have answered is not known.
"""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

from edgegw.control import engine, state
from edgegw.control.cycle import Memo
from edgegw.control.plant import Plant
from edgegw.control.recording import Moment
from edgegw.control.rule import LinkState
from edgegw.control.state import State
from edgegw.domain.image import Image
from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value

BEGAN_S = 1_000_000.0
POINTS = 20_000
"""Points kept of what a setpoint held; of more, every other goes."""


class RuleRun:
    """What one rule would have done: since when and until when it was on; the last end is None if it still is."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int | None]] = []

    def json(self, end_ts: int) -> dict[str, Any]:
        """Return it for scripts."""
        total_ms = sum((end_ts if off is None else off) - on for on, off in self.spans)
        return {
            "times_on": len(self.spans),
            "total_s": round(total_ms / 1000, 3),
            "first": self.spans[0][0] if self.spans else None,
            "last": self.spans[-1][0] if self.spans else None,
            "spans": self.spans,
        }


class SetpointRun:
    """What one setpoint would have held, and what would have been written to it."""

    def __init__(self) -> None:
        self.points: list[tuple[int, Scalar]] = []
        self.written: list[Scalar] = []
        self.writes = 0
        self.causes: dict[str, int] = {}
        self.refused: dict[str, int] = {}

    def holds(self, ts: int, value: Scalar) -> None:
        """Note what it holds from a moment on."""
        if not self.points or self.points[-1][1] != value:
            self.points.append((ts, value))
        if len(self.points) > POINTS:
            del self.points[1:-1:2]

    def wrote(self, value: Scalar, cause: str) -> None:
        """Note a write."""
        self.writes += 1
        self.causes[cause] = self.causes.get(cause, 0) + 1
        numbers = [*self.written, value]
        plain = not any(isinstance(number, str) for number in numbers)
        self.written = sorted({min(numbers), max(numbers)}) if plain else numbers[-1:]

    def json(self) -> dict[str, Any]:
        """Return it for scripts: the least and greatest value written, and all that it held."""
        return {
            "writes": self.writes,
            "from": self.written[0] if self.written else None,
            "to": self.written[-1] if self.written else None,
            "causes": self.causes,
            "refused": self.refused,
            "points": self.points,
        }


class Replay:
    """A run of a plant's rules over a recording."""

    def __init__(
        self, plant: Plant, *, held: frozenset[str] = frozenset(), link: LinkState = "online"
    ) -> None:
        self.rules = {rule.name: RuleRun() for rule in plant.rules}
        wanted = {at for rule in plant.rules for at in (*rule.do, *rule.last)}
        self.setpoints = {setpoint: SetpointRun() for setpoint in sorted(wanted)}
        self.scans = 0
        self.first_ts = self.last_ts = 0
        self._plant = plant
        self._held = held
        self._link: LinkState = link
        self._image = Image()
        self._memo = Memo(plant)
        self._state = state.restored(State(), plant, BEGAN_S, saved_s=BEGAN_S, same_boot=True)
        self._now_s = BEGAN_S
        self._due_s: float | None = None
        self._shift_ms: int | None = None
        self._kept: dict[str, Scalar] = {}

    def play(self, moments: Iterable[Moment], *, follow_link: bool = True) -> None:
        """Play moments one after the other; a clock that was set back stands still instead."""
        for moment in moments:
            self._until(self._clock(moment.ts))
            if moment.scan is not None:
                self._take(moment.scan)
            elif moment.lost is not None:
                self._image.lost(moment.lost, self._now_s)
            elif moment.link is not None and follow_link:
                self._link = moment.link
            self._cycles()

    def json(self) -> dict[str, Any]:
        """Return all of it for scripts."""
        return {
            "from": self.first_ts,
            "to": self.last_ts,
            "scans": self.scans,
            "lacking": self.lacking(),
            "rules": {name: run.json(self.last_ts) for name, run in self.rules.items()},
            "setpoints": {name: run.json() for name, run in self.setpoints.items()},
        }

    def lacking(self) -> dict[str, list[str]]:
        """Return, of each rule that lacks any, the inputs that were nowhere in the recording."""
        devices = self._image.devices.items()
        there = {f"{device}.{tag}" for device, latest in devices for tag in latest.values}
        lacking = {
            rule.name: [name for name in rule.inputs if name not in there] for rule in self._plant.rules
        }
        return {name: inputs for name, inputs in lacking.items() if inputs}

    def _clock(self, ts: int) -> float:
        """Return the virtual time of a moment."""
        if self._shift_ms is None:
            self.first_ts, self._shift_ms = ts, 0
        if ts + self._shift_ms < self.last_ts:
            self._shift_ms = self.last_ts - ts
        self.last_ts = max(self.last_ts, ts + self._shift_ms)
        return BEGAN_S + (self.last_ts - self.first_ts) / 1000

    def _ts(self) -> int:
        return self.first_ts + round((self._now_s - BEGAN_S) * 1000)

    def _until(self, then_s: float) -> None:
        while self._due_s is not None and self._due_s < then_s:
            self._now_s = self._due_s
            self._cycles()
        self._now_s = then_s

    def _take(self, scan: Scan) -> None:
        values: dict[str, Value] = dict(scan.values)
        for tag in values:
            full = f"{scan.device}.{tag}"
            if full in self._kept:
                values[tag] = self._kept[full]
            value = values[tag]
            if full in self.setpoints and isinstance(value, bool | int | float | str):
                self.setpoints[full].holds(self._ts(), value)
        self._image.take(
            Scan(scan.ts, scan.device, values, scan.quality), self._now_s, held=scan.device in self._held,
            seen_s=inf,  # a recording says when a device was lost; between, what it holds is what it held
        )  # fmt: skip
        self.scans += 1

    def _cycles(self) -> None:
        """Run a cycle, and the ones that its writes cause."""
        while True:
            cycle = engine.step(
                self._plant, self._state, self._image.frozen(), self._link, self._now_s, memo=self._memo
            )
            self._state, self._due_s = cycle.state, cycle.due_s
            for name, fields in cycle.events:
                self._note(name, fields)
            for planned in cycle.writes:
                self._state = state.confirmed(self._state, planned.setpoint, self._now_s)
                self._kept[planned.setpoint] = planned.value
                if not planned.repeat:
                    self.setpoints[planned.setpoint].wrote(planned.value, planned.cause)
                self.setpoints[planned.setpoint].holds(self._ts(), planned.value)
            if not cycle.writes:
                return

    def _note(self, name: str, fields: Mapping[str, Any]) -> None:
        if name == "rule-on":
            self.rules[fields["rule"]].spans.append((self._ts(), None))
        elif name == "rule-off":
            spans = self.rules[fields["rule"]].spans
            spans[-1] = (spans[-1][0], self._ts())
        elif name == "write-refused":
            refused = self.setpoints[fields["tag"]].refused
            refused[fields["reason"]] = refused.get(fields["reason"], 0) + 1
