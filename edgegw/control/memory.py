"""What control remembers over a restart: a small file, replaced as a whole.

It is kept apart from the journal, so that a journal that is full or set aside takes neither rules nor leases
with it. The ids of commands have a file of their own.
"""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from edgegw.control.state import State

log = logging.getLogger(__name__)


class Memory(msgspec.Struct):
    """What survives a restart: control's state.

    Monotonic times, as `saved_s`, are good for one boot of the machine.
    """

    boot: str
    state: State
    saved_s: float


def decode(content: bytes | None) -> Memory | None:
    """Return what was remembered, None if that is nothing or cannot be read."""
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=Memory)
    except msgspec.MsgspecError as error:
        log.error("control: what was remembered cannot be read (%s); every rule begins anew", error)
        return None


class MemoryFile:
    """The file. Saving happens in a thread; of several savings that wait only the newest is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._newest = b""
        self._saved = b""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="control-memory")
        self._failing = False

    @property
    def in_process(self) -> bool:
        """Tell whether what will be loaded was saved by this process: a reload, no restart."""
        return bool(self._newest)

    def load(self) -> bytes | None:
        """Return what was saved last, None if there is nothing.

        Within one process that is what was last to be saved, even if no disk would take it.
        """
        if self._newest:
            return self._newest
        try:
            return self.path.read_bytes()
        except OSError:
            return None

    async def save(self, content: bytes) -> bool:
        """Tell, when it is over, whether the content (or a newer one) is durable."""
        self._newest = content
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._save)

    def close(self) -> None:
        """Wait for the last saving."""
        self._thread.shutdown(wait=True)

    def _save(self) -> bool:
        content = self._newest
        if content == self._saved:
            return True
        beside = self.path.with_name(self.path.name + ".new")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if not self._failing:
                log.error("control's memory %s: %s; it goes on without", self.path, error.strerror)
            self._failing = True
            return False
        if self._failing:
            log.warning("control's memory %s: back", self.path)
        self._failing = False
        self._saved = content
        return True
