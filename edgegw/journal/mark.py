"""The mark beside the journal: how far it is known to have come, so that an older copy gives itself away.

One short line of JSON with its CRC-32, within one sector, rewritten in place after every commit and forced to
the disk with a stream's first commit and with every checkpoint. It never runs ahead of what is durable in the journal.
"""

import os
import zlib
from pathlib import Path

import msgspec

from edgegw.errors import JournalError

_WIDTH = 200


class Mark(msgspec.Struct, frozen=True):
    """The stream, its last durable seq, the hex hash of that batch, and whether it was closed in order."""

    stream: str
    head: int
    digest: str
    clean: bool


class MarkFile:
    """The file that holds the mark."""

    def __init__(self, journal: Path) -> None:
        self.path = journal.with_name(journal.name + ".mark")
        self._written = b""

    def read(self) -> Mark | None:
        """Return the mark, None if there is none or it is not as it was written."""
        try:
            line = self.path.read_bytes()
            if line[_WIDTH:] != _sum(line[:_WIDTH]):
                return None
            return msgspec.json.decode(line[:_WIDTH], type=Mark)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, mark: Mark, *, sync: bool) -> None:
        """Write the mark in place; raise JournalError."""
        line = msgspec.json.encode(mark).ljust(_WIDTH)
        line += _sum(line)
        if line == self._written and not sync:
            return
        try:
            new = not self.path.exists()
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o640)
            try:
                os.pwrite(fd, line, 0)
                if sync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            if new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise JournalError(
                f"journal's mark {self.path}: {(error.strerror or str(error)).lower()}"
            ) from error
        self._written = line


def _sync_folder(folder: Path) -> None:
    """Make a new file's name last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sum(line: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(line)
