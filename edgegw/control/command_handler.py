"""Commands, from their bytes to their answer: judged, noted, and handed to the controller or the uplink."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any, Protocol

from edgegw import clock
from edgegw.control import commands
from edgegw.control.commands import Known
from edgegw.control.controller import Controller, Ledger
from edgegw.control.ids import CommandIds
from edgegw.domain.command import Peer, Replay, ReplayCommand, Reply, WriteCommand
from edgegw.domain.record import Event

COMMAND_PATIENCE_S = 5.0
"""How long a command waits for its id to be durable; without that it is not acted on."""
ANSWERS = 256
"""Answers kept for commands that a broker may deliver twice."""
LEAVING = "the gateway is stopping or taking up a new configuration; nothing is sent"


class Replayer(Protocol):
    """What commands need of the uplink."""

    async def plan(self, asked: ReplayCommand) -> Replay | str:
        """Return what a replay would send, or why there can be none."""
        ...

    def start(self, replay: Replay) -> bool:
        """Have a replay sent; False if too many are under way."""
        ...


class CommandHandler:
    """Takes commands for as long as the gateway runs; `control` gives the controller that is at work now."""

    def __init__(
        self, control: Callable[[], Controller], ids: CommandIds, ledger: Ledger, replayer: Replayer
    ) -> None:
        self._control = control
        self._ids = ids
        self._ledger = ledger
        self._replayer = replayer
        self._answers: dict[bytes, asyncio.Future[Reply]] = {}
        self.opened = asyncio.Event()
        """Set once the journal is open, and `seen` knows of its newest record: no command acts before."""
        self._newest = (clock.wall_ms(), clock.mono_s())

    def seen(self, ts: int) -> None:
        """Note a time that has been, such as a record's: a clock that stands long before it is wrong."""
        if ts > self._latest_ms():
            self._newest = (ts, clock.mono_s())

    async def command(self, payload: bytes, *, retained: bool = False, by: Peer | None = None) -> Reply:
        """Act on a command once, and answer it; the same message once more gets the same answer.

        `by` is who gave it by hand at the gateway; None if it came from upstream.
        """
        message = hashlib.sha256(payload).digest()
        again = self._answers.get(message)
        if again is not None and not retained:
            return await asyncio.shield(again)
        answer = asyncio.ensure_future(self._command(payload, retained, by))
        if not retained:
            self._answers[message] = answer
        while len(self._answers) > ANSWERS:
            del self._answers[next(iter(self._answers))]
        return await asyncio.shield(answer)

    async def _command(self, payload: bytes, retained: bool, by: Peer | None) -> Reply:
        try:
            async with asyncio.timeout(COMMAND_PATIENCE_S):
                await self.opened.wait()
        except TimeoutError:
            return self._refused(Reply(None, False, "the journal is not open; nothing was done"), by)
        now_ms, now_s, control = clock.wall_ms(), clock.mono_s(), self._control()
        known = Known(
            self._ids,
            self._ids.can_act(now_s),
            commands.wrong_clock(now_ms, self._latest_ms(), clock.synchronised()),
        )
        asked = commands.read(
            payload,
            retained=retained,
            by_hand=by is not None,
            limits=control.limits,
            known=known,
            now_ms=now_ms,
        )
        if isinstance(asked, Reply):
            return self._refused(asked, by)
        if isinstance(asked, ReplayCommand):
            return self._refused(await self._replay(asked), by)
        reply = await self._write(asked, control, by, now_ms)
        return self._refused(reply._replace(asked=commands.bounded(asked.writes)), by)

    async def _write(self, asked: WriteCommand, control: Controller, by: Peer | None, now_ms: int) -> Reply:
        if (objection := control.objection(asked)) is not None:
            return Reply(asked.id, False, objection)
        fields = {
            "id": asked.id,
            "write": asked.writes,
            "expires": asked.expires_ms,
            "lease_s": asked.lease_s,
        }
        self._ledger.append(Event(now_ms, "command", {**fields, **_who(by), "ok": True}))
        if not await self._durable(asked.id, (asked.expires_ms - now_ms) / 1000):
            return Reply(asked.id, False, "the journal cannot take it; nothing was written")
        if asked.expires_ms <= clock.wall_ms():
            return Reply(asked.id, False, "expired before it could be journaled")
        self.seen(now_ms)
        return await self._control().obey(asked)

    async def _replay(self, asked: ReplayCommand) -> Reply:
        """Have records sent again; the id counts as expired at once, and is remembered for so long from now."""
        replay = LEAVING if self._control().leaving else await self._replayer.plan(asked)
        if isinstance(replay, str):
            return Reply(asked.id, False, replay)
        if self._control().leaving:
            return Reply(asked.id, False, LEAVING)
        if asked.id in self._ids:
            return Reply(asked.id, False, "this id was already acted on")
        what = {"stream": asked.stream, "from": replay.first, "to": replay.last}
        self._ledger.append(Event(clock.wall_ms(), "command", {"id": asked.id, "replay": what, "ok": True}))
        if not await self._durable(asked.id, 0.0):
            return Reply(asked.id, False, "the journal cannot take it; nothing is sent")
        if not self._replayer.start(replay):
            return Reply(asked.id, False, "busy with other replays; try again later with another id")
        return Reply(asked.id, True, replay=replay)

    async def _durable(self, name: str, expires_in_s: float) -> bool:
        """Tell whether the id, which acts from now on, and the ledger became durable in time."""
        noted = self._ids.note(name, clock.mono_s(), expires_in_s)
        try:
            async with asyncio.timeout(COMMAND_PATIENCE_S):
                durable, _ = await asyncio.gather(noted, self._ledger.flush())
        except TimeoutError:
            return False
        return durable

    def _refused(self, reply: Reply, by: Peer | None) -> Reply:
        """Have the ledger know of a command that was not done: what was asked, by whom, and why not."""
        if not reply.ok:
            asked = {} if reply.asked is None else {"write": reply.asked}
            self._ledger.append(Event(clock.wall_ms(), "command", reply.wire() | asked | _who(by)))
        return reply

    def _latest_ms(self) -> int:
        """Return what the wall clock should say at least, by the monotonic one."""
        wall_ms, mono_s = self._newest
        return wall_ms + round((clock.mono_s() - mono_s) * 1000)


def _who(by: Peer | None) -> dict[str, Any]:
    return {} if by is None else {"uid": by.uid, "pid": by.pid}
