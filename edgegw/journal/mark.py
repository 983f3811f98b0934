"""The mark beside the journal: how far it is known to have come, so that an older copy gives itself away.

One short line of JSON, rewritten in place after every commit and forced to the disk with every checkpoint.
It never runs ahead of what is durable in the journal.
"""

import os
from pathlib import Path

import msgspec

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

    def read(self) -> Mark | None:
        """Return the mark, None if there is none or it cannot be read as one."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Mark)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, mark: Mark, *, sync: bool) -> None:
        """Write the mark in place; raise OSError."""
        line = msgspec.json.encode(mark).ljust(_WIDTH) + b"\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o640)
        try:
            os.pwrite(fd, line, 0)
            if sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)
