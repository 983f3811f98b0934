"""The running gateway, spoken to by its socket; and what a command keeps to that does without one."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from edgegw.errors import EdgegwError, JournalError

if TYPE_CHECKING:
    from edgegw.config.schema import Config

ANSWER_S = 90.0
"""How long the gateway may take: for its journal, and for a device with the longest time-out."""
GONE = (FileNotFoundError, ConnectionRefusedError)

Ask = Callable[[dict[str, Any]], dict[str, Any]]
T = TypeVar("T")


class Place(NamedTuple):
    """Where a gateway's journal is, and the process that runs it, None if none does."""

    journal: Path
    pid: int | None

    @property
    def socket(self) -> Path:
        """The gateway's socket, if it runs."""
        return self.journal.with_name(self.journal.name + ".sock")


def locate(config: "Config", config_path: Path) -> Place:
    """Return where the gateway of a configuration has its journal: the running one's, else where it would be.

    Raises EdgegwError if something answers in its place that is not to be believed.
    """
    from edgegw.config.load import journal_path
    from edgegw.runtime import presence

    running = presence.find(config_path)
    if running is not None and isinstance(running.get("journal"), str):
        return Place(Path(running["journal"]), running["pid"])
    return Place(journal_path(config, config_path), None)


def there(place: Place) -> Path:
    """Return the journal's file if it is there and may be seen; raise EdgegwError."""
    try:
        place.journal.stat()
    except FileNotFoundError:
        raise JournalError(
            f"journal {place.journal}: not there; it is made when the gateway first runs"
        ) from None
    except OSError as error:
        raise _denied(place.journal, error) from None
    return place.journal


def expect_alone(place: Place, config: "Config", command: str) -> None:
    """Raise EdgegwError if a gateway runs that could not be asked: nothing may be done beside it."""
    from edgegw.cli.status import from_daemon

    if place.pid is not None:
        raise EdgegwError(
            f"the gateway runs (process {place.pid}), and its socket {place.socket} does not answer; nothing was done"
        )
    if from_daemon(config) is not None:
        raise EdgegwError(
            f"a gateway {config.gateway.id} answers on {config.status.http}, and it does not run this configuration; "
            f"nothing was done; name the one that it runs: edgegw {command} -c FILE"
        )


def _denied(file: Path, error: OSError) -> EdgegwError:
    why = (error.strerror or str(error)).lower()
    hint = "; expected a user who may, as in: sudo edgegw ..." if isinstance(error, PermissionError) else ""
    return EdgegwError(f"{file}: {why}{hint}")


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
