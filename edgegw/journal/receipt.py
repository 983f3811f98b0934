"""The receipt that comes back over an air gap: what of an exported file is durable at the other end."""

import hashlib

import msgspec

from edgegw.errors import EdgegwError

FORMAT = "edgegw-receipt"
VERSION = 1


class ReceiptError(EdgegwError):
    """A receipt is none, or not this journal's; nothing may be released for it."""


class Held(msgspec.Struct, frozen=True):
    """Seqs that are durable, both included, and the hash (hex) of the batch that ends them."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    digest: str


class Receipt(msgspec.Struct, frozen=True, tag_field="format", tag=FORMAT):
    """What somebody has of a stream; `made` is in milliseconds."""

    version: int
    gateway: str
    stream: str
    made: int
    ranges: list[Held]


class _Sealed(msgspec.Struct, frozen=True):
    receipt: Receipt
    sha256: str


class _Version(msgspec.Struct):
    format: str
    version: int


class _AnyVersion(msgspec.Struct):
    receipt: _Version


def encode(receipt: Receipt) -> bytes:
    """Return a receipt as its file holds it: one line of JSON with the SHA-256 of the `receipt` in it."""
    text = msgspec.json.encode(receipt)
    sealed = {"receipt": msgspec.Raw(text), "sha256": hashlib.sha256(text).hexdigest()}
    return msgspec.json.encode(sealed) + b"\n"


def decode(content: bytes) -> Receipt:
    """Read a receipt's file; raise ReceiptError unless every byte of it is as it was written."""
    try:
        found = msgspec.json.decode(content, type=_AnyVersion).receipt
        if (found.format, found.version) != (FORMAT, VERSION):
            raise ReceiptError(f"found {found.format} {found.version}; this version reads {FORMAT} {VERSION}")
        receipt = msgspec.json.decode(content, type=_Sealed).receipt
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ReceiptError(f"no receipt: {error}; the file has been cut or changed, or is another") from None
    if encode(receipt) != content:
        raise ReceiptError("it does not give its SHA-256; the file has been cut or changed")
    if any(not 1 <= held.first <= held.last for held in receipt.ranges):
        raise ReceiptError("found ranges that are none")
    return receipt
