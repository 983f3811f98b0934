"""A TCP way to a broker that understands MQTT packets: it can lose some kinds of them, each way."""

import asyncio
from typing import Self

PUBLISH, PUBACK = 3, 4


class LossyProxy:
    """Passes packets on, but for those of the kinds in `lose`, which it counts in `lost`.

    A PUBLISH (QoS 1) of more than `discard_above` bytes is acknowledged and goes no farther. With `rewrite`, messages
    have the second text for the first, of the same length; `rewritten` counts that.
    """

    def __init__(self, to_port: int) -> None:
        self.port = 0
        self.connections = 0
        self.lose: set[int] = set()
        self.lost = 0
        self.discard_above = 1 << 30
        self.rewrite: tuple[bytes, bytes] | None = None
        self.rewritten = 0
        self._to_port = to_port
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.close()
            return
        self.connections += 1
        try:
            await asyncio.gather(
                self._pass(reader, up_writer, writer), self._pass(up_reader, writer, up_writer)
            )
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            up_writer.close()
            writer.close()

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        while True:
            packet = await read_packet(source)
            if packet[0] >> 4 == PUBLISH and len(packet) > self.discard_above:
                self.lost += 1
                back.write(b"\x40\x02" + message_id(packet))
                continue
            if packet[0] >> 4 in self.lose:
                self.lost += 1
                continue
            if self.rewrite and packet[0] >> 4 == PUBLISH and self.rewrite[0] in packet:
                packet = packet.replace(*self.rewrite, 1)
                self.rewritten += 1
            sink.write(packet)
            await sink.drain()


async def read_packet(reader: asyncio.StreamReader) -> bytes:
    """Return the next MQTT packet as it came; raise IncompleteReadError at the end."""
    head = await reader.readexactly(1)
    length, shift = 0, 0
    while True:
        byte = await reader.readexactly(1)
        head += byte
        length |= (byte[0] & 0x7F) << shift
        shift += 7
        if not byte[0] & 0x80:
            return head + await reader.readexactly(length)


def make_packet(first: int, body: bytes) -> bytes:
    """Return an MQTT packet that begins with this byte."""
    length, rest = b"", len(body)
    while True:
        rest, byte = rest >> 7, rest & 0x7F
        length += bytes((byte | (0x80 if rest else 0),))
        if not rest:
            return bytes((first,)) + length + body


def message_id(publish: bytes) -> bytes:
    """Return the message id of a PUBLISH with QoS 1."""
    start = next(at for at in range(1, 5) if not publish[at] & 0x80) + 1
    topic_length = int.from_bytes(publish[start : start + 2], "big")
    return publish[start + 2 + topic_length :][:2]
