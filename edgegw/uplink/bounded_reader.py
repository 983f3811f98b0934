"""Reads a socket for a bounded time at once, so that a peer that floods it never has the event loop for itself."""

import asyncio
from collections.abc import Callable
from typing import Any

from edgegw import clock

TURN_S = 0.002
"""How long a turn may hold the event loop, but for the packet that it ends with."""


class BoundedReader:
    """Calls `read` while the socket has something, for TURN_S, and then rests as long as the turn took.

    So reading takes half of the time at most, whatever a packet costs. `read` handles one packet and returns whether
    there may be more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Callable[[], bool]) -> None:
        self._loop = loop
        self._read = read
        self._sock: Any = None
        self._resting: asyncio.TimerHandle | None = None

    def start(self, sock: Any) -> None:
        """Read from this socket, which does not block."""
        self._sock = sock
        self._loop.add_reader(sock, self._turn)

    def stop(self) -> None:
        """Read no more; called before the socket is closed."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._sock = None

    def _turn(self) -> None:
        began_s = clock.mono_s()
        while clock.mono_s() - began_s < TURN_S:
            if not self._read():
                return
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._resting = self._loop.call_later(clock.mono_s() - began_s, self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        self._loop.add_reader(self._sock, self._turn)
        self._turn()  # what TLS has decrypted already does not make the socket readable
