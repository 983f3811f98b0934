"""`edgegw rules test`: recordings played through the rules."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from control_field import BATTERY, configuration, records, running, site, stop
from control_rig import plant
from gateway_rig import until
from rig import Process

from edgegw.control import chart
from edgegw.control.recording import LATE_MS, Moment, moments, table
from edgegw.control.replay import Replay
from edgegw.domain.record import Scan

TAGS = {
    "meter.kw": "number",
    "meter.ok": "bool",
    "battery.kw": "number writable min=-50 max=50 ramp=10/s safe=0",
}
RULES = {
    "peak": {
        "when": "meter.kw > 80.0",
        "for": "2s",
        "do": {"battery.kw": "meter.kw - 60.0"},
        "finally": {"battery.kw": 0.0},
    }
}
KINDS = {name: limits.kind for name, limits in plant(TAGS, {})[0].limits.items()}
KINDS |= {"load.mean": "number", "load.coverage": "number"}
T0 = 1_767_225_600_000


def played(lines: list[str], rules: dict[str, Any] = RULES) -> dict[str, Any]:
    made, problems = plant(TAGS | {"battery.kw": "number writable min=-50 max=50 safe=0"}, rules)
    assert problems == []
    replay = Replay(made)
    replay.play(table(lines, KINDS))
    return replay.json()


def rows(*kw: float | str, start: int = T0) -> list[str]:
    return ["ts,meter.kw,battery.kw", *(f"{start + 1000 * i},{value},0" for i, value in enumerate(kw))]


def test_a_replay_tells_when_each_rule_was_on_and_what_it_wrote() -> None:
    found = played(rows(70, 90, 90, 90, 100, 70, 70))
    assert found["rules"]["peak"] == {
        "times_on": 1, "total_s": 2.0, "first": T0 + 3000, "last": T0 + 3000, "spans": [(T0 + 3000, T0 + 5000)],
    }  # fmt: skip
    setpoint = found["setpoints"]["battery.kw"]
    assert (setpoint["writes"], setpoint["from"], setpoint["to"]) == (3, 0.0, 40.0)
    assert setpoint["points"] == [(T0, 0.0), (T0 + 3000, 30.0), (T0 + 4000, 40.0), (T0 + 5000, 0.0)]
    assert setpoint["causes"] == {"rule:peak": 3}


def test_what_a_rule_writes_is_taken_to_work_whatever_was_recorded() -> None:
    found = played(rows(*[90] * 10))
    assert found["setpoints"]["battery.kw"]["writes"] == 1


def test_timers_end_between_rows_and_a_hole_leaves_rules_undecided() -> None:
    rule = {"peak": RULES["peak"] | {"for": "1500ms"}}
    lines = [*rows(90, 90, 90), *rows(90, start=T0 + 60_000)[1:]]
    found = played(lines, rule)
    assert found["rules"]["peak"]["spans"] == [(T0 + 1500, None)]
    assert found["setpoints"]["battery.kw"]["causes"] == {"rule:peak": 2, "failsafe": 1}
    assert (T0 + 5000, 0.0) in found["setpoints"]["battery.kw"]["points"], (
        "three periods after the last reading"
    )


def test_a_refusal_is_counted() -> None:
    found = played(rows(*[120] * 5))
    assert found["setpoints"]["battery.kw"]["refused"] == {"60 is above max 50": 1}


def test_a_clock_that_was_set_back_loses_no_record() -> None:
    found = played([*rows(90, 90, 90, 90), *rows(90, 70, start=T0 - 86_400_000)[1:]])
    assert found["rules"]["peak"]["times_on"] == 1
    assert found["rules"]["peak"]["spans"][0][1] is not None


def test_a_journals_records_come_in_order_of_their_times() -> None:
    link = {"ts": T0 + 900, "event": "link", "state": "islanded", "from": "offline"}
    scans = [{"ts": T0 + i * 100, "device": "meter", "values": {"kw": float(i)}} for i in range(20)]
    found = list(
        moments(
            [link, *scans, {"ts": T0, "event": "start"}, {"ts": T0 + 5, "device": "meter", "status": "bad"}]
        )
    )
    assert [m.ts for m in found] == sorted(m.ts for m in found)
    assert [m for m in found if m.link or m.lost] == [
        Moment(T0 + 5, lost="meter"), Moment(T0 + 900, link="islanded")
    ]  # fmt: skip
    assert len(found) == 22


def test_a_clock_set_back_in_a_journal_keeps_its_order() -> None:
    stamps = [T0, T0 + 100, T0 - 2 * LATE_MS, T0 - 2 * LATE_MS + 100]
    found = list(moments({"ts": ts, "device": "meter", "values": {}} for ts in stamps))
    assert [m.ts for m in found] == stamps


def window(ts: int, mean: float, coverage: float = 1.0, **more: Any) -> dict[str, Any]:
    values = {"mean": mean}
    return {"ts": ts, "device": "load", "values": values, "from": ts - 900_000, "coverage": coverage} | more


def test_windows_of_a_journal_have_their_coverage_and_what_came_late_is_left_out() -> None:
    scans = [{"ts": T0 + i * 1000, "device": "meter", "values": {"kw": 1.0}} for i in range(20)]
    late = [window(T0 - 900_000, 5.0, rev=1), window(T0 + 19_000, 2.0, 0.5)]
    found = list(moments([*scans[:10], window(T0 + 9_000, 1.0), *scans[10:], *late]))
    assert [m.ts for m in found] == sorted(m.ts for m in found)
    assert [m.scan.values for m in found if m.scan and m.scan.device == "load"] == [
        {"mean": 1.0, "coverage": 1.0}, {"mean": 2.0, "coverage": 0.5},
    ]  # fmt: skip


def test_summaries_are_left_out() -> None:
    minute = {"ts": T0, "device": "meter", "values": {"kw": {"mean": 90.0, "count": 60}}}
    assert list(moments([minute])) == []


def test_a_table_may_have_windows_and_what_no_column_tells_is_named() -> None:
    tags = {"meter.kw": "number", "battery.kw": "number writable"}
    load = {"of": ["meter.kw"], "size": "10s", "agg": ["mean"]}
    rules = {
        "heavy": {"when": "load.mean > 80.0 && load.coverage > 0.9", "do": {"battery.kw": 1.0}},
        "light": {"when": "meter.kw < 1.0", "do": {"battery.kw": 2.0}},
    }
    made, problems = plant(tags, rules, windows={"load": load})
    assert problems == []
    for columns, cells, lacking, on in (
        ("load.mean,load.coverage", "90,1", {"light": ["meter.kw"]}, 1),
        ("load.mean", "90", {"heavy": ["load.coverage"], "light": ["meter.kw"]}, 0),
        ("meter.kw", "90", {"heavy": ["load.coverage", "load.mean"]}, 0),
    ):
        replay = Replay(made)
        replay.play(table([f"ts,{columns}", f"{T0},{cells}", f"{T0 + 1000},{cells}"], KINDS))
        found = replay.json()
        assert (found["lacking"], found["rules"]["heavy"]["times_on"]) == (lacking, on)


def test_a_table_may_have_holes_times_in_two_forms_and_several_devices() -> None:
    lines = [
        "ts,meter.kw,battery.kw,meter.ok",
        "2026-01-01T00:00:00Z,1,,on",
        f"{T0 + 5},,2.5,",
        "",
        f"{T0 + 9},,,",
    ]
    assert list(table(lines, KINDS)) == [
        Moment(T0, scan=Scan(T0, "meter", {"kw": 1.0, "ok": True})),
        Moment(T0 + 5, scan=Scan(T0 + 5, "battery", {"kw": 2.5})),
    ]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], "line 1: found ''; expected ts,DEVICE.TAG,..."),
        (["time,meter.kw"], "line 1: found 'time,meter.kw'; expected ts,DEVICE.TAG,..."),
        (["ts,meter.kv"], "line 1: meter.kv is no tag of the configuration; did you mean meter.kw?"),
        (["ts,meter.kw", "1,2,3"], "line 2: found 3 cells; expected 2"),
        (["ts,meter.kw", "1,2", "1,x"], "line 3: meter.kw: found 'x'; expected a number"),
        (["ts,meter.ok", "1,maybe"], "line 2: meter.ok: found 'maybe'; expected true or false"),
        (
            ["ts,meter.kw", "noon,2"],
            "line 2: found ts 'noon'; expected milliseconds, or as in 2026-02-03T04:05:06Z",
        ),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_the_line(lines: list[str], error: str) -> None:
    with pytest.raises(ValueError) as raised:
        list(table(lines, KINDS))
    assert str(raised.value) == error


def test_charts() -> None:
    assert chart.bar([(0, 250), (500, None)], 0, 1000, 4) == "█·██"
    assert chart.bar([(501, 502)], 0, 1000, 4) == "··▒·", "however short, it is seen"
    assert chart.bar([], 0, 1000, 4) == "····"
    assert chart.levels([(0, 0.0), (250, 5.0), (500, 10.0)], 0, 1000, 4) == "▁▅██"
    assert chart.levels([(500, True)], 0, 1000, 4) == "  ▁▁"
    assert chart.levels([(0, "auto"), (500, "off")], 0, 1000, 4) == "aaoo"
    assert chart.axis(T0, T0 + 1000, 60) == "2026-01-01 00:00:00" + " " * 22 + "2026-01-01 00:00:01"


# -- the command -----------------------------------------------------------------------------------------------------


def rules_test(*arguments: str) -> tuple[int, str, str]:
    with Process(sys.executable, "-m", "edgegw", "rules", "test", *arguments) as process:
        code, out = process.end()
        return code, out, "\n".join(process.lines)


CONFIG = """
gateway = { id = "t" }
[device.meter]
driver = "modbus"
url = "tcp://127.0.0.1:502"
[device.meter.tags]
kw = { address = "holding:0", type = "float32" }
out = { address = "holding:2", type = "float32", writable = true }
[rule.peak]
when = "meter.kw > 80.0"
link = "offline"
do = { "meter.out" = "meter.kw" }
"""


def test_the_command_shows_a_table_and_a_chart_and_exits_as_said(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    recording = tmp_path / "day.csv"
    recording.write_text("ts,meter.kw\n" + "".join(f"{T0 + 1000 * i},{60 + i}\n" for i in range(60)))
    options = ("-c", str(config), "--csv", str(recording))
    code, out, errors = rules_test(*options)
    assert (code, errors) == (0, "")
    assert "█" not in out
    code, out, _ = rules_test(*options, "--link", "islanded")
    assert (code, "█" in out, "▁" in out) == (0, True, True)
    assert "rule:peak 39" in out
    code, out, _ = rules_test(*options, "--link", "islanded", "--json")
    assert (code, json.loads(out)["rules"]["peak"]["times_on"]) == (0, 1)
    recording.write_text("ts,meter.kv\n")
    code, _, errors = rules_test(*options)
    assert (code, "did you mean meter.kw?" in errors) == (2, True)
    recording.write_text(f"ts,meter.out\n{T0},1\n")
    code, _, errors = rules_test(*options)
    assert (code, errors) == (0, "rule.peak: meter.kw: nowhere in the recording; never known here")
    code, _, errors = rules_test("-c", str(config))
    assert (code, "not there" in errors) == (1, True)
    config.write_text(CONFIG.replace("80.0", "80"))
    code, _, errors = rules_test(*options)
    assert (code, "write 80.0 for 80" in errors) == (2, True)


async def test_a_journal_played_again_does_what_was_done(tmp_path: Path) -> None:
    """A real run without a broker, of a rule for an islanded link; the same from its records as JSON lines."""
    rule = {
        "when": "meter.kw > 80.0", "link": "offline", "for": "300ms",
        "do": {"battery.setpoint": "meter.kw - 60.0"}, "finally": {"battery.setpoint": 0.0},
    }  # fmt: skip
    async with site() as field:
        field.set(90.0)
        made = configuration(field, {"peak": rule}, uplink={"island_after": "700ms"})
        with running(tmp_path, made) as run:
            await until(lambda: field.values() == [30.0], "the rule")
            field.set(95.0)
            await until(lambda: field.values() == [30.0, 35.0], "another value")
            field.set(50.0)
            await until(lambda: field.values() == [30.0, 35.0, 0.0], "the last value")
            await field.scanned(5, BATTERY)
            await stop(run)
    really = [e["ts"] for e in records(tmp_path) if e["event"] in ("rule-on", "rule-off")]
    code, out, errors = rules_test("-c", str(tmp_path / "config.toml"), "--json")
    assert code == 0, errors
    found = json.loads(out)
    (span,) = found["rules"]["peak"]["spans"]
    assert span == [pytest.approx(ts, abs=150) for ts in really]
    assert found["setpoints"]["battery.setpoint"]["writes"] == 3
    assert found["setpoints"]["battery.setpoint"]["to"] == 35.0
    code, out, _ = rules_test("-c", str(tmp_path / "config.toml"), "--json", "--link", "online")
    assert json.loads(out)["rules"]["peak"]["times_on"] == 0
    lines = tmp_path / "records.ndjson"
    lines.write_text("".join(json.dumps(record) + "\n" for record in all_records(tmp_path)))
    code, out, _ = rules_test("-c", str(tmp_path / "config.toml"), "--json", "--journal", str(lines))
    assert json.loads(out)["rules"] == found["rules"]


def all_records(folder: Path) -> list[dict[str, Any]]:
    import msgspec

    from edgegw.journal.store import Reader, unpack, walk

    reader = Reader(folder / "journal.db")
    try:
        return [record for batch in walk(reader) for record in msgspec.json.decode(unpack(batch))["records"]]
    finally:
        reader.close()
