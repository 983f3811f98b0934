"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgegw.errors import EdgegwError

MODE = 0o640


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give an empty file of another name beside `path`; what it is filled with stands under `path` once it is durable.

    Whatever goes wrong within, or is interrupted, leaves `path` as it was. Raises EdgegwError where the disk fails.
    """
    beside: Path | None = None
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        beside = Path(name)
        os.close(fd)
        yield beside
        _sync(beside)
        beside.chmod(MODE)
        beside.replace(path)
        with suppress(OSError):  # not every file system of a stick can sync a folder
            _sync(path.parent)
    except BaseException as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = (error.strerror or str(error)).lower()
            raise EdgegwError(f"{path}: {reason}; it is as it was before") from error
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
