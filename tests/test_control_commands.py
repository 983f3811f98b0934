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

from edgegw.control import commands
from edgegw.domain.command import ReplayCommand, Reply, WriteCommand

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
    return commands.read(payload, retained=retained, limits=LIMITS, done=done, now_ms=NOW_MS)


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


def test_ids_are_remembered_for_a_day_after_they_expired_and_no_more_of_them_than_there_is_room_for() -> None:
    day_ms = commands.KEEP_IDS_MS
    assert commands.remembered({"old": 0, "new": 1}, day_ms) == {"new": 1}
    many = {str(i): NOW_MS + i for i in range(commands.IDS + 10)}
    kept = commands.remembered(many, NOW_MS)
    assert len(kept) == commands.IDS - 1  # there is room for the one that is being taken
    assert min(kept.values()) > NOW_MS + 10


def test_no_id_that_can_still_act_is_forgotten_for_want_of_room() -> None:
    open_ids = {str(i): NOW_MS + 1000 for i in range(commands.IDS)}
    answer = commands.read(
        json.dumps(GOOD).encode(), retained=False, limits=LIMITS, done=open_ids, now_ms=NOW_MS
    )
    assert isinstance(answer, Reply)
    assert "not expired yet" in str(answer.error)
