"""Tells systemd how the service is doing (sd_notify(3))."""

import os
import socket


class Notifier:
    """Sends datagrams to $NOTIFY_SOCKET; without one it says nothing."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(watchdog) / 1e6 if watchdog.isdecimal() and for_us else None
        """How often systemd wants a sign of life, None if it does not."""

    def send(self, *lines: str) -> None:
        """Send a state, as in `READY=1` or `STATUS=...`."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(self._address)
                sock.sendall("\n".join(lines).encode())
            except OSError:
                return  # nobody listens; that must not stop the gateway
