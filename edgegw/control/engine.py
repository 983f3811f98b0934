"""The engine: one cycle of control, from a frozen image to what is to be written. Pure.

Phases: inputs, rules, demands, arbitration, guard. The state goes in and comes out; nothing here reads a clock,
waits or touches a device. The controller runs it on the plant, `rules test` on a recording.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import inf, nextafter
from typing import Any

from edgegw.control import arbiter
from edgegw.control.arbiter import Demand
from edgegw.control.cycle import Cycle, Memo, Planned
from edgegw.control.expression import activation
from edgegw.control.guard import History, Refuse, Wait, check, guard, pace_s, same, settled
from edgegw.control.plant import Plant
from edgegw.control.present import present, unread_until
from edgegw.control.rule import LinkState, Rule, RuleState, judge
from edgegw.control.state import RETRY_S, Failure, Farewell, Refusal, State
from edgegw.domain.image import Latest
from edgegw.domain.tag import Scalar

DUE_MARGIN_S = 0.002
"""Near the moment that something falls due, a rule is looked at anew: a cycle is asked for a little after it."""


def step(
    plant: Plant, state: State, image: Mapping[str, Latest], link: LinkState, now_s: float,
    *, busy: frozenset[str] = frozenset(), memo: Memo | None = None,
) -> Cycle:  # fmt: skip
    """Run one cycle. `busy` setpoints have a write on the way; `memo` is this plant's, from the cycle before.

    Neither state nor image may change afterwards.
    """
    return _Step(plant, state, image, link, now_s, busy, memo or Memo(plant)).run()


class _Step:
    """The cycle's working memory."""

    def __init__(
        self, plant: Plant, state: State, image: Mapping[str, Latest], link: LinkState, now_s: float,
        busy: frozenset[str], memo: Memo,
    ) -> None:  # fmt: skip
        self.memo = memo
        self.plant = plant
        self.image = image
        self.link = link
        self.now_s = now_s
        self.busy = busy
        self.rules = state.rules
        self.judged: dict[str, RuleState] = {}
        self.leases = dict(state.leases)
        self.farewells = dict(state.farewells)
        self.owners = dict(state.owners)
        self.histories = dict(state.histories)
        self.refusals = dict(state.refusals)
        self.failures = dict(state.failures)
        self.began_s = state.began_s
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.writes: list[Planned] = []
        self.unread: set[str] = set()
        self.due: list[float] = []

    def run(self) -> Cycle:
        demands = self._ruled()
        demands += self._leases(frozenset(demand.setpoint for demand in demands))
        held = frozenset(demand.setpoint for demand in demands)
        self.farewells = {
            at: farewell
            for at, farewell in self.farewells.items()
            if at not in held and not self._holds(at, farewell.value)
        }
        demands += [Demand(at, f.owner, f.priority, f.value, f.cause) for at, f in self.farewells.items()]
        winners = arbiter.arbitrate(demands)
        self._authority(winners)
        for demand in winners.values():
            if demand.setpoint in self.busy or self._reached(demand):
                continue
            if demand.value is not None:
                self._guarded(demand, demand.value)
            elif demand.cause != "failsafe":
                self._kept(demand)
        for setpoint in [at for at in self.refusals if at not in winners]:
            del self.refusals[setpoint]
        state = State(
            self.rules, self.leases, self.farewells, self.owners, self.histories, self.refusals, self.failures,
            self.began_s,
        )  # fmt: skip
        later = [moment for moment in self.due if moment > self.now_s and moment != inf]
        return Cycle(state, self.writes, self.events, min(later, default=None))

    # -- inputs ------------------------------------------------------------------------------------------

    def _inputs(self, rule: Rule) -> dict[str, Scalar]:
        """Return what a rule may read: good and fresh values; uncertain, bad and stale ones are left out."""
        names = rule.inputs
        return activation((name, value) for name in names if (value := self._input(rule, name)) is not None)

    def _input(self, rule: Rule, name: str) -> Any:
        device, _, tag = name.partition(".")
        latest = self.image.get(device)
        if latest is None:
            return None
        stale_after_s = self.plant.rule_stale_after_s.get(rule.name, self.plant.stale_after_s[device])
        if not latest.held:
            self.due.append(nextafter(latest.at_s + stale_after_s, inf))
        if not latest.fresh(self.now_s, stale_after_s) or tag in latest.quality:
            return None
        return latest.values.get(tag)

    def _unseen(self, devices: Iterable[str]) -> bool:
        """Tell whether, since control began, one of these has not been read for the first time, and still may be."""
        ends_s = [self.began_s + self.plant.stale_after_s[at] for at in devices if self._never_read(at)]
        self.due += ends_s
        return any(self.now_s < moment for moment in ends_s)

    def _never_read(self, device: str) -> bool:
        return device in self.plant.stale_after_s and device not in self.image

    def _holds(self, setpoint: str, wanted: Scalar) -> bool:
        limits = self.plant.limits[setpoint]
        if check(limits, wanted) is not None or (target := settled(limits, wanted)) is None:
            return False
        return same(self._present(setpoint), target, limits.resolution)

    def _present(self, setpoint: str) -> Scalar | None:
        return present(self.plant, self.histories, self.image, setpoint, self.now_s)

    # -- demands -----------------------------------------------------------------------------------------

    def _ruled(self) -> list[Demand]:
        """Return what the rules want; those are judged anew for which anything has changed since the last cycle."""
        memo = self.memo
        for number in self._moved():
            before = len(self.due)
            memo.demands[number] = list(self._rule(self.plant.rules[number]))
            memo.due[number] = min((at for at in self.due[before:] if at > self.now_s), default=inf)
            if not memo.demands[number]:
                del memo.demands[number]
        if any(state != self.rules.get(name) for name, state in self.judged.items()):
            self.rules = {**self.rules, **self.judged}
        memo.link, memo.image, memo.states = self.link, self.image, self.rules
        memo.due_s = min(memo.due, default=inf)
        self.due.append(memo.due_s)
        return [demand for number in sorted(memo.demands) for demand in memo.demands[number]]

    def _moved(self) -> Iterable[int]:
        """Return which of the rules the last cycle does not tell about, in their order."""
        memo = self.memo
        if memo.link != self.link or memo.states is not self.rules:
            return range(len(memo.due))
        image, before = self.image, memo.image
        touched = {
            number
            for device, readers in memo.readers.items()
            if image.get(device) is not before.get(device)
            for number in readers
        }
        if (near_s := self.now_s + DUE_MARGIN_S) >= memo.due_s:
            touched |= {number for number, due_s in enumerate(memo.due) if near_s >= due_s}
        return sorted(touched)

    def _reached(self, demand: Demand) -> bool:
        """Tell whether the setpoint was found to hold just this, and neither has changed since."""
        known = self.memo.reached.get(demand.setpoint)
        device = demand.setpoint.partition(".")[0]
        return known is not None and known[0] is demand and known[1] is self.image.get(device)

    def _rule(self, rule: Rule) -> Iterator[Demand]:
        inputs = self._inputs(rule)
        before = self.rules.get(rule.name, RuleState())
        judged = judge(rule, before, inputs, self.link, self.plant.hand_back, self.now_s)
        state = judged.state
        if judged.due_s is not None:
            self.due.append(judged.due_s)
        if judged.switched:
            self.events.append(("rule-on" if state.active else "rule-off", {"rule": rule.name}))
        if judged.switched and not state.active:
            self._last_values(rule, inputs)
        wanted = {at: expression.value(inputs) for at, expression in rule.do.items()} if state.active else {}
        decided = judged.decided and None not in wanted.values()
        waiting = not decided and not judged.switched and self._unseen(rule.devices)
        if waiting:
            state = (
                before  # nothing was lost yet: it goes on where it was left once its inputs are read again
            )
        if state.active:
            unsafe = False
            if not waiting:
                state, unsafe = self._undecided(rule, state, decided)
            for setpoint, value in wanted.items():
                demand = Demand(setpoint, f"rule:{rule.name}", rule.priority, value, f"rule:{rule.name}")
                if not decided:
                    safe = self.plant.limits[setpoint].safe
                    demand = (
                        demand._replace(value=safe, cause="failsafe")
                        if unsafe
                        else demand._replace(value=None)
                    )
                yield demand
        self.judged[rule.name] = state

    def _undecided(self, rule: Rule, state: RuleState, decided: bool) -> tuple[RuleState, bool]:
        """Note since when an active rule cannot say what it wants; tell whether `hold` is over."""
        if decided:
            return state._replace(undecided_since_s=None), False
        since_s = self.now_s if state.undecided_since_s is None else state.undecided_since_s
        ends_s = inf if rule.hold_s is None else since_s + rule.hold_s
        self.due.append(ends_s)
        return state._replace(undecided_since_s=since_s), self.now_s >= ends_s

    def _last_values(self, rule: Rule, inputs: Mapping[str, Scalar]) -> None:
        """Leave the rule's last values behind; where one cannot be decided, `safe`."""
        for setpoint, expression in rule.last.items():
            value, cause = expression.value(inputs), f"rule:{rule.name}"
            if value is None:
                value, cause = self.plant.limits[setpoint].safe, "failsafe"
            if value is not None:
                self.farewells[setpoint] = Farewell(f"rule:{rule.name}", value, cause, rule.priority)

    def _leases(self, ruled: frozenset[str]) -> Iterator[Demand]:
        """Yield what commands hold; end leases whose time is over, and open-ended ones on an islanded link.

        Either way `safe` is left behind, where there is one. A hand at the gateway needs no link.
        """
        islanded = self.link == "islanded"
        for setpoint, lease in list(self.leases.items()):
            if lease.until_s is not None and lease.until_s > self.now_s:
                self.due.append(lease.until_s)
            elif not lease.open_ended or (islanded and not lease.by_hand):
                del self.leases[setpoint]
                safe = self.plant.limits[setpoint].safe
                if setpoint not in ruled and safe is not None:
                    self.farewells[setpoint] = Farewell("failsafe", safe, "failsafe", 0)
                continue
            priority = arbiter.REMOTE_ISLANDED if islanded else arbiter.REMOTE_PRIORITY
            owner = f"command:{lease.command}"
            yield Demand(setpoint, owner, priority, lease.value, owner)

    def _authority(self, winners: Mapping[str, Demand]) -> None:
        """Say of each setpoint whose owner changed who has it now."""
        for setpoint in sorted({*self.owners, *winners}):
            was = self.owners.get(setpoint)
            owner = winners[setpoint].owner if setpoint in winners else None
            if owner == was:
                continue
            self.events.append(("authority", {"tag": setpoint, "owner": owner, "was": was}))
            if (failure := self.failures.get(setpoint)) is not None and failure.final:
                self.failures[setpoint] = failure._replace(final=False)  # another owner asks: it may be tried
            if owner is None:
                del self.owners[setpoint]
            else:
                self.owners[setpoint] = owner

    # -- the guard ---------------------------------------------------------------------------------------

    def _guarded(self, demand: Demand, wanted: Scalar) -> None:
        setpoint, limits = demand.setpoint, self.plant.limits[demand.setpoint]
        now_held = self._present(setpoint)
        if self._holds(setpoint, wanted):
            if limits.refresh_s is not None:
                self._refresh(demand, wanted, limits.refresh_s)
                return
            self.refusals.pop(setpoint, None)
            self.failures.pop(setpoint, None)
            self.memo.reached[setpoint] = (demand, self.image.get(setpoint.partition(".")[0]))
            return
        self.memo.reached.pop(setpoint, None)
        device = setpoint.partition(".")[0]
        failure = self._failure(setpoint)
        if failure is not None and (soon_s := failure.at_s + RETRY_S) > self.now_s:
            self.due.append(soon_s)
            return
        unread_until_s = unread_until(self.plant, self.began_s, self.image, device, self.now_s)
        if now_held is None and unread_until_s is not None:
            self.due.append(unread_until_s)
            self.unread.add(setpoint)
            return  # it may hold what is wanted already
        self._write(demand, wanted, now_held, failure)

    def _kept(self, demand: Demand) -> None:
        """Have a setpoint that keeps its value for a while go on holding it, where its device lets go by itself."""
        kept = self._present(demand.setpoint)
        if kept is not None and self._holds(demand.setpoint, kept):
            self._guarded(demand, kept)

    def _refresh(self, demand: Demand, wanted: Scalar, refresh_s: float) -> None:
        """Write what the setpoint holds once more when that is due: also when nobody knows what its device made of it.

        That is so where it was not written by us since the start, or the device was away since.
        """
        history = self.histories.get(demand.setpoint, History())
        latest, failure = self.image.get(demand.setpoint.partition(".")[0]), self._failure(demand.setpoint)
        due_s = self.now_s
        if history.at_s is not None and failure is not None:
            due_s = failure.retry_s(wanted, demand.cause)
            due_s = due_s if failure.final else min(history.at_s + refresh_s, due_s)
        elif history.at_s is not None and history.value is not None:
            away = latest is not None and latest.since_s > history.at_s
            due_s = self.now_s if away else history.at_s + refresh_s
        if due_s > self.now_s:
            self.refusals.pop(demand.setpoint, None)
            self.due.append(due_s)
            return
        held = self._present(demand.setpoint)
        self._write(demand, wanted, held, None, repeat=history.value is not None)

    def _write(
        self,
        demand: Demand,
        wanted: Scalar,
        now_held: Scalar | None,
        failure: Failure | None,
        *,
        repeat: bool = False,
    ) -> None:
        """Ask the guard, and do as it says."""
        setpoint, limits = demand.setpoint, self.plant.limits[demand.setpoint]
        history = self.histories.get(setpoint, History())
        verdict = guard(limits, history, now_held, wanted, self.now_s)
        if isinstance(verdict, Refuse):
            self._refused(demand, wanted, verdict)
            if verdict.limit != "present":
                self.farewells.pop(setpoint, None)
        elif isinstance(verdict, Wait):
            self.due.append(verdict.until_s)
            if verdict.reason is not None:
                self._refused(demand, wanted, Refuse("max_per_hour", verdict.reason))
        elif failure is not None and (retry_s := failure.retry_s(verdict.value, demand.cause)) > self.now_s:
            self.due.append(retry_s)
        else:
            self.refusals.pop(setpoint, None)
            self.histories[setpoint] = history.wrote(verdict.value, self.now_s, limits.max_per_hour)
            self.writes.append(Planned(setpoint, verdict.value, now_held, demand.cause, repeat))
            if not verdict.final:
                self.due.append(self.now_s + pace_s(limits))

    def _failure(self, setpoint: str) -> Failure | None:
        """Return the last write's failure that still counts: none once the device was lost and has come back."""
        failure, latest = self.failures.get(setpoint), self.image.get(setpoint.partition(".")[0])
        if failure is not None and latest is not None and not latest.lost and latest.since_s > failure.at_s:
            del self.failures[setpoint]
            return None
        return failure

    def _refused(self, demand: Demand, wanted: Scalar, refuse: Refuse) -> None:
        """Note a refusal: an event when it begins, not one for every cycle and every value of an expression."""
        before = self.refusals.get(demand.setpoint)
        if before is None or (before.owner, before.limit) != (demand.owner, refuse.limit):
            fields = {"tag": demand.setpoint, "value": wanted, "cause": demand.cause, "reason": refuse.reason}
            self.events.append(("write-refused", fields))
        self.refusals[demand.setpoint] = Refusal(demand.owner, *refuse)


def objection(
    plant: Plant, given: State, owner: str, setpoints: Iterable[str], image: Mapping[str, Latest],
    link: LinkState, now_s: float, *, busy: frozenset[str] = frozenset(),
) -> str | None:  # fmt: skip
    """Say why a command that is given its setpoints would not have them, or not reach them: nothing is changed."""
    trial = _Step(plant, given, image, link, now_s, busy, Memo(plant))
    tried = trial.run().state
    for setpoint in setpoints:
        has, refusal = tried.owners.get(setpoint), tried.refusals.get(setpoint)
        if has != owner:
            return f"{setpoint}: {has or 'nobody'} has authority"
        device = setpoint.partition(".")[0]
        if setpoint in trial.unread and device in image:
            return f"{setpoint}: device.{device} does not answer; what it holds must be read before it is written"
        if refusal is not None and refusal.owner == owner:
            return f"{setpoint}: {refusal.reason}"
    return None
