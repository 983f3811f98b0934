"""The port between the gateway and a field device."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value


class Driver(Protocol):
    """A device as the scanner sees it.

    Entering the context starts to keep a connection and never touches the network itself; leaving it
    closes the connection. `scan` raises `errors.DeviceError` when the device gives nothing; a tag that
    alone is bad is a value None with a quality in the scan and harms no other tag.
    """

    period_s: float | None
    """Seconds between the starts of two scans; None if the device itself says when (a subscription)."""

    on_connected: Callable[[], None]
    """Called whenever a connection has been made; the scanner sets it, to scan at once after an outage."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def scan(self) -> Sequence[Scan]:
        """Return the device's next readings: one scan, or one for each timestamp the source gave.

        A polled device is read now. A subscribed device returns when readings have come, and raises once for each
        loss and each failed attempt to connect.
        """
        ...

    async def write(self, tag: str, value: Scalar) -> Value:
        """Write one tag, at most once, and return what reading it back gives, in the tag's unit.

        Whether the tag may be written, and how far, is the guard's business; whether what comes back is what was
        meant is the caller's. Raises errors.Unconfirmed if it is not known whether the write took effect, and any
        other DeviceError if it did not: Refused by the device, or here because the tag cannot hold the value;
        NotConnected if nothing could be sent. The write is never sent a second time.
        """
        ...

    async def read(self) -> Sequence[Scan]:
        """Connect if need be, and read all tags once, whether they are polled or subscribed; raise DeviceError."""
        ...


@runtime_checkable
class LearnsTypes(Protocol):
    """A driver that learns from its device in which types this holds what may be written."""

    held_types: Mapping[str, str]
    """The contract's type of each writable number, by tag; another mapping whenever they were learnt anew."""
