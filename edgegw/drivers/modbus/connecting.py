"""Why a connection could not be made: the cause, and a hint for the operator."""

import errno
import socket
import ssl

from edgegw.errors import NotConnected

_SERIAL = {
    errno.ENOENT: ("no-such-device", "no such device; expected a serial port; is the adapter plugged in?"),
    errno.ENODEV: ("no-such-device", "no such device; expected a serial port; is the adapter plugged in?"),
    errno.ENXIO: (
        "no-such-device",
        "no device behind it; expected a serial port; is the adapter plugged in?",
    ),
    errno.EACCES: (
        "not-permitted",
        "permission denied; expected a port that may be read and written; is this user in its group, as a rule "
        "dialout?",
    ),
    errno.EBUSY: ("busy", "in use by another program; expected a port of our own; what else has it open?"),
    errno.ENOTTY: (
        "no-serial-port",
        "found something else than a serial port; expected one, as in /dev/ttyUSB0",
    ),
}
_SERIAL[errno.EPERM] = _SERIAL[errno.EACCES]
_SERIAL[errno.EAGAIN] = _SERIAL[errno.EBUSY]  # of the lock


def network_failure(error: OSError, timeout_s: float) -> NotConnected:
    """Return why a TCP or TLS connection could not be made."""
    match error:
        case TimeoutError():
            return NotConnected("unreachable", f"no connection in {timeout_s} s")
        case ConnectionRefusedError():
            return NotConnected("refused", "connection refused; is it switched on, and is the port right?")
        case ssl.SSLCertVerificationError():
            what = f"certificate refused: {error.verify_message}"
            return NotConnected(
                "not-trusted", f"{what}; is its CA in the system's store or in SSL_CERT_FILE?"
            )
        case socket.gaierror():
            return NotConnected(
                "unreachable", f"{(error.strerror or str(error)).lower()}; is it spelt right?"
            )
        case _:
            return NotConnected("unreachable", (error.strerror or str(error)).lower())


def serial_failure(path: str, error: OSError, timeout_s: float) -> NotConnected:
    """Return why a serial port could not be opened, from the error of pyserial."""
    if isinstance(error, TimeoutError):
        return NotConnected("unreachable", f"{path}: not open in {timeout_s} s")
    cause = error.__context__  # pyserial hides the number of a port that cannot be configured
    number = error.errno or (cause.args[0] if cause is not None and cause.args else None)
    reason, what = _SERIAL.get(number or 0, ("unreachable", str(error).lower()))
    return NotConnected(reason, f"{path}: {what}")
