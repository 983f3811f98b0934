"""How a command finds its gateway: the running one's journal, wherever that is, and nothing is written beside it."""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from control_field import BATTERY, configuration, records, running, site, stop
from gateway_rig import until
from rig import Process

from edgegw.config.load import SYSTEM_STATE, journal_path, secret, state_directory
from edgegw.config.schema import Config
from edgegw.errors import ConfigError, EdgegwError
from edgegw.runtime import presence

OURS = Config.model_validate({"gateway": {"id": "a"}})


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell does not have, and systemd gives the service."""
    for name in ("STATE_DIRECTORY", "EDGEGW_STATE", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def test_where_a_relative_journal_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged, own = Path("/etc/edgegw/config.toml"), tmp_path / "config.toml"
    assert journal_path(OURS, own) == tmp_path / "journal.db"
    assert journal_path(OURS, packaged) == SYSTEM_STATE / "journal.db"
    assert state_directory(Path("/etc/edgegw/sites/north.toml")) == SYSTEM_STATE
    (tmp_path / "link.toml").symlink_to(packaged)
    assert state_directory(tmp_path / "link.toml") == SYSTEM_STATE
    monkeypatch.setenv("STATE_DIRECTORY", "/srv/state:/srv/other")
    assert [state_directory(path) for path in (packaged, own)] == [Path("/srv/state")] * 2
    monkeypatch.setenv("EDGEGW_STATE", str(tmp_path))
    assert journal_path(OURS, packaged) == tmp_path / "journal.db"
    away = Config.model_validate({"gateway": {"id": "a"}, "journal": {"path": "/data/j.db"}})
    assert journal_path(away, packaged) == Path("/data/j.db")


def test_a_credential_is_read_from_a_shell_too_or_it_is_said_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgegw.config.load.SERVICE_CREDENTIALS", tmp_path)
    with pytest.raises(
        ConfigError, match=f"root alone can read from a shell, in {tmp_path}, while the service runs"
    ):
        secret("%d/edgegw_mqtt", Path("/etc/edgegw/config.toml"))
    (tmp_path / "edgegw_mqtt").write_text("s3cret\n")
    assert secret("%d/edgegw_mqtt", Path("/etc/edgegw/config.toml")) == "s3cret"


async def edgegw(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command from a shell; return exit code, standard output and standard error."""
    words = (*arguments, "-c", str(folder / "config.toml"))

    def run() -> tuple[int, str, str]:
        with Process(sys.executable, "-m", "edgegw", *words) as made:
            code, out = made.end()
            return code, out, "\n".join(made.lines)

    return await asyncio.to_thread(run)


async def test_p8_a_shell_without_the_services_environment_acts_through_the_gateway(tmp_path: Path) -> None:
    """As the package runs it: the journal is in the state directory, which only the service knows of."""
    state, etc = tmp_path / "state", tmp_path / "etc"
    state.mkdir()
    etc.mkdir()
    async with site() as plant:
        follow = {"when": "meter.kw > 80.0", "do": {"battery.setpoint": 30.0}}
        made = configuration(plant, {"follow": follow}, limits={"safe": 2.0})
        with running(etc, made, "env", f"STATE_DIRECTORY={state}") as run:
            await plant.scanned(3, BATTERY)
            await until((state / "journal.db.sock").exists, "the socket")

            async def done(*words: str) -> Any:
                code, out, errors = await edgegw(etc, *words)
                assert code == 0, (words, out, errors)
                return json.loads(out) if "--json" in words else out

            answer = await done("write", "battery.setpoint", "-10", "--yes", "--json")
            assert answer["note"].startswith("held by the gateway")
            await until(lambda: plant.get() == -10.0, "the write")
            assert (await done("journal", "stat", "--json"))["head"] > 0
            assert "command" in await done("journal", "query", "--events")
            assert "battery" in await done("journal", "tail")
            await done("journal", "verify")
            await done("rules", "test")
            exported = await done("journal", "export", str(tmp_path / "x.edgegw"), "--json")
            assert exported["records"] > 5
            await done("journal", "prune", "--json")
            status = await done("status", "--json")
            assert (status["running"], status["journal"]["head"] > 0) == (True, True)
            await stop(run)
    assert [file.name for file in etc.iterdir()] == ["config.toml"], "no second journal is made"
    assert [e["ok"] for e in records(state, "write") if "ok" in e] == [True]


async def test_p8_nothing_is_written_beside_a_gateway_that_cannot_be_asked(tmp_path: Path) -> None:
    async with site() as plant:
        made = configuration(plant, {}, limits={"safe": 2.0})
        with running(tmp_path, made) as run:
            await plant.scanned(3, BATTERY)
            await until((tmp_path / "journal.db.sock").exists, "the socket")
            (tmp_path / "journal.db.sock").unlink()
            code, _, errors = await edgegw(tmp_path, "write", "battery.setpoint", "-10", "--yes")
            assert (code, "the gateway runs (process" in errors, "nothing was done" in errors) == (
                1,
                True,
                True,
            )
            code, _, errors = await edgegw(tmp_path, "journal", "prune")
            assert (code, "nothing was done" in errors) == (1, True)
            assert not plant.values()
            await stop(run)
        assert presence.find(tmp_path / "config.toml") is None


def test_an_answer_of_any_user_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may run a process could else have a technician's writes end at a socket of his own."""
    config = tmp_path / "config.toml"
    config.write_text("")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(presence._name(config))
        listener.listen()
        pid = os.fork()
        if not pid:  # pragma: no cover
            taken, _ = listener.accept()
            taken.sendall(b'{"journal": "/nowhere/journal.db"}\n')
            os._exit(0)
        monkeypatch.setattr(presence, "SYSTEM_USERS", 0)
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
        os.chown(config, 4242, -1)
        with pytest.raises(EdgegwError, match="says that it runs it"):
            presence.find(config)
        os.waitpid(pid, 0)
