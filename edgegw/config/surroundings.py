"""What a configuration needs of its machine: the journal's folder, and files with secrets that others cannot read."""

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edgegw.config.load import credential_path
from edgegw.config.schema import Config

_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
"""Why no file can be made in a folder that is there, other than for a fault of its disk."""


def journal_obstacle(journal: Path) -> str | None:
    """Say why a journal cannot be kept at this path by this user; None if the configuration is not what is in the way.

    A disk that is full or broken is no mistake of the configuration: the field is polled and controlled without it.
    Nor is one that was remounted read-only under a journal that was there.
    """
    folder, user = journal.parent, _user()
    try:
        kind = folder.stat().st_mode
    except FileNotFoundError:
        return f"the folder {folder} is not there; make it, and give it to the user that runs edgegw"
    except NotADirectoryError:
        return f"{folder} is below a file; expected a folder"
    except PermissionError:
        return f"the folder {folder} cannot be entered by user {user}"
    except OSError:
        return None
    if not stat.S_ISDIR(kind):
        return f"{folder} is a file; expected a folder"
    if not os.access(folder, os.X_OK):
        return f"the folder {folder} cannot be entered by user {user}"
    if journal.is_dir():
        return f"{journal} is a folder; expected a file's name in it, as in journal.db"
    if os.statvfs(folder).f_flag & os.ST_RDONLY and journal.exists():
        return None
    if journal.exists() and not os.access(journal, os.R_OK | os.W_OK):
        return f"{journal} cannot be written by user {user}; it is {_owner(journal)}'s"
    return None if _takes_files(folder) else f"the folder {folder} cannot be written by user {user}"


def _takes_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # a file system without such files
            return os.access(folder, os.W_OK | os.X_OK)
        return error.errno not in _NO_RIGHT
    return True


def secret_advice(config: Config, config_path: Path) -> Iterator[str]:
    """Yield a line for each file with a secret that every user of the machine may read or change."""
    for key in ("password_file", "key_file"):
        name = getattr(config.uplink, key)
        if not name:
            continue
        file = credential_path(name, config_path)
        with suppress(OSError):
            mode = file.stat().st_mode
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                yield (
                    f"uplink.{key}: every user of this machine may read {file} (mode {stat.S_IMODE(mode):03o}); "
                    f"expected 640 or less: chmod o= {file}"
                )


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _owner(file: Path) -> str:
    try:
        return file.owner()
    except (KeyError, OSError):
        return "another user"
