"""One MQTT connection, from CONNECT to its end: the only importer of paho in this folder."""

import socket
import ssl
from collections import deque
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgegw.clock import mono_s
from edgegw.errors import ConfigError, UplinkError
from edgegw.receiver.wire import MAX_MESSAGE

RECEIVE_MAXIMUM = 200
"""How many unacknowledged messages an MQTT 5 broker may have on their way to us."""
MAX_PACKET = MAX_MESSAGE + 64 * 1024
"""The largest packet that an MQTT 5 broker may send us: any gateway's batch with its topic and properties."""
SESSION_S = 7 * 24 * 3600
"""How long an MQTT 5 broker keeps messages for a receiver that is away."""
KEEPALIVE_S = 30
ANSWER_S = 3.0
"""How long a broker that speaks MQTT 5 may take to answer; amqtt 0.12 waits for bytes that never come."""
HANDSHAKE_S = 10.0
UNCONFIRMED = 16
"""How many published messages may be unconfirmed before no more are."""
FAREWELL_S = 2.0
"""How long to wait at the end for the last acknowledgements to leave."""


class Protocol(Enum):
    """The versions of MQTT that are spoken, the one to try first before the other."""

    V5 = "5"
    V311 = "3.1.1"


class ProtocolError(UplinkError):
    """The broker seems not to speak MQTT 5."""


class Message(NamedTuple):
    """What came; `mid` is None where no acknowledgement is wanted."""

    topic: str
    payload: bytes
    mid: int | None


class Broker(NamedTuple):
    """Where to subscribe, to what, and as whom."""

    host: str
    port: int
    tls: bool
    topic: str
    client_id: str
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @property
    def url(self) -> str:
        """The broker's address as an operator writes it."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Broker({self.url}, {self.topic})"


def parse_url(text: str) -> tuple[str, int, bool]:
    """Read `mqtt://HOST:PORT` or `mqtts://HOST:PORT` into host, port and whether TLS; raise ConfigError."""
    problem = f"--url: found {text!r}; expected mqtt://HOST:PORT or mqtts://HOST:PORT"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise ConfigError([problem]) from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError(["--url: found a user in it; expected none: use --username and --password-file"])
    if parts.scheme not in ("mqtt", "mqtts") or not host or parts.path not in ("", "/") or port == 0:
        raise ConfigError([problem])
    tls = parts.scheme == "mqtts"
    return host, port or (8883 if tls else 1883), tls


class Connection:
    """A paho client driven by its owner's thread; the callbacks only note what happened."""

    def __init__(self, broker: Broker, protocol: Protocol) -> None:
        self.inbox: deque[Message] = deque()
        self.lost: str | None = None
        self._broker = broker
        self._protocol = protocol
        self._answer: ReasonCode | None = None
        self._granted: list[ReasonCode] | None = None
        self._asked = False
        self._unconfirmed: dict[int, str] = {}
        self.refused: dict[str, str] = {}
        five = protocol is Protocol.V5
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=broker.client_id,
            clean_session=None if five else False,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        if broker.username is not None:
            self._client.username_pw_set(broker.username, broker.password)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.on_disconnect = self._on_disconnect

    def connect(self) -> None:
        """Reach the broker and send CONNECT; raise UplinkError."""
        try:
            if self._broker.tls:
                self._client.tls_set_context(self._tls_context())
            if self._protocol is Protocol.V5:
                wishes = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
                wishes.SessionExpiryInterval = SESSION_S
                wishes.ReceiveMaximum = RECEIVE_MAXIMUM
                wishes.MaximumPacketSize = MAX_PACKET
                self._client.connect(
                    self._broker.host, self._broker.port, KEEPALIVE_S, clean_start=False, properties=wishes
                )
            else:
                self._client.connect(self._broker.host, self._broker.port, KEEPALIVE_S)
            sock: Any = self._client.socket()
            if sock is not None:  # acknowledgements are small and many: do not let the kernel gather them
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise UplinkError(f"{self._broker.url}: {error.strerror or error}") from error

    def _tls_context(self) -> ssl.SSLContext:
        """Read the certificates, at each connection anew; raise OSError, of which ssl.SSLError is one."""
        context = ssl.create_default_context(cafile=self._broker.ca_file)
        if self._broker.cert_file is not None:
            context.load_cert_chain(self._broker.cert_file, self._broker.key_file, lambda: "")
        return context

    def check(self) -> None:
        """Raise ProtocolError if the broker does not answer to MQTT 5, UplinkError if it refused or left."""
        url = self._broker.url
        if self._answer is not None and self._answer.is_failure:
            refusal = f"{url}: connection refused: {self._answer}"
            raise (
                ProtocolError(refusal)
                if self._answer == "Unsupported protocol version"
                else UplinkError(refusal)
            )
        if self._granted is not None and any(code.is_failure for code in self._granted):
            raise UplinkError(f"{url}: subscription to {self._broker.topic} refused: {self._granted[0]}")
        if self.lost and self._answer is None and self._protocol is Protocol.V5:
            raise ProtocolError(f"{url}: {self.lost}")
        if self.lost:
            raise UplinkError(f"{url}: {self.lost}")

    def check_answer(self, waited_s: float) -> None:
        """Raise ProtocolError or UplinkError if the broker has been silent for too long."""
        if self._answer is None and self._protocol is Protocol.V5 and waited_s > ANSWER_S:
            raise ProtocolError(f"{self._broker.url}: no answer in {ANSWER_S:.0f} s")
        if waited_s > HANDSHAKE_S:
            raise UplinkError(f"{self._broker.url}: no answer in {HANDSHAKE_S:.0f} s")

    def subscribed(self) -> bool:
        """Subscribe once the broker has accepted us; True once it has granted it."""
        if self._answer is None:
            return False
        if not self._asked:
            self._asked = True
            self._client.subscribe(self._broker.topic, qos=1)
        return self._granted is not None

    def read(self, timeout_s: float) -> None:
        """Wait for the broker so long at most, and put what came into the inbox."""
        rc = self._client.loop(timeout_s)
        if rc is not MQTTErrorCode.MQTT_ERR_SUCCESS and self.lost is None:
            self.lost = mqtt.error_string(rc).rstrip(".").lower()

    def acknowledge(self, mid: int) -> None:
        """Confirm a message; nothing happens if the connection is lost, and the broker will send it again."""
        if self.lost is None:
            self._client.ack(mid, 1)

    @property
    def can_publish(self) -> bool:
        """Whether the broker is there and keeps up with what is published."""
        return self.lost is None and len(self._unconfirmed) < UNCONFIRMED

    @property
    def unconfirmed(self) -> set[str]:
        """The last levels of the topics of what was published and not confirmed."""
        return set(self._unconfirmed.values())

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish a message with QoS 1; `refused` has the reason of a refusal, by the last level of the topic."""
        info = self._client.publish(topic, payload, qos=1)
        self._unconfirmed[info.mid] = topic.rpartition("/")[2]

    def close(self) -> None:
        """Let the last acknowledgements leave and say goodbye, if there is still someone to say it to."""
        if self.lost is None and self._answer is not None and not self._answer.is_failure:
            self._client.disconnect()
        deadline_s = mono_s() + FAREWELL_S
        while self._client.want_write() and self.lost is None and mono_s() < deadline_s:
            self._client.loop(0.1)
        sock: Any = self._client.socket()
        if sock is not None:
            sock.close()

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        self._answer = reason

    def _on_subscribe(
        self, client: Any, userdata: Any, mid: int, codes: list[ReasonCode], props: Any
    ) -> None:
        self._granted = codes

    def _on_message(self, client: Any, userdata: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "?"
        self.inbox.append(Message(topic, bytes(message.payload), message.mid if message.qos else None))

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        level = self._unconfirmed.pop(mid, "")
        if reason.is_failure:
            self.refused[level] = str(reason)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: mqtt.DisconnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if self.lost is None:
            self.lost = (
                f"the broker ended it: {reason}"
                if flags.is_disconnect_packet_from_server
                else "connection lost"
            )
