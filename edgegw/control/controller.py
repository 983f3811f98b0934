"""The controller: runs the engine's cycle on the plant, and carries out what it decides.

A cycle runs when a scan touches a tag that a rule reads, and when a time falls due. What it decides is journaled
before it is done. A disk that does not take the entry in time does not stop the act: then the entry says so.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from edgegw import clock
from edgegw.control import commands, engine
from edgegw.control.engine import Cycle, Planned, Plant, State
from edgegw.control.memory import MemoryFile
from edgegw.control.rule import LinkState
from edgegw.domain.command import Reply, WriteCommand
from edgegw.domain.image import Image
from edgegw.domain.record import Event, Record
from edgegw.domain.tag import Scalar, Value
from edgegw.errors import DeviceError

log = logging.getLogger(__name__)

PATIENCE_S = 0.005
"""How long an act waits for its entry to be durable."""
COMMAND_PATIENCE_S = 5.0
"""How long a command waits for its id to be durable; without that it is not acted on."""


ANSWERS = 256
"""Answers kept for commands that a broker may deliver twice."""


class Ledger(Protocol):
    """What control needs of the journal."""

    def append(self, record: Record) -> None:
        """Take an entry."""
        ...

    async def flush(self) -> None:
        """Return when all of that is durable."""
        ...


class _Memory(msgspec.Struct):
    """What survives a restart. Monotonic times are good for one boot of the machine."""

    boot: str
    state: State
    done: dict[str, int]


class Controller:
    """Control as a service, with one inbox: `touch`, `command`."""

    def __init__(
        self, plant: Plant, image: Image, ledger: Ledger, link: Callable[[], LinkState],
        write: Callable[[str, str, Scalar], Awaitable[Value]], memory: MemoryFile,
    ) -> None:  # fmt: skip
        self.state = State()
        self.cycles = 0
        self._plant = plant
        self._image = image
        self._ledger = ledger
        self._link = link
        self._write = write
        self._memo = engine.Memo()
        self._due = asyncio.Event()
        self._busy: dict[str, asyncio.Task[str | None]] = {}
        self._settling: set[asyncio.Task[bool]] = set()
        self._done: dict[str, int] = {}
        self._answers: dict[bytes, asyncio.Future[Reply]] = {}
        self._memory = memory
        self._devices = {name.partition(".")[0] for rule in plant.rules for name in rule.inputs}
        self._devices |= {name.partition(".")[0] for name, limits in plant.limits.items() if limits.writable}
        self._restore(memory.load())

    def touch(self, device: str) -> None:
        """Say that a device has new readings, or none any more."""
        if device in self._devices:
            self._due.set()

    def wake(self) -> None:
        """Run a cycle soon: something that rules ask for has changed."""
        self._due.set()

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
            try:
                async with asyncio.timeout(None if due_s is None else max(0.0, due_s - clock.mono_s())):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def settle(self) -> None:
        """Wait for the writes that are on their way, and save what must survive."""
        if self._busy:
            await asyncio.wait(list(self._busy.values()))
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
        return cycle.due_s

    def _take(self, cycle: Cycle) -> None:
        self.state = cycle.state
        if not cycle.events and not cycle.writes:
            return
        now_ms = clock.wall_ms()
        for name, fields in cycle.events:
            self._ledger.append(Event(now_ms, name, fields))
        for planned in cycle.writes:
            fields = {
                "tag": planned.setpoint,
                "cause": planned.cause,
                "old": planned.old,
                "new": planned.value,
            }
            self._ledger.append(Event(now_ms, "write", fields))
        durable = asyncio.create_task(self._durable(PATIENCE_S))
        self._settling.add(durable)
        durable.add_done_callback(self._settling.discard)
        for planned in cycle.writes:
            task = asyncio.create_task(self._carry_out(planned, durable), name=f"write {planned.setpoint}")
            self._busy[planned.setpoint] = task

    async def _durable(self, patience_s: float) -> bool:
        """Tell whether entries and memory became durable within so long."""
        try:
            async with asyncio.timeout(patience_s):
                saved, _ = await asyncio.gather(self._memory.save(self._remembered()), self._ledger.flush())
        except TimeoutError:
            return False
        return saved

    async def _carry_out(self, planned: Planned, durable: asyncio.Task[bool]) -> str | None:
        """Write once, read back, and journal what came of it; return what went wrong."""
        in_time = await asyncio.shield(durable)
        device, _, tag = planned.setpoint.partition(".")
        outcome: dict[str, Any] = {"tag": planned.setpoint, "cause": planned.cause, "new": planned.value}
        error: str | None = None
        try:
            found = await self._write(device, tag, planned.value)
        except DeviceError as failure:
            error = failure.reason
            log.warning("%s; written by %s", failure, planned.cause)
        else:
            outcome["read"] = found
            if not isinstance(found, bool | int | float | str) or not engine.same(found, planned.value):
                error = "read-back"
        finally:
            self._busy.pop(planned.setpoint, None)
            self._due.set()
        outcome |= {"ok": error is None} | ({"error": error} if error else {})
        if not in_time:
            outcome["late"] = True  # the act went first: the entry of the intent was not yet durable
        if error:
            self.state = engine.failed(self.state, planned.setpoint, clock.mono_s())
        self._ledger.append(Event(clock.wall_ms(), "write", outcome))
        return error

    # -- commands ----------------------------------------------------------------------------------------

    async def command(self, payload: bytes, *, retained: bool = False) -> Reply:
        """Act on a command once, and answer it; the same message once more gets the same answer."""
        again = self._answers.get(payload)
        if again is not None and not retained:
            return await asyncio.shield(again)
        answer = asyncio.ensure_future(self._command(payload, retained))
        self._answers[payload] = answer
        while len(self._answers) > ANSWERS:
            del self._answers[next(iter(self._answers))]
        return await asyncio.shield(answer)

    async def _command(self, payload: bytes, retained: bool) -> Reply:
        now_ms = clock.wall_ms()
        asked = commands.read(
            payload, retained=retained, limits=self._plant.limits, done=self._done, now_ms=now_ms
        )
        if isinstance(asked, Reply):
            return self._answered(asked)
        self._done = {**commands.remembered(self._done, now_ms), asked.id: asked.expires_ms}
        fields = {
            "id": asked.id,
            "write": asked.writes,
            "expires": asked.expires_ms,
            "lease_s": asked.lease_s,
        }
        self._ledger.append(Event(now_ms, "command", {**fields, "ok": True}))
        if not await self._durable(COMMAND_PATIENCE_S):
            return self._answered(Reply(asked.id, False, "the journal cannot take it; nothing was written"))
        if asked.expires_ms <= clock.wall_ms():
            return self._answered(Reply(asked.id, False, "expired before it could be journaled"))
        return self._answered(await self._obey(asked))

    def _answered(self, reply: Reply) -> Reply:
        if not reply.ok:
            self._ledger.append(Event(clock.wall_ms(), "command", reply.wire()))
        return reply

    async def _obey(self, asked: WriteCommand) -> Reply:
        """Give the command its hold, run a cycle, and wait for what it writes."""
        kinds = {setpoint: self._plant.limits[setpoint].kind for setpoint in asked.writes}
        writes = {at: commands.as_number(value, kinds[at]) for at, value in asked.writes.items()}
        self.state = engine.command(self.state, asked.id, writes, asked.lease_s, clock.mono_s())
        for setpoint in writes:
            if (busy := self._busy.get(setpoint)) is not None:
                await asyncio.wait([busy])
        self.cycle()
        self._due.set()
        for setpoint in writes:
            owner = self.state.owners.get(setpoint)
            if owner != f"command:{asked.id}":
                return Reply(asked.id, False, f"{setpoint}: {owner} has authority")
            if (refusal := self.state.refusals.get(setpoint)) is not None:
                return Reply(asked.id, False, f"{setpoint}: {refusal.partition(': ')[2]}")
            if (busy := self._busy.get(setpoint)) is not None and (error := await asyncio.shield(busy)):
                return Reply(asked.id, False, f"{setpoint}: not confirmed: {error}")
        return Reply(asked.id, True)

    # -- memory ------------------------------------------------------------------------------------------

    def _remembered(self) -> bytes:
        return msgspec.json.encode(_Memory(clock.boot_id(), self.state, self._done))

    def _restore(self, memory: bytes | None) -> None:
        """Take up what was remembered; rules and setpoints that are no more are let go."""
        if memory is None:
            return
        try:
            known = msgspec.json.decode(memory, type=_Memory)
        except msgspec.MsgspecError as error:
            log.error("control: what was remembered cannot be read (%s); every rule begins anew", error)
            return
        self._done = known.done
        self.state = engine.restored(
            known.state, self._plant, clock.mono_s(), same_boot=known.boot == clock.boot_id()
        )
