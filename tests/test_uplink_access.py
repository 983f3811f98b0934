"""The access list that the docs give a broker: it allows what is needed, and nothing else."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from control_field import command, stop
from field import field
from gateway_rig import config, device, gateway, until
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from rig import DEADLINE_S, MOSQUITTO, ROOT, Process, free_port, mosquitto, needs_mosquitto

USERS = ("site-7", "site-8", "archive", "operator")
ALLOWED = [
    ("archive", "edgegw/site-7/ack", True),
    ("archive", "edgegw/site-7/cmd", True),
    ("archive", "edgegw/site-7/data", False),
    ("operator", "edgegw/site-7/cmd", True),
    ("operator", "edgegw/site-7/ack", False),
    ("operator", "edgegw/site-8/cmd", False),
    ("site-8", "edgegw/site-8/data", True),
    ("site-8", "edgegw/site-7/data", False),
    ("site-8", "edgegw/site-7/cmd", False),
]


class Client:
    """A user of the broker, who keeps what comes and how each publication was acknowledged."""

    def __init__(self, port: int, user: str, topic: str) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.accepted: dict[int, bool] = {}
        self._ready = threading.Event()
        client = self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        client.username_pw_set(user, user)
        client.on_connect = lambda *_: client.subscribe(topic, 1)
        client.on_subscribe = lambda *_: self._ready.set()
        client.on_message = lambda _, __, message: self.messages.append((message.topic, message.payload))
        client.on_publish = lambda _, __, mid, reason, ___: self.accepted.update({mid: not reason.is_failure})
        client.connect("127.0.0.1", port)
        client.loop_start()
        assert self._ready.wait(DEADLINE_S)

    def publish(self, topic: str, payload: bytes) -> int:
        """Publish a message and return its id."""
        return self._client.publish(topic, payload, 1).mid

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def secured(tmp_path: Path) -> str:
    """Return settings of a broker with the docs' access list, where each user's name is the password."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    section = text.partition("### Who may do what at the broker")[2]
    (tmp_path / "access").write_text(section.split("```")[1])
    passwd = Path(MOSQUITTO).parent.parent / "bin" / "mosquitto_passwd"
    for number, user in enumerate(USERS):
        create = () if number else ("-c",)
        with Process(str(passwd), "-b", *create, str(tmp_path / "users"), user, user) as made:
            assert made.end()[0] == 0
    return f"allow_anonymous false\npassword_file {tmp_path}/users\nacl_file {tmp_path}/access"


@needs_mosquitto
async def test_p10_the_docs_access_list_allows_what_is_needed_and_nothing_else(
    tmp_path: Path, secured: str
) -> None:
    port = free_port()
    (tmp_path / "password").write_text("site-7")
    async with field() as meter:
        login = {"username": "site-7", "password_file": "password"}
        made = config(port, {"m": device(meter.port)}, uplink=login)
        with mosquitto(tmp_path, port, secured), gateway(tmp_path, made) as run:
            archive = await asyncio.to_thread(Client, port, "archive", "edgegw/#")
            operator = await asyncio.to_thread(Client, port, "operator", "edgegw/#")
            stranger = await asyncio.to_thread(Client, port, "site-8", "edgegw/#")
            await until(lambda: any(topic.endswith("/data") for topic, _ in archive.messages), "batches")
            operator.publish("edgegw/site-7/cmd", command("c1", {"m.none": 1.0}))
            await until(lambda: operator.messages, "the answer")
            assert {topic for topic, _ in operator.messages} == {"edgegw/site-7/reply"}
            assert json.loads(operator.messages[0][1])["id"] == "c1"
            assert not stranger.messages
            clients = {"archive": archive, "operator": operator, "site-8": stranger}
            for user, topic, allowed in ALLOWED:
                mid = clients[user].publish(topic, b"{}")
                await until(lambda user=user, mid=mid: mid in clients[user].accepted, "its acknowledgement")
                assert clients[user].accepted[mid] is allowed, (user, topic)
            for client in clients.values():
                client.close()
            await stop(run)
