"""Payloads as they may come: whole, packed, and wrong in every way that must not stop the receiver."""

import json

import msgspec
import pytest
import zstandard
from chains import STREAM, Chain
from hypothesis import given
from hypothesis import strategies as st

from edgegw.domain.batch import GENESIS, Kind, digest
from edgegw.receiver import wire
from edgegw.receiver.dedupe import Key, NamedGap
from edgegw.receiver.wire import MalformedError, read, read_gap

KEY = Key("site-7", STREAM)
OTHER = STREAM.replace("0b0e", "0b0f")
GOOD = Chain().data(2)


def changed(**keys: object) -> bytes:
    return json.dumps(json.loads(GOOD) | keys).encode()


def records(*found: object) -> bytes:
    return changed(records=found, count=len(found))


MALFORMED = {
    "nothing": b"",
    "no JSON": b"xx",
    "cut short": GOOD[:-20],
    "something after it": GOOD + b"x",
    "a list": b"[1]",
    "no key": b"{}",
    "not UTF-8": GOOD.replace(b"meter0", b"meter\xff"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "nested without end": changed(records=[]).replace(b"[]", b"[" * 100_000),
    "NaN": GOOD.replace(b"1.5", b"NaN"),
    "a number beyond every float": GOOD.replace(b"1.5", b"1e999"),
    "an unknown version": changed(v=2),
    "an unknown kind": changed(kind="other"),
    "no gateway": changed(gateway=""),
    "no stream": changed(stream=""),
    "seq 0": changed(seq=0),
    "seq as text": changed(seq="1"),
    "seq beyond 64 bits": changed(seq=2**63 - 1),
    "seq far beyond 64 bits": changed(seq=2**70),
    "count 0": changed(count=0, records=[]),
    "count of others": changed(count=3),
    "prev too short": changed(prev="00"),
    "prev not hex": changed(prev="x" * 64),
    "a record that is none": records(1),
    "a record without ts": records({"device": "a", "values": {}}),
    "a record without device": records({"ts": 1, "values": {}}),
    "neither values nor status": records({"ts": 1, "device": "a"}),
    "ts beyond 64 bits": records({"ts": 2**63, "device": "a", "values": {}}),
    "a value that is an object": records({"ts": 1, "device": "a", "values": {"b": {}}}),
    "an event without a name": changed(kind="event", records=[{"ts": 1}], count=1),
    "an event that is none": changed(kind="event", records=[1], count=1),
    "a summary without last_prev": changed(kind="summary", records=[]),
    "a summary of no period": changed(kind="summary", records=[], last_prev=GENESIS.hex(), period=0),
    "no zstd frame": wire.ZSTD_MAGIC + b"xx",
    "a zstd frame cut short": zstandard.compress(GOOD)[:-10],
    "a zstd frame of something else": zstandard.compress(b"xx"),
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_batch_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedError):
        read(payload)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(noise: bytes) -> None:
    for payload in (noise, GOOD[:100] + noise, wire.ZSTD_MAGIC + noise):
        with pytest.raises(MalformedError):
            read(payload)


def test_what_unpacks_to_too_much_is_malformed() -> None:
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(GOOD)
    for payload in (GOOD, zstandard.compress(GOOD), streamed):
        assert read(payload, len(GOOD)).count == 2
        with pytest.raises(MalformedError, match="at most"):
            read(payload, len(GOOD) - 1)


def test_a_packed_batch_reads_like_the_batch() -> None:
    for packed in (
        zstandard.compress(GOOD),
        zstandard.ZstdCompressor(write_content_size=False).compress(GOOD),
    ):
        assert read(packed) == read(GOOD)


def test_a_batch_keeps_the_bytes_that_came() -> None:
    batch = read(GOOD)
    assert (batch.key, batch.seq, batch.count, batch.last, batch.kind) == (KEY, 1, 2, 2, Kind.DATA)
    assert batch.body == GOOD
    assert batch.digest == digest(GOOD)
    assert batch.link == (1, 2, GENESIS, digest(GOOD), False)
    assert batch.readings == 6


def test_unknown_keys_are_no_fault() -> None:
    more = json.loads(GOOD)
    more["new"] = 1
    more["records"][0]["new"] = {"a": 1}
    assert read(json.dumps(more).encode()).count == 2


def gap(**keys: object) -> bytes:
    return msgspec.json.encode({"ts": 1, "event": "gap", "from": 3, "to": 9, "reason": "full", **keys})


def test_a_gap_event_names_what_is_gone() -> None:
    assert read_gap(KEY, gap()) == (KEY, NamedGap(3, 9, "full", None))
    assert read_gap(KEY, gap(last_prev=GENESIS.hex())) == (KEY, NamedGap(3, 9, "full", GENESIS))
    assert read_gap(KEY, gap(summary=True)) == (KEY, NamedGap(3, 9, "full", None, thinned=True))
    assert read_gap(KEY, gap(stream=OTHER)) == (Key("site-7", OTHER), NamedGap(3, 9, "full", None))


@pytest.mark.parametrize(
    "keys",
    [
        {"from": 10},
        {"stream": "other"},
        {"reason": "x" * 1001},
        {"from": 0},
        {"to": 2**63},
        {"last_prev": "00"},
        {"last_prev": "x" * 64},
    ],
)
def test_a_gap_event_that_names_nothing_is_malformed(keys: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        read_gap(KEY, gap(**keys))
