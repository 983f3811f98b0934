"""The ballast: a file that holds room on the disk, to be given back when others have filled it.

On a full disk SQLite can neither delete nor checkpoint; with this much given back it can.
"""

import os
from contextlib import suppress
from pathlib import Path

SPARE = 3
"""How many times the ballast must be free before it is taken: whoever filled the disk may not be done."""


class Ballast:
    """The file beside the journal; used by one thread."""

    def __init__(self, journal: Path, size_bytes: int) -> None:
        self.path = journal.with_name(journal.name + ".ballast")
        self._size = size_bytes

    @property
    def spare(self) -> bool:
        """Whether there is plenty of room on the disk besides, as far as anybody can say."""
        try:
            disk = os.statvfs(self.path.parent)
        except OSError:
            return True
        return disk.f_bavail * disk.f_frsize >= SPARE * self._size

    def hold(self) -> bool:
        """Take room for it if there is plenty; tell whether it is held."""
        try:
            if self.path.exists() and self.path.stat().st_size == self._size:
                return True
            if not self.spare:
                return False
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
            try:
                os.posix_fallocate(fd, 0, self._size)
            finally:
                os.close(fd)
        except OSError:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            return False
        return True

    def give(self) -> None:
        """Give its room back; a disk that takes not even that keeps it."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
