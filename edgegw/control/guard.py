"""The guard: the one way to any device. It decides whether, when and how far a setpoint may move."""

from math import inf, isclose, isfinite
from typing import NamedTuple

from edgegw.control.grid import Grid
from edgegw.domain.tag import Scalar

HOUR_S = 3600.0


class Limits(NamedTuple):
    """What a tag's configuration says of writing it. `ramp_per_s` is in units a second."""

    writable: bool
    kind: str
    min: float | None = None
    max: float | None = None
    max_step: float | None = None
    ramp_per_s: float | None = None
    min_interval_s: float = 0.0
    max_per_hour: int | None = None
    safe: Scalar | None = None
    grid: Grid = Grid()
    """What the device's register can hold."""
    refresh_s: float | None = None
    """How often a value is written again while somebody has the setpoint."""

    @property
    def resolution(self) -> float:
        """The smallest difference that the device can hold: what an integer register counts in."""
        return self.grid.step

    @property
    def stepped(self) -> bool:
        """Tell whether a write starts from what the setpoint holds, so that this must be known."""
        return self.kind == "number" and (self.ramp_per_s is not None or self.max_step is not None)


class History(NamedTuple):
    """What was written to a setpoint before.

    `value` is what it was last left at, None if that is not known, and `since_s` since when: what was read before
    then says nothing of it any more. `at_s` is when it was last written, `hour` the writes that count against
    `max_per_hour`.
    """

    value: Scalar | None = None
    at_s: float | None = None
    hour: tuple[float, ...] = ()
    since_s: float | None = None

    def wrote(self, value: Scalar, now_s: float, most: int | None) -> "History":
        """Return the history with one more write, of which the last `most` are kept."""
        recent = (*(at for at in self.hour if now_s - at < HOUR_S), now_s)[-most:] if most else ()
        return History(value, now_s, recent, now_s)


class Write(NamedTuple):
    """Write this value now. It is `final` if it is all the way to what was wanted."""

    value: Scalar
    final: bool


class Wait(NamedTuple):
    """Nothing may be written before this moment; `reason` where that is more than the setpoint's usual pace."""

    until_s: float
    reason: str | None = None


class Refuse(NamedTuple):
    """What was wanted may not be written: the limit that forbids it, and the reason in full."""

    limit: str
    reason: str


def check(limits: Limits, wanted: object) -> Refuse | None:
    """Refuse what no moment could make right: a tag that is not writable, a wrong type, a value out of range."""
    if not limits.writable:
        return Refuse("writable", "not writable")
    if limits.kind == "bool":
        return (
            None
            if isinstance(wanted, bool)
            else Refuse("type", f"found {wanted!r:.60}; expected true or false")
        )
    if limits.kind == "string":
        return None if isinstance(wanted, str) else Refuse("type", f"found {wanted!r:.60}; expected a string")
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return Refuse("type", f"found {wanted!r:.60}; expected a number")
    if not _finite(wanted):
        return Refuse("finite", "not a finite number")
    if limits.min is not None and wanted < limits.min:
        return Refuse("min", f"{wanted:g} is below min {limits.min:g}")
    if limits.max is not None and wanted > limits.max:
        return Refuse("max", f"{wanted:g} is above max {limits.max:g}")
    return None


def same(present: Scalar | None, wanted: Scalar, resolution: float = 0.0) -> bool:
    """Tell whether a setpoint holds what is wanted, as closely as single precision and its register can."""
    if (
        isinstance(present, bool)
        or isinstance(wanted, bool)
        or isinstance(present, str)
        or isinstance(wanted, str)
    ):
        return type(present) is type(wanted) and present == wanted
    if present is None:
        return False
    if resolution:
        return abs(present - wanted) < 0.5 * resolution
    return isclose(present, wanted, rel_tol=1e-6, abs_tol=1e-6)


def _finite(wanted: float) -> bool:
    try:
        return isfinite(wanted)
    except OverflowError:  # an integer that no double holds
        return False


def guard(
    limits: Limits, history: History, present: Scalar | None, wanted: Scalar, now_s: float
) -> Write | Wait | Refuse:
    """Decide about writing `wanted` to a setpoint that holds `present` (None: not known) at `now_s`.

    A `ramp` or `max_step` moves the value there in steps, each from what the setpoint holds. What is written is what
    the register holds, within all limits, so that rounding leads past none of them.
    """
    if (refusal := check(limits, wanted)) is not None:
        return refusal
    if history.at_s is not None and now_s < history.at_s + limits.min_interval_s:
        return Wait(history.at_s + limits.min_interval_s)
    if limits.max_per_hour is not None:
        hour = [at for at in history.hour if now_s - at < HOUR_S]
        if len(hour) >= limits.max_per_hour:
            return Wait(hour[-limits.max_per_hour] + HOUR_S, f"max_per_hour {limits.max_per_hour} is used up")
    target = settled(limits, wanted)
    if target is None:
        return Refuse("min", f"a register that counts in {limits.resolution:g} holds nothing from min to max")
    if not limits.stepped:
        return Write(target, final=True)
    if not isinstance(present, int | float) or isinstance(present, bool):
        return Refuse("present", "the present value is not known, and a ramp or max_step starts from it")
    step = _step(limits, history, now_s)
    distance = float(target) - present
    early = history.at_s is not None and now_s < history.at_s + pace_s(limits)
    if abs(distance) <= step * ROUNDING and not (early and limits.ramp_per_s is None):
        return Write(target, final=True)
    if early and history.at_s is not None:
        return Wait(history.at_s + pace_s(limits))
    return _towards(limits, present, step if distance > 0 else -step)


RAMP_TICK_S = 0.25
"""How often a setpoint that is on its way moves on, where no min_interval says otherwise."""


def pace_s(limits: Limits) -> float:
    """Return the time between two steps: with a slow ramp as long as the smallest difference takes."""
    slowest_s = limits.resolution / limits.ramp_per_s if limits.ramp_per_s is not None else 0.0
    return max(limits.min_interval_s, RAMP_TICK_S, slowest_s)


def _step(limits: Limits, history: History, now_s: float) -> float:
    """Return how far one write may go."""
    step = limits.max_step if limits.max_step is not None else float("inf")
    if limits.ramp_per_s is not None:
        longest_s = pace_s(limits)
        since_s = longest_s if history.at_s is None else min(now_s - history.at_s, longest_s)
        step = min(step, limits.ramp_per_s * since_s)
    return step


ROUNDING = 1.0 + 1e-9
"""How much longer than it says a step may be: what adding up doubles costs."""


def _range(limits: Limits) -> tuple[float, float]:
    return -inf if limits.min is None else limits.min, inf if limits.max is None else limits.max


def settled(limits: Limits, wanted: Scalar) -> Scalar | None:
    """Return what the register holds of a value that `check` lets pass: within the range, None if there is nothing."""
    if isinstance(wanted, bool | str):
        return wanted
    return limits.grid.nearest(wanted, *_range(limits))


def _towards(limits: Limits, present: float, step: float) -> Write | Refuse:
    """Return one step, no longer than `step` also when it is rounded; from outside the range it leads to its edge."""
    low, high = _range(limits)
    goal = present + step
    if not low <= goal <= high:
        edge = limits.grid.nearest(goal, low, high)
        return (
            Refuse("max_step", "no step leads into the range") if edge is None else Write(edge, final=False)
        )
    furthest = present + step * ROUNDING
    value = limits.grid.nearest(goal, min(present, furthest), max(present, furthest))
    if value is None or value == present:
        return Refuse("max_step", f"a register that counts in {limits.resolution:g} moves by no less")
    return Write(value, final=False)
