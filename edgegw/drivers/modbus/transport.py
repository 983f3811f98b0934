"""Transports: how a request's bytes reach a unit and the answer's come back.

Every connection carries one request at a time, since many a gateway serves only one: the next is sent when the one
before it was answered or timed out.
"""

from collections.abc import Awaitable
from typing import Protocol
from urllib.parse import urlsplit

from edgegw.drivers.modbus.rtu import RtuTransport
from edgegw.drivers.modbus.tcp import TcpTransport
from edgegw.errors import NotConnected


class Transport(Protocol):
    """A connection to one endpoint, shared by the units behind it."""

    @property
    def connected(self) -> bool:
        """Whether a request may be sent."""
        ...

    @property
    def violation(self) -> NotConnected | None:
        """Why the last connection was ended, if for what the endpoint sent over it."""
        ...

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        ...

    def call(self, unit: int, pdu: bytes, timeout_s: float) -> Awaitable[bytes]:
        """Send a request PDU and return the PDU that answers it; raise DeviceError, NotSent if nothing went out."""
        ...

    def check(self, unit: int) -> None:
        """Return if a unit may be read now; raise NoAnswer if it is failing and would delay its neighbours."""
        ...

    def recall(self) -> None:
        """Have nothing that was sent and has not been delivered arrive later, at the price of the connection."""
        ...

    def close(self) -> None:
        """Close the connection; what is on the way raises NotConnected."""
        ...


def open_transport(url: str) -> Transport:
    """Return the transport for a device's url."""
    return TcpTransport(url) if urlsplit(url).scheme in ("tcp", "tls") else RtuTransport(url)
