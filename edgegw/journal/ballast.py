"""The ballast: a file that holds room on the disk, to be given back when others have filled it.

On a full disk SQLite can neither delete nor checkpoint; with this much given back it can.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from edgegw import clock
from edgegw.errors import JournalFull
from edgegw.journal.store import Store

log = logging.getLogger(__name__)

SPARE = 3
"""How many times the ballast must be free before it is taken: whoever filled the disk may not be done."""
LOOK_EVERY_S = 10.0


class Ballast:
    """The file beside the journal; used by one thread."""

    def __init__(self, journal: Path, size_bytes: int) -> None:
        self.path = journal.with_name(journal.name + ".ballast")
        self.size_bytes = size_bytes

    @property
    def spare(self) -> bool:
        """Whether there is plenty of room on the disk besides, as far as anybody can say."""
        free_bytes = self.free_bytes()
        return free_bytes is None or free_bytes >= SPARE * self.size_bytes

    def free_bytes(self) -> int | None:
        """Return what is free on the disk, None where it does not tell."""
        try:
            disk = os.statvfs(self.path.parent)
        except OSError:
            return None
        return disk.f_bavail * disk.f_frsize

    def hold(self) -> bool:
        """Take room for it if there is plenty; tell whether it is held."""
        try:
            if self.path.exists() and self.path.stat().st_size == self.size_bytes:
                return True
            if not self.spare:
                return False
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
            try:
                os.posix_fallocate(fd, 0, self.size_bytes)
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


class Headroom:
    """Keeps a journal from growing on a disk that others have filled: then old batches go for new ones.

    `confined` while that is so; `cramped` from when a commit found no room until some was made.
    """

    def __init__(self, journal: Path, size_bytes: int) -> None:
        self.confined = self.cramped = False
        self._ballast = Ballast(journal, size_bytes)
        self._looked_s = -LOOK_EVERY_S

    def squeezed(self, *, full: bool) -> None:
        """Give the ballast back after a failure on a full disk.

        Not only where SQLite says so: where it cannot make its files it speaks of an I/O error.
        """
        self.cramped = self.cramped or full
        if self._ballast.spare:
            return  # it is our own limit, or something else
        if not self.confined:
            log.error(
                "journal: the disk is full; the ballast is given back; once that is used up old batches go for new ones"
            )
        self._ballast.give()
        self.confined = True
        self._looked_s = clock.mono_s()

    def extend(self, store: Store) -> bool:
        """Let a confined journal have some of what the disk still has, as what the ballast gave back; tell whether it
        grew. The way there leads through the WAL, which takes as much."""
        free_bytes, eighth = self._ballast.free_bytes(), self._ballast.size_bytes // 8
        if not self.confined or free_bytes is None or free_bytes < 7 * eighth:
            return False
        try:
            store.reserve(3 * eighth)
        except JournalFull:
            return False
        store.confine()
        self.cramped = False
        return True

    def look(self, store: Store) -> None:
        """See now and then whether there is room to grow: as much as the ballast takes, and some."""
        if clock.mono_s() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = clock.mono_s()
        if not self._ballast.hold():
            if not self.confined:
                log.error(
                    "journal: the disk is nearly full; what is left is used up, then old batches go for new ones"
                )
            store.confine()
            self.confined = True
        elif self.confined:
            log.warning("journal: there is room on the disk again")
            store.relax()
            self.confined = False
