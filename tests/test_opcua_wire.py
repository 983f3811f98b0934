"""OPC UA on the wire: what is decoded in blocks is what asyncua decodes value by value, whatever the bytes."""

import contextlib
import struct
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_from_binary, struct_to_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegw.config.schema import OpcUaTag
from edgegw.domain.record import Scan
from edgegw.drivers.opcua import failures, values, wire
from edgegw.drivers.opcua.block import Block, Points, block_of, joined
from edgegw.drivers.opcua.request import encode_item, encode_node, items_request, read_request
from edgegw.drivers.opcua.values import Reading

V = ua.VariantType
INTEGERS = {
    V.SByte: 8,
    V.Byte: 8,
    V.Int16: 16,
    V.UInt16: 16,
    V.Int32: 32,
    V.UInt32: 32,
    V.Int64: 64,
    V.UInt64: 64,
}
STATUSES = ["Good", "GoodLocalOverride", "UncertainLastUsableValue", "BadSensorFailure", "BadNodeIdUnknown"]
OVERFLOW = 0x0480


def integers(kind: ua.VariantType) -> st.SearchStrategy[int]:
    bits = INTEGERS[kind]
    least = 0 if kind.name.startswith(("U", "B")) else -(2 ** (bits - 1))
    return st.integers(least, least + 2**bits - 1)


def variants(kind: ua.VariantType, plain: st.SearchStrategy[Any]) -> st.SearchStrategy[ua.Variant]:
    return plain.map(lambda value: ua.Variant(value, kind))


PLAIN = [
    *(variants(kind, integers(kind)) for kind in INTEGERS),
    variants(V.Boolean, st.booleans()),
    variants(V.Float, st.floats(width=32)),
    variants(V.Float, st.floats(-1000, 1000).map(lambda v: round(v, 1))),
    variants(V.Double, st.floats()),
    variants(V.String, st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    variants(V.String, st.just("a\udcffb")),
]
STRANGE = [
    variants(V.Null, st.none()),
    variants(V.LocalizedText, st.builds(ua.LocalizedText, st.sampled_from(["Betrieb", None]))),
    variants(V.DateTime, st.datetimes(datetime(1700, 1, 1), timezones=st.just(UTC))),
    variants(V.ByteString, st.none() | st.binary(max_size=10)),
    variants(V.Guid, st.builds(uuid.UUID, int=st.integers(0, 2**128 - 1))),
    variants(V.NodeId, st.just(ua.NodeId("x", 2))),
    variants(V.ExtensionObject, st.just(ua.Range(1.0, 2.0))),
    *(
        st.lists(st.integers(0, 99) if kind == V.Int32 else st.floats(-9, 9, width=16), max_size=4).map(
            lambda several, kind=kind: ua.Variant(several, kind, is_array=True)
        )
        for kind in (V.Int32, V.Float, V.Double)
    ),
]
STATUS = st.builds(
    lambda name, flags: ua.StatusCode(getattr(ua.StatusCodes, name) | flags),
    st.sampled_from(STATUSES),
    st.sampled_from([0, OVERFLOW]),
)
TIME = st.datetimes(datetime(1601, 1, 1), datetime(9999, 12, 31, 23, 59, 59), timezones=st.just(UTC))
FINE = st.none() | st.integers(0, 9999)


def data_values(kinds: list[st.SearchStrategy[ua.Variant]]) -> st.SearchStrategy[ua.DataValue]:
    return st.builds(
        ua.DataValue,
        st.one_of(kinds),
        st.none() | STATUS,
        st.none() | TIME,
        st.none() | TIME,
        FINE,
        FINE,
    )


def valueless(data: ua.DataValue) -> ua.DataValue:
    data.Value = None  # its constructor puts a null in the place of none
    return data


ANY = data_values(PLAIN) | data_values(PLAIN + STRANGE) | data_values(PLAIN).map(valueless)
TYPES = [
    "",
    "bool",
    "int16",
    "uint16",
    "int32",
    "int64",
    "uint64",
    "float32",
    "float64",
    "string",
    "float64[]",
]
TAG = st.builds(
    lambda kind, keys: OpcUaTag(**{"address": "i=1", "type": kind, **keys}),
    st.sampled_from(TYPES),
    st.sampled_from([{}, {}, {"scale": 0.1}, {"offset": -1.0}]),
)


def read(results: list[ua.DataValue]) -> bytes:
    body: bytes = struct_to_binary(ua.ReadResponse(Results=results))
    return body


def publish(*notifications: Any, sequence: int = 7) -> bytes:
    message = ua.NotificationMessage(
        SequenceNumber=ua.Counter(sequence), NotificationData=list(notifications)
    )
    result = ua.PublishResult(3, [1, 2], False, message, [ua.StatusCode()])
    body: bytes = struct_to_binary(ua.PublishResponse(Parameters=result))
    return body


def changes(items: list[tuple[int, ua.DataValue]]) -> ua.DataChangeNotification:
    return ua.DataChangeNotification([ua.MonitoredItemNotification(*item) for item in items])


def slowly(body: bytes) -> list[ua.DataValue]:
    results: list[ua.DataValue] = struct_from_binary(ua.ReadResponse, Buffer(body)).Results
    return results


def expected(tags: list[OpcUaTag], found: list[ua.DataValue]) -> list[Reading]:
    return [values.decode(tag, data) for tag, data in zip(tags, found, strict=True)]


def taken(tags: list[OpcUaTag], block: Block) -> list[Reading]:
    readings = Points("d", {f"t{i}": tag for i, tag in enumerate(tags)}).readings(block)
    assert readings.names == [f"t{place}" for place in block.places]
    times = [values.unix_ms(at or 0) for at in block.ticks]
    return [
        Reading(value, readings.qualities.get(i), ts_ms)
        for i, (value, ts_ms) in enumerate(zip(readings.values, times, strict=True))
    ]


def typed(readings: list[Reading]) -> list[tuple[Any, ...]]:
    return [(type(reading.value), *reading) for reading in readings]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(TAG, ANY), max_size=12))
def test_a_read_is_decoded_as_asyncua_decodes_it(sent: list[tuple[OpcUaTag, ua.DataValue]]) -> None:
    tags, found = [tag for tag, _ in sent], [data for _, data in sent]
    body = read(found)
    assert typed(taken(tags, wire.read_response(body))) == typed(expected(tags, slowly(body)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TAG, min_size=4, max_size=4),
    st.lists(st.lists(st.tuples(st.integers(0, 3), ANY), max_size=6), max_size=3),
)
def test_what_is_published_is_decoded_as_asyncua_decodes_it(
    tags: list[OpcUaTag], published: list[list[tuple[int, ua.DataValue]]]
) -> None:
    body = publish(*map(changes, published))
    found = wire.publish_response(body)
    assert found[:3] == (3, 7, not published)
    assert [list(block.places) for block in found.changes] == [[at for at, _ in items] for items in published]
    for block, items in zip(found.changes, published, strict=True):
        slow = slowly(read([data for _, data in items]))
        each = expected([tags[at] for at, _ in items], slow)
        assert typed(taken(tags, block)) == typed(each)
        overflowed = [values.overflowed(status or 0) for status in block.statuses]
        assert overflowed == [values.overflowed(values.status(data)) for data in slow]


def test_plain_numbers_are_not_left_to_asyncua(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = valueless(ua.DataValue(StatusCode=ua.StatusCode(ua.StatusCodes.BadNodeIdUnknown)))
    body = read([ua.DataValue(ua.Variant(1.5, V.Double)), ua.DataValue(ua.Variant("on", V.String)), unknown])
    published = publish(changes([(0, ua.DataValue(ua.Variant(7, V.Int32)))]))
    monkeypatch.delattr(wire, "struct_from_binary")
    assert wire.read_response(body).raws == [1.5, "on", None]
    assert wire.publish_response(published).changes[0].raws == [7]


@pytest.mark.parametrize("status", ["BadShutdown", "BadTimeout"])
def test_the_end_of_a_subscription_is_told_with_what_came_before_it(status: str) -> None:
    code = ua.StatusCode(getattr(ua.StatusCodes, status))
    before = changes([(1, ua.DataValue(ua.Variant(1.5, V.Double)))])
    found = wire.publish_response(publish(before, ua.StatusChangeNotification(code)))
    assert found.ended == code.value
    assert [block.raws for block in found.changes] == [(1.5,)]


def test_a_keep_alive_has_nothing_and_the_number_of_the_next_message() -> None:
    assert wire.publish_response(publish()) == wire.Publication(3, 7, True, [], 0)


@pytest.mark.parametrize("response", [ua.ReadResponse, ua.PublishResponse])
def test_a_refusal_is_raised_as_the_status_it_is(response: Any) -> None:
    refused = ua.ResponseHeader(ServiceResult=ua.StatusCode(ua.StatusCodes.BadTooManyOperations))
    decode = wire.read_response if response is ua.ReadResponse else wire.publish_response
    with pytest.raises(ua.uaerrors.BadTooManyOperations):
        decode(struct_to_binary(response(ResponseHeader=refused)))


def test_diagnostics_beside_the_values_change_nothing() -> None:
    results = [ua.DataValue(ua.Variant(1.5, V.Double))]
    response = ua.ReadResponse(Results=results, DiagnosticInfos=[ua.DiagnosticInfo(SymbolicId=1)])
    response.ResponseHeader.StringTable = ["why"]
    assert wire.read_response(struct_to_binary(response)).raws == (1.5,)


HEADER = struct.pack("<BBHqIIBi3s", 1, 0, 634, 0, 0, 0, 0, -1, bytes(3))
AT = 133_932_528_001_230_000
AT_MS = 1_748_779_200_123
# as OPC UA Part 6 has them, by hand: the value, and its reading
WRITTEN: list[tuple[str, bytes, Reading]] = [
    ("a Double alone", struct.pack("<BBd", 1, 11, 1.5), Reading(1.5, None, None)),
    ("a Float", struct.pack("<BBf", 1, 10, 230.1), Reading(230.1, None, None)),
    ("a source time", struct.pack("<BBdq", 5, 11, 1.5, AT), Reading(1.5, None, AT_MS)),
    ("both times", struct.pack("<BBdqq", 13, 11, 1.5, AT, AT + 9**9), Reading(1.5, None, AT_MS)),
    ("finer than a time", struct.pack("<BBdqHqH", 0x3D, 11, 1.5, AT, 7, AT, 8), Reading(1.5, None, AT_MS)),
    ("a status", struct.pack("<BBdIq", 7, 11, 1.5, 0x40900000, AT), Reading(1.5, "uncertain:last-usable-value", AT_MS)),
    ("a status alone", struct.pack("<BI", 2, 0x80340000), Reading(None, "bad:node-id-unknown", None)),
    ("a status and times", struct.pack("<BIqq", 14, 0x80340000, AT, AT), Reading(None, "bad:node-id-unknown", AT_MS)),
    ("nothing", b"\0", Reading(None, "bad:no-value", None)),
    ("a boolean of another bit", b"\x01\x01\x80", Reading(True, None, None)),
    ("a text", struct.pack("<BBi2s", 1, 12, 2, b"on"), Reading("on", None, None)),
    ("a null text", struct.pack("<BBi", 1, 12, -1), Reading(None, "bad:no-value", None)),
    ("a negative time", struct.pack("<BBdq", 5, 11, 1.5, -1), Reading(1.5, None, None)),
    ("the last time", struct.pack("<BBdq", 5, 11, 1.5, 2**63 - 1), Reading(1.5, None, None)),
    ("not a number", struct.pack("<BBd", 1, 11, float("nan")), Reading(None, "bad:not-a-number", None)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "reading"), [case[1:] for case in WRITTEN], ids=[case[0] for case in WRITTEN]
)
def test_bytes_of_the_specification_become(written: bytes, reading: Reading) -> None:
    tag = OpcUaTag(address="i=1")
    body = HEADER + struct.pack("<i", 3) + 3 * written + struct.pack("<i", -1)
    assert taken([tag] * 3, wire.read_response(body)) == [reading] * 3


BROKEN = {
    "a text longer than the rest": struct.pack("<BBi", 1, 12, 9),
    "a text shorter than nothing": struct.pack("<BBi", 1, 12, -9),
    "an array of nulls without end": struct.pack("<BBi", 1, 0x80, 2**31 - 1),
    "an array of nulls in a variant of a variant": struct.pack("<BBiBi", 1, 0x98, 1, 0x80, 2**31 - 1),
    "a null array in an array of variants": struct.pack("<BBiBBi", 1, 0x98, 2, 0, 0x80, 2**31 - 1),
    "more variants than anybody means": struct.pack("<BBi", 1, 0x98, 600_000) + bytes(600_000),
    "a variant in a variant, and so on": b"\x01" + 20_000 * b"\x18",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_no_server_means_to_send_is_an_error(broken: bytes) -> None:
    with pytest.raises(failures.FOREIGN):
        wire.read_response(HEADER + struct.pack("<i", 1) + broken + struct.pack("<i", -1))


def test_more_values_announced_than_there_are_bytes_is_an_error_at_once() -> None:
    with pytest.raises(failures.FOREIGN):
        wire.read_response(HEADER + struct.pack("<i", 2**31 - 1))


FEW = st.lists(data_values(PLAIN + STRANGE), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(FEW, st.data())
def test_a_body_cut_short_is_an_error(found: list[ua.DataValue], data: st.DataObject) -> None:
    for body, decode in (
        (read(found), wire.read_response),
        (publish(changes(list(enumerate(found)))), wire.publish_response),
    ):
        with pytest.raises(failures.FOREIGN):
            decode(body[: data.draw(st.integers(0, len(body) - 1))])


@settings(max_examples=500, deadline=None)
@given(FEW, st.integers(0, 2**16), st.integers(1, 255))
def test_a_byte_gone_wrong_is_an_error_or_what_asyncua_makes_of_it(
    found: list[ua.DataValue], at: int, change: int
) -> None:
    body = bytearray(read(found))
    body[at % len(body)] ^= change
    tag = OpcUaTag(address="i=1")
    try:
        block = wire.read_response(bytes(body))
    except failures.FOREIGN:
        return
    slow = slowly(bytes(body))
    assert typed(taken([tag] * len(slow), block)) == typed(expected([tag] * len(slow), slow))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", HEADER, HEADER + struct.pack("<i", 3)]))
def test_noise_is_an_error_or_nothing(noise: bytes, head: bytes) -> None:
    for decode in (wire.read_response, wire.publish_response):
        with contextlib.suppress(failures.FOREIGN):
            decode(head + noise)


def test_the_chunks_of_a_poll_are_one_block() -> None:
    tags = {f"t{i}": OpcUaTag(address="i=1") for i in range(4)}
    chunks = [[1.5, 2], ["on", [3]]]
    found = [block_of(range(2), [ua.DataValue(ua.Variant(value)) for value in chunk]) for chunk in chunks]
    first = wire.read_response(read([ua.DataValue(ua.Variant(value)) for value in chunks[0]]))
    for blocks in (found, [first, found[1]]):
        scans = Points("d", tags).scans(joined(blocks), 99, by_source=False)
        assert scans == [Scan(99, "d", {"t0": 1.5, "t1": 2, "t2": "on", "t3": [3]})]


NODES = ["i=2258", "ns=2;s=Plant.Voltage", "ns=1;g=12345678-1234-1234-1234-1234567890ab", "b=YWJj"]


def test_a_read_of_encoded_nodes_is_the_request_that_asyncua_makes() -> None:
    nodes = [ua.NodeId.from_string(node) for node in NODES]
    theirs = ua.ReadRequest()
    for node in nodes:
        asked = ua.ReadValueId(NodeId=node, AttributeId=ua.IntegerId(ua.AttributeIds.Value))
        theirs.Parameters.NodesToRead.append(asked)
    ours = read_request([encode_node(node) for node in nodes])
    ours.RequestHeader = theirs.RequestHeader
    assert struct_to_binary(ours) == struct_to_binary(theirs)


def test_the_request_for_encoded_items_is_the_one_that_asyncua_makes() -> None:
    nodes = [ua.NodeId.from_string(node) for node in NODES]
    theirs = ua.CreateMonitoredItemsRequest()
    theirs.Parameters.SubscriptionId = ua.IntegerId(3)
    for place, node in enumerate(nodes):
        asked = ua.ReadValueId(NodeId=node, AttributeId=ua.IntegerId(ua.AttributeIds.Value))
        wanted = ua.MonitoringParameters(place, 250.0, QueueSize=10, DiscardOldest=True)
        item = ua.MonitoredItemCreateRequest(asked, ua.MonitoringMode.Reporting, wanted)
        theirs.Parameters.ItemsToCreate.append(item)
    items = [encode_item(encode_node(node), place, 250.0, 10) for place, node in enumerate(nodes)]
    ours = items_request(3, items)
    ours.RequestHeader = theirs.RequestHeader
    assert struct_to_binary(ours) == struct_to_binary(theirs)
