"""Writes by hand: the daemon's socket, and `edgegw write` with and without a daemon."""

import asyncio
import json
import os
import pty
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from control_field import (
    BATTERY,
    RELAY,
    SETPOINT,
    Operator,
    command,
    configuration,
    event,
    records,
    running,
    site,
    stop,
)
from field import frame
from gateway_rig import toml, until
from rig import MOSQUITTO, ROOT, Process, free_port, mosquitto

from edgegw.control.commands import COMMAND_BYTES
from edgegw.control.hand import CONNECTIONS, HandService, address
from edgegw.domain.command import Peer, Reply
from edgegw.runtime.lock import held

FOLLOW = {"when": "meter.kw > 80.0", "priority": 200, "do": {"battery.setpoint": 30.0}}


# -- the socket ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def service(path: Path, obeyed: list[bytes]) -> AsyncIterator[None]:
    async def obey(line: bytes, by: Peer) -> Reply:
        assert by == Peer(os.getuid(), os.getpid())
        obeyed.append(line)
        return Reply("x", True)

    made = HandService(path, obey, lambda tag: {"value": 1.0, "tag": tag}, {})
    task = asyncio.create_task(made.run())
    try:
        await until(path.exists, "the socket")
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def talk(path: Path, *lines: bytes) -> list[Any]:
    with address(path) as name:
        reader, writer = await asyncio.open_unix_connection(name)
    answers = []
    for line in lines:
        writer.write(line + b"\n")
        answers.append(json.loads(await asyncio.wait_for(reader.readline(), 5)))
    writer.close()
    return answers


async def test_a_line_is_obeyed_and_answered_and_a_tag_is_shown(tmp_path: Path) -> None:
    path, obeyed = tmp_path / "journal.db.sock", []
    async with service(path, obeyed):
        answers = await talk(path, b'{"id":"x"}', b'{"show":"a.b"}', b'{"id":"y"}')
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert answers == [{"id": "x", "ok": True}, {"value": 1.0, "tag": "a.b"}, {"id": "x", "ok": True}]
    assert obeyed == [b'{"id":"x"}\n', b'{"id":"y"}\n']
    assert not path.exists(), "it is taken away at the end"


async def test_a_socket_that_a_crash_left_is_no_hindrance_nor_is_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    path = folder / "journal.db.sock"
    path.write_text("left behind")
    path.chmod(0o600)
    async with service(path, []):
        await until(lambda: stat.S_ISSOCK(path.stat().st_mode), "the new socket")
        await until(lambda: stat.S_IMODE(path.stat().st_mode) == 0o660, "its mode")
        assert await talk(path, b"{}") == [{"id": "x", "ok": True}]


async def test_what_is_too_long_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    path, obeyed = tmp_path / "s", []
    async with service(path, obeyed):
        with address(path) as name:
            reader, writer = await asyncio.open_unix_connection(name)
        writer.write(b"x" * (COMMAND_BYTES * 3) + b"\n")
        assert json.loads(await asyncio.wait_for(reader.readline(), 5)) == {"id": "x", "ok": True}
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert [len(line) > COMMAND_BYTES for line in obeyed] == [True]
        assert await talk(path, b"{}") == [{"id": "x", "ok": True}]


async def test_more_connections_than_there_is_room_for_are_told_so(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with service(path, []):
        with address(path) as name:
            several = [await asyncio.open_unix_connection(name) for _ in range(CONNECTIONS)]
        (answer,) = await talk(path, b"{}")
        assert answer == {"id": None, "ok": False, "error": f"busy with {CONNECTIONS} connections; try again"}
        for _, writer in several:
            writer.close()


# -- the command -----------------------------------------------------------------------------------------------------


async def write(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run `edgegw write --yes --json`; return exit code, answer and standard error."""
    config = str(folder / "config.toml")

    def run() -> tuple[int, str, str]:
        with Process(
            sys.executable, "-m", "edgegw", "write", *arguments, "--yes", "--json", "-c", config
        ) as made:
            code, out = made.end()
            return code, out, "\n".join(made.lines)

    code, out, errors = await asyncio.to_thread(run)
    return code, json.loads(out) if out else {}, errors


async def test_a_running_gateway_writes_holds_and_refuses(tmp_path: Path) -> None:
    """Exit 0 done, 1 refused with the reason, 2 wrong usage; every one that reached it is in the ledger."""
    async with site() as plant:
        plant.set(10.0)
        limits = {"safe": 2.0, "ramp": "16/s"}
        with running(tmp_path, configuration(plant, {"follow": FOLLOW}, limits=limits)) as run:
            await plant.scanned(3, BATTERY)
            await until((tmp_path / "journal.db.sock").exists, "the socket")
            code, answer, _ = await write(tmp_path, "battery.setpoint", "-10")
            assert (code, answer["ok"], answer["wanted"]) == (0, True, -10.0)
            await until(lambda: plant.get() == -10.0, "the ramp")
            assert len(plant.values()) == 3, "three steps of 4 kW"
            await plant.scanned(3, BATTERY)
            code, answer, _ = await write(tmp_path, "battery.relay", "on")
            assert (code, answer["value"], plant.coils[BATTERY][RELAY]) == (0, True, 1)
            code, answer, _ = await write(tmp_path, "battery.setpoint", "60")
            assert (code, answer["error"]) == (1, "battery.setpoint: 60 is above max 50")
            code, answer, _ = await write(tmp_path, "meter.kw", "1")
            assert (code, answer["error"]) == (1, "meter.kw: not writable")
            for wrong in (("meter.kv", "1"), ("battery.setpoint", "much"), ("battery.setpoint", "nan"),
                          ("battery.relay", "2"), ("battery.setpoint", "1", "--lease", "5")):  # fmt: skip
                assert (await write(tmp_path, *wrong))[0] == 2, wrong
            plant.set(90.0)
            await until(lambda: plant.get() == 30.0, "the rule, which has more authority")
            code, answer, _ = await write(tmp_path, "battery.setpoint", "5")
            assert (code, answer["error"]) == (1, "battery.setpoint: rule:follow has authority")
            await stop(run)
    commands = records(tmp_path, "command")
    assert {e["uid"] for e in commands} == {os.getuid()}
    assert len({e["pid"] for e in commands}) == len(commands), "each was asked by a process of its own"
    assert [e["write"] for e in commands][2:4] == [{"battery.setpoint": 60.0}, {"meter.kw": 1.0}]
    assert [(e["id"].startswith("hand-"), e["ok"]) for e in commands] == [
        (True, ok) for ok in (True, True, False, False, False)
    ]
    assert not (tmp_path / "journal.db.sock").exists()


@pytest.mark.parametrize("running_too", [True, False])
async def test_p8_an_integer_that_no_double_holds_is_written_as_it_is(
    tmp_path: Path, running_too: bool
) -> None:
    """By command of a gateway that runs, and without one; it is journaled as such, and reads back the same."""
    counter = {"address": "holding:40", "type": "uint64", "writable": True}
    value = 2**53 + 1
    async with site() as plant:
        made = configuration(plant, {})
        made["device"]["battery"]["tags"]["counter"] = counter
        (tmp_path / "config.toml").write_text(toml(made))
        if running_too:
            with running(tmp_path, made) as run:
                await plant.scanned(3, BATTERY)
                await until((tmp_path / "journal.db.sock").exists, "the socket")
                code, answer, _ = await write(tmp_path, "battery.counter", str(value))
                await stop(run)
        else:
            code, answer, _ = await write(tmp_path, "battery.counter", str(value))
    assert (code, answer["ok"], answer["value"]) == (0, True, value)
    assert [f.data for f in plant.frames] == [struct.pack(">Q", value)]
    told = [(e["new"], e.get("read")) for e in records(tmp_path, "write")]
    assert told == [(value, None), (value, value)]


async def test_p8_a_write_that_its_device_refuses_for_good_is_made_once_and_the_answer_says_so(
    tmp_path: Path,
) -> None:
    """Another value, another command, or the device's return after an outage: then it is tried anew."""

    async def refuses(tid: int, unit: int, pdu: bytes) -> bytes | None:
        answer = await plant.answer(tid, unit, pdu)
        if pdu[0] == 16:
            plant.set(12.0, BATTERY, SETPOINT)
            return frame(tid, unit, bytes((0x90, 2)))
        return answer

    async with site() as plant:
        plant.field.behave[BATTERY] = refuses
        with running(tmp_path, configuration(plant, {})) as run:
            await plant.scanned(3, BATTERY)
            await until((tmp_path / "journal.db.sock").exists, "the socket")
            first = await write(tmp_path, "battery.setpoint", "30")
            began = len(plant.scans[BATTERY])
            await until(lambda: len(plant.scans[BATTERY]) > began + 50, "scans after the refusal", 60.0)
            assert len(plant.frames) == 1
            second = await write(tmp_path, "battery.setpoint", "31")
            assert plant.values() == [30.0, 31.0]
            plant.field.behave[BATTERY] = plant.field.silent
            await event(tmp_path, "device-down", device="battery")
            plant.field.behave[BATTERY] = refuses
            await until(lambda: len(plant.frames) == 3, "the same once the device is back", 60.0)
            await stop(run)
            said = [line for line in run.lines if "not confirmed" in line]
    assert plant.values() == [30.0, 31.0, 31.0]
    for code, answer, _ in (first, second):
        assert (code, answer["ok"]) == (1, False)
        assert "refused by the device: illegal-address; it is not tried again until" in answer["error"]
    assert len(said) == 1, said
    assert "not tried again until something changes" in said[0]
    assert all(e["final"] for e in records(tmp_path, "write") if e.get("ok") is False)


async def test_a_lease_by_hand_ends_in_safe_and_an_islanded_link_ends_nothing(tmp_path: Path) -> None:
    async with site() as plant:
        made = configuration(plant, {}, limits={"safe": 2.0}, uplink={"island_after": "200ms"})
        with running(tmp_path, made) as run:
            await event(tmp_path, "link", state="islanded")
            code, _, _ = await write(tmp_path, "battery.setpoint", "10")
            assert code == 0
            plant.set(0.0, BATTERY, 10)
            await until(lambda: plant.values() == [10.0, 10.0], "what a hand wrote to be held")
            code, _, _ = await write(tmp_path, "battery.setpoint", "11", "--lease", "500ms")
            assert code == 0
            await until(lambda: plant.values() == [10.0, 10.0, 11.0, 2.0], "safe")
            await stop(run)


async def test_p8_what_is_written_is_rounded_to_within_its_limits(tmp_path: Path) -> None:
    """A register that counts in tens, and max = 46: 40 arrives, by hand and without a daemon as well."""
    coarse = {"address": "holding:30", "type": "int16", "scale": 10.0, "min": -46.0, "max": 46.0}
    async with site() as plant:
        made = configuration(plant, {})
        made["device"]["battery"]["tags"]["coarse"] = coarse | {
            "writable": True,
            "safe": 45.0,
            "eeprom": True,
        }
        with running(tmp_path, made) as run:
            await plant.scanned(2, BATTERY)
            await until((tmp_path / "journal.db.sock").exists, "the socket")
            code, answer, _ = await write(tmp_path, "battery.coarse", "46")
            assert (code, answer["value"]) == (0, 40.0)
            await stop(run)
        code, answer, _ = await write(tmp_path, "battery.coarse", "-46")
        assert (code, answer["value"]) == (0, -40.0)
        assert [int.from_bytes(f.data, "big", signed=True) for f in plant.frames] == [4, -4]
    assert [e["new"] for e in records(tmp_path, "write") if "ok" in e] == [40.0, -40.0]
    with Process(sys.executable, "-m", "edgegw", "check", "-c", str(tmp_path / "config.toml")) as check:
        _, out = await asyncio.to_thread(check.end)
    assert "device.battery.tags.coarse: max 46 comes to 40, since the register counts in 10" in out
    assert (
        "device.battery.tags.coarse: kept in EEPROM, which wears with each write, and has no max_per_hour"
        in out
    )
    assert "device.battery.tags.coarse: safe 45 comes to 40, since the register counts in 10" in out


@pytest.mark.skipif(not MOSQUITTO, reason="mosquitto is not here")
async def test_no_command_from_upstream_passes_for_one_by_hand(tmp_path: Path) -> None:
    port = free_port()
    async with site() as plant:
        made = configuration(plant, {}, broker_port=port)
        with mosquitto(tmp_path, port), Operator(port) as operator, running(tmp_path, made) as run:
            await event(tmp_path, "link", state="online")
            answer = await operator.ask(command("hand-1", {"battery.setpoint": 1.0}))
            assert (answer["ok"], "by hand" in answer["error"]) == (False, True)
            await stop(run)
        assert plant.frames == []


async def test_without_a_gateway_one_step_is_written_and_ledgered(tmp_path: Path) -> None:
    """The guard knows what was written before, by whomever, and control forgets nothing of what it remembers."""
    limits = {"safe": 2.0, "max_step": 15.0, "max_per_hour": 3}
    async with site() as plant:
        plant.set(90.0)
        made = configuration(plant, {"plain": FOLLOW | {"do": {"battery.plain": 5.0}}}, limits=limits)
        with running(tmp_path, made) as run:
            await event(tmp_path, "write", ok=True)
            assert (await write(tmp_path, "battery.setpoint", "1", "--lease", "100ms"))[0] == 0
            await until(lambda: plant.values() == [1.0, 2.0], "safe")
            await event(tmp_path, "write", count=3, ok=True)
            await stop(run)
        code, answer, _ = await write(tmp_path, "battery.setpoint", "20")
        assert (code, answer["value"]) == (0, 17.0)
        assert "one step towards 20" in answer["note"]
        code, answer, _ = await write(tmp_path, "battery.setpoint", "20")
        assert code == 1
        assert "max_per_hour 3 is used up: not for another 3" in answer["error"]
        code, answer, _ = await write(tmp_path, "battery.setpoint", "-60")
        assert (code, answer["error"]) == (1, "battery.setpoint: -60 is below min -50")
        assert (await write(tmp_path, "battery.setpoint", "1", "--lease", "1s"))[0] == 2
        assert plant.values() == [1.0, 2.0, 17.0]
        with held(tmp_path / "journal.db.lock", "journal"):
            code, _, errors = await write(tmp_path, "battery.setpoint", "20")
            assert (code, "in use by another process" in errors) == (1, True)
        with running(tmp_path, made) as run:
            await plant.scanned(5, BATTERY)
            code, answer, _ = await write(tmp_path, "battery.setpoint", "3")
            assert (code, answer["error"]) == (1, "battery.setpoint: max_per_hour 3 is used up")
            await stop(run)
    by_hand = [e for e in records(tmp_path, "write") if e["cause"].startswith("command:hand-")]
    assert [(e["new"], e.get("ok")) for e in by_hand] == [
        (1.0, None),
        (1.0, True),
        (17.0, None),
        (17.0, True),
    ]
    assert {e["uid"] for e in records(tmp_path, "command")} == {os.getuid()}
    assert all(e["uid"] == os.getuid() and e["pid"] for e in records(tmp_path, "write-refused") if "uid" in e)
    assert [e["rule"] for e in records(tmp_path, "rule-on")] == ["plain"], "the rule was remembered"
    with Process(
        sys.executable, "-m", "edgegw", "journal", "verify", "-c", str(tmp_path / "config.toml")
    ) as verify:
        code, out = await asyncio.to_thread(verify.end)
    assert (code, "the chain holds" in out) == (0, True)


async def test_a_device_that_does_not_answer_is_a_failure_that_is_said(tmp_path: Path) -> None:
    async with site() as plant:
        made = configuration(plant, {})
        with running(tmp_path, made) as run:
            await plant.scanned(1, BATTERY)
            await stop(run)

        async def mute_to_writes(tid: int, unit: int, pdu: bytes) -> bytes | None:
            return None if pdu[0] == 16 else await plant.answer(tid, unit, pdu)

        plant.field.behave[BATTERY] = mute_to_writes
        code, answer, _ = await write(tmp_path, "battery.setpoint", "5")
        assert (code, answer["ok"], "no answer" in answer["error"]) == (1, False, True)
        plant.field.behave[BATTERY] = plant.field.silent
        code, _, errors = await write(tmp_path, "battery.setpoint", "5")
        assert (code, errors.startswith("error: device.battery")) == (1, True)
    assert [e["ok"] for e in records(tmp_path, "write") if "ok" in e] == [False]


@pytest.mark.parametrize(("key", "code"), [("y", 0), ("n", 1)])
async def test_it_asks_first_and_shows_what_it_asks_about(tmp_path: Path, key: str, code: int) -> None:
    async with site() as plant:
        made = configuration(plant, {}, limits={"safe": 2.0, "ramp": "40/s"})
        with running(tmp_path, made) as run:
            await plant.scanned(2, BATTERY)
            await until((tmp_path / "journal.db.sock").exists, "the socket")

            def ask() -> tuple[int, str]:
                terminal, end = pty.openpty()
                words = [
                    sys.executable,
                    "-m",
                    "edgegw",
                    "write",
                    "battery.setpoint",
                    "5",
                    "-c",
                    "config.toml",
                ]
                env = os.environ | {"PYTHONPATH": str(ROOT)}
                with subprocess.Popen(
                    words, cwd=tmp_path, stdin=end, stderr=subprocess.PIPE, env=env
                ) as asking:
                    os.close(end)
                    os.write(terminal, key.encode() + b"\n")
                    assert asking.stderr
                    said = asking.stderr.read().decode()
                os.close(terminal)
                return asking.returncode, said

            found, said = await asyncio.to_thread(ask)
            await stop(run)
    assert found == code, said
    assert "battery.setpoint  now 0" in said
    assert "limits: min -50, max 50, ramp 40/s, safe 2" in said
    assert plant.values() == ([5.0] if key == "y" else [])


def test_it_asks_nobody_where_there_is_nobody(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'gateway = { id = "t" }\n[device.a]\ndriver = "modbus"\nurl = "tcp://127.0.0.1:1"\n'
        '[device.a.tags]\nx = { address = "holding:0", type = "int16", writable = true }\n'
    )
    words = [sys.executable, "-m", "edgegw", "write", "a.x", "5", "-c", "config.toml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env
    )
    assert (done.returncode, "expected --yes" in done.stderr) == (2, True)
