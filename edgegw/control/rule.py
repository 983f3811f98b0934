"""A rule: when it is on, by its expressions and its times."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from edgegw.control.expression import Expression
from edgegw.domain.tag import Scalar

LinkState = Literal["online", "offline", "islanded"]


class Rule(NamedTuple):
    """A rule, compiled. `do` and `last` (the contract's `finally`) hold an expression for each setpoint."""

    name: str
    when: Expression
    until: Expression | None
    do: dict[str, Expression]
    last: dict[str, Expression]
    link: str
    priority: int
    for_s: float
    min_on_s: float
    min_off_s: float
    hold_s: float | None
    """How long a setpoint keeps its value while the rule is undecided; None for as long as that lasts."""
    inputs: tuple[str, ...]
    """The names that any of its expressions reads."""
    devices: tuple[str, ...]
    """The devices (or windows) of these names."""


class RuleState(NamedTuple):
    """What a rule remembers. Times are monotonic seconds; after a restart it has just switched."""

    active: bool = False
    since_s: float = 0.0
    true_since_s: float | None = None
    undecided_since_s: float | None = None


class Judged(NamedTuple):
    """A rule after one cycle, and when it must be looked at again if nothing else happens.

    `decided` is false if an active rule cannot tell whether it should go on.
    """

    state: RuleState
    switched: bool
    decided: bool
    due_s: float | None


def judge(
    rule: Rule, state: RuleState, inputs: Mapping[str, Scalar], link: LinkState, hand_back: str, now_s: float
) -> Judged:
    """Decide whether a rule is on.

    It turns on when its link is there and `when` has held for `for`, `min_off` after it went off. It turns off
    when `until` holds (or, without one, `when` does not), or when its link is gone and is handed back, `min_on`
    after it went on. Undecided is neither true nor false: it interrupts `for`, and turns nothing off.
    """
    link_there = rule.link == "always" or rule.link == ("offline" if link == "islanded" else _online(link))
    if not state.active:
        return _off(rule, state, link_there and rule.when.value(inputs) is True, now_s)
    if not link_there and hand_back == "release":
        return _on(rule, state, True, now_s)
    if rule.until is not None:
        return _on(rule, state, rule.until.value(inputs), now_s)
    when = rule.when.value(inputs)
    return _on(rule, state, None if when is None else not when, now_s)


def _online(link: LinkState) -> str:
    """Return the rules' word for a link that is not islanded: lost but a moment ago is neither of their two."""
    return "online" if link == "online" else ""


def _off(rule: Rule, state: RuleState, wanted: bool, now_s: float) -> Judged:
    if not wanted:
        return Judged(state._replace(true_since_s=None), False, True, None)
    true_since_s = now_s if state.true_since_s is None else state.true_since_s
    ready_s = max(true_since_s + rule.for_s, state.since_s + rule.min_off_s)
    if now_s >= ready_s:
        return Judged(RuleState(True, now_s), True, True, None)
    return Judged(state._replace(true_since_s=true_since_s), False, True, ready_s)


def _on(rule: Rule, state: RuleState, over: Scalar | None, now_s: float) -> Judged:
    if over is not True:
        return Judged(state, False, over is not None, None)
    ready_s = state.since_s + rule.min_on_s
    if now_s >= ready_s:
        return Judged(RuleState(False, now_s), True, True, None)
    return Judged(state, False, True, ready_s)
