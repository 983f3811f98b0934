"""Ed25519 signatures (RFC 8032): whose hand a file is from."""

from typing import TYPE_CHECKING

from edgegw.errors import EdgegwError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class KeyFileError(EdgegwError):
    """A key file holds no key that can be used here."""


class Signer:
    """A private key; `public_key` are the 32 raw bytes of its other half."""

    def __init__(self, key: "Ed25519PrivateKey") -> None:
        self.public_key = key.public_key().public_bytes_raw()
        self._key = key

    def sign(self, content: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(content)


def signer(pem: bytes) -> Signer:
    """Read a private key (PKCS#8 PEM, not encrypted); raise KeyFileError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(
            "found no private key to sign with; expected an Ed25519 key in PEM without a password, as from: "
            "openssl genpkey -algorithm ed25519"
        )
    return Signer(key)


def public_key(pem: bytes) -> bytes:
    """Read a public key (PEM) and return its 32 raw bytes; raise KeyFileError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(
            "found no public key; expected an Ed25519 key in PEM, as from: openssl pkey -in KEY -pubout"
        )
    return key.public_bytes_raw()


def genuine(public_key: str, signature: bytes, content: bytes) -> bool:
    """Tell whether a signature of `content` was made with the key whose other half this is, in hex."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True
