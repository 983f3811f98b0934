"""Presence: where a command finds the process that runs a configuration, wherever that keeps its files.

The process answers on a socket of Linux's abstract namespace that is named after the configuration's path: it needs no
folder, works with any STATE_DIRECTORY, and is gone with the process. The answer only says where to look; access is
decided by the files named there.
"""

import asyncio
import hashlib
import json
import logging
import os
import socket
import struct
from pathlib import Path
from typing import Any

from edgegw.errors import EdgegwError

log = logging.getLogger(__name__)

RETRY_S = 30.0
ANSWER_S = 2.0
MAX_ANSWER_BYTES = 4096
SYSTEM_USERS = 1000
"""Users below this number are the system's (login.defs(5), UID_MIN)."""
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7)


async def announce(config: Path, answer: dict[str, Any]) -> None:
    """Answer everyone who asks for the process that runs a configuration, until cancelled."""
    logged = False
    while True:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(_name(config))
        except OSError as error:
            listener.close()
            if not logged:
                log.warning("%s: another process runs it already, or says so: %s", config, error.strerror)
            logged = True
            await asyncio.sleep(RETRY_S)
            continue
        line = json.dumps(answer).encode() + b"\n"

        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes = line
        ) -> None:
            writer.write(line)
            writer.close()

        server = await asyncio.start_unix_server(serve, sock=listener)
        async with server:
            await server.serve_forever()


def find(config: Path) -> dict[str, Any] | None:
    """Return what the process that runs a configuration answers, None if there is none.

    Raises EdgegwError if one answers that is neither root's, the caller's, the system's nor of the file's owner.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(_name(config))
            with sock.makefile("rb") as lines:
                line = lines.readline(MAX_ANSWER_BYTES)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except ConnectionRefusedError:
            return None
        except OSError as error:
            raise EdgegwError(f"{config}: the process that runs it does not answer: {error}") from None
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid >= SYSTEM_USERS and uid not in (os.geteuid(), config.stat().st_uid):
        raise EdgegwError(
            f"{config}: process {pid} of user {uid} says that it runs it; expected one of root, of a system user, of "
            "the file's owner, or your own"
        )
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise EdgegwError(f"{config}: process {pid}, which runs it, gave no answer that can be read")
    return answer | {"pid": pid}


def _name(config: Path) -> str:
    return "\0edgegw-" + hashlib.sha256(os.fsencode(config.resolve())).hexdigest()[:32]
