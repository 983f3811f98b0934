"""OPC UA values: data-only cases of decoding, status words and grouping into scans."""

import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from asyncua import ua
from pydantic import ValidationError

from edgegw.config.schema import OpcUaTag
from edgegw.domain.record import Scan
from edgegw.drivers.opcua import values
from edgegw.drivers.opcua.block import Points, block_of
from edgegw.drivers.opcua.values import Reading

V = ua.VariantType
MISMATCH, NAN, UNSUPPORTED, NO_VALUE = (
    "bad:type-mismatch", "bad:not-a-number", "bad:unsupported-type", "bad:no-value",
)  # fmt: skip
NOON = datetime(2025, 6, 1, 12, 0, 0, 123_999)
NOON_MS = 1_748_779_200_123

# what the server sends, the tag's keys, the value and quality expected
DECODED: list[tuple[Any, ua.VariantType | None, dict[str, Any], Any, str | None]] = [
    (True, V.Boolean, {}, True, None),
    (7, V.Int16, {}, 7, None),
    (2**64 - 1, V.UInt64, {}, 2**64 - 1, None),
    (1.5, V.Double, {}, 1.5, None),
    ("on", V.String, {}, "on", None),
    ("", V.String, {}, "", None),
    ([1, 2], V.Int32, {}, [1, 2], None),
    ([True, False], V.Boolean, {}, [True, False], None),
    (["a", "b"], V.String, {}, ["a", "b"], None),
    ([], V.Double, {}, [], None),
    (ua.LocalizedText("Betrieb", "de"), V.LocalizedText, {}, "Betrieb", None),
    (ua.LocalizedText(None), V.LocalizedText, {}, "", None),
    (b"\x01\xff", V.ByteString, {}, "01ff", None),
    (datetime(2025, 6, 1, 12, 0, 0, 500_000), V.DateTime, {}, "2025-06-01T12:00:00.500000Z", None),
    (uuid.UUID(int=5), V.Guid, {}, "00000000-0000-0000-0000-000000000005", None),
    (None, V.Null, {}, None, NO_VALUE),
    (None, V.String, {}, None, NO_VALUE),
    (ua.NodeId.from_string("ns=2;s=X"), V.NodeId, {}, None, UNSUPPORTED),
    ([[1.0], [2.0]], V.Double, {}, None, UNSUPPORTED),
    (float("nan"), V.Double, {}, None, NAN),
    (float("-inf"), V.Float, {}, None, NAN),
    ([1.0, float("inf")], V.Double, {}, None, NAN),
    ("a\udcffb", V.String, {}, None, "bad:not-text"),
    ("a\tb\n", V.String, {}, "a\tb\n", None),
    # configured types
    (1, V.Int32, {"type": "float64"}, 1.0, None),
    (2**53 + 1, V.Int64, {"type": "float64"}, None, MISMATCH),
    (1.0, V.Double, {"type": "int32"}, None, MISMATCH),
    (True, V.Boolean, {"type": "int16"}, None, MISMATCH),
    (1, V.Int16, {"type": "bool"}, None, MISMATCH),
    (True, V.Boolean, {"type": "float32"}, None, MISMATCH),
    ("1", V.String, {"type": "float32"}, None, MISMATCH),
    (1, V.Int16, {"type": "string"}, None, MISMATCH),
    (70_000, V.Int32, {"type": "uint16"}, None, MISMATCH),
    (-1, V.Int32, {"type": "uint32"}, None, MISMATCH),
    (-32_768, V.Int32, {"type": "int16"}, -32_768, None),
    (32_768, V.Int32, {"type": "int16"}, None, MISMATCH),
    (1.5, V.Double, {"type": "float32"}, 1.5, None),
    (1.5, V.Double, {"type": "float64[]"}, None, MISMATCH),
    ([1.5], V.Double, {"type": "float64"}, None, MISMATCH),
    ([1, 2], V.Int32, {"type": "float64[]"}, [1.0, 2.0], None),
    # scale and offset
    (2500.0, V.Double, {"scale": 0.001}, 2.5, None),
    (20, V.Int16, {"scale": 0.5, "offset": -3.0}, 7.0, None),
    ([1000, 2000], V.Int32, {"scale": 0.001}, [1.0, 2.0], None),
    (1e308, V.Double, {"scale": 1e10}, None, NAN),
    (True, V.Boolean, {"scale": 2.0}, None, MISMATCH),
    ("x", V.String, {"offset": 1.0}, None, MISMATCH),
]


@pytest.mark.parametrize(("sent", "kind", "keys", "value", "quality"), DECODED)
def test_a_sent_value_becomes(
    sent: Any, kind: ua.VariantType, keys: dict[str, Any], value: Any, quality: str | None
) -> None:
    tag = OpcUaTag(**{"address": "ns=2;s=X", **keys})
    variant = ua.Variant(sent, kind, is_array=isinstance(sent, list))
    reading = values.decode(tag, ua.DataValue(variant, SourceTimestamp=NOON))
    assert reading == Reading(value, quality, NOON_MS)
    assert type(reading.value) is type(value)


STATUSES = [
    (ua.StatusCodes.Good, None),
    (ua.StatusCodes.GoodLocalOverride, None),
    (ua.StatusCodes.Good | 0x0480, None),
    (ua.StatusCodes.UncertainLastUsableValue, "uncertain:last-usable-value"),
    (ua.StatusCodes.UncertainLastUsableValue | 0x0480, "uncertain:last-usable-value"),
    (ua.StatusCodes.BadNodeIdUnknown, "bad:node-id-unknown"),
    (ua.StatusCodes.BadNoCommunication, "bad:no-communication"),
    (ua.StatusCodes.BadTcpServerTooBusy, "bad:tcp-server-too-busy"),
    (0x80FF0000, "bad:status-80ff0000"),
    (0xC0010000, "bad:status-c0010000"),
    (0x40FF0000, "uncertain:status-40ff0000"),
]


@pytest.mark.parametrize(("code", "quality"), STATUSES)
def test_a_status_code_becomes_a_quality(code: int, quality: str | None) -> None:
    tag = OpcUaTag(address="i=1")
    reading = values.decode(tag, ua.DataValue(ua.Variant(1.5, V.Double), StatusCode=ua.StatusCode(code)))
    assert reading.quality == quality
    assert reading.value == (None if quality and quality.startswith("bad:") else 1.5)


def test_an_uncertain_value_that_is_no_number_is_bad() -> None:
    tag = OpcUaTag(address="i=1")
    status = ua.StatusCode(ua.StatusCodes.UncertainLastUsableValue)
    assert values.decode(tag, ua.DataValue(ua.Variant(float("nan"), V.Double), StatusCode=status))[:2] == (
        None,
        NAN,
    )


TIMES = [
    (None, None),
    (NOON, NOON_MS),
    (NOON.replace(tzinfo=UTC), NOON_MS),
    (datetime(2025, 6, 1, 14, 0, 0, 123_000, timezone(timedelta(hours=2))), NOON_MS),
    (datetime(2025, 6, 1, 12, 0, 0, 122_999), NOON_MS - 1),
    (datetime(1601, 1, 1, tzinfo=UTC), None),
    (datetime(1601, 1, 1), None),
    (datetime(9999, 12, 31, 23, 59, 59), None),
]


@pytest.mark.parametrize(("sent", "ts_ms"), TIMES)
def test_a_source_time_is_whole_milliseconds_utc(sent: datetime | None, ts_ms: int | None) -> None:
    tag = OpcUaTag(address="i=1")
    assert values.decode(tag, ua.DataValue(ua.Variant(1), SourceTimestamp=sent)).ts_ms == ts_ms


def sent(value: Any, ts_ms: int | None, status: int = 0) -> ua.DataValue:
    at = None if ts_ms is None else datetime.fromtimestamp(ts_ms / 1000, UTC)
    return ua.DataValue(ua.Variant(value), StatusCode=ua.StatusCode(status), SourceTimestamp=at)


GROUPED: list[tuple[str, bool, list[tuple[str, ua.DataValue]], list[Scan]]] = [
    ("nothing", True, [], []),
    (
        "one scan for each source time, in order",
        True,
        [("a", sent(1, 20)), ("b", sent(2, 10)), ("c", sent(3, 20))],
        [Scan(10, "d", {"b": 2}), Scan(20, "d", {"a": 1, "c": 3})],
    ),
    (
        "no source time: the gateway's",
        True,
        [("a", sent(1, 20)), ("b", sent(2, None))],
        [Scan(20, "d", {"a": 1}), Scan(99, "d", {"b": 2})],
    ),
    ("gateway time", False, [("a", sent(1, 20)), ("b", sent(2, 10))], [Scan(99, "d", {"a": 1, "b": 2})]),
    (
        "several values of a tag at one time are all kept, in order",
        False,
        [("a", sent(1, 20)), ("b", sent(5, 20)), ("a", sent(2, 21)), ("a", sent(3, 22))],
        [Scan(99, "d", {"a": 1, "b": 5}), Scan(99, "d", {"a": 2}), Scan(99, "d", {"a": 3})],
    ),
    (
        "quality stands by tag",
        False,
        [("a", sent(1, 20, ua.StatusCodes.BadNoData)), ("b", sent(2, 20))],
        [Scan(99, "d", {"a": None, "b": 2}, {"a": "bad:no-data"})],
    ),
]


@pytest.mark.parametrize(
    ("by_source", "readings", "scans"), [c[1:] for c in GROUPED], ids=[c[0] for c in GROUPED]
)
def test_readings_become_scans(
    by_source: bool, readings: list[tuple[str, ua.DataValue]], scans: list[Scan]
) -> None:
    tags = {name: OpcUaTag(address="i=1") for name in "abc"}
    found = block_of([list(tags).index(name) for name, _ in readings], [data for _, data in readings])
    assert Points("d", tags).scans(found, 99, by_source=by_source) == scans


WRONG_NODE_IDS = [
    "",
    "x",
    "ns=2;g=not-a-guid",
    "i=abc",
    "i=4294967296",
    "ns=65536;i=1",
    "b=abc",
    "s=",
    "ns=2",
]
NODE_IDS = [
    "i=2258",
    "ns=2;s=a;b=c",
    "ns=65535;i=4294967295",
    "b=YWJj",
    "ns=1;g=12345678-1234-1234-1234-1234567890ab",
]


@pytest.mark.parametrize("address", WRONG_NODE_IDS)
def test_an_address_that_is_no_node_id_is_a_mistake_in_the_config(address: str) -> None:
    with pytest.raises(ValidationError, match="expected a node id"):
        OpcUaTag(address=address)


@pytest.mark.parametrize("address", NODE_IDS)
def test_an_address_that_the_config_takes_is_a_node_id(address: str) -> None:
    tag = OpcUaTag(address=address)
    assert ua.NodeId.from_string(tag.address).to_string() == address
