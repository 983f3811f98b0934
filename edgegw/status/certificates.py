"""How long the certificates are valid that a gateway is configured with."""

from collections.abc import Iterable
from pathlib import Path

from cryptography import x509


def valid_for_s(files: Iterable[Path], now_s: float) -> dict[str, float]:
    """Return for each file (PEM or DER) how long its first certificate to end is valid, in seconds from `now_s` (Unix).

    A file that cannot be read, or holds none, is left out: the connection that needs it reports it.
    """
    found: dict[str, float] = {}
    for file in files:
        try:
            data = file.read_bytes()
            pem = b"-----BEGIN CERTIFICATE-----" in data
            certificates = (
                x509.load_pem_x509_certificates(data) if pem else [x509.load_der_x509_certificate(data)]
            )
        except (OSError, ValueError):
            continue
        ends = min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)
        found[str(file)] = ends - now_s
    return found
