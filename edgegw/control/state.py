"""What control remembers from one cycle to the next, and how commands, outcomes and restarts change it. Pure."""

from collections.abc import Iterable, Mapping
from math import inf
from typing import NamedTuple

from edgegw.control.guard import History
from edgegw.control.plant import Plant
from edgegw.control.rule import Rule, RuleState
from edgegw.domain.command import HAND
from edgegw.domain.tag import Scalar

RETRY_S = 1.0
"""How soon a write that could not be confirmed may be tried again, by the next cycle's decision."""
RETRY_MOST_S = 600.0
"""How long it is left alone in the end, if the same write fails the same way again and again."""


class Lease(NamedTuple):
    """A command's hold on a setpoint: until a moment, or (None) until another command or an islanded link."""

    command: str
    value: Scalar
    until_s: float | None

    @property
    def open_ended(self) -> bool:
        """Tell whether no moment ends it."""
        return self.until_s is None

    @property
    def by_hand(self) -> bool:
        """Tell whether a person at the gateway wants it, for as long as nothing else is said."""
        return self.command.startswith(HAND)


class Farewell(NamedTuple):
    """A last value that a setpoint is still to reach: a rule's `finally`, or `safe`."""

    owner: str
    value: Scalar
    cause: str
    priority: int


class Refusal(NamedTuple):
    """What the guard last said no to: whom, which limit, and why."""

    owner: str
    limit: str
    reason: str


class Failure(NamedTuple):
    """A write that was not confirmed: what was written for whom, why it failed, how often in a row, when last.

    It is `final` if the device refused it in a way that the same write would be refused again.
    """

    value: Scalar
    cause: str
    error: str
    times: int
    at_s: float
    final: bool = False

    def retry_s(self, value: Scalar, cause: str) -> float:
        """Return when a write may follow: soon if it is another one, ever later if it is the same.

        What was refused for good is not written again; another value for the same cause follows ever later.
        """
        same = value == self.value
        if cause != self.cause or not (same or self.final):
            return self.at_s + RETRY_S
        if same and self.final:
            return inf
        return self.at_s + min(RETRY_MOST_S, RETRY_S * 2.0 ** min(self.times - 1, 30))


class State(NamedTuple):
    """All that control remembers from one cycle to the next; `began_s` is when it took up its work."""

    rules: Mapping[str, RuleState] = {}
    leases: Mapping[str, Lease] = {}
    farewells: Mapping[str, Farewell] = {}
    owners: Mapping[str, str] = {}
    histories: Mapping[str, History] = {}
    refusals: Mapping[str, Refusal] = {}
    failures: Mapping[str, Failure] = {}
    began_s: float = -inf


def failed(
    state: State, setpoint: str, value: Scalar, cause: str, error: str, now_s: float, *, final: bool = False
) -> State:
    """Note that a write was not confirmed: what the setpoint holds is not known until it is read again."""
    history = state.histories.get(setpoint, History())._replace(value=None, since_s=now_s)
    was = state.failures.get(setpoint)
    again = was is not None and (was.cause, was.error) == (cause, error) and (final or was.value == value)
    failure = Failure(value, cause, error, was.times + 1 if was is not None and again else 1, now_s, final)
    return state._replace(
        histories={**state.histories, setpoint: history}, failures={**state.failures, setpoint: failure}
    )


def confirmed(state: State, setpoint: str, now_s: float) -> State:
    """Note that a write was read back: what was read of the setpoint until now is older than that."""
    history = state.histories[setpoint]._replace(since_s=now_s)
    failures = {at: failure for at, failure in state.failures.items() if at != setpoint}
    return state._replace(histories={**state.histories, setpoint: history}, failures=failures)


def command(
    state: State, name: str, writes: Mapping[str, Scalar], lease_s: float | None, now_s: float
) -> State:
    """Return the state in which a command has its hold on setpoints."""
    until_s = None if lease_s is None else now_s + lease_s
    return state._replace(
        leases={**state.leases, **{at: Lease(name, value, until_s) for at, value in writes.items()}}
    )


def counting(timed: Iterable[Rule], state: State, now_s: float) -> bool:
    """Tell whether the `for` of one of these rules is running: how far it has come is part of what must survive."""
    begun = ((rule, state.rules.get(rule.name, RuleState()).true_since_s) for rule in timed)
    return any(since_s is not None and now_s - since_s < rule.for_s for rule, since_s in begun)


def restored(
    state: State, plant: Plant, now_s: float, *, saved_s: float, same_boot: bool, reload: bool = False
) -> State:
    """Return the state after a restart (or a mere reload), from the one that was saved at `saved_s`.

    Every rule counts as just switched. A `for` goes on where it was, the time between not counted; a `hold` counts
    it. A setpoint is read before it is written. After a reboot the monotonic clock has begun anew, and
    nobody knows how long the machine was off: what commands held is over, but for an open-ended hold by hand, and the
    writes of the last hour count as made now. What a rule held that is no more goes to `safe`.
    """
    known = {at for at, limits in plant.limits.items() if limits.writable}
    shift_s = now_s - saved_s
    rules = {}
    for rule in plant.rules:
        was = state.rules.get(rule.name, RuleState())
        undecided_s = _shifted(was.undecided_since_s, 0.0 if same_boot else shift_s)
        rules[rule.name] = RuleState(was.active, now_s, _shifted(was.true_since_s, shift_s), undecided_s)
    histories = {
        at: history._replace(value=history.value if reload else None)
        if same_boot
        else History(None, now_s, (now_s,) * len(history.hour))
        for at, history in state.histories.items()
        if at in known and history.at_s is not None
    }
    leases = {
        at: lease if same_boot or (lease.open_ended and lease.by_hand) else lease._replace(until_s=now_s)
        for at, lease in state.leases.items()
        if at in known
    }
    farewells = {at: farewell for at, farewell in state.farewells.items() if at in known}
    owners = {at: owner for at, owner in state.owners.items() if at in known}
    for at, owner in owners.items():
        kind, _, name = owner.partition(":")
        safe = plant.limits[at].safe
        if kind == "rule" and name not in rules and safe is not None:
            farewells.setdefault(at, Farewell("failsafe", safe, "failsafe", 0))
    return State(rules, leases, farewells, owners, histories, began_s=now_s)


def _shifted(moment_s: float | None, shift_s: float) -> float | None:
    return None if moment_s is None else moment_s + shift_s
