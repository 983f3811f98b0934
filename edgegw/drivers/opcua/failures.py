"""Turns what asyncua raises into our errors."""

import socket
import struct

from asyncua.ua.status_codes import StatusCodes
from asyncua.ua.uaerrors import UaError, UaStatusCodeError

from edgegw.drivers.opcua import values
from edgegw.errors import BadAnswer, DeviceError, NoAnswer, NotConnected, Refused

FOREIGN = (
    OSError, UaError, struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError,
)  # fmt: skip
"""What asyncua's calls raise: for the network, for a status code, and for bytes that it cannot decode."""

_SESSION_GONE = frozenset({
    StatusCodes.BadSessionIdInvalid,
    StatusCodes.BadSessionClosed,
    StatusCodes.BadSessionNotActivated,
    StatusCodes.BadSecureChannelIdInvalid,
    StatusCodes.BadSecureChannelClosed,
    StatusCodes.BadConnectionClosed,
    StatusCodes.BadShutdown,
    StatusCodes.BadServerHalted,
})  # fmt: skip
"""Status codes after which nothing more can be asked on this connection."""

FINAL = frozenset({
    StatusCodes.BadUserAccessDenied, StatusCodes.BadNotWritable, StatusCodes.BadNotReadable,
    StatusCodes.BadNodeIdUnknown, StatusCodes.BadNodeIdInvalid, StatusCodes.BadAttributeIdInvalid,
    StatusCodes.BadTypeMismatch, StatusCodes.BadOutOfRange, StatusCodes.BadWriteNotSupported,
    StatusCodes.BadNotSupported, StatusCodes.BadNotImplemented, StatusCodes.BadSecurityModeInsufficient,
})  # fmt: skip
"""Status codes of a write that would be refused in the same way again (OPC UA Part 4, 5.11.4.4)."""


def ours(error: BaseException, doing: str, timeout_s: float) -> DeviceError:
    """Return the error to raise for one of asyncua's, met while doing something."""
    match error:
        case TimeoutError():
            return NoAnswer("timeout", f"no answer in {timeout_s:.1f} s ({doing})")
        case ConnectionRefusedError():
            return NotConnected(
                "refused",
                "connection refused; expected an OPC UA server; is it running, and is the port right?",
            )
        case socket.gaierror():
            return NotConnected(
                "unknown-host",
                "the host has no address; expected a name that DNS knows; is it spelt right?",
            )
        case ConnectionError():
            return NotConnected("connection-lost", f"connection lost ({doing})")
        case OSError():
            return NotConnected("unreachable", f"{(error.strerror or str(error)).lower()} ({doing})")
        case UaStatusCodeError() if error.code in _SESSION_GONE:
            return NotConnected(
                "connection-lost", f"the server ended the session: {values.reason(error.code)} ({doing})"
            )
        case UaStatusCodeError():
            why = values.reason(error.code)
            return Refused(why, f"the server refuses: {why} ({doing})", final=error.code in FINAL)
        case _:
            return BadAnswer(
                "bad-answer", f"found an answer that is not OPC UA, or broken ({doing}): {error}"
            )
