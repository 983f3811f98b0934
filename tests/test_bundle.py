"""The file that crosses an air gap, and the receipt that comes back: every byte of either is accounted for."""

import hashlib
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest
import zstandard
from chains import STREAM, Body, Chain
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edgegw.domain.batch import Batch, decode, digest
from edgegw.journal import bundle, receipt
from edgegw.journal.bundle import Bundle, BundleError
from edgegw.journal.receipt import Held, Receipt, ReceiptError
from edgegw.journal.signature import KeyFileError, Signer, public_key, signer

MADE = 1_732_256_000_000
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PRIVATE = KEY.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
PUBLIC = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def bodies(count: int = 5) -> list[Body]:
    """Return batches of both kinds."""
    chain = Chain()
    return [chain.event({"event": "link", "n": n}) if n % 3 == 2 else chain.data(3) for n in range(count)]


def row(body: Body) -> Batch:
    """Return a batch as the journal has it."""
    message = decode(body)
    return Batch(message.stream, message.seq, message.count, message.kind, digest(body), len(body), b"")


def packed(made: list[Body], by: Signer | None = None) -> bytes:
    """Return a file's bytes."""
    file = io.BytesIO()
    pairs = ((row(body), body) for body in made)
    bundle.write(file, pairs, gateway="site-7", stream=STREAM, made_ms=MADE, signer=by)
    return file.getvalue()


def unpacked(content: bytes, key: bytes | None = None) -> list[Body]:
    """Return the batches of a file, all checked."""
    return list(Bundle(io.BytesIO(content), key).bodies())


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, signer(PRIVATE)], ids=["unsigned", "signed"])
@pytest.mark.parametrize("count", [0, 1, 5, 400])
def test_what_comes_out_is_what_went_in_byte_for_byte_and_each_time_the_same(
    count: int, by: Signer | None
) -> None:
    made = bodies(count)
    content = packed(made, by)
    assert unpacked(content, public_key(PUBLIC) if by else None) == made
    assert packed(made, by) == content


def test_anybody_opens_it_with_tar_zstd_and_openssl(tmp_path: Path) -> None:
    made = bodies()
    (tmp_path / "b.tar").write_bytes(packed(made, signer(PRIVATE)))
    with tarfile.open(tmp_path / "b.tar") as opened:
        opened.extractall(tmp_path, filter="data")
        assert opened.getnames() == [bundle.PAYLOAD, bundle.MANIFEST, bundle.CHECKSUM, bundle.SIGNATURE]
    payload = (tmp_path / bundle.PAYLOAD).read_bytes()
    lines = zstandard.ZstdDecompressor().stream_reader(payload).read().splitlines()
    assert lines == made
    text = (tmp_path / bundle.MANIFEST).read_bytes()
    assert json.loads(text) == {
        "format": "edgegw-bundle", "version": 1, "gateway": "site-7", "stream": STREAM, "made": MADE,
        "edgegw": json.loads(text)["edgegw"], "batches": 5, "records": 13, "ranges": [[1, 13]],
        "json_bytes": sum(map(len, made)), "sha256": hashlib.sha256(payload).hexdigest(),
        "public_key": KEY.public_key().public_bytes_raw().hex(),
    }  # fmt: skip
    assert (tmp_path / bundle.CHECKSUM).read_text().split() == [
        hashlib.sha256(text).hexdigest(),
        bundle.MANIFEST,
    ]
    (tmp_path / "public.pem").write_bytes(PUBLIC)
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "public.pem", "-rawin"]
    files = ["-in", bundle.MANIFEST, "-sigfile", bundle.SIGNATURE]
    try:
        done = subprocess.run([*verify, *files], cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("by", [None, signer(PRIVATE)], ids=["unsigned", "signed"])
def test_a_flip_of_any_byte_is_refused(by: Signer | None) -> None:
    content = bytearray(packed(bodies(3), by))
    numbers = random.Random(7)
    for at, byte in enumerate(content):
        content[at] = byte ^ numbers.randint(1, 255)
        with pytest.raises(BundleError):
            unpacked(bytes(content))
        content[at] = byte
    assert len(unpacked(bytes(content))) == 3


def test_a_cut_anywhere_is_refused_and_so_is_what_is_added() -> None:
    content = packed(bodies(3))
    for at in range(len(content)):
        with pytest.raises(BundleError):
            unpacked(content[:at])
    for more in (b"\0", b"x", bytes(512), content):
        with pytest.raises(BundleError):
            unpacked(content + more)


@given(st.binary(max_size=3000))
def test_what_is_no_export_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        unpacked(content)


@given(st.data())
def test_parts_of_two_files_make_none(data: st.DataObject) -> None:
    one, other = packed(bodies(4)), packed(bodies(5))
    cut = data.draw(st.integers(1, min(len(one), len(other)) - 1))
    mixed = one[:cut] + other[cut:]
    if mixed not in (one, other):
        with pytest.raises(BundleError):
            unpacked(mixed)


def test_only_the_key_that_is_demanded_will_do() -> None:
    made, mine = bodies(), public_key(PUBLIC)
    other = Signer(Ed25519PrivateKey.generate())
    assert unpacked(packed(made, signer(PRIVATE)), mine) == made
    with pytest.raises(BundleError, match=f"another key signed.*; expected .* {mine.hex()}"):
        unpacked(packed(made, other), mine)
    with pytest.raises(BundleError, match="not signed; expected one signed with"):
        unpacked(packed(made), mine)


def forged(manifest: dict[str, object], made: list[Body]) -> bytes:
    """Return a file whose checksums are right, with batches and a manifest of one's own."""
    payload = zstandard.compress(b"".join(body + b"\n" for body in made))
    sound = msgspec.to_builtins(Bundle(io.BytesIO(packed(bodies()))).manifest)
    text = json.dumps(sound | {"sha256": hashlib.sha256(payload).hexdigest()} | manifest).encode()
    parts = b""
    for name, content in (
        (bundle.PAYLOAD, payload),
        (bundle.MANIFEST, text),
        (bundle.CHECKSUM, f"{hashlib.sha256(text).hexdigest()}  {bundle.MANIFEST}\n".encode()),
    ):
        header = tarfile.TarInfo(name)
        header.size = len(content)
        parts += header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return parts + bytes(1024)


def with_manifest(text: bytes, signature: bytes | None = None) -> bytes:
    """Return a file with these bytes as its manifest, whatever they are."""
    file = b""
    for name, content in (
        (bundle.PAYLOAD, zstandard.compress(b"")),
        (bundle.MANIFEST, text),
        (bundle.CHECKSUM, f"{hashlib.sha256(text).hexdigest()}  {bundle.MANIFEST}\n".encode()),
        *([(bundle.SIGNATURE, signature)] if signature is not None else []),
    ):
        header = tarfile.TarInfo(name)
        header.size = len(content)
        file += header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return file + bytes(1024)


def test_p10_nothing_is_decoded_before_the_signature_is_found_to_be_that_of_the_key_asked_for() -> None:
    other = Signer(Ed25519PrivateKey.generate())
    for text in (b"no JSON at all", b"[" * 100_000, b'{"ranges":[' + b"[1,1]," * 600_000):
        with pytest.raises(BundleError, match="not signed"):
            unpacked(with_manifest(text), public_key(PUBLIC))
        with pytest.raises(BundleError, match="another key signed"):
            unpacked(with_manifest(text, other.sign(text)), public_key(PUBLIC))


@pytest.mark.parametrize("key", [None, public_key(PUBLIC)], ids=["any key", "a key"])
def test_p10_members_are_bounded_before_they_are_read(key: bytes | None) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: found 4194305 bytes; expected 4194304 at most"):
        unpacked(with_manifest(bytes(4 * 1024**2 + 1)), key)
    with pytest.raises(BundleError, match=r"manifest\.json\.sig: found 257 bytes; expected 256 at most"):
        unpacked(with_manifest(b"{}", bytes(257)), key)


def test_a_signature_whose_key_the_manifest_does_not_name_is_refused() -> None:
    for content in (
        with_manifest(msgspec.json.encode(Bundle(io.BytesIO(packed(bodies()))).manifest), bytes(64)),
        packed(bodies(), signer(PRIVATE)).replace(bundle.SIGNATURE.encode(), b"x" * len(bundle.SIGNATURE)),
    ):
        with pytest.raises(BundleError):
            unpacked(content)


def test_a_file_of_another_writer_that_keeps_to_the_layout_is_taken() -> None:
    assert unpacked(forged({}, bodies())) == bodies()


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"version": 2}, "found 'edgegw-bundle' 2; this version reads edgegw-bundle 1"),
        ({"format": "other"}, "found 'other' 1"),
        ({"gateway": "site-8"}, "found a batch of 'site-7'"),
        ({"stream": "0b0e6e5e-0000-4000-8000-000000000002"}, "expected one of 'site-7' '0b0e6e5e"),
        ({"batches": 4}, "found 5 batches of 13 records; the manifest differs"),
        ({"records": 12}, "the manifest differs"),
        ({"ranges": [[1, 12]]}, "the manifest differs"),
        ({"json_bytes": 1}, "the manifest differs"),
        ({"made": "today"}, "Expected `int`"),
        ({"sha256": "00"}, "does not give its SHA-256"),
    ],
    ids=str,
)
def test_a_manifest_that_says_otherwise_is_refused_with_the_reason(
    manifest: dict[str, object], said: str
) -> None:
    with pytest.raises(BundleError, match=said.replace("(", ".")):
        unpacked(forged(manifest, bodies()))


def test_a_batch_twice_or_out_of_order_or_none_is_refused() -> None:
    made = bodies()
    for wrong in ([made[0], made[0]], made[::-1], [made[0], b"{}"], [made[0], b'{"v":'], [made[0], b""]):
        counts = {"batches": len(wrong), "json_bytes": sum(map(len, wrong))}
        with pytest.raises(BundleError):
            unpacked(forged(counts, wrong))


@pytest.mark.parametrize("pem", [b"", b"no key", PUBLIC], ids=["empty", "text", "the other half"])
def test_what_is_no_private_key_is_refused_before_anything_is_written(pem: bytes) -> None:
    with pytest.raises(KeyFileError, match="openssl genpkey -algorithm ed25519"):
        signer(pem)


def test_what_is_no_public_key_is_refused() -> None:
    for pem in (b"", b"no key", PRIVATE):
        with pytest.raises(KeyFileError, match="expected an Ed25519 key in PEM"):
            public_key(pem)


# -- the receipt -------------------------------------------------------------------------------------------------------

RECEIPT = Receipt(1, "site-7", STREAM, MADE, [Held(1, 12, "ab" * 32), Held(20, 20, "cd" * 32)])


def test_a_receipt_comes_back_as_it_was_and_holds_what_the_readme_says() -> None:
    content = receipt.encode(RECEIPT)
    assert receipt.decode(content) == RECEIPT
    found = json.loads(content)
    assert found["receipt"] == {
        "format": "edgegw-receipt", "version": 1, "gateway": "site-7", "stream": STREAM, "made": MADE,
        "ranges": [{"from": 1, "to": 12, "digest": "ab" * 32}, {"from": 20, "to": 20, "digest": "cd" * 32}],
    }  # fmt: skip
    text = content[len(b'{"receipt":') : content.index(b',"sha256":')]
    assert found["sha256"] == hashlib.sha256(text).hexdigest()


def test_a_receipt_with_a_flip_or_a_cut_anywhere_is_refused() -> None:
    content = bytearray(receipt.encode(RECEIPT))
    numbers = random.Random(7)
    for at, byte in enumerate(content):
        for other in {byte ^ numbers.randint(1, 255), byte ^ 0x20}:
            content[at] = other
            with pytest.raises(ReceiptError):
                receipt.decode(bytes(content))
        content[at] = byte
        with pytest.raises(ReceiptError):
            receipt.decode(bytes(content[:at]))
    for more in (b"\n", b" ", b"{}"):
        with pytest.raises(ReceiptError):
            receipt.decode(bytes(content) + more)


@given(st.binary(max_size=300))
def test_what_is_no_receipt_is_refused(content: bytes) -> None:
    with pytest.raises(ReceiptError):
        receipt.decode(content)


def test_a_receipt_of_a_later_version_or_with_ranges_that_are_none_is_refused() -> None:
    with pytest.raises(ReceiptError, match="found edgegw-receipt 2; this version reads"):
        receipt.decode(receipt.encode(msgspec.structs.replace(RECEIPT, version=2)))
    for held in (Held(0, 5, "ab" * 32), Held(6, 5, "ab" * 32)):
        with pytest.raises(ReceiptError, match="ranges that are none"):
            receipt.decode(receipt.encode(msgspec.structs.replace(RECEIPT, ranges=[held])))
