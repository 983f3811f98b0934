"""The guard: the one way to any device. It decides whether, when and how far a setpoint may move."""

from math import isclose, isfinite
from typing import NamedTuple

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
    resolution: float = 0.0
    """The smallest difference that the device can hold: what an integer register counts in."""

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
    nearest = max(1e-6, 0.5 * resolution * (1.0 + 1e-6))
    return present is not None and isclose(present, wanted, rel_tol=1e-6, abs_tol=nearest)


def _finite(wanted: float) -> bool:
    try:
        return isfinite(wanted)
    except OverflowError:  # an integer that no double holds
        return False


def guard(
    limits: Limits, history: History, present: Scalar | None, wanted: Scalar, now_s: float
) -> Write | Wait | Refuse:
    """Decide about writing `wanted` to a setpoint that holds `present` (None: not known) at `now_s`.

    A `ramp` or `max_step` moves the value there in steps, each from what the setpoint holds.
    """
    if (refusal := check(limits, wanted)) is not None:
        return refusal
    if history.at_s is not None and now_s < history.at_s + limits.min_interval_s:
        return Wait(history.at_s + limits.min_interval_s)
    if limits.max_per_hour is not None:
        hour = [at for at in history.hour if now_s - at < HOUR_S]
        if len(hour) >= limits.max_per_hour:
            return Wait(hour[-limits.max_per_hour] + HOUR_S, f"max_per_hour {limits.max_per_hour} is used up")
    if not limits.stepped:
        return Write(wanted, final=True)
    if not isinstance(present, int | float) or isinstance(present, bool):
        return Refuse("present", "the present value is not known, and a ramp or max_step starts from it")
    step = _step(limits, history, now_s)
    distance = float(wanted) - present
    early = history.at_s is not None and now_s < history.at_s + pace_s(limits)
    if abs(distance) <= step and not (early and limits.ramp_per_s is None):
        return Write(wanted, final=True)
    if early and history.at_s is not None:
        return Wait(history.at_s + pace_s(limits))
    return Write(_within(limits, present + (step if distance > 0 else -step)), final=False)


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


def _within(limits: Limits, value: float) -> float:
    """Keep a step within the range: where the setpoint lay outside of it, the first write brings it in."""
    low = limits.min if limits.min is not None else float("-inf")
    high = limits.max if limits.max is not None else float("inf")
    return min(max(value, low), high)
