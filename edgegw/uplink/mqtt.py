"""MQTT: paho's client on the event loop, and the only place that knows paho.

One client object serves one connection and is then thrown away: what was not acknowledged comes again from the
journal, so paho must not keep or resend anything of its own.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgegw import clock
from edgegw.errors import UplinkError
from edgegw.uplink import tls
from edgegw.uplink.bounded_reader import BoundedReader
from edgegw.uplink.connect_errors import ProtocolRefused, refusal, silent
from edgegw.uplink.login import Login
from edgegw.uplink.messages import Ack, Incoming, Will

KEEPALIVE_S = 15
CONNECT_S = 10.0
MAX_INCOMING_BYTES = 256 * 1024
"""The largest message accepted from a broker: what a command or an acknowledgement of many ranges takes, and some."""
RECEIVE_MAXIMUM = 16
"""QoS 1 messages that an MQTT 5 broker may send before the first of them is acknowledged."""
MAX_QUEUED_PACKETS = 4096
"""Packets that may wait to be written: far above any window. Each packet of a broker may ask for one."""
RECEIVE_BYTES = 64 * 1024
SESSION_TAKEN_OVER = 0x8E
_PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


class _Client(paho.Client):
    """paho's client, with what it keeps to itself: the error that ended a connection."""

    failure: OSError | None = None
    first_byte: int | None = None

    def _sock_recv(self, bufsize: int) -> bytes:
        try:
            data = super()._sock_recv(min(bufsize, RECEIVE_BYTES))
        except BlockingIOError:
            raise
        except OSError as error:
            self.failure = error
            raise
        if self.first_byte is None and data:
            self.first_byte = data[0]
        return data


class Connection:
    """One connection to a broker, from its opening to its loss."""

    def __init__(self, url: str, protocol: str, login: Login, will: Will | None) -> None:
        self.url = url
        self.protocol = protocol
        self.client_id = login.client_id
        self.taken_over = False  # by another client with this client id, as the broker said (MQTT 5)
        self.sudden = False  # whether it was closed without a reason
        self.receive_maximum = 65535
        self.maximum_packet_size: int | None = None
        self.acknowledged: Callable[[int, Ack], None] = lambda mid, ack: None
        self._takers: dict[str, Callable[[Incoming], None]] = {}
        self._subscribing: dict[int, asyncio.Future[str | None]] = {}
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._housekeeping: asyncio.TimerHandle | None = None
        self._reader = BoundedReader(self._loop, self._read_packet)
        self._dropped = False
        parts = urlsplit(url)
        self._tls = login if parts.scheme == "mqtts" else None
        self._host, self._port = parts.hostname or "", parts.port or (8883 if self._tls else 1883)
        self._v5 = protocol == "5"
        client = self._client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=login.client_id,
            protocol=_PROTOCOLS[protocol],
            clean_session=None if self._v5 else True,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages_set(0)  # the drain keeps its own window
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        if login.username:
            client.username_pw_set(login.username, login.password or None)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_want_write
        client.on_socket_unregister_write = self._on_want_no_write

    @property
    def unsent(self) -> int:
        """Packets that wait to be written."""
        return len(self._client._out_packet)

    async def open(self, patience_s: float = CONNECT_S) -> None:
        """Connect and wait for the broker's word; raise UplinkError, of it Unanswered or ProtocolRefused."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.to_thread(self._dial)
        except TimeoutError:
            raise UplinkError(f"uplink {self.url}: no connection in {CONNECT_S:.0f} s") from None
        except OSError as error:
            raise UplinkError(f"uplink {self.url}: {self._reason(error)}") from None
        self._keep_house()
        try:
            async with asyncio.timeout(patience_s):
                await self._opened
        except TimeoutError:
            raise silent(self.url, patience_s) from None

    def _dial(self) -> None:
        """Connect, on a thread: names are resolved, files read and keys exchanged."""
        if self._tls is not None:
            self._client.tls_set_context(tls.context(self._tls))
        self._client.connect(self._host, self._port, KEEPALIVE_S, properties=self._requests())

    def _reason(self, error: OSError) -> str:
        """Return why the connection failed or ended."""
        if self._tls is not None:
            return tls.explain(error, self._host, clock.wall_ms(), certificate=bool(self._tls.cert_file))
        return (error.strerror or str(error)).lower()

    def _requests(self) -> Properties | None:
        """Return what is asked of an MQTT 5 broker: its limits for what it sends."""
        if not self._v5:
            return None
        requests = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        requests.MaximumPacketSize = MAX_INCOMING_BYTES
        requests.ReceiveMaximum = RECEIVE_MAXIMUM
        return requests

    def subscribe(self, topic: str, take: Callable[[Incoming], None]) -> asyncio.Future[str | None]:
        """Have `take` called with each message on a topic without wildcards; it confirms each when it is done with it.

        The future gives the reason for which the broker refuses, None if it does not; a connection that ends
        cancels it.
        """
        self._takers[_folded(topic)] = take
        answer: asyncio.Future[str | None] = self._loop.create_future()
        _, mid = self._client.subscribe(topic, qos=1)
        if mid is None or self.lost.done():
            answer.cancel()
        else:
            self._subscribing[mid] = answer
        return answer

    def confirm(self, incoming: Incoming) -> None:
        """Acknowledge a message; an MQTT 5 broker sends no more than RECEIVE_MAXIMUM before that."""
        if incoming.mid is not None:
            self._client.ack(incoming.mid, 1)

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
        for answer in self._subscribing.values():
            answer.cancel()
        self._subscribing.clear()

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
        why: str | None = None
        failed = isinstance(self._client.failure, ssl.SSLError)
        if flags.is_disconnect_packet_from_server:
            why = f"the broker ended it: {reason}".lower()
            if reason.value == SESSION_TAKEN_OVER:
                self.taken_over = True
                why = f"another client connects with the id {self.client_id}; is a second gateway of this id running?"
        elif self._client.failure is not None and failed:
            why = self._reason(self._client.failure)
        elif reason != "Unspecified error":  # which is what paho calls a connection that was closed or reset
            why = str(reason).lower()
        if not self._opened.done():
            unopened = refusal(self.url, why, v5=self._v5 and not failed, first_byte=self._client.first_byte)
            self._opened.set_exception(unopened)
        self.sudden = why is None
        self._lose(why or "connection lost")

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        # 0x10: accepted, but no matching subscribers (MQTT 5.0, 3.4.2.1)
        self.acknowledged(mid, Ack(not reason.is_failure, reason.value != 0x10, str(reason)))

    def _on_subscribe(
        self, client: Any, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        answer = self._subscribing.pop(mid, None)
        if answer is not None and not answer.done():
            answer.set_result(next((str(reason).lower() for reason in reasons if reason.is_failure), None))

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self.end("the broker sent a topic that is not UTF-8")
            return
        properties = message.properties
        incoming = Incoming(
            bytes(message.payload),
            message.retain,
            getattr(properties, "ResponseTopic", None),
            getattr(properties, "CorrelationData", None),
            message.mid if message.qos else None,
        )
        if (take := self._takers.get(_folded(topic))) is not None:
            take(incoming)
        else:
            self.confirm(incoming)

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        if self._dropped:
            sock.close()
        elif sock.fileno() >= 0:
            self._reader.start(sock)

    def _read_packet(self) -> bool:
        """Read and handle one packet; end the connection if the broker does what it must not.

        paho's own `loop_read` reads as many packets as messages are unacknowledged: a flood would hold the event loop,
        and the longer the more answers wait.
        """
        if self._client.socket() is None or self.lost.done():
            return False
        result = self._client._packet_read()
        # paho has no limit for these (2.2): a packet is read to its end whatever its size, messages of QoS 2, for
        # which nobody subscribed, are kept until the broker releases them, and answers wait for a broker to read them
        if self._client._in_packet["remaining_length"] > MAX_INCOMING_BYTES:
            self.end(f"the broker sent a message of more than {MAX_INCOMING_BYTES} bytes")
        elif self._client._in_messages:
            self.end("the broker sent a message of QoS 2, to a subscription of QoS 1")
        elif self.unsent > MAX_QUEUED_PACKETS:
            self.end("the broker asks for answers and does not read them")
        elif result not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN):
            self._client._loop_rc_handle(result)
        return result == MQTTErrorCode.MQTT_ERR_SUCCESS

    def end(self, why: str) -> None:
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
        self._reader.stop()
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock)

    def _on_want_write(self, client: Any, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_write, sock)

    def _watch_write(self, sock: Any) -> None:
        if self._dropped or sock is None or sock.fileno() < 0:
            return
        try:
            self._loop.add_writer(sock, self._client.loop_write)
        except RuntimeError:  # uvloop gives up its handle where a socket is reset, and tells nobody
            self.end("connection lost")

    def _on_want_no_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if sock is not None and sock.fileno() >= 0:
            self._loop.remove_writer(sock)


def _folded(topic: str) -> str:
    """Return a topic with its dots as slashes: RabbitMQ maps them on each other, `a/b.c` is delivered as `a/b/c`.

    A broker delivers only what was subscribed to, so that nothing else can be taken for it.
    """
    return topic.replace(".", "/")
