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

    `decided` is false if the rule cannot tell whether it should be on, or go on.
    """

    state: RuleState
    switched: bool
    decided: bool
    due_s: float | None


def judge(
    rule: Rule, state: RuleState, inputs: Mapping[str, Scalar], link: LinkState, hand_back: str, now_s: float
) -> Judged:
    """Decide whether a rule is on.

    It turns on when its link is there and `when` without `until` has held for `for`, `min_off` after it went off.
    It turns off when `until` holds (or, without one, `when` does not), or when its link is over, `min_on` after it
    went on.
    Undecided is neither true nor false: it interrupts `for`, and turns nothing off.
    """
    if not state.active:
        wanted = _wanted(rule, inputs) if _begins(rule.link, link) else False
        return _off(rule, state, wanted, now_s)
    if _over(rule.link, link, hand_back):
        return _on(rule, state, True, now_s)
    if rule.until is not None:
        return _on(rule, state, rule.until.value(inputs), now_s)
    when = rule.when.value(inputs)
    return _on(rule, state, None if when is None else not when, now_s)


def _wanted(rule: Rule, inputs: Mapping[str, Scalar]) -> bool | None:
    """Tell whether a rule that is off should be on: `when`, and not `until` already; None if that is undecided."""
    when = rule.when.value(inputs)
    until = rule.until.value(inputs) if rule.until is not None and when is not False else False
    if when is False or until is True:
        return False
    return None if when is None or until is None else True


def _begins(wanted: str, link: LinkState) -> bool:
    """Tell whether a rule may turn on: a link lost but a moment ago is neither online nor islanded."""
    return wanted == "always" or wanted == {"online": "online", "islanded": "offline"}.get(link)


def _over(wanted: str, link: LinkState, hand_back: str) -> bool:
    """Tell whether a rule's link is over: not before it is islanded, or online again and handed back."""
    return {"online": link == "islanded", "offline": link == "online" and hand_back == "release"}.get(
        wanted, False
    )


def _off(rule: Rule, state: RuleState, wanted: bool | None, now_s: float) -> Judged:
    if not wanted:
        return Judged(state._replace(true_since_s=None), False, wanted is not None, None)
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
