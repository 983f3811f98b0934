"""Report by exception: what is recorded, and that nothing else of the gateway sees less for it."""

import asyncio
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from control_field import SETPOINT, configuration, running, site
from gateway_rig import until
from hypothesis import given
from hypothesis import strategies as st
from journal_rig import kept

from edgegw.config.schema import Deadband
from edgegw.domain.record import Scan
from edgegw.scan.report import Reporter

TAGS = {
    "kw": Deadband(width=0.5),
    "volt": Deadband(share=0.1),
    "any": Deadband(),
    "flag": Deadband(width=2.0),
    "text": Deadband(),
    "list": Deadband(),
}


def scan(values: dict[str, Any], quality: dict[str, str] | None = None, ts: int = 0) -> Scan:
    return Scan(ts, "m", values, quality)


class Step(NamedTuple):
    """What is read, and what of it is recorded."""

    values: dict[str, Any]
    recorded: dict[str, Any] | None
    quality: dict[str, str] | None = None
    at_s: float = 0.0


CASES = {
    "the first scan is whole": [Step({"kw": 1.0, "text": "a"}, {"kw": 1.0, "text": "a"})],
    "what has not changed is no record": [Step({"kw": 1.0}, {"kw": 1.0}), Step({"kw": 1.0}, None)],
    "beyond the deadband, not at it": [
        Step({"kw": 1.0}, {"kw": 1.0}),
        Step({"kw": 1.5}, None),
        Step({"kw": 0.5}, None),
        Step({"kw": 1.501}, {"kw": 1.501}),
    ],
    "what creeps is measured from what was reported": [
        Step({"kw": 0.0}, {"kw": 0.0}),
        Step({"kw": 0.25}, None),
        Step({"kw": 0.5}, None),
        Step({"kw": 0.75}, {"kw": 0.75}),
        Step({"kw": 1.25}, None),
    ],
    "a share is of the last reported value": [
        Step({"volt": -100.0}, {"volt": -100.0}),
        Step({"volt": -109.0}, None),
        Step({"volt": -112.0}, {"volt": -112.0}),
        Step({"volt": -101.0}, None),
        Step({"volt": 0.0}, {"volt": 0.0}),
        Step({"volt": 0.001}, {"volt": 0.001}),
    ],
    "without a deadband any change counts": [
        Step({"any": 1}, {"any": 1}),
        Step({"any": 1.0000001}, {"any": 1.0000001}),
    ],
    "bools, text and arrays have no distances": [
        Step({"flag": False, "text": "a", "list": [1.0]}, {"flag": False, "text": "a", "list": [1.0]}),
        Step({"flag": True, "text": "a", "list": [1.0]}, {"flag": True}),
        Step({"flag": True, "text": "b", "list": [1.0, 2.0]}, {"text": "b", "list": [1.0, 2.0]}),
        Step({"flag": 1.0, "text": "b", "list": [1.0, 2.0]}, None),
    ],
    "only what changed is in the record": [
        Step({"kw": 1.0, "any": 1, "text": "a"}, {"kw": 1.0, "any": 1, "text": "a"}),
        Step({"kw": 1.1, "any": 2, "text": "a"}, {"any": 2}),
    ],
    "a quality that comes, changes or goes is a change": [
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0, "any": 1}),
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0}, {"kw": "uncertain:old"}),
        Step({"kw": 1.0, "any": 1}, None, {"kw": "uncertain:old"}),
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0}, {"kw": "uncertain:older"}),
        Step({"kw": None, "any": 1}, {"kw": None}, {"kw": "bad:timeout"}),
        Step({"kw": None, "any": 1}, None, {"kw": "bad:timeout"}),
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0}),
        Step({"kw": 1.0, "any": 1}, None),
    ],
    "a quality stays with its tag": [
        Step({"kw": None, "any": 1}, {"kw": None, "any": 1}, {"kw": "bad:timeout"}),
        Step({"kw": None, "any": 2}, {"any": 2}, {"kw": "bad:timeout"}),
        Step({"any": 3}, {"any": 3}),
        Step({"kw": None}, None, {"kw": "bad:timeout"}),
    ],
    "a heartbeat is whole, and never late by a scan": [
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0, "any": 1}),
        Step({"kw": 1.0, "any": 1}, None, at_s=9.0),
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0, "any": 1}, at_s=9.001),
        Step({"kw": 1.0, "any": 1}, None, at_s=18.0),
        Step({"kw": 1.0, "any": 1}, {"kw": 1.0, "any": 1}, at_s=19.001),
    ],
    "after a heartbeat each tag that comes alone is reported once": [
        Step({"kw": 1.0}, {"kw": 1.0}),
        Step({"any": 1}, {"any": 1}),
        Step({"kw": 1.0}, {"kw": 1.0}, at_s=20.0),
        Step({"any": 1}, {"any": 1}, at_s=20.0),
        Step({"any": 1}, None, at_s=20.0),
    ],
}


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES)
def test_what_is_recorded(steps: list[Step]) -> None:
    reporter = Reporter(TAGS, heartbeat_s=10.0, period_s=1.0)
    for step in steps:
        whole = scan(step.values, step.quality)
        (recorded,) = reporter.report([whole], step.at_s) or [None]
        if step.recorded is None:
            assert recorded is None, step
            continue
        assert recorded is not None, step
        assert recorded.values == step.recorded
        expected = {tag: why for tag, why in (step.quality or {}).items() if tag in step.recorded}
        assert recorded.quality == (expected or None)
        assert list(whole.values) == list(step.values), "the scan itself is never touched"


def test_after_the_device_was_away_all_is_reported_whichever_scan_it_comes_in() -> None:
    reporter = Reporter(TAGS, heartbeat_s=1e9)
    reporter.report([scan({"kw": 1.0, "text": "a"})], 0.0)
    reporter.forget()
    first, second = scan({"kw": 1.0}, ts=1), scan({"text": "a"}, ts=2)
    assert reporter.report([first, second], 1.0) == [first, second]
    assert reporter.report([first, second], 2.0) == []


values = st.fixed_dictionaries(
    {},
    optional={
        "kw": st.none() | st.floats(-3, 3, width=16),
        "volt": st.none() | st.floats(-300, 300, width=16),
        "any": st.integers(0, 2) | st.booleans(),
        "text": st.sampled_from(["", "a"]),
    },
)


@given(st.lists(st.tuples(values, st.sampled_from([None, "uncertain:x"])), max_size=30))
def test_whoever_keeps_the_last_record_of_each_tag_knows_it_within_its_deadband(
    read: list[tuple[dict[str, Any], str | None]],
) -> None:
    reporter = Reporter(TAGS, heartbeat_s=7.0)
    known: dict[str, tuple[Any, str | None]] = {}
    for at_s, (held, why) in enumerate(read):
        quality = {tag: "bad:x" for tag, value in held.items() if value is None}
        if why and held:
            quality.setdefault(min(held), why)
        for recorded in reporter.report([scan(held, quality or None)], float(at_s)):
            assert recorded.values
            for tag, value in recorded.values.items():
                known[tag] = (value, (recorded.quality or {}).get(tag))
        for tag, value in held.items():
            last, last_why = known[tag]
            assert last_why == quality.get(tag)
            if value is None or isinstance(value, str | bool):
                assert value == last
            else:
                assert abs(value - last) <= max(TAGS[tag].width, TAGS[tag].share * abs(last))


async def test_p7_rules_see_every_scan_whatever_is_recorded(tmp_path: Path) -> None:
    rule = {"when": "meter.kw > 2.0", "do": {"battery.setpoint": 7.0}}
    async with site() as plant:
        made = configuration(plant, {"r": rule})
        made["device"]["meter"] |= {"report": "change", "heartbeat": "1h"}
        made["device"]["meter"]["tags"]["kw"]["deadband"] = 5.0
        with running(tmp_path, made) as run:
            await plant.scanned(5)
            plant.set(3.0)
            await until(lambda: plant.get(address=SETPOINT) == 7.0, "the rule's write")
            await plant.scanned(5)
            plant.set(5.5)
            await plant.scanned(5)
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
    bodies = b"".join(kept(tmp_path / "journal.db").bodies.values())
    assert bodies.count(b'"device":"meter","values"') == 2
    assert b'"values":{"kw":0.0}' in bodies
    assert b'"values":{"kw":5.5}' in bodies
    assert bodies.count(b'"device":"battery","values"') > 5, "a device that says nothing else reports all"
