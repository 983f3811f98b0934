"""A lock that one process holds for as long as it lives."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgegw.errors import EdgegwError


class HeldError(EdgegwError):
    """Another process holds the lock."""


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path` (flock(2)); raise HeldError if another process does.

    Where no such file can be made, nothing is held: a folder that cannot be written is not a second process.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError:
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise HeldError(f"{what}: in use by another process; stop that one first") from None
    try:
        yield
    finally:
        os.close(fd)
