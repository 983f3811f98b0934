"""Bounds what a server may send: asyncua's protocol, with each chunk's header checked before its bytes are kept.

asyncua 2.1 waits for as many bytes as a header announces, and copies what it has at each packet. It replaces its own
limits by those that the server acknowledges, which may be none.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any

from asyncua import ua
from asyncua.client.ua_client import UaClient, UASocketProtocol
from asyncua.common.connection import TransportLimits
from asyncua.ua.ua_binary import uatcp_to_binary

from edgegw.drivers.opcua.request import ReadEncoded

MAX_CHUNK_BYTES = 65_536
"""Of one chunk, headers included: what the Hello asks for (OPC UA Part 6, 7.1.2.3)."""
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MIN_CHUNK_BYTES = 8192
"""The least that either side has to accept (7.1.2.3)."""
MAX_CHUNKS = MAX_MESSAGE_BYTES // MIN_CHUNK_BYTES
MAX_SHORT_BYTES = 128 * 1024
"""Of an answer that asyncua decodes as a whole, at up to 7 µs a byte."""
_LONG = (ReadEncoded, ua.PublishRequest, ua.BrowseRequest, ua.BrowseNextRequest)
"""Requests whose answers may be as long as a message: those that are decoded here, and what a person waits for."""
MAX_ABORTED = 16
"""Messages in a row that the server may begin and not end."""

_HEADER = struct.Struct("<3scI")
"""The type of a message, what the chunk is of it, and the chunk's size in bytes, this header included (7.1.2.2)."""


class MessageBounds:
    """Adds up the chunks of a message, and raises ValueError as soon as a bound is passed."""

    def __init__(self) -> None:
        self._bytes = self._chunks = self._aborted = 0

    def check(self, size: int) -> None:
        """Check the size of a chunk by its header, before the rest of it is there."""
        if not _HEADER.size <= size <= MAX_CHUNK_BYTES:
            raise ValueError(f"found a chunk of {size} bytes; expected {MAX_CHUNK_BYTES} at most")
        if self._bytes + size > MAX_MESSAGE_BYTES:
            raise ValueError(f"found a message of more than {MAX_MESSAGE_BYTES} bytes; expected no more")

    def add(self, part: bytes, size: int) -> None:
        """Count a chunk that is there: `C` goes on, `F` ends its message, `A` aborts it."""
        self._bytes += size
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise ValueError(f"found a message of {self._chunks} chunks; expected {MAX_CHUNKS} at most")
        if part != b"C":
            self._aborted = self._aborted + 1 if part == b"A" else 0
            self._bytes = self._chunks = 0
        if self._aborted > MAX_ABORTED:
            raise ValueError(f"found {self._aborted} messages in a row that are aborted; expected answers")


class BoundedProtocol(UASocketProtocol):
    """asyncua's protocol, which gets whole chunks within the bounds, and answers to what was asked.

    Anything else ends the connection, and `violated` is called with the reason.
    """

    def __init__(
        self, timeout_s: float, security_policy: Any, violated: Callable[[ValueError], None]
    ) -> None:
        limits = TransportLimits(MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_MESSAGE_BYTES)
        super().__init__(timeout_s, security_policy, limits)
        self._violated = violated
        self._bounds = MessageBounds()
        self._received = bytearray()
        self._short: set[int] = set()

    def data_received(self, data: bytes) -> None:
        """Pass on the chunks that are whole; each byte is copied twice, however many packets it comes in."""
        self._received += data
        whole = 0
        try:
            while len(self._received) - whole >= _HEADER.size:
                _, part, size = _HEADER.unpack_from(self._received, whole)
                self._bounds.check(size)
                if len(self._received) < whole + size:
                    break
                self._bounds.add(part, size)
                whole += size
        except ValueError as error:
            self._end(error)
            return
        if whole:
            chunks = bytes(self._received[:whole])
            del self._received[:whole]
            super().data_received(chunks)

    async def send_hello(self, url: str, max_messagesize: int = 0, max_chunkcount: int = 0) -> ua.Acknowledge:
        """Send a Hello with our own bounds (7.1.2.3)."""
        hello = ua.Hello(
            ReceiveBufferSize=ua.UInt32(MAX_CHUNK_BYTES),
            SendBufferSize=ua.UInt32(MAX_CHUNK_BYTES),
            MaxMessageSize=ua.UInt32(MAX_MESSAGE_BYTES),
            MaxChunkCount=ua.UInt32(MAX_CHUNKS),
            EndpointUrl=ua.String(url),
        )
        answer: asyncio.Future[ua.Acknowledge] = asyncio.get_running_loop().create_future()
        self._callbackmap[0] = answer
        if self.transport is not None:
            self.transport.write(uatcp_to_binary(ua.MessageType.Hello, hello))  # type: ignore[arg-type]
        return await asyncio.wait_for(answer, self.timeout)

    def _process_received_message(self, msg: Any) -> None:
        """Apply of an acknowledgement only how large the chunks may be that we send."""
        if isinstance(msg, ua.Acknowledge):
            if msg.ReceiveBufferSize < MIN_CHUNK_BYTES:
                what = f"found a server that accepts chunks of {msg.ReceiveBufferSize} bytes"
                error = ValueError(f"{what}; expected {MIN_CHUNK_BYTES} at least")
                self._violated(error)
                raise error
            self._connection._limits = TransportLimits(
                MAX_CHUNK_BYTES, min(msg.ReceiveBufferSize, MAX_CHUNK_BYTES), MAX_CHUNKS, MAX_MESSAGE_BYTES
            )
        super()._process_received_message(msg)

    def _send_request(
        self, request: Any, timeout: float = 1, message_type: Any = ua.MessageType.SecureMessage
    ) -> "asyncio.Future[Any]":
        future = super()._send_request(request, timeout, message_type)
        if not isinstance(request, _LONG):
            self._short.add(self._request_id)
        return future

    def _call_callback(self, request_id: int, body: Any) -> None:
        if request_id not in self._callbackmap:
            self._violated(ValueError(f"found an answer to request {request_id}, which was not made"))
        if request_id in self._short:
            self._short.remove(request_id)
            if len(body) > MAX_SHORT_BYTES:
                what = f"found an answer of {len(body)} bytes to a request of a few"
                error = ValueError(f"{what}; expected {MAX_SHORT_BYTES} at most")
                self._violated(error)
                raise error
        super()._call_callback(request_id, body)  # raises if it is not there, and the connection ends

    def _end(self, error: ValueError) -> None:
        self._received.clear()
        self._violated(error)
        self._fail_all_pending(error)
        if self.transport is not None:
            self.transport.abort()


def bound(client: UaClient, timeout_s: float, violated: Callable[[ValueError], None]) -> None:
    """Have a client use the bounded protocol; `violated` is called with the reason when it ends a connection."""

    def make_protocol() -> BoundedProtocol:
        protocol = BoundedProtocol(timeout_s, client.security_policy, violated)
        protocol.pre_request_hook = client.pre_request_hook
        protocol.on_connection_lost = client._on_transport_lost
        protocol.is_session_closing = client._is_session_closing
        client.protocol = protocol
        return protocol

    client._make_protocol = make_protocol  # type: ignore[method-assign]  # asyncua has no other way in
