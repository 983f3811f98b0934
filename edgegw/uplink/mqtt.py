"""MQTT: paho's client on the event loop, and the only place that knows paho.

One client object serves one connection and is then thrown away: what was not acknowledged comes again from the
journal, so paho must not keep or resend anything of its own.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgegw.errors import UplinkError

log = logging.getLogger(__name__)

KEEPALIVE_S = 15
CONNECT_S = 10.0
VERSION_S = 4.0
"""How long a broker may keep silent to a CONNECT of MQTT 5 before 3.1.1 is tried: some old ones just do."""
MAX_INCOMING_BYTES = 256 * 1024
"""The largest message accepted from a broker: what a command or an acknowledgement of many ranges takes, and some."""
_PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


class Login(NamedTuple):
    """How to present oneself to a broker."""

    client_id: str
    username: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class Will(NamedTuple):
    """What the broker says for us, retained, when the connection is gone."""

    topic: str
    payload: bytes


class Ack(NamedTuple):
    """What the broker said to a publish.

    `heard` is False only where MQTT 5 tells that nobody is subscribed.
    """

    accepted: bool
    heard: bool
    reason: str


class Incoming(NamedTuple):
    """A message to the gateway. `answer_to` and `correlation` are MQTT 5's request and response."""

    payload: bytes
    retained: bool
    answer_to: str | None
    correlation: bytes | None


class ProtocolRefused(UplinkError):
    """The broker does not speak this version of MQTT."""


async def connect(url: str, protocol: str, login: Login, will: Will | None = None) -> "Connection":
    """Connect to one broker; `auto` tries MQTT 5, then 3.1.1. Raise UplinkError."""
    if protocol != "auto":
        return await _open(Connection(url, protocol, login, will))
    try:
        return await _open(Connection(url, "5", login, will))
    except ProtocolRefused:
        log.info("uplink %s: does not speak MQTT 5; trying 3.1.1", url)
        return await _open(Connection(url, "3.1.1", login, will))


async def _open(connection: "Connection") -> "Connection":
    try:
        await connection.open()
    except BaseException:
        connection.drop()
        raise
    return connection


class Connection:
    """One connection to a broker, from its opening to its loss."""

    def __init__(self, url: str, protocol: str, login: Login, will: Will | None) -> None:
        self.url = url
        self.protocol = protocol
        self.receive_maximum = 65535
        self.maximum_packet_size: int | None = None
        self.acknowledged: Callable[[int, Ack], None] = lambda mid, ack: None
        self._takers: dict[str, Callable[[Incoming], None]] = {}
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._housekeeping: asyncio.TimerHandle | None = None
        self._dropped = False
        parts = urlsplit(url)
        secure = parts.scheme == "mqtts"
        self._host, self._port = parts.hostname or "", parts.port or (8883 if secure else 1883)
        self._v5 = protocol == "5"
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=login.client_id,
            protocol=_PROTOCOLS[protocol],
            clean_session=None if self._v5 else True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages_set(0)  # the drain keeps its own window
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        if login.username:
            client.username_pw_set(login.username, login.password or None)
        if secure:
            client.tls_set_context(_tls(login))
        client.on_connect = self._on_connect
        client.on_connect_fail = None
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_want_write
        client.on_socket_unregister_write = self._on_want_no_write

    async def open(self) -> None:
        """Connect and wait for the broker's word; raise UplinkError."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.to_thread(
                    self._client.connect, self._host, self._port, KEEPALIVE_S, properties=self._requests()
                )
        except TimeoutError:
            raise UplinkError(f"uplink {self.url}: no connection in {CONNECT_S:.0f} s") from None
        except ssl.SSLError as error:
            raise UplinkError(f"uplink {self.url}: TLS failed: {error.reason or error}".lower()) from None
        except OSError as error:
            raise UplinkError(f"uplink {self.url}: {(error.strerror or str(error)).lower()}") from None
        self._keep_house()
        patience_s = VERSION_S if self._v5 else CONNECT_S
        try:
            async with asyncio.timeout(patience_s):
                await self._opened
        except TimeoutError:
            kind = ProtocolRefused if self._v5 else UplinkError
            raise kind(f"uplink {self.url}: connected, but no answer in {patience_s:.0f} s") from None

    def _requests(self) -> Properties | None:
        """Return what is asked of an MQTT 5 broker: to discard what would be too large for us."""
        if not self._v5:
            return None
        requests = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        requests.MaximumPacketSize = MAX_INCOMING_BYTES
        return requests

    def subscribe(self, topic: str, take: Callable[[Incoming], None]) -> None:
        """Have `take` called with each message on a topic, which holds no wildcard."""
        self._takers[topic] = take
        self._client.subscribe(topic, qos=1)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False,
        content_type: str | None = None, correlation: bytes | None = None,
    ) -> int:  # fmt: skip
        """Hand a QoS 1 message to the connection and return the id its acknowledgement will bear."""
        properties = None
        if self._v5 and (content_type or correlation):
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            if content_type:
                properties.ContentType = content_type
            if correlation:
                properties.CorrelationData = correlation
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        return info.mid

    def close(self) -> None:
        """Say goodbye, so that the broker does not publish the will."""
        self._client.disconnect()
        self._client.loop_write()
        self.drop()

    def drop(self) -> None:
        """End the connection at once."""
        self._dropped = True
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        sock = self._client.socket()
        if sock is not None:
            self._forget(sock)
            sock.close()
        self._lose("closed")

    def _lose(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)
        if not self._opened.done():
            self._opened.set_exception(UplinkError(f"uplink {self.url}: {why}"))
            self._opened.exception()  # whoever waits gets it; nobody need

    def _keep_house(self) -> None:
        """Send pings and notice that their answers are missing, once a second."""
        if self._client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._housekeeping = self._loop.call_later(1.0, self._keep_house)
        else:
            self._lose("connection lost")

    # -- paho's callbacks: all on the event loop's thread, but those about the socket while connecting ------

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        if self._opened.done():
            return
        if reason.is_failure:
            kind = ProtocolRefused if "protocol version" in str(reason).lower() else UplinkError
            self._opened.set_exception(kind(f"uplink {self.url}: refused: {reason}".lower()))
            return
        if properties is not None:
            self.receive_maximum = getattr(properties, "ReceiveMaximum", 65535)
            self.maximum_packet_size = getattr(properties, "MaximumPacketSize", None)
        self._opened.set_result(None)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: paho.DisconnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if not self._opened.done() and self._v5:
            # an old broker hangs up on the unknown version without a word (MQTT 3.1.1, 3.1.2.2)
            self._opened.set_exception(ProtocolRefused(f"uplink {self.url}: hung up: {reason}".lower()))
        if flags.is_disconnect_packet_from_server:
            self._lose(f"the broker ended it: {reason}".lower())
        else:  # paho calls a connection that was closed or reset an unspecified error
            unspecified = reason == "Unspecified error"
            self._lose("connection lost" if unspecified else str(reason).lower())

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        # 0x10: accepted, but no matching subscribers (MQTT 5.0, 3.4.2.1)
        self.acknowledged(mid, Ack(not reason.is_failure, reason.value != 0x10, str(reason)))

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._end("the broker sent a topic that is not UTF-8")
            return
        properties = message.properties
        answer_to = getattr(properties, "ResponseTopic", None)
        correlation = getattr(properties, "CorrelationData", None)
        if (take := self._takers.get(topic)) is not None:
            take(Incoming(bytes(message.payload), message.retain, answer_to, correlation))

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        if self._dropped:
            sock.close()
        elif sock.fileno() >= 0:
            self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        self._client.loop_read()
        # paho has no limit for either (2.1): a packet is read to its end whatever its size, and messages of QoS 2,
        # for which nobody subscribed, are kept until the broker releases them
        if self._client._in_packet["remaining_length"] > MAX_INCOMING_BYTES:
            self._end(f"the broker sent a message of more than {MAX_INCOMING_BYTES} bytes")
        elif self._client._in_messages:
            self._end("the broker sent a message of QoS 2, to a subscription of QoS 1")

    def _end(self, why: str) -> None:
        """End a connection whose broker does what it must not; paho may be in the middle of a packet."""
        self._lose(why)
        self._loop.call_soon(self.drop)

    def _on_socket_close(self, client: Any, userdata: Any, sock: Any) -> None:
        if self._loop.is_closed():
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return  # the connecting thread closes what it opened; it was never watched
        self._forget(sock)

    def _forget(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def _on_want_write(self, client: Any, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_write, sock)

    def _watch_write(self, sock: Any) -> None:
        if not self._dropped and sock.fileno() >= 0:
            self._loop.add_writer(sock, self._client.loop_write)

    def _on_want_no_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock)


def _tls(login: Login) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=login.ca_file or None)
        if login.cert_file:
            context.load_cert_chain(login.cert_file, login.key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise UplinkError(f"uplink: ca_file, cert_file or key_file cannot be used: {error}") from None
    return context
