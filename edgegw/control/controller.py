"""The controller: runs the engine's cycle on the plant, and carries out what it decides.

A cycle runs when a scan touches a tag that a rule reads, and when a time falls due. What it decides is journaled
before it is done. A disk that does not take the entry in time does not stop the act: then the entry says so.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from edgegw import clock
from edgegw.control import commands, engine, state
from edgegw.control.cycle import Cycle, Memo, Planned
from edgegw.control.guard import Limits, same
from edgegw.control.memory import Memory, MemoryFile, decode
from edgegw.control.outcomes import Outcomes
from edgegw.control.plant import Plant
from edgegw.control.present import present
from edgegw.control.rule import LinkState
from edgegw.control.state import State
from edgegw.domain.command import Reply, WriteCommand
from edgegw.domain.image import Image
from edgegw.domain.record import Event, Record
from edgegw.domain.tag import Scalar, Value
from edgegw.errors import DeviceError, Refused

log = logging.getLogger(__name__)

PATIENCE_S = 0.005
"""How long an act waits for its entry to be durable."""
IDLE_S = 5.0
"""How long control waits at most from one cycle to the next, so that it is seen to work."""
SAVE_S = 1.0
"""How soon timers that have begun or ended are saved; what was decided or done is saved at once."""


class Ledger(Protocol):
    """What control needs of the journal."""

    def append(self, record: Record) -> None:
        """Take an entry."""
        ...

    async def flush(self) -> None:
        """Return when all of that is durable."""
        ...


class Controller:
    """Control as a service; `touch` says that there is something new, `obey` gives a command its setpoints."""

    def __init__(
        self, plant: Plant, image: Image, ledger: Ledger, link: Callable[[], LinkState],
        write: Callable[[str, str, Scalar], Awaitable[Value]], memory: MemoryFile,
        held_types: Callable[[str], Mapping[str, str] | None],
    ) -> None:  # fmt: skip
        self.state = State()
        self.cycles = 0
        self._completed_s = clock.mono_s()
        self._plant = self._configured = plant
        self._held_types = held_types
        self._learnt: dict[str, Mapping[str, str]] = {}
        self._image = image
        self._ledger = ledger
        self._link = link
        self._write = write
        self._memo = Memo(plant)
        self._timed = [rule for rule in plant.rules if rule.for_s]
        self._due = asyncio.Event()
        self._busy: dict[str, asyncio.Task[str | None]] = {}
        self._outcomes = Outcomes(lambda fields: ledger.append(Event(clock.wall_ms(), "write", fields)))
        self._settling: set[asyncio.Task[bool]] = set()
        self._saved: tuple[object, ...] = ()
        self._saving: asyncio.TimerHandle | None = None
        self.leaving = False
        self._memory = memory
        self._devices = {name.partition(".")[0] for rule in plant.rules for name in rule.inputs}
        self._devices |= {name.partition(".")[0] for name, limits in plant.limits.items() if limits.writable}
        for device in self._devices:
            self._learn(device)
        self._restore(memory.load())

    @property
    def limits(self) -> Mapping[str, Limits]:
        """What is known of writing each tag."""
        return self._plant.limits

    def touch(self, device: str) -> None:
        """Say that a device has new readings, or none any more."""
        if device in self._devices:
            self._learn(device)
            self._due.set()

    def _learn(self, device: str) -> None:
        """Keep the limits in the types in which a device says that it holds its setpoints, from now on."""
        types = self._held_types(device)
        if types is None or types is self._learnt.get(device):
            return
        self._learnt[device] = types
        self._plant = self._configured
        for name, known in self._learnt.items():
            self._plant = self._plant.learnt(name, known)
        self._memo = Memo(self._plant)

    def wake(self) -> None:
        """Run a cycle soon: something that rules ask for has changed."""
        self._due.set()

    @property
    def idle_s(self) -> float:
        """How long ago the last cycle was completed."""
        return clock.mono_s() - self._completed_s

    def rules(self) -> dict[str, dict[str, Any]]:
        """Return each rule's state for the status."""
        now_s, now_ms = clock.mono_s(), clock.wall_ms()
        shown = {}
        for rule in self._plant.rules:
            state = self.state.rules.get(rule.name)
            since = round(now_ms - (now_s - state.since_s) * 1000) if state and state.since_s else None
            undecided = bool(state and state.undecided_since_s is not None)
            shown[rule.name] = {
                "active": bool(state and state.active),
                "since": since,
                "undecided": undecided,
            }
        return shown

    async def run(self) -> None:
        """Run cycles until cancelled."""
        while True:
            due_s = self.cycle()
            self._due.clear()
            wait_s = IDLE_S if due_s is None else min(IDLE_S, max(0.0, due_s - clock.mono_s()))
            try:
                async with asyncio.timeout(wait_s):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def settle(self) -> None:
        """Take no more commands, wait for the writes that are on their way, and save what must survive."""
        self.leaving = True
        if self._saving is not None:
            self._saving.cancel()
        if self._busy:
            await asyncio.wait(list(self._busy.values()))
        self._outcomes.flush_all()
        await self._memory.save(self._remembered())

    def cycle(self) -> float | None:
        """Run one cycle now; return when the next must be."""
        now_s = clock.mono_s()
        busy = frozenset(self._busy)
        cycle = engine.step(
            self._plant, self.state, self._image.frozen(), self._link(), now_s, busy=busy, memo=self._memo
        )
        self.cycles += 1
        self._take(cycle)
        self._completed_s = clock.mono_s()
        return cycle.due_s

    def _take(self, cycle: Cycle) -> None:
        self.state = cycle.state
        if not cycle.events and not cycle.writes:
            self._save_soon()
            return
        now_ms = clock.wall_ms()
        for name, fields in cycle.events:
            if name == "authority":
                self._outcomes.flush(fields["tag"])
            self._ledger.append(Event(now_ms, name, fields))
        for planned in cycle.writes:
            if planned.repeat:
                continue
            self._outcomes.flush(planned.setpoint)
            fields = {
                "tag": planned.setpoint,
                "cause": planned.cause,
                "old": planned.old,
                "new": planned.value,
            }
            self._ledger.append(Event(now_ms, "write", fields))
        durable = self._begin_durable() if cycle.events or any(map(self._counts, cycle.writes)) else None
        for planned in cycle.writes:
            task = asyncio.create_task(self._carry_out(planned, durable), name=f"write {planned.setpoint}")
            self._busy[planned.setpoint] = task

    def _counts(self, planned: Planned) -> bool:
        """Tell whether a write must be durable before it is made: one that is told, or counted over restarts."""
        limits = self._plant.limits[planned.setpoint]
        return not planned.repeat or limits.max_per_hour is not None or limits.min_interval_s > 0.0

    def _begin_durable(self) -> asyncio.Task[bool]:
        durable = asyncio.create_task(self._durable(PATIENCE_S))
        self._settling.add(durable)
        durable.add_done_callback(self._settling.discard)
        return durable

    def _save_soon(self) -> None:
        """Have what must survive saved within SAVE_S, if it has changed or a timer runs."""
        if self._saving is not None or self.leaving:
            return
        if self._lasting() != self._saved or state.counting(self._timed, self.state, clock.mono_s()):
            self._saving = asyncio.get_running_loop().call_later(SAVE_S, self._save_now)

    def _save_now(self) -> None:
        self._saving = None
        task = asyncio.create_task(self._memory.save(self._remembered()))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _durable(self, patience_s: float) -> bool:
        """Tell whether entries and memory became durable within so long."""
        try:
            async with asyncio.timeout(patience_s):
                saved, _ = await asyncio.gather(self._memory.save(self._remembered()), self._ledger.flush())
        except TimeoutError:
            return False
        return saved

    async def _carry_out(self, planned: Planned, durable: asyncio.Task[bool] | None) -> str | None:
        """Write once, read back, and journal what came of it; return what went wrong.

        A refresh that is confirmed is only counted.
        """
        in_time = durable is None or await asyncio.shield(durable)
        device, _, tag = planned.setpoint.partition(".")
        outcome: dict[str, Any] = {"tag": planned.setpoint, "cause": planned.cause, "new": planned.value}
        error: str | None = None
        detail = ""
        final = False
        try:
            found = await self._write(device, tag, planned.value)
        except DeviceError as failure:
            error, detail = failure.reason, str(failure)
            final = isinstance(failure, Refused) and failure.final
        else:
            outcome["read"] = found
            resolution = self._plant.limits[planned.setpoint].resolution
            if not isinstance(found, bool | int | float | str) or not same(found, planned.value, resolution):
                error, detail = "read-back", f"it reads back as {found!r}"
        finally:
            self._busy.pop(planned.setpoint, None)
            self._due.set()
        now_s = clock.mono_s()
        outcome["ok"] = error is None
        if error is None:
            self.state = state.confirmed(self.state, planned.setpoint, now_s)
            self._outcomes.confirmed(planned, now_s)
            if planned.repeat:
                return None
        else:
            value, cause = planned.value, planned.cause
            self.state = state.failed(self.state, planned.setpoint, value, cause, error, now_s, final=final)
            self._outcomes.flush(planned.setpoint)
            times = self._outcomes.failed(planned, error, detail, now_s, final=final)
            outcome |= {"error": error, "failures": times} | ({"final": True} if final else {})
        if not in_time:
            outcome["late"] = True  # the act went first: the entry of the intent was not yet durable
        self._ledger.append(Event(clock.wall_ms(), "write", outcome))
        return error

    # -- commands ----------------------------------------------------------------------------------------

    async def obey(self, asked: WriteCommand) -> Reply:
        """Give the command its hold, run a cycle, and wait for what it writes."""
        while busy := [self._busy[setpoint] for setpoint in asked.writes if setpoint in self._busy]:
            await asyncio.wait(busy)
        if (objection := self.objection(asked)) is not None:
            return Reply(asked.id, False, objection)
        self.state = self._given(asked)
        self.cycle()
        self._due.set()
        for setpoint in asked.writes:
            busy_now, failure = self._busy.get(setpoint), self.state.failures.get(setpoint)
            error = failure.error if failure is not None else None
            if busy_now is not None:
                error = await asyncio.shield(busy_now)
                failure = self.state.failures.get(setpoint)
            if error is not None:
                final = failure is not None and failure.final
                what = "refused by the device" if final else "not confirmed"
                then = "it is not tried again until something changes" if final else "it is tried again"
                return Reply(asked.id, False, f"{setpoint}: {what}: {error}; {then}")
        return Reply(asked.id, True)

    def objection(self, asked: WriteCommand) -> str | None:
        """Say why the command cannot have its setpoints now, from a cycle that is only tried."""
        if self.leaving:
            return "the gateway is stopping or taking up a new configuration; nothing was written"
        owner, image, busy = f"command:{asked.id}", self._image.frozen(), frozenset(self._busy)
        given = self._given(asked)
        return engine.objection(
            self._plant, given, owner, asked.writes, image, self._link(), clock.mono_s(), busy=busy
        )

    def _given(self, asked: WriteCommand) -> State:
        """Return the state in which the command holds its setpoints."""
        kinds = {setpoint: self._plant.limits[setpoint].kind for setpoint in asked.writes}
        writes = {at: commands.as_number(value, kinds[at]) for at, value in asked.writes.items()}
        return state.command(self.state, asked.id, writes, asked.lease_s, clock.mono_s())

    def show(self, setpoint: str) -> dict[str, Any]:
        """Return what is known of a tag, for a hand at the gateway: its value and who has it."""
        device, _, tag = setpoint.partition(".")
        image, now_s = self._image.devices, clock.mono_s()
        latest = image.get(device)
        value: Value = present(self._plant, self.state.histories, image, setpoint, now_s)
        quality = None
        if latest is None:
            quality = "bad:not-read" if value is None else None
        elif not latest.answering(now_s, self._plant.overdue_after_s[device]):
            quality = "bad:stale"
        elif value is None or value == latest.values.get(tag):
            value, quality = latest.values.get(tag), latest.quality.get(tag)
        return {"value": value, "quality": quality, "owner": self.state.owners.get(setpoint)}

    # -- memory ------------------------------------------------------------------------------------------

    def _lasting(self) -> tuple[object, ...]:
        """Return what a restart must find again, as far as cycles change it."""
        state = self.state
        return state.rules, state.leases, state.farewells, state.owners

    def _remembered(self) -> bytes:
        self._saved = self._lasting()
        return msgspec.json.encode(Memory(clock.boot_id(), self.state, clock.mono_s()))

    def _restore(self, memory: bytes | None) -> None:
        """Take up what was remembered; rules and setpoints that are no more are let go."""
        boot, now_s = clock.boot_id(), clock.mono_s()
        known = decode(memory) or Memory(boot, State(), now_s)
        self.state = state.restored(
            known.state, self._plant, now_s, saved_s=known.saved_s, same_boot=known.boot == boot,
            reload=self._memory.in_process,
        )  # fmt: skip
