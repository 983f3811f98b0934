"""A real PostgreSQL server of the tests' own, which can be stopped, killed and started again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class Postgres:
    """A server on a socket in a folder; there is none before `start`."""

    def __init__(self, folder: Path) -> None:
        """Make the database cluster; skip where PostgreSQL or psycopg is not installed."""
        pytest.importorskip("psycopg")
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if not shutil.which("initdb") else []
        path = os.pathsep.join([str(found[-1]) if found else "", os.environ["PATH"]])
        if not shutil.which("initdb", path=path):
            pytest.skip("no PostgreSQL server is installed here")
        self._env = {"PATH": path, "LC_ALL": "C.UTF-8"}
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = folder
        if self._user:
            shutil.chown(folder, self._user)
        self._call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "edgegw", "--no-sync")

    @property
    def url(self) -> str:
        """What `--to` needs."""
        return f"postgresql:///postgres?host={self._folder}&user=edgegw"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        self._call(
            "pg_ctl", "-D", f"{self._folder}/data", "-w", "-l", f"{self._folder}/log", "-o", options, "start"
        )

    def stop(self, mode: str) -> None:
        """Stop the server: `fast` ends every connection, `immediate` is a kill."""
        self._call("pg_ctl", "-D", f"{self._folder}/data", "-w", "-m", mode, "stop")

    def _call(self, *command: str) -> None:
        subprocess.run(
            command, check=True, user=self._user, env=self._env, cwd="/", stdout=subprocess.DEVNULL
        )
