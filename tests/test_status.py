"""What a running gateway says of itself: over HTTP, over its socket, and to the commands that ask it."""

import asyncio
import http.client
import json
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from control_field import event, stop
from field import field, frame
from gateway_rig import TAGS, config, device, gateway, until
from rig import NO_DISK, Process, free_port, mosquitto
from test_cli_commands import arun, written
from test_uplink_hostile import hostile_broker


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    """Return status, content type and body of an answer."""

    def ask() -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read()
        finally:
            connection.close()

    return await asyncio.to_thread(ask)


async def codes(port: int) -> tuple[int, str, dict[str, str]]:
    """Return what /healthz says: HTTP status, state, and the problems but for the clock and disk of this machine."""
    status, _, body = await get(port, "/healthz")
    health = json.loads(body)
    problems = {p["code"]: p["what"] for p in health["problems"]}
    return (
        status,
        health["state"],
        {c: w for c, w in problems.items() if c not in ("clock-unsynced", "disk-full")},
    )


async def reaches(port: int, status: int, *expected: str, deadline_s: float = 60.0) -> dict[str, str]:
    """Wait until /healthz has just these problems; return what they are about."""
    async with asyncio.timeout(deadline_s):
        while True:
            found, state, problems = await codes(port)
            if (found, *sorted(problems)) == (status, *sorted(expected)):
                assert state == ("failing" if status == 503 else state)
                return problems
            await asyncio.sleep(0.05)


async def test_healthz_is_true_of_devices_link_and_journal(tmp_path: Path) -> None:
    """Degraded is 200, failing is 503; what is mended is gone."""
    broker, port = free_port(), free_port()
    async with field() as plant:
        made = config(broker, {"a": device(plant.port, 1), "b": device(plant.port, 2)},
                      status={"http": f"127.0.0.1:{port}"})  # fmt: skip
        with gateway(tmp_path, made) as run:
            await until(lambda: plant.counts[1] > 2 and plant.counts[2] > 2, "scans")
            await reaches(port, 200, "link-lost")
            with mosquitto(tmp_path, broker):
                await reaches(port, 200)
                plant.behave[2] = plant.silent
                assert await reaches(port, 200, "device-down") == {"device-down": "b"}
                plant.behave[1] = plant.silent
                assert (await reaches(port, 503, "no-device", "device-down"))["no-device"] == (
                    "none of 2 devices answers"
                )
                plant.behave[1] = plant.behave[2] = plant.exception(2)
                assert sorted(await reaches(port, 200, "tags-bad")) == ["tags-bad"]
                plant.behave.clear()
                await reaches(port, 200)
            await stop(run)


async def test_healthz_is_failing_where_the_disk_takes_nothing(tmp_path: Path) -> None:
    port = free_port()
    async with field() as plant:
        made = config(free_port(), {"a": device(plant.port)}, status={"http": f"127.0.0.1:{port}"})
        with gateway(tmp_path, made, *NO_DISK) as run:
            await until(lambda: plant.counts[1] > 2, "scans")
            problems = await reaches(port, 503, "journal-error", "link-lost")
            assert str(tmp_path / "journal.db") in problems["journal-error"]
            run.send(signal.SIGKILL)
            await asyncio.to_thread(run.end)


async def test_healthz_is_failing_where_the_broker_confirms_nothing(tmp_path: Path) -> None:
    """It takes connections and messages, and acknowledges none: the uplink leaves it and comes back, over and over."""
    port, broker_port = free_port(), free_port()
    async with field() as plant, hostile_broker(b"", broker_port) as broker:
        made = config(broker_port, {"a": device(plant.port)}, status={"http": f"127.0.0.1:{port}"})
        with gateway(tmp_path, made) as run:
            await until(lambda: run.said("online"), "the broker")
            problems = await reaches(port, 503, "no-acknowledgement", deadline_s=250.0)
            assert "has confirmed nothing for" in problems["no-acknowledgement"]
            assert broker.connections > 1, "over more than one connection"
            await stop(run)


async def test_a_head_request_is_answered_without_a_body(tmp_path: Path) -> None:
    port = free_port()
    async with field() as plant:
        made = config(free_port(), {"a": device(plant.port)}, status={"http": f"127.0.0.1:{port}"})
        with gateway(tmp_path, made) as run:
            await until(lambda: plant.counts[1] > 2, "scans")
            for path in ("/healthz", "/api/status", "/metrics", "/nothing"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                raw = await asyncio.wait_for(reader.read(), 30.0)
                writer.close()
                head, _, body = raw.partition(b"\r\n\r\n")
                assert body == b"", path
                assert b"Content-Length: " in head
                assert b"Content-Length: 0" not in head
            await stop(run)


ONE_BAD = TAGS | {"odd": {"address": "holding:900", "type": "uint16"}}


async def test_bad_tags_are_counted_logged_once_and_named_by_check_and_read(tmp_path: Path) -> None:
    port, broker = free_port(), free_port()

    async def partly(tid: int, unit: int, pdu: bytes) -> bytes | None:
        (address,) = struct.unpack(">H", pdu[1:3])
        if address >= 900:
            return frame(tid, unit, bytes((pdu[0] | 0x80, 2)))
        return await plant.well(tid, unit, pdu)

    async with field() as plant:
        plant.behave[1] = partly
        made = config(broker, {"a": device(plant.port, tags=ONE_BAD), "b": device(plant.port, 2)},
                      status={"http": f"127.0.0.1:{port}"})  # fmt: skip
        path = written(tmp_path, made)

        async def asked() -> None:
            code, out, _ = await arun("check", "--connect", "--json", "-c", path)
            tried = json.loads(out)["tried"]
            assert code == 1
            assert tried["device.a"] == "device.a: 1 of 3 tags are bad: odd (illegal-address)"
            assert tried["device.b"] is None
            code, out, _ = await arun("read", "a", "--json", "-c", path)
            assert (code, json.loads(out)["quality"]) == (1, {"odd": "bad:illegal-address"})
            assert (await arun("read", "a.n", "-c", path))[0] == 0
            assert (await arun("read", "a.odd", "-c", path))[0] == 1

        await asked()
        with gateway(tmp_path, made) as run:
            await until(lambda: plant.counts[1] > 50, "scans")
            await asked()
            _, _, body = await get(port, "/api/status")
            found = json.loads(body)["devices"]
            assert (found["a"]["state"], found["a"]["bad_tags"], found["b"]["bad_tags"]) == ("good", 1, 0)
            _, _, metrics = await get(port, "/metrics")
            assert b'edgegw_tag_bad{device="a"} 1.0' in metrics
            assert b'edgegw_tag_bad{device="b"} 0.0' in metrics
            await stop(run)
            said = [line for line in run.lines if "tags are bad" in line]
    assert len(said) == 1, said
    assert "device.a: 1 of 3 tags are bad: odd (illegal-address)" in said[0]


async def test_a_device_that_serves_one_connection_is_read_through_the_running_gateway(
    tmp_path: Path,
) -> None:
    """`check --connect` and `read` open no second connection; of a device that it does not run they do."""
    broker = free_port()
    async with field() as plant, field() as other:
        made = config(broker, {"a": device(plant.port, every="15m")})
        path = written(tmp_path, made)
        with mosquitto(tmp_path, broker), gateway(tmp_path, made) as run:
            await until(lambda: plant.counts[1] == 1, "the first scan")
            for scans in (2, 3):
                code, out, said = await arun("read", "a", "--json", "-c", path)
                assert (code, json.loads(out)["values"]["n"]) == (0, scans), said
            code, out, _ = await arun("check", "--connect", "-c", path)
            assert code == 0, out
            assert (plant.connections, plant.counts[1]) == (1, 4)
            plant.behave[1] = plant.silent
            code, _, said = await arun("read", "a", "-c", path)
            assert code == 1
            assert f"device.a (tcp://127.0.0.1:{plant.port} unit 1): no answer in 0.3 s" in said
            made["device"]["a"]["url"] = f"tcp://127.0.0.1:{other.port}"
            written(tmp_path, made)
            code, out, said = await arun("read", "a", "--json", "-c", path)
            assert (code, json.loads(out)["values"]["n"], other.connections) == (0, 1, 1), said
            await stop(run)


async def test_check_asks_a_gateway_for_more_devices_than_its_socket_serves_connections(
    tmp_path: Path,
) -> None:
    broker = free_port()
    async with field() as plant:
        devices = {f"d{unit}": device(plant.port, unit) for unit in range(1, 31)}
        made = config(broker, devices)
        path = written(tmp_path, made)
        with mosquitto(tmp_path, broker), gateway(tmp_path, made) as run:
            await until(lambda: all(plant.counts[unit] for unit in range(1, 31)), "scans")
            connections = plant.connections
            code, out, said = await arun("check", "--connect", "-c", path)
            assert code == 0, out + said
            assert out.count("  ok ") == 31
            assert plant.connections == connections
            await stop(run)


async def test_status_finds_a_running_gateway_without_http(tmp_path: Path) -> None:
    broker = free_port()
    async with field() as plant:
        made = config(broker, {"a": device(plant.port)})
        path = written(tmp_path, made)
        with mosquitto(tmp_path, broker), gateway(tmp_path, made) as run:
            await event(tmp_path, "link", state="online")
            await until(lambda: plant.counts[1] > 5, "scans")
            code, out, _ = await arun("status", "--json", "-c", path)
            found: dict[str, Any] = json.loads(out)
            assert (code, found["running"], found["link"]["state"]) == (0, True, "online")
            assert (found["devices"]["a"]["state"], found["devices"]["a"]["reason"]) == ("good", None)
            assert found["journal"]["path"] == str(tmp_path / "journal.db")
            assert found["journal"]["max_size"] == 1024**3
            assert len(found["config"]) == 64
            assert found["clock"] in ("synced", "unsynced")
            assert found["health"]["state"] in ("ok", "degraded")
            code, out, _ = await arun("status", "-c", path)
            assert "edgegw" in out
            assert ", running\n" in out
            await stop(run)


async def test_a_reload_that_needs_a_restart_says_so_upstream(tmp_path: Path) -> None:
    async with field() as plant:
        made = config(free_port(), {"a": device(plant.port)})
        with gateway(tmp_path, made) as run:
            await until(lambda: plant.counts[1] > 2, "scans")
            made["uplink"]["inflight"] = 7
            written(tmp_path, made)
            run.send(signal.SIGHUP)
            taken = await event(tmp_path, "config")
            await stop(run)
    assert (taken["ok"], taken["pending_restart"]) == (True, ["uplink"])
    assert (taken["stopped"], taken["started"]) == ([], [])


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("gone/journal.db", "gone is not there"),
        ("file/journal.db", "is a file; expected a folder"),
        ("folder", "is a folder; expected a file's name"),
    ],
)
async def test_p9_a_journal_that_cannot_be_kept_where_it_should_is_a_wrong_configuration(
    tmp_path: Path, where: str, what: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    made = config(free_port(), {"a": device(free_port())}, journal={"path": where})
    path = written(tmp_path, made)
    for command in ("run", "check"):
        code, _, said = await arun(command, "-c", path)
        assert code == 2, said
        assert "journal.path: " in said
        assert what in said
    assert not (tmp_path / "gone").exists()


async def test_p9_a_configuration_of_brackets_is_an_error_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for text in ("x = " + "[" * 3000, "x = " + "{a=" * 3000):
        path.write_text(text)
        for command in ("check", "run"):
            code, _, said = await arun(command, "-c", path)
            assert (code, "nested too deeply" in said) == (2, True), said
    path.write_text("[gateway]\nid = 'a'\n" + "".join(f"k{n} = 1\n" for n in range(20_000)))
    code, _, said = await arun("check", "-c", path)
    assert code == 2
    assert "and 19800 more problems" in said


async def test_a_password_that_every_user_may_read_is_told_of(tmp_path: Path) -> None:
    made = config(
        free_port(), {"a": device(free_port())}, uplink={"username": "u", "password_file": "secret"}
    )
    path = written(tmp_path, made)
    secret = tmp_path / "secret"
    secret.write_text("hush")
    for mode, expected in ((0o644, True), (0o640, False), (0o602, True)):
        secret.chmod(mode)
        code, out, _ = await arun("check", "-c", path)
        assert (code, "every user of this machine may read" in out) == (0, expected), out
    with gateway(tmp_path, made) as run:
        await until(lambda: run.said("every user of this machine may read"), "the warning")
        await until(lambda: run.said("gateway site-7"), "the gateway")
        await stop(run)


async def test_ranges_beyond_all_bounds_are_refused_on_the_socket(tmp_path: Path) -> None:
    async with field() as plant:
        with gateway(tmp_path, config(free_port(), {"a": device(plant.port)})) as run:
            await event(tmp_path, "start")
            reader, writer = await asyncio.open_unix_connection(tmp_path / "journal.db.sock")
            for first in (-(2**70), 0, 2**63):
                line = {"acknowledge": {"stream": "x", "ranges": [[first, 5]]}}
                writer.write(json.dumps(line).encode() + b"\n")
                answer = json.loads(await asyncio.wait_for(reader.readline(), 30.0))
                assert answer["ok"] is False
                assert "Expected `int`" in answer["error"]
            writer.close()
            await stop(run)
            assert not [line for line in run.lines if "Traceback" in line]


def test_a_message_is_one_line_of_the_log_whatever_came_into_it_from_outside() -> None:
    program = (
        "import logging\nfrom edgegw.cli.log import DAEMON, log_to_stderr\nlog_to_stderr('INFO', DAEMON)\n"
        "logging.error('%s', 'x' + chr(10) + '2026-11-24 00:00:00,000 ERROR FORGED' + chr(27) + '[2J')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.exception('crashed')\n"
    )
    with Process(sys.executable, "-c", program) as process:
        assert process.end()[0] == 0
        lines = process.lines
    assert lines[0].endswith(r"ERROR x\n2026-11-24 00:00:00,000 ERROR FORGED\x1b[2J")
    assert lines[1].endswith("ERROR crashed")
    assert lines[2] == "Traceback (most recent call last):", "a traceback keeps its lines"
