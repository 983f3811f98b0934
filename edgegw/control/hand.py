"""Writes by hand at the gateway: a local socket of the daemon, and the way without one."""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgegw import clock
from edgegw.control import state
from edgegw.control.command_handler import COMMAND_PATIENCE_S
from edgegw.control.commands import COMMAND_BYTES
from edgegw.control.controller import Ledger
from edgegw.control.guard import History, Refuse, Wait, Write, guard, same
from edgegw.control.memory import Memory, MemoryFile, decode
from edgegw.control.plant import Plant
from edgegw.control.state import State
from edgegw.domain.command import HAND, Peer, Reply
from edgegw.domain.image import Image
from edgegw.domain.record import Event
from edgegw.domain.tag import Scalar, Value
from edgegw.drivers.base import Driver, LearnsTypes
from edgegw.errors import DeviceError

log = logging.getLogger(__name__)

CONNECTIONS = 8
"""Connections at once; further ones are told so."""
IDLE_S = 60.0
AGAIN_S = 30.0
MODE = 0o660


Request = Callable[[Any], Awaitable[dict[str, Any]]]
"""Does what is asked for, and answers; what it is given is whatever stood in the line."""


@contextmanager
def address(path: Path) -> Iterator[str]:
    """Give a name of the socket that is short enough for any folder (unix(7): 107 bytes)."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class HandService:
    """The daemon's socket: a line of JSON in and one out; in comes a command, `{"show": TAG}` or `{REQUEST: ...}`."""

    def __init__(
        self, path: Path, obey: Callable[[bytes, Peer], Awaitable[Reply]], show: Callable[[str], dict[str, Any]],
        requests: Mapping[str, Request],
    ) -> None:  # fmt: skip
        self.path = path
        self._obey = obey
        self._show = show
        self._requests = requests
        self._open = 0

    async def run(self) -> None:
        """Serve until cancelled; where there can be no socket, try again now and then."""
        said = False
        while True:
            try:
                listener = self._listener()
            except OSError as error:
                if not said:
                    log.warning(
                        "socket %s: %s; nothing can be asked of it by hand", self.path, error.strerror
                    )
                said = True
                await asyncio.sleep(AGAIN_S)
                continue
            try:
                server = await asyncio.start_unix_server(self._serve, sock=listener, limit=COMMAND_BYTES)
                async with server:
                    await server.serve_forever()
            finally:
                with contextlib.suppress(OSError):
                    self.path.unlink()

    def _listener(self) -> socket.socket:
        """Bind the socket, with its mode before anybody can connect; the journal's lock says that we may."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with address(self.path) as name:
                listener.bind(name)
            self.path.chmod(MODE)
        except OSError:
            listener.close()
            raise
        return listener

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        peer = _peer(writer)
        try:
            async with asyncio.timeout(IDLE_S) as idle:
                while line := await self._line(reader):
                    idle.reschedule(None)
                    writer.write(msgspec.json.encode(await self._answer(line, peer)) + b"\n")
                    idle.reschedule(asyncio.get_running_loop().time() + IDLE_S)
                    await writer.drain()
                    if len(line) > COMMAND_BYTES:
                        break  # where the next line begins is not known
        except (TimeoutError, OSError):
            pass  # whoever asked has gone, or says nothing
        finally:
            self._open -= 1
            writer.close()

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readline()
        except ValueError:  # longer than the limit
            return b" " * (COMMAND_BYTES + 1)

    async def _answer(self, line: bytes, peer: Peer) -> dict[str, Any]:
        if self._open > CONNECTIONS:
            return Reply(None, False, f"busy with {CONNECTIONS} connections; try again").wire()
        try:
            asked = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            asked = None
        if isinstance(asked, dict) and asked.keys() == {"show"} and isinstance(asked["show"], str):
            return self._show(asked["show"])
        if isinstance(asked, dict) and len(asked) == 1 and (do := self._requests.get(next(iter(asked)))):
            return await do(*asked.values())
        return (await self._obey(line, peer)).wire()


def _peer(writer: asyncio.StreamWriter) -> Peer:
    """Return who is at the other end, as the kernel says (unix(7), SO_PEERCRED)."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as own:
        pid, uid, _ = struct.unpack("3i", own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid, pid)


class Alone(NamedTuple):
    """What a write without the daemon came to: the answer, what the tag held and holds, and whether it is all of it."""

    reply: Reply
    old: Value
    new: Value
    final: bool


async def write_alone(
    plant: Plant, setpoint: str, wanted: Scalar, name: str,
    *, driver: Driver, ledger: Ledger, memory: MemoryFile,
) -> Alone:  # fmt: skip
    """Write one tag, one step, while no daemon runs: through the guard and the ledger, with what control remembers.

    The caller holds the journal's lock. Raises DeviceError if the device cannot be read beforehand.
    """
    device, _, tag = setpoint.partition(".")
    who = {"uid": os.getuid(), "pid": os.getpid()}
    known, history = _remembered(plant, setpoint, memory)
    image = Image()
    for scan in await driver.scan():
        image.take(scan, clock.mono_s())
    types = driver.held_types if isinstance(driver, LearnsTypes) else {}
    limits = plant.learnt(device, types).limits[setpoint]
    old = image.devices[device].values.get(tag)
    present = old if isinstance(old, bool | int | float | str) else None
    now_s = clock.mono_s()
    verdict = guard(limits, history, present, wanted, now_s)
    if not isinstance(verdict, Write):
        reason = _said(verdict, now_s)
        fields = {"tag": setpoint, "value": wanted, "cause": f"command:{name}", "reason": reason}
        ledger.append(Event(clock.wall_ms(), "write-refused", fields | who))
        return Alone(Reply(name, False, f"{setpoint}: {reason}"), old, old, final=False)
    intent = {"tag": setpoint, "cause": f"command:{name}", "old": present, "new": verdict.value}
    asked = {"id": name, "write": {setpoint: wanted}, "ok": True}
    ledger.append(Event(clock.wall_ms(), "command", asked | who))
    ledger.append(Event(clock.wall_ms(), "write", intent))
    made = history.wrote(verdict.value, now_s, limits.max_per_hour)
    known.state = known.state._replace(histories={**known.state.histories, setpoint: made})
    try:
        async with asyncio.timeout(COMMAND_PATIENCE_S):
            saved, _ = await asyncio.gather(memory.save(msgspec.json.encode(known)), ledger.flush())
    except TimeoutError:
        saved = False
    if not saved:
        return Alone(
            Reply(name, False, "the journal cannot take it; nothing was written"), old, old, final=False
        )
    found: Value = None
    error: str | None = None
    try:
        found = await driver.write(tag, verdict.value)
    except DeviceError as failure:
        error = str(failure)
    else:
        if not isinstance(found, bool | int | float | str) or not same(
            found, verdict.value, limits.resolution
        ):
            error = f"{setpoint}: wrote {verdict.value!r}, and it reads back as {found!r}"
    outcome = {"tag": setpoint, "cause": f"command:{name}", "new": verdict.value, "ok": error is None}
    ledger.append(Event(clock.wall_ms(), "write", outcome | ({"error": error} if error else {"read": found})))
    return Alone(Reply(name, error is None, error), old, found, verdict.final)


def _remembered(plant: Plant, setpoint: str, memory: MemoryFile) -> tuple[Memory, History]:
    """Return what control remembers, and the setpoint's history in times of this boot."""
    boot, now_s = clock.boot_id(), clock.mono_s()
    begin = state.restored(State(), plant, now_s, saved_s=now_s, same_boot=True)
    known = decode(memory.load()) or Memory(boot, begin, now_s)
    since = state.restored(known.state, plant, now_s, saved_s=known.saved_s, same_boot=known.boot == boot)
    return known, since.histories.get(setpoint, History())


def _said(verdict: Refuse | Wait, now_s: float) -> str:
    if isinstance(verdict, Refuse):
        return verdict.reason
    return f"{verdict.reason or 'min_interval'}: not for another {verdict.until_s - now_s:.1f} s"


def new_id(unique: str) -> str:
    """Return the id of a command by hand."""
    return f"{HAND}{unique}"
