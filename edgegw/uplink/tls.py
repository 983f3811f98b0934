"""TLS to a broker: the context from the configured files, and what a failure means for the operator."""

import ssl
from datetime import UTC, datetime
from typing import NoReturn

from edgegw.errors import UplinkError
from edgegw.uplink.login import Login

_UNKNOWN_AUTHORITY = (18, 19, 20, 21)
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_HOST, _OTHER_ADDRESS = 62, 64
"""X509_V_ERR codes (OpenSSL, x509_vfy.h)."""


def context(login: Login) -> ssl.SSLContext:
    """Read the files for TLS; raise UplinkError that names the key of the one that cannot be used."""
    for key, name in (
        ("ca_file", login.ca_file),
        ("cert_file", login.cert_file),
        ("key_file", login.key_file),
    ):
        if name:
            _check_readable(key, name)
    try:
        made = ssl.create_default_context(cafile=login.ca_file or None)
    except ssl.SSLError:
        raise UplinkError(
            f"uplink.ca_file: {login.ca_file}: holds no certificate; expected PEM (-----BEGIN CERTIFICATE-----)"
        ) from None
    if login.cert_file:
        _load_own(made, login)
    return made


def _check_readable(key: str, name: str) -> None:
    try:
        with open(name, "rb"):
            pass
    except OSError as error:
        raise UplinkError(f"uplink.{key}: {name}: {(error.strerror or str(error)).lower()}") from None


def _load_own(made: ssl.SSLContext, login: Login) -> None:
    try:
        made.load_cert_chain(login.cert_file, login.key_file or None, password=lambda: _encrypted(login))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UplinkError(
                f"uplink.key_file: {login.key_file}: is not the key of uplink.cert_file, {login.cert_file}"
            ) from None
        raise UplinkError(
            f"uplink.cert_file or key_file: {login.cert_file}, {login.key_file}: cannot be used "
            f"({(error.reason or str(error)).lower()}); expected PEM"
        ) from None


def _encrypted(login: Login) -> NoReturn:
    raise UplinkError(
        f"uplink.key_file: {login.key_file}: is encrypted; expected a key without a passphrase, mode 0600"
    )


def explain(error: OSError, host: str, now_ms: int, *, certificate: bool) -> str:
    """Return why a connection by TLS failed; `certificate`: whether a client certificate was presented."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"tls failed: {_explain_verification(error, host, now_ms)}"
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError):
        return "tls failed: the broker closed the connection during the handshake; a plain port needs mqtt://"
    if isinstance(error, ssl.SSLError):
        return f"tls failed: {_explain_alert(error, certificate=certificate)}"
    return (error.strerror or str(error)).lower()


def _explain_verification(error: ssl.SSLCertVerificationError, host: str, now_ms: int) -> str:
    now = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    match error.verify_code:
        case code if code in _UNKNOWN_AUTHORITY:
            return (
                f"the broker's certificate is not from an authority that is trusted ({error.verify_message}); "
                "expected one of uplink.ca_file, or of the system's where that is empty"
            )
        case code if code in (_OTHER_HOST, _OTHER_ADDRESS):
            return (
                f"the broker's certificate is not for {host}; expected one that names the host of uplink.url"
            )
        case code if code == _EXPIRED:
            return f"the broker's certificate has expired; this machine's clock says {now}"
        case code if code == _NOT_YET_VALID:
            return (
                f"the broker's certificate is not yet valid; this machine's clock says {now}: is that right?"
            )
    return f"the broker's certificate is not accepted: {error.verify_message}"


def _explain_alert(error: ssl.SSLError, *, certificate: bool) -> str:
    reason = error.reason or str(error)
    words = reason.partition("ALERT_")[2].replace("_", " ").lower()
    if reason == "WRONG_VERSION_NUMBER":
        return "this port does not speak TLS; a plain port needs mqtt://"
    if reason.endswith("ALERT_PROTOCOL_VERSION") or reason == "UNSUPPORTED_PROTOCOL":
        return "the broker speaks no version of TLS that is accepted; expected TLS 1.2 or later"
    if not certificate and (words in ("certificate required", "handshake failure", "bad certificate")):
        return f"the broker requires a client certificate ({words}); set uplink.cert_file and uplink.key_file"
    if certificate and ("certif" in words or words in ("unknown ca", "decrypt error", "handshake failure")):
        return f"the broker does not accept the client certificate of uplink.cert_file ({words})"
    return (words or reason.replace("_", " ")).lower()
