"""What a TCP connection has taken and not yet delivered, and how to end it so that this never arrives.

Whoever closes a socket leaves the kernel to deliver what was written, for minutes if the way is cut. A write that
was given up would then reach the device after newer ones.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios


def undelivered(transport: asyncio.Transport) -> bool:
    """Tell whether anything written has not been acknowledged by the far end's kernel (tcp(7), SIOCOUTQ)."""
    if transport.get_write_buffer_size():
        return True
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return False
    try:
        (waiting,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    except OSError:
        return False  # it has ended already
    return bool(waiting > 0)


def discard(transport: asyncio.Transport) -> None:
    """Have closing reset the connection, if something would be left to deliver."""
    sock = transport.get_extra_info("socket")
    if sock is not None and undelivered(transport):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
