"""What a broker answers to CONNECT and SUBSCRIBE, or does not, and what the gateway makes of that."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from control_field import stop
from gateway_rig import config, device, gateway, toml, until
from mqtt_proxy import read_packet
from rig import Process, free_port, mosquitto, needs_mosquitto

from edgegw.errors import UplinkError
from edgegw.uplink import negotiation
from edgegw.uplink.login import Login
from edgegw.uplink.negotiation import connect

LOGIN = Login("edgegw-site-7")
V5, V311 = 5, 4
"""Levels of the protocol in a CONNECT (MQTT 5.0, 3.1.2.2; 3.1.1, 3.1.2.2)."""
SILENCE, HANG_UP = b"", b"hang up"
ACCEPT = {V5: b"\x20\x03\x00\x00\x00", V311: b"\x20\x02\x00\x00"}
REFUSE = b"\x20\x02\x00\x01"


class Broker:
    """Answers CONNECTs with what `answers` holds for the level of each, one after the other, the last for ever."""

    def __init__(self, answers: dict[int, list[bytes]]) -> None:
        self.url = ""
        self.levels: list[int] = []
        self._answers = answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            level = (await read_packet(reader))[8]
            self.levels.append(level)
            answers = self._answers[level]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer != HANG_UP:
                writer.write(answer)
                await reader.read()
        writer.close()


@asynccontextmanager
async def broker(v5: list[bytes], v311: list[bytes]) -> AsyncIterator[Broker]:
    made = Broker({V5: v5, V311: v311})
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


@pytest.mark.parametrize(
    ("v5", "v311", "spoken", "levels"),
    [
        ([ACCEPT[V5]], [SILENCE], "5", [V5]),
        ([REFUSE], [ACCEPT[V311]], "3.1.1", [V5, V311]),
        ([HANG_UP], [ACCEPT[V311]], "3.1.1", [V5, V311, V5, V311]),
        ([HANG_UP, ACCEPT[V5]], [ACCEPT[V311]], "5", [V5, V311, V5]),
        ([SILENCE], [ACCEPT[V311]], "3.1.1", [V5, V311, V5, V311]),
        ([SILENCE, ACCEPT[V5]], [ACCEPT[V311]], "5", [V5, V311, V5]),
        ([HANG_UP], [HANG_UP], "closed the connection in answer to CONNECT", [V5, V311]),
    ],
    ids=["speaks 5", "refuses 5", "hangs up on 5", "was starting", "silent to 5", "was frozen", "hangs up"],
)
async def test_only_an_answer_shows_that_a_broker_does_not_speak_mqtt_5(
    monkeypatch: pytest.MonkeyPatch, v5: list[bytes], v311: list[bytes], spoken: str, levels: list[int]
) -> None:
    monkeypatch.setattr(negotiation, "VERSION_S", 0.5)
    async with broker(list(v5), list(v311)) as made:
        if spoken in ("5", "3.1.1"):
            connection = await connect(made.url, "auto", LOGIN)
            assert connection.protocol == spoken
            connection.drop()
        else:
            with pytest.raises(UplinkError, match=spoken):
                await connect(made.url, "auto", LOGIN)
        assert made.levels == levels


@needs_mosquitto
async def test_a_frozen_broker_is_said_to_be_silent_and_is_asked_for_mqtt_5_when_it_thaws(
    tmp_path: Path,
) -> None:
    port = free_port()
    made = config(port, {"m": device(free_port())})
    said = "no answer to CONNECT in 10 s; the port is open: is the broker frozen"
    (tmp_path / "config.toml").write_text(toml(made))
    check = (
        sys.executable,
        "-m",
        "edgegw",
        "check",
        "--connect",
        "--json",
        "-c",
        str(tmp_path / "config.toml"),
    )
    with mosquitto(tmp_path, port) as server:
        server.send(signal.SIGSTOP)
        with gateway(tmp_path, made) as run, Process(*check) as checking:
            await until(lambda: run.said(said), "its silence", 60.0)
            code, out = await asyncio.to_thread(checking.end)
            assert code == 1
            assert said in json.loads(out)["tried"][f"uplink {made['uplink']['url']}"]
            server.send(signal.SIGCONT)
            await until(lambda: run.said("online, MQTT 5"), "the link", 60.0)
            assert not run.said("does not speak MQTT 5")
            await stop(run)


async def test_check_says_that_the_broker_hung_up_on_a_subscription(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            await read_packet(reader)
            writer.write(ACCEPT[V5])
            await read_packet(reader)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        made = config(server.sockets[0].getsockname()[1], {"m": device(free_port())})
        (tmp_path / "config.toml").write_text(toml(made))
        check = ("check", "--connect", "--json", "-c", str(tmp_path / "config.toml"))
        with Process(sys.executable, "-m", "edgegw", *check) as checking:
            code, out = await asyncio.to_thread(checking.end)
    url = made["uplink"]["url"]
    assert code == 1
    assert json.loads(out)["tried"][f"uplink {url}"] == f"uplink {url}: connection lost"


def dynamic_security() -> Path:
    """Return mosquitto's plugin that refuses subscriptions; its access lists grant all, and deliver nothing."""
    return next(Path("/usr/lib").rglob("mosquitto_dynamic_security.so"))


@needs_mosquitto
@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_subscription_that_the_broker_refuses_is_said_once_and_by_check(
    tmp_path: Path, version: str
) -> None:
    port = free_port()
    rules = {"publishClientSend": True, "publishClientReceive": True, "subscribe": False, "unsubscribe": True}
    (tmp_path / "security.json").write_text(json.dumps({"defaultACLAccess": rules}))
    plugin = dynamic_security()
    secured = f"allow_anonymous true\nplugin {plugin}\nplugin_opt_config_file {tmp_path}/security.json"
    made = config(port, {"m": device(free_port())}, uplink={"protocol": version})
    said = {name: f"the subscription to edgegw/site-7/{name} is refused: " for name in ("cmd", "ack")}

    def count(words: str) -> int:
        return sum(words in line for line in run.lines)

    with gateway(tmp_path, made) as run:
        for _ in range(2):
            links, losses = count("online, MQTT"), count("records stay")
            with mosquitto(tmp_path, port, secured):
                await until(lambda before=links: count("online, MQTT") > before, "the link", 60.0)
                await until(lambda: all(count(words) for words in said.values()), "the refusals")
                check = ("check", "--connect", "--json", "-c", str(tmp_path / "config.toml"))
                with Process(sys.executable, "-m", "edgegw", *check) as checking:
                    code, out = await asyncio.to_thread(checking.end)
                assert code == 1
                assert said["cmd"] in json.loads(out)["tried"][f"uplink {made['uplink']['url']}"]
            await until(lambda before=losses: count("records stay") > before, "the loss")
        assert [count(words) for words in said.values()] == [1, 1]
        await stop(run)
