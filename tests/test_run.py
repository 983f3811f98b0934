"""`edgegw run` as a service: what it tells systemd, and what it does about a second one."""

import asyncio
import signal
import socket
from pathlib import Path

import pytest
from field import field
from gateway_rig import config, device, gateway, until
from rig import free_port


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
async def test_systemd_is_told_ready_alive_reloading_and_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"@edgegw-test-{free_port()}" if abstract else str(tmp_path / "notify")
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.setblocking(False)
        asyncio.get_running_loop().add_reader(
            systemd, lambda: told.extend(systemd.recv(4096).decode().split("\n"))
        )
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        async with field() as made:
            with gateway(tmp_path, config(free_port(), {"m": device(made.port)})) as run:
                await until(lambda: "READY=1" in told and told.count("WATCHDOG=1") > 3, "ready and alive")
                run.send(signal.SIGHUP)
                await until(lambda: "RELOADING=1" in told and told.count("READY=1") == 2, "the reload")
                run.send(signal.SIGTERM)
                assert (await asyncio.to_thread(run.end))[0] == 0
        await until(lambda: "STOPPING=1" in told, "the end")
        asyncio.get_running_loop().remove_reader(systemd)


async def test_a_second_gateway_on_the_same_journal_does_not_start(tmp_path: Path) -> None:
    async with field() as made:
        configuration = config(free_port(), {"m": device(made.port)})
        with gateway(tmp_path, configuration) as first:
            await until(lambda: made.counts[1] > 3, "scans")
            connections = made.connections
            with gateway(tmp_path, configuration) as second:
                code, _ = await asyncio.to_thread(second.end)
            assert code == 1
            assert second.said("in use by another process")
            assert not second.said("Traceback")
            assert made.connections == connections, "the second one reached for the field"
            first.send(signal.SIGTERM)
            assert (await asyncio.to_thread(first.end))[0] == 0
