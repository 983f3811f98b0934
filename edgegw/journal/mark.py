"""The mark beside the journal: how far it is known to have come, so that an older copy gives itself away.

One short line of JSON, rewritten in place after every commit and forced to the disk with every checkpoint.
It never runs ahead of what is durable in the journal.
"""

import os
from pathlib import Path

import msgspec

from edgegw.errors import JournalError

_WIDTH = 120


class Mark(msgspec.Struct, frozen=True):
    """The stream, the last seq known durable, and whether the journal was closed in order."""

    stream: str
    head: int
    clean: bool


class MarkFile:
    """The file that holds the mark."""

    def __init__(self, journal: Path) -> None:
        self.path = journal.with_name(journal.name + ".mark")
        self._written = b""

    def read(self) -> Mark | None:
        """Return the mark, None if there is none or it cannot be read as one."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Mark)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, mark: Mark, *, sync: bool) -> None:
        """Write the mark in place; raise JournalError."""
        line = msgspec.json.encode(mark).ljust(_WIDTH) + b"\n"
        if line == self._written and not sync:
            return
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o640)
            try:
                os.pwrite(fd, line, 0)
                if sync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise JournalError(
                f"journal's mark {self.path}: {(error.strerror or str(error)).lower()}"
            ) from error
        self._written = line

    def remove(self) -> None:
        """Take the mark away; raise JournalError."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(
                f"journal's mark {self.path}: {(error.strerror or str(error)).lower()}"
            ) from error
        self._written = b""
