"""Field endpoints that mean harm, in a process of their own, and what a healthy device beside them comes to.

As a script: `hostile.py KIND` listens on a free port, and prints it.
"""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK = 256 * 1024


def mbap(tid: int) -> bytes:
    """Return a sound Modbus/TCP answer to a request that nobody made."""
    return struct.pack(">HHHB", tid, 0, 5, 1) + b"\x03\x02\x00\x07"


def crc16(data: bytes) -> bytes:
    """Return the CRC of an RTU frame (Modbus over Serial Line 1.02, 6.2.2)."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc.to_bytes(2, "little")


UNREQUESTED = mbap(0xFFFF) * (CHUNK // len(mbap(0)))
RTU = b"\x07\x03\x02\x00\x07" + crc16(b"\x07\x03\x02\x00\x07")
ACKNOWLEDGE = b"ACKF" + struct.pack("<6I", 28, 0, 65535, 65535, 0, 0)


def chunk(final: bytes, body: bytes, kind: bytes = b"MSG") -> bytes:
    """Return an OPC UA chunk with its header of eight bytes (Part 6, 7.1.2.2)."""
    return kind + final + struct.pack("<I", 8 + len(body)) + body


class Endpoint:
    """One connection of an endpoint that means harm."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def forever(self, data: bytes) -> None:
        while True:
            self.send(data)

    def drain(self) -> None:
        while self._sock.recv(CHUNK):
            pass

    # ---- Modbus

    def stream(self) -> None:
        """Frames that nobody asked for, without end."""
        self.forever(UNREQUESTED)

    def burst(self) -> None:
        """256 KiB of them at once, and then nothing."""
        self.send(UNREQUESTED)
        self.drain()

    def garbage(self) -> None:
        """256 KiB of what is no Modbus."""
        self.send(b"\xff" * CHUNK)
        self.drain()

    def between(self) -> None:
        """Right answers, and a stream of frames behind each."""
        while head := self._sock.recv(12):
            tid, _, _, unit, function, _, count = struct.unpack(">HHHBBHH", head)
            pdu = bytes((function, 2 * count)) + bytes(2 * count)
            self.send(struct.pack(">HHHB", tid, 0, len(pdu) + 1, unit) + pdu + UNREQUESTED)

    def rtu_stream(self) -> None:
        """Frames of another unit on a line, without end."""
        self.forever(RTU * (CHUNK // len(RTU)))

    def rtu_drip(self) -> None:
        """The same, a few frames a segment, as fast as they go."""
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.forever(RTU * 20)

    # ---- OPC UA

    def giant(self) -> None:
        """A message that is announced to have 2 GiB, and its bytes."""
        self._sock.recv(CHUNK)
        self.send(ACKNOWLEDGE + b"MSGF" + struct.pack("<I", 2**31 - 1))
        self.forever(bytes(CHUNK))

    def endless(self) -> None:
        """A message of chunks that never ends."""
        self._sock.recv(CHUNK)
        self.send(ACKNOWLEDGE)
        for sequence in range(1, 2**31):
            self.send(chunk(b"C", struct.pack("<4I", 0, 0, sequence, 1) + bytes(8000)))

    def aborted(self) -> None:
        """Messages that are aborted, without end."""
        self._sock.recv(CHUNK)
        self.send(ACKNOWLEDGE)
        for sequence in range(1, 2**31):
            self.send(chunk(b"A", struct.pack("<4IIi", 0, 0, sequence, 1, 0x80010000, -1)))

    def lengthy(self) -> None:
        """An answer to the request for a channel that has a megabyte."""
        self._sock.recv(CHUNK)
        self.send(ACKNOWLEDGE)
        self._sock.recv(CHUNK)
        for sequence in range(1, 17):
            part = b"F" if sequence == 16 else b"C"
            self.send(chunk(part, struct.pack("<4I", 0, 0, sequence, 1) + bytes(65_000)))
        self.drain()

    def unasked(self) -> None:
        """Messages that answer no request, without end."""
        self._sock.recv(CHUNK)
        self.send(ACKNOWLEDGE)
        for sequence in range(1, 2**31):
            self.send(chunk(b"F", struct.pack("<4I", 0, 0, sequence, 77_777) + bytes(100)))


def _serve(kind: str) -> None:
    def run(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            getattr(Endpoint(sock), kind)()

    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    while True:
        sock, _ = listening.accept()
        threading.Thread(target=run, args=(sock,), daemon=True).start()


class Hostile:
    """A process that serves one kind of endpoint."""

    def __init__(self, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@asynccontextmanager
async def hostile(kind: str) -> AsyncIterator[Hostile]:
    """Run an endpoint of a kind."""
    made = await asyncio.to_thread(Hostile, kind)
    try:
        yield made
    finally:
        made.end()


if __name__ == "__main__":
    _serve(sys.argv[1])
