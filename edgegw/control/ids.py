"""The ids of commands that were acted on: each acts once, also across restarts, power cuts and reboots.

A file of its own beside the journal, appended to before a command acts: a line of JSON for each id, behind a first line
that names the boot whose monotonic clock the times are of. Ids age by running time, so that no step of the wall clock
brings one back; the time that the machine was off is not counted. Now and then the file is written anew, without the
ids that are no longer needed. A last line that was torn by a power cut was never confirmed, and is left out.
"""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgegw import clock
from edgegw.domain.command import HAND
from edgegw.errors import EdgegwError
from edgegw.runtime.whole import whole

log = logging.getLogger(__name__)

KEEP_S = 86_400.0
"""How long an id is remembered after its command expired, in case the clock goes back."""
IDS = 4096
"""Ids remembered, of commands from upstream and by hand each: all that can still act, of others the newest."""
SPARE = 1024
"""Lines that the file may hold beside those that are needed, before it is written anew."""


class Noted(NamedTuple):
    """An id, when it was noted, and when its command expires: monotonic seconds."""

    id: str
    at_s: float
    expires_s: float


class CommandIds:
    """The ids, in memory and in their file. Appending happens in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ids: dict[str, Noted] = {}
        self._lines = 0
        self._anew = True
        self._failing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="command-ids")
        self._load()

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def can_act(self, now_s: float) -> int:
        """Return how many commands from upstream have not expired yet."""
        return sum(noted.expires_s > now_s and not noted.id.startswith(HAND) for noted in self._ids.values())

    async def note(self, name: str, now_s: float, expires_in_s: float) -> bool:
        """Note an id, whose command expires in so long; tell, when it is over, whether it is durable."""
        self._forget(now_s)
        noted = self._ids[name] = Noted(name, now_s, now_s + expires_in_s)
        needed = list(self._ids.values())
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._append, noted, needed)

    def _forget(self, now_s: float) -> None:
        """Drop ids that expired long ago, and of more than there is room for those that expired first."""
        old = [name for name, noted in self._ids.items() if noted.expires_s + KEEP_S <= now_s]
        for by_hand in (True, False) if len(self._ids) - len(old) >= IDS else ():
            mine = [n for n in self._ids.values() if n.id.startswith(HAND) == by_hand]
            old += [noted.id for noted in sorted(mine, key=lambda noted: noted.expires_s)[: 1 - IDS]]
        for name in old:
            self._ids.pop(name, None)

    def _append(self, noted: Noted, needed: list[Noted]) -> bool:
        try:
            if self._anew or self._lines > len(needed) + SPARE:
                self._write(needed)
            else:
                self._add(noted)
        except (OSError, EdgegwError) as error:
            if not self._failing:
                log.error("ids of commands: %s; no command acts until they can be written", error)
            self._failing = self._anew = True
            return False
        if self._failing:
            log.warning("ids of commands %s: back", self.path)
        self._failing = self._anew = False
        return True

    def _add(self, noted: Noted) -> None:
        with open(os.open(self.path, os.O_WRONLY | os.O_APPEND), "wb") as file:
            file.write(msgspec.json.encode(noted) + b"\n")
            file.flush()
            os.fdatasync(file.fileno())
        self._lines += 1

    def _write(self, needed: list[Noted]) -> None:
        lines = [msgspec.json.encode({"boot": clock.boot_id()}), *map(msgspec.json.encode, needed)]
        with whole(self.path) as beside:
            beside.write_bytes(b"".join(line + b"\n" for line in lines))
        self._lines = len(needed)

    def _load(self) -> None:
        try:
            first, *lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return
        noted, wrong = [], 0
        for line in lines[:-1]:
            try:
                noted.append(msgspec.json.decode(line, type=Noted))
            except msgspec.MsgspecError:
                wrong += 1
        if wrong:
            log.error("ids of commands %s: %d of %d lines cannot be read", self.path, wrong, len(lines))
        same_boot = first == msgspec.json.encode({"boot": clock.boot_id()})
        shift_s = 0.0 if same_boot else clock.mono_s() - max((one.at_s for one in noted), default=0.0)
        for one in noted:
            self._ids[one.id] = Noted(one.id, one.at_s + shift_s, one.expires_s + shift_s)
        self._lines = len(noted)
        self._anew = bool(wrong or lines[-1:] != [b""] or not same_boot)
