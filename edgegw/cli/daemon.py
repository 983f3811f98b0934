"""The running gateway, spoken to by its socket; and what a command keeps to that does without one."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from edgegw.errors import EdgegwError

ANSWER_S = 90.0
"""How long the gateway may take: for its journal, and for a device with the longest time-out."""
GONE = (FileNotFoundError, ConnectionRefusedError)

Ask = Callable[[dict[str, Any]], dict[str, Any]]
T = TypeVar("T")


def converse(journal: Path, command: str, talk: Callable[[Ask], T]) -> T | None:
    """Let `talk` ask the running gateway as often as it likes; return None if none runs, raise EdgegwError."""
    from edgegw.control.hand import address

    file = journal.with_name(journal.name + ".sock")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_S)
            with address(file) as short:
                sock.connect(short)
            with sock.makefile("rwb") as wire:
                return talk(lambda message: _ask(wire, message))
    except GONE:
        return None
    except PermissionError:
        raise EdgegwError(
            f"{file}: permission denied; expected a user who may, as in: sudo edgegw {command}"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise EdgegwError(f"{file}: the gateway did not answer: {error}") from None


def _ask(wire: Any, message: dict[str, Any]) -> dict[str, Any]:
    wire.write(json.dumps(message).encode() + b"\n")
    wire.flush()
    answer = json.loads(wire.readline())
    if not isinstance(answer, dict):
        raise ValueError("found no object")
    return answer


def own(file: Path, command: str) -> None:
    """Keep root from leaving files that the gateway's own user could not open; raise EdgegwError."""
    with suppress(FileNotFoundError):
        owner = (file if file.exists() else file.parent).stat().st_uid
        if os.geteuid() == 0 and owner != 0:
            import pwd

            with suppress(KeyError):
                name = pwd.getpwuid(owner).pw_name
                raise EdgegwError(f"{file} is another user's; expected: sudo -u {name} edgegw {command}")
            raise EdgegwError(f"{file} is user {owner}'s; run edgegw {command} as that user")
