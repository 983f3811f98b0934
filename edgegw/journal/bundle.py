"""The file that carries batches over an air gap: a tar of the batches, a manifest, and what vouches for both.

Every byte of it is accounted for: what is not exactly as it was written, or not all there, is refused. The layout is in
the README beside this.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import msgspec
import zstandard

from edgegw import __version__
from edgegw.domain.batch import Batch, decode
from edgegw.domain.ranges import Ranges
from edgegw.errors import EdgegwError
from edgegw.journal.signature import Signer, genuine

FORMAT = "edgegw-bundle"
VERSION = 1
PAYLOAD, MANIFEST, CHECKSUM, SIGNATURE = (
    "batches.ndjson.zst", "manifest.json", "manifest.json.sha256", "manifest.json.sig",
)  # fmt: skip
BLOCK = 512
END = bytes(2 * BLOCK)
MAX_BODY = 16 * 1024**2
"""The most bytes of one batch: the largest `uplink.max_message` that there is."""
MAX_MANIFEST = 4 * 1024**2
"""The most bytes of a manifest: it has a few for each range of seqs."""
MAX_MEMBER = 256
"""The most bytes of a checksum or a signature."""
CHUNK = 1024**2


class BundleError(EdgegwError):
    """A file is not as an export made it; nothing of it may be taken in."""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is in a file. Times are milliseconds, hashes and the Ed25519 public key (of whoever signed it) are hex."""

    format: str
    version: int
    gateway: str
    stream: str
    made: int
    edgegw: str
    batches: int
    records: int
    ranges: list[tuple[int, int]]
    json_bytes: int
    sha256: str
    public_key: str = ""


class _Version(msgspec.Struct):
    format: str
    version: int


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    file: BinaryIO, batches: Iterable[tuple[Batch, bytes]], *,
    gateway: str, stream: str, made_ms: int, signer: Signer | None = None,
) -> Manifest:  # fmt: skip
    """Write batches, in order of their seqs, to an empty file that can seek; return what is in it."""
    file.write(bytes(BLOCK))  # the payload's header, once its size is known
    passed = _Hashed(file)
    count = records = json_bytes = 0
    ranges = Ranges()
    with zstandard.ZstdCompressor(level=3).stream_writer(passed, closefd=False) as packer:  # type: ignore[arg-type]
        for batch, body in batches:
            packer.write(body + b"\n")
            ranges.add(batch.seq, batch.last)
            count += 1
            records += batch.count
            json_bytes += len(body)
    file.write(_padding(passed.size))
    manifest = Manifest(
        FORMAT, VERSION, gateway, stream, made_ms, __version__,
        count, records, list(ranges), json_bytes, passed.sha256.hexdigest(),
        signer.public_key.hex() if signer else "",
    )  # fmt: skip
    text = msgspec.json.encode(manifest)
    _add(file, MANIFEST, text)
    _add(file, CHECKSUM, _checksum(text))
    if signer:
        _add(file, SIGNATURE, signer.sign(text))
    file.write(END)
    file.seek(0)
    file.write(_header(PAYLOAD, passed.size))
    return manifest


class _Hashed:
    """A file that only takes bytes, counted and hashed as they pass."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    file.write(_header(name, len(content)) + content + _padding(len(content)))


def _header(name: str, size: int) -> bytes:
    """Return a member's header, the same for the same member: no time, no owner."""
    made = tarfile.TarInfo(name)
    made.size = size
    return made.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _checksum(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


# -- reading -----------------------------------------------------------------------------------------------------------


class Bundle:
    """A file whose manifest, signature and payload have been found to be as they were written."""

    def __init__(self, file: BinaryIO, public_key: bytes | None = None) -> None:
        """Check all but the batches themselves; raise BundleError.

        With `public_key` (raw) only a file that its owner signed will do.
        """
        self._file = file
        file.seek(0)
        self._size = _size(file, PAYLOAD)
        file.seek(BLOCK + self._size)
        _expect(file, _padding(self._size), "padding")
        text = _member(file, MANIFEST, MAX_MANIFEST)
        if _member(file, CHECKSUM) != _checksum(text):
            raise BundleError(f"{MANIFEST}: it does not give its SHA-256; the file has been changed")
        signature = _last_member(file)
        if public_key is not None:  # before anything of it is decoded
            _check_signer(public_key, signature, text)
        self.manifest = _manifest(text)
        signed_with = self.manifest.public_key
        if bool(signed_with) != (signature is not None):
            raise BundleError(f"found {SIGNATURE} or public_key without the other; the file has been changed")
        if signature is not None and not genuine(signed_with, signature, text):
            raise BundleError(f"{SIGNATURE}: it is not that of {MANIFEST}; the file has been changed")
        payload = hashlib.sha256()
        for chunk in iter(self._part().chunk, b""):
            payload.update(chunk)
        if payload.hexdigest() != self.manifest.sha256:
            raise BundleError(f"{PAYLOAD}: it does not give its SHA-256; the file has been changed")

    def bodies(self) -> Iterator[bytes]:
        """Yield the JSON bytes of each batch, in order; raise BundleError where they are not what the manifest says."""
        manifest, ranges = self.manifest, Ranges()
        count = records = json_bytes = last = 0
        lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(self._part()), CHUNK)  # type: ignore[arg-type]
        try:
            while line := lines.readline(MAX_BODY + 1):
                body = line[:-1]
                message = decode(body)
                whose = (message.gateway, message.stream)
                if whose != (manifest.gateway, manifest.stream) or message.seq <= last or message.count < 1:
                    raise BundleError(
                        f"{PAYLOAD}: found a batch of {whose[0][:80]!r} {whose[1][:80]!r} at {message.seq}; "
                        f"expected one of {manifest.gateway!r} {manifest.stream!r} after {last}"
                    )
                last = message.seq + message.count - 1
                ranges.add(message.seq, last)
                count += 1
                records += message.count
                json_bytes += len(body)
                yield body
        except (zstandard.ZstdError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{PAYLOAD}: {error}") from None
        found = (count, records, list(ranges), json_bytes)
        if found != (manifest.batches, manifest.records, manifest.ranges, manifest.json_bytes):
            raise BundleError(f"{PAYLOAD}: found {count} batches of {records} records; the manifest differs")

    def _part(self) -> "_Part":
        return _Part(self._file, BLOCK, self._size)


class _Part:
    """A stretch of a file, to be read once from its beginning."""

    def __init__(self, file: BinaryIO, at: int, size: int) -> None:
        self._file = file
        self._left = size
        file.seek(at)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(data)
        return data

    def chunk(self) -> bytes:
        return self.read(CHUNK)


def _size(file: BinaryIO, name: str) -> int:
    """Read a member's header, which must be what `_header` makes; return its size."""
    header = file.read(BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise BundleError(f"found no {name} ({error}); expected a file that `journal export` made") from None
    if size < 0 or header != _header(name, size):
        raise BundleError(f"found a header that is not as edgegw writes it; expected {name}")
    return size


def _check_signer(public_key: bytes, signature: bytes | None, text: bytes) -> None:
    """Raise BundleError if a manifest was not signed with the key that was asked for."""
    if signature is None or not genuine(public_key.hex(), signature, text):
        found = "not signed" if signature is None else "that another key signed, or that was changed"
        raise BundleError(f"found a file {found}; expected one signed with {public_key.hex()}")


def _last_member(file: BinaryIO) -> bytes | None:
    """Return the signature if there is one; raise BundleError if the file does not end then."""
    begin = file.tell()
    signature = None
    if file.read(BLOCK) != END[:BLOCK]:
        file.seek(begin)
        signature = _member(file, SIGNATURE)
    else:
        file.seek(begin)
    _expect(file, END, "end")
    if file.read(1):
        raise BundleError("found more after the end; the file has been changed")
    return signature


def _member(file: BinaryIO, name: str, max_bytes: int = MAX_MEMBER) -> bytes:
    size = _size(file, name)
    if size > max_bytes:
        raise BundleError(f"{name}: found {size} bytes; expected {max_bytes} at most")
    content = file.read(size)
    if len(content) != size:
        raise BundleError(f"{name}: found {len(content)} of {size} bytes; the file has been cut")
    _expect(file, _padding(size), "padding")
    return content


def _expect(file: BinaryIO, content: bytes, what: str) -> None:
    if file.read(len(content)) != content:
        raise BundleError(f"found no {what} where it belongs; the file has been cut or changed")


def _manifest(text: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(text, type=_Version)
        if (version.format, version.version) != (FORMAT, VERSION):
            raise BundleError(
                f"{MANIFEST}: found {version.format[:80]!r} {version.version}; this version reads {FORMAT} {VERSION}"
            )
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{MANIFEST}: {error}") from None
