"""Commands: what is said to a message before anything is done, and that no message does worse than be refused."""

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from control_rig import plant
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegw.config.schema import Config
from edgegw.control import commands
from edgegw.control.commands import Known
from edgegw.domain.command import ReplayCommand, Reply, WriteCommand
from edgegw.gateway import Timed, own_times

CASES = tomllib.loads((Path(__file__).parent / "cases" / "control_commands.toml").read_text())["case"]
NOW_MS = 1_000_000
TAGS = {
    "battery.kw": "number writable min=-50 max=50",
    "relay.closed": "bool writable",
    "battery.mode": "text writable",
    "meter.kw": "number",
}
LIMITS = plant(TAGS, {})[0].limits
GOOD = {"id": "a", "write": {"battery.kw": 10.0}, "expires": NOW_MS + 60_000}


def read(payload: bytes, retained: bool = False, **done: int) -> WriteCommand | ReplayCommand | Reply:
    return commands.read(payload, retained=retained, limits=LIMITS, known=Known(done), now_ms=NOW_MS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("error", "taken"))
def test_what_is_said_to_a_message(case: dict[str, Any]) -> None:
    message = {
        key: value
        for key, value in (GOOD | case.get("json", {})).items()
        if key not in case.get("without", ())
    }
    payload = case["message"] if "message" in case else json.dumps(message)
    answer = read(payload.ljust(case.get("bytes", 0)).encode(), case.get("retained", False), old=1)
    if "error" in case:
        assert isinstance(answer, Reply)
        assert (answer.ok, answer.error) == (False, case["error"])
    elif "replay" in message:
        assert answer == ReplayCommand("a", *(message["replay"][key] for key in ("stream", "from", "to")))
    else:
        assert answer == WriteCommand("a", message["write"], message["expires"], case.get("lease_s"))


def test_the_answer_bears_the_id_if_one_could_be_made_out() -> None:
    assert read(b'{"id":"x","expires":5}').wire() == {"id": "x", "ok": False, "error": "expired 1000.0 s ago"}  # type: ignore[union-attr]
    assert read(b"no").wire()["id"] is None  # type: ignore[union-attr]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PARTS = {
    "id": st.just("a") | JSON,
    "write": st.dictionaries(st.sampled_from(list(TAGS)) | st.text(), JSON, max_size=3) | JSON,
    "expires": st.just(NOW_MS + 1) | JSON,
    "lease": st.sampled_from(["1s", "9" * 400 + "d", "0s"]) | JSON,
}
REPLAYS = st.fixed_dictionaries({}, optional={"stream": st.text(), "from": JSON, "to": JSON}) | JSON


@settings(deadline=None)
@given(st.fixed_dictionaries({"id": PARTS["id"], "replay": REPLAYS}))
def test_no_replay_is_taken_but_one_with_a_range(message: dict[str, Any]) -> None:
    answer = read(json.dumps(message).encode())
    if isinstance(answer, Reply):
        assert not answer.ok
        msgspec.json.encode(answer.wire())
    else:
        assert isinstance(answer, ReplayCommand)
        assert 1 <= answer.first <= answer.last


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=PARTS))
def test_no_message_does_worse_than_be_refused_and_every_answer_can_be_sent(message: dict[str, Any]) -> None:
    answer = read(json.dumps(message).encode())
    if isinstance(answer, Reply):
        assert not answer.ok
        msgspec.json.encode(answer.wire())
    else:
        msgspec.json.encode(answer)
        assert all(LIMITS[tag].writable for tag in answer.writes)
        assert answer.expires_ms > NOW_MS


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_json_are_refused(payload: bytes) -> None:
    assert isinstance(read(payload), Reply)


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 60_000,
        b'{"id":"\\ud800"}',
        b"\xff\xfe",
        b'{"id":"a","expires":1060000,"write":{"battery.kw":' + b"1" * 400 + b"}}",
        b'{"id":"a","expires":1060000,"write":{"battery.kw":1e999}}',
        b'{"id":"a","expires":1060000,"write":{"relay.closed":' + b"1" * 4000 + b"}}",
        b'{"id":"a","expires":-' + b"1" * 400 + b',"write":{"battery.kw":1}}',
        b'{"id":"a","expires":1060000,"write":{"' + b"x" * 60_000 + b'":1}}',
    ],
    ids=lambda payload: f"{payload[:30]}",
)
def test_a_message_made_to_harm_is_answered_in_few_words(payload: bytes) -> None:
    answer = read(payload)
    assert isinstance(answer, Reply)
    assert len(msgspec.json.encode(answer.wire())) < 500


def test_no_id_that_can_still_act_is_forgotten_for_want_of_room_and_a_hand_is_not_locked_out() -> None:
    full = Known(can_act=commands.IDS)
    answer = commands.read(json.dumps(GOOD).encode(), limits=LIMITS, known=full, now_ms=NOW_MS)
    assert isinstance(answer, Reply)
    assert "not expired yet" in str(answer.error)
    by_hand = json.dumps(GOOD | {"id": "hand-a"}).encode()
    taken = commands.read(by_hand, limits=LIMITS, known=full, now_ms=NOW_MS, by_hand=True)
    assert isinstance(taken, WriteCommand)


YEAR_MS = 365 * 86_400_000
NOW = commands.RELEASED_MS + YEAR_MS


@pytest.mark.parametrize(
    ("now_ms", "latest_ms", "synced", "why"),
    [
        (NOW, NOW, True, None),
        (NOW, NOW, False, None),
        (NOW, NOW + commands.HOUR_MS, False, None),
        (NOW, 0, False, None),
        (NOW, NOW + 3 * commands.HOUR_MS, False, "but it was 2027-01-01 03:00 UTC already; synchronise it"),
        (NOW, NOW + 3 * commands.HOUR_MS, True, None),
        (0, 0, False, "the gateway's clock says 1970-01-01 00:00 UTC, before this version was made; set it"),
        (0, NOW, True, "the gateway's clock says 1970-01-01 00:00 UTC, before this version was made; set it"),
    ],
)
def test_a_clock_that_is_plainly_wrong_is_told_from_one_that_is_not_synchronised(
    now_ms: int, latest_ms: int, synced: bool, why: str | None
) -> None:
    found = commands.wrong_clock(now_ms, latest_ms, synced)
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


def test_a_wrong_clock_refuses_what_comes_from_upstream_and_no_hand() -> None:
    wrong = Known(clock="the clock is wrong")
    answer = commands.read(json.dumps(GOOD).encode(), limits=LIMITS, known=wrong, now_ms=NOW_MS)
    assert isinstance(answer, Reply)
    assert answer.error == "the clock is wrong"
    by_hand = json.dumps(GOOD | {"id": "hand-a"}).encode()
    assert isinstance(
        commands.read(by_hand, limits=LIMITS, known=wrong, now_ms=NOW_MS, by_hand=True), WriteCommand
    )


@settings(deadline=None)
@given(JSON | st.dictionaries(st.text(), st.integers() | st.floats() | st.text(max_size=500), max_size=40))
def test_what_was_asked_is_told_whatever_it_was_in_few_words(writes: Any) -> None:
    told = commands.bounded(writes)
    assert (told is None) == (not isinstance(writes, dict))
    assert len(msgspec.json.encode(told)) < 20_000
    assert len(told or ()) <= commands.ASKED + 1


def test_a_command_for_an_unknown_tag_among_many_costs_no_search() -> None:
    """Nothing on the event loop may grow with the tags: no hint is looked for."""
    message = json.dumps(GOOD | {"write": {"battery.kv": 1.0}}).encode()
    answer = commands.read(message, limits=LIMITS, known=Known(), now_ms=NOW_MS)
    assert isinstance(answer, Reply)
    assert (answer.error, answer.asked) == ("battery.kv: no such tag", {"battery.kv": 1.0})


def test_a_server_whose_clock_is_years_ahead_makes_no_command_be_refused() -> None:
    """What a device says of the time says nothing of the gateway's clock."""
    tags = {"x": {"address": "ns=2;s=X"}}
    server = {"driver": "opcua", "url": "opc.tcp://127.0.0.1:4840/", "tags": tags}
    meter = {
        "driver": "modbus",
        "url": "tcp://127.0.0.1",
        "tags": {"x": {"address": "holding:0", "type": "int16"}},
    }
    devices = {"plant": server, "here": server | {"timestamp": "gateway"}, "meter": meter}
    made = Config.model_validate({"gateway": {"id": "a"}, "device": devices})
    records = [
        Timed(1, "plant"),
        Timed(2, "here"),
        Timed(3, "meter"),
        Timed(4),
        Timed(5, "no more"),
        Timed(6, "window"),
    ]
    assert own_times(records, made) == [2, 3, 4]
