"""Promises 7 and 8 on the real process: what control does when all else fails, and what never gets past its guard."""

import asyncio
import itertools
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from control_field import (
    BATTERY,
    METER,
    PLAIN,
    RELAY,
    SETPOINT,
    Frame,
    Operator,
    Site,
    command,
    configuration,
    event,
    kill,
    records,
    running,
    site,
    stop,
)
from field import frame
from gateway_rig import toml, until
from rig import FAKETIME, MOSQUITTO, NO_DISK, FakeClock, Process, free_port, mosquitto

from edgegw import clock

PEAK: dict[str, Any] = {
    "when": "meter.kw > 80.0",
    "until": "meter.kw < 60.0",
    "do": {"battery.setpoint": "math.least(meter.kw - 60.0, 50.0)"},
    "finally": {"battery.setpoint": 0.0},
}
STALLED = ("strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync")
needs_broker = pytest.mark.skipif(not MOSQUITTO, reason="mosquitto is not here")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not here")
needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="libfaketime (Debian's faketime) is not here")


# -- promise 7 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    ["none", "journal without a disk", "device mute", pytest.param("disk stalled", marks=needs_strace)],
)
async def test_p7_a_rule_acts_on_the_scan_that_shows_its_condition(tmp_path: Path, trouble: str) -> None:
    """No broker, and beside that a journal that cannot be, a disk that stalls, or a device that is mute."""
    async with site() as plant:
        plant.set(70.0)
        made = configuration(plant, {"peak": PEAK}, every="300ms")
        prefix: tuple[str, ...] = ()
        if trouble == "journal without a disk":
            prefix = NO_DISK
        elif trouble == "device mute":
            made["device"]["third"] = made["device"]["meter"] | {"unit": 3}
            plant.field.behave[3] = plant.field.silent
        elif trouble == "disk stalled":
            prefix = (*STALLED, "-e", "inject=fdatasync,fsync:delay_enter=3000000")
        with running(tmp_path, made, *prefix) as run:
            await plant.scanned(3)
            await plant.scanned(1, BATTERY)
            plant.set(90.0)
            changed_s = time.monotonic()
            await until(lambda: plant.frames, "a write")
            shown = [at_s for at_s in plant.scans[METER] if changed_s <= at_s <= plant.frames[0].at_s]
            assert len(shown) == 1, "it took more than one scan"
            assert plant.frames[0].at_s - shown[0] < 0.15
            await until(lambda: plant.get() == pytest.approx(30.0), "the setpoint")
            plant.set(50.0)
            await until(lambda: plant.get() == 0.0, "the last value")
            run.send(
                signal.SIGKILL if trouble in ("disk stalled", "journal without a disk") else signal.SIGTERM
            )
            await asyncio.to_thread(run.end)
        assert plant.values() == [30.0, 0.0]


@needs_broker
async def test_p7_losing_the_uplink_changes_nothing_but_what_link_asks_for(tmp_path: Path) -> None:
    port = free_port()
    rules = {
        "always": {"when": "meter.kw > 0.0", "do": {"battery.plain": "meter.kw"}},
        "island": {
            "when": "meter.kw > 80.0", "link": "offline",
            "do": {"battery.setpoint": 20.0}, "finally": {"battery.setpoint": 5.0},
        },
    }  # fmt: skip
    async with site() as plant:
        plant.set(90.0)
        made = configuration(plant, rules, broker_port=port, uplink={"island_after": "1s"})
        with ExitStack() as stack:
            broker = stack.enter_context(mosquitto(tmp_path, port))
            run = stack.enter_context(running(tmp_path, made))
            await event(tmp_path, "link", state="online")
            await until(lambda: plant.values(PLAIN) == [90.0], "the rule for always")
            await plant.scanned(5)
            assert plant.values() == []
            lost_s = time.monotonic()
            broker.send(signal.SIGKILL)
            await until(lambda: plant.values() == [20.0], "the rule for an islanded link")
            assert plant.frames[-1].at_s - lost_s >= 1.0
            plant.set(91.0)
            await until(lambda: plant.values(PLAIN) == [90.0, 91.0], "the rule for always, islanded")
            stack.enter_context(mosquitto(tmp_path, port))
            await until(lambda: plant.values() == [20.0, 5.0], "the hand-back")
            plant.set(92.0)
            await until(
                lambda: plant.values(PLAIN) == [90.0, 91.0, 92.0], "the rule for always, online again"
            )
            pauses = [b - a for a, b in itertools.pairwise(plant.scans[METER])]
            assert sorted(pauses)[len(pauses) // 2] == pytest.approx(0.05, abs=0.01)
            await stop(run)
    assert [e["rule"] for e in records(tmp_path, "rule-on")] == ["always", "island"]
    assert [e["rule"] for e in records(tmp_path, "rule-off")] == ["island"]


def ways_to_fail(plant: Site) -> dict[str, Callable[[], None]]:
    def behave(answer: Any) -> Callable[[], None]:
        return lambda: plant.field.behave.__setitem__(METER, answer)

    return {
        "silent": behave(plant.field.silent),
        "exception": behave(plant.field.exception(2)),
        "not a number": lambda: plant.set(float("nan")),
    }


@pytest.mark.parametrize("failure", ["silent", "exception", "not a number"])
async def test_p7_on_an_input_that_is_missing_bad_or_stale_no_rule_turns_on(
    tmp_path: Path, failure: str
) -> None:
    """The last value that was good would have turned it on but for `for`."""
    async with site() as plant:
        plant.set(90.0)
        rule = PEAK | {"for": "1200ms", "stale_after": "400ms"}
        with running(tmp_path, configuration(plant, {"peak": rule})) as run:
            await plant.scanned(4)
            ways_to_fail(plant)[failure]()
            await plant.scanned(30, BATTERY)
            assert plant.frames == []
            plant.set(90.0)
            plant.field.behave[METER] = plant.answer
            await until(lambda: plant.values() == [30.0], "the rule once its input is good again")
            await stop(run)


@pytest.mark.parametrize("failure", ["silent", "exception", "not a number"])
async def test_p7_a_rule_whose_input_fails_brings_what_it_holds_to_safe_after_hold(
    tmp_path: Path, failure: str
) -> None:
    async with site() as plant:
        plant.set(90.0)
        rule = PEAK | {"hold": "600ms", "stale_after": "400ms"}
        with running(tmp_path, configuration(plant, {"peak": rule}, limits={"safe": 2.0})) as run:
            await until(lambda: plant.values() == [30.0], "the rule")
            failed_s = time.monotonic()
            ways_to_fail(plant)[failure]()
            await until(lambda: plant.values() == [30.0, 2.0], "safe")
            after_s = 1.0 if failure == "silent" else 0.6
            assert after_s - 0.1 < plant.frames[-1].at_s - failed_s < after_s + 0.6
            plant.set(90.0)
            plant.field.behave[METER] = plant.answer
            await until(lambda: plant.values() == [30.0, 2.0, 30.0], "the rule again")
            await stop(run)
    assert [e["cause"] for e in records(tmp_path, "write") if "ok" in e] == [
        "rule:peak",
        "failsafe",
        "rule:peak",
    ]
    assert len(records(tmp_path, "rule-on")) == 1, "it stayed on"


# -- promise 8 -------------------------------------------------------------------------------------------------------


@needs_broker
async def test_p8_no_write_goes_out_but_to_a_writable_tag_within_its_limits_and_ledgered(
    tmp_path: Path,
) -> None:
    """Rules and commands, good ones and bad ones; the journal is read at the moment each frame comes."""
    port = free_port()
    rules = {
        "follow": {
            "when": "meter.kw > 0.0",
            "do": {"battery.setpoint": "meter.kw - 60.0", "battery.plain": "meter.kw"},
        }
    }
    intents: list[bool] = []
    limits = {"safe": 0.0, "max_step": 20.0, "min_interval": "50ms"}

    def seen(written: Frame) -> None:
        tag = {SETPOINT: "battery.setpoint", PLAIN: "battery.plain", RELAY: "battery.relay"}[written.address]
        value = written.value if isinstance(written.value, bool) else pytest.approx(written.value, rel=1e-6)
        intents.append(
            any(e["tag"] == tag and "ok" not in e and e["new"] == value for e in records(tmp_path, "write"))
        )

    async with site() as plant:
        plant.seen = seen
        plant.set(-1.0)
        made = configuration(plant, rules, broker_port=port, limits=limits)
        with mosquitto(tmp_path, port), Operator(port) as operator, running(tmp_path, made) as run:
            await event(tmp_path, "link", state="online")
            await plant.scanned(2)
            for kw in (90.0, 500.0, 30.0, -400.0, 100.0):
                plant.set(kw)
                await plant.scanned(3)
            bad = [
                command("b1", {"battery.setpoint": 51.0}),
                command("b2", {"battery.setpoint": -50.5}),
                command("b3", {"meter.kw": 1.0}),
                command("b4", {"battery.hidden": 1.0}),
                command("b5", {"battery.nothing": 1.0}),
                command("b6", {"battery.setpoint": True}),
                command("b7", {"battery.relay": 1}),
                command("b8", {"battery.setpoint": 10.0}, expires_ms=-1),
                command("b9", {"battery.plain": 1.0}, unknown=1),
                b"\x00\x01",
                b"[" * 70_000,
            ]
            frames = len(plant.frames)
            plant.set(-1.0)  # the rule lets go
            await event(tmp_path, "rule-off", rule="follow")
            await plant.scanned(5)
            settled = len(plant.frames)
            for payload in bad:
                answer = await operator.ask(payload)
                assert answer["ok"] is False
                assert answer["error"]
            await plant.scanned(5, BATTERY)
            assert len(plant.frames) == settled, "a command that was refused was done"
            good = await operator.ask(command("g1", {"battery.relay": True, "battery.plain": 7.5}))
            assert good == {"id": "g1", "ok": True}
            await stop(run)
    assert frames > 4
    writable = {(16, SETPOINT), (16, PLAIN), (5, RELAY)}
    assert {(f.function, f.address) for f in plant.frames} <= writable
    assert {f.unit for f in plant.frames} == {BATTERY}
    setpoints = [0.0, *plant.values()]
    assert all(-50.0 <= value <= 50.0 for value in setpoints)
    assert all(abs(b - a) <= 20.0 + 1e-3 for a, b in itertools.pairwise(setpoints))
    check_ledger(tmp_path, plant.frames, intents)
    assert {e["reason"] for e in records(tmp_path, "write-refused")} == {"440 is above max 50"}
    assert [e["id"] for e in records(tmp_path, "command") if e["ok"]] == ["g1"]
    refused = [e for e in records(tmp_path, "command") if not e["ok"]]
    assert len(refused) == len(bad)
    assert [e["write"] for e in refused[:3]] == [
        {"battery.setpoint": 51.0}, {"battery.setpoint": -50.5}, {"meter.kw": 1.0},
    ]  # fmt: skip


def check_ledger(folder: Path, frames: list[Frame], intents: list[bool]) -> None:
    """Check that each frame has its intent and its outcome, and that an outcome says `late` if the act went first."""
    names = {SETPOINT: "battery.setpoint", PLAIN: "battery.plain", RELAY: "battery.relay"}
    events = records(folder, "write")
    wanted = [e for e in events if "ok" not in e]
    outcomes = [e for e in events if "ok" in e]
    assert len(wanted) == len(outcomes) == len(frames)
    for name in names.values():
        values = [f.value for f in frames if names[f.address] == name]
        for entries in (wanted, outcomes):
            assert [e["new"] for e in entries if e["tag"] == name] == [
                pytest.approx(v) if isinstance(v, float) else v for v in values
            ]
    assert all(e["ok"] for e in outcomes)
    assert all(e["cause"].partition(":")[0] in ("rule", "command", "failsafe") for e in wanted)
    late = sum(e.get("late", False) for e in outcomes)
    assert intents.count(False) <= late, "the act went before its entry, and the ledger does not say so"


async def test_p8_a_write_that_cannot_be_confirmed_is_an_event_and_not_repeated_by_a_retry(
    tmp_path: Path,
) -> None:
    """The battery takes a write and answers nothing: it is written again only by later decisions, a second apart."""

    async def mute_to_writes(tid: int, unit: int, pdu: bytes) -> bytes | None:
        answer = await plant.answer(tid, unit, pdu)
        if pdu[0] == 16:
            plant.set(0.0, BATTERY, SETPOINT)  # and does not do it either
            return None
        return answer

    async with site() as plant:
        plant.field.behave[BATTERY] = mute_to_writes
        plant.set(90.0)
        with running(tmp_path, configuration(plant, {"peak": PEAK})) as run:
            await until(lambda: len(plant.frames) >= 3, "decisions")
            plant.field.behave[BATTERY] = plant.answer
            await until(lambda: plant.get() == 30.0, "the write that is answered")
            await event(tmp_path, "write", ok=True)
            await stop(run)
    pauses = [b.at_s - a.at_s for a, b in itertools.pairwise(plant.frames)]
    assert min(pauses) > 1.0, pauses
    outcomes = [e for e in records(tmp_path, "write") if "ok" in e]
    assert [e["ok"] for e in outcomes] == [False] * (len(plant.frames) - 1) + [True]
    assert {e["error"] for e in outcomes if not e["ok"]} == {"timeout"}


async def test_p8_a_device_that_lets_go_of_what_is_not_repeated_is_fed(tmp_path: Path) -> None:
    """A fake with a deadman: what it does falls to nothing 5 s after the last write, whatever its register shows."""
    lapses: list[float] = []

    async def deadman(tid: int, unit: int, pdu: bytes) -> bytes | None:
        fed = [f.at_s for f in plant.frames if f.address == SETPOINT]
        if fed and time.monotonic() - fed[-1] > 5.0:
            lapses.append(time.monotonic())
        return await plant.answer(tid, unit, pdu)

    limits = {"refresh": "1s", "max_per_hour": 3600, "min_interval": "1s"}
    async with site() as plant:
        plant.field.behave[BATTERY] = deadman
        plant.set(90.0)
        with running(tmp_path, configuration(plant, {"peak": PEAK}, limits=limits)) as run:
            await until(lambda: len(plant.values()) >= 9, "refreshes", 60.0)
            plant.set(91.0)
            await until(lambda: plant.values()[-1] == 31.0, "another value")
            await until(lambda: plant.values().count(31.0) >= 3, "refreshes of it", 30.0)
            plant.set(50.0)
            await event(tmp_path, "authority", owner=None)
            await stop(run)
    assert lapses == []
    pauses = [b.at_s - a.at_s for a, b in itertools.pairwise(plant.frames)]
    assert min(pauses[:8]) > 0.9, "sooner than it must"
    told = [(e["new"], e.get("ok"), e.get("repeats")) for e in records(tmp_path, "write")]
    values = plant.values()
    assert told == [
        (30.0, None, None), (30.0, True, None), (30.0, True, values.count(30.0) - 1),
        (31.0, None, None), (31.0, True, None), (31.0, True, values.count(31.0) - 1),
        (0.0, None, None), (0.0, True, None),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["refuses", "clamps"])
async def test_p8_a_write_that_fails_the_same_way_is_made_ever_more_rarely_and_said_once(
    tmp_path: Path, how: str
) -> None:
    """A wanted value that is another one is tried at once."""

    async def unwilling(tid: int, unit: int, pdu: bytes) -> bytes | None:
        answer = await plant.answer(tid, unit, pdu)
        if pdu[0] == 16:
            plant.set(12.0, BATTERY, SETPOINT)
            return frame(tid, unit, bytes((0x90, 4))) if how == "refuses" else answer
        return answer

    async with site() as plant:
        plant.field.behave[BATTERY] = unwilling
        plant.set(90.0)
        with running(tmp_path, configuration(plant, {"peak": PEAK})) as run:
            await until(lambda: len(plant.frames) >= 4, "decisions", 30.0)
            plant.set(91.0)
            await until(lambda: plant.values()[-1] == 31.0, "the other value")
            await event(tmp_path, "write", ok=False, new=31.0)
            await stop(run)
            said = [line for line in run.lines if "not confirmed" in line]
    same = [f.at_s for f in plant.frames if f.value == 30.0]
    pauses = [b - a for a, b in itertools.pairwise(same)]
    assert all(pause > wanted for pause, wanted in zip(pauses, (1.0, 2.0, 4.0), strict=False)), pauses
    assert len(said) == 1, said
    outcomes = [e for e in records(tmp_path, "write") if e.get("ok") is False]
    assert [e["failures"] for e in outcomes] == [*range(1, len(outcomes) + 1)]


async def test_p8_a_device_that_holds_another_value_than_was_written_is_found_out(tmp_path: Path) -> None:
    async def clamps(tid: int, unit: int, pdu: bytes) -> bytes | None:
        answer = await plant.answer(tid, unit, pdu)
        if pdu[0] == 16:
            plant.set(12.0, BATTERY, SETPOINT)
        return answer

    async with site() as plant:
        plant.field.behave[BATTERY] = clamps
        plant.set(90.0)
        with running(tmp_path, configuration(plant, {"peak": PEAK})) as run:
            outcome = await event(tmp_path, "write", ok=False)
            await stop(run)
    assert (outcome["error"], outcome["new"], outcome["read"]) == ("read-back", 30.0, 12.0)


async def test_p8_a_device_that_was_away_is_read_before_it_is_written(tmp_path: Path) -> None:
    """It boots to -50 and answers writes at once, but is not read yet: no step is made from the 40 of before."""
    reads = asyncio.Event()

    async def booted(tid: int, unit: int, pdu: bytes) -> bytes | None:
        return await plant.answer(tid, unit, pdu) if pdu[0] == 16 or reads.is_set() else None

    limits = {"max_step": 25.0, "min_interval": "100ms"}
    async with site() as plant:
        plant.set(100.0)
        with running(tmp_path, configuration(plant, {"peak": PEAK}, limits=limits)) as run:
            await until(lambda: plant.get() == 40.0, "the rule")
            plant.field.behave[BATTERY] = booted
            await event(tmp_path, "device-down", device="battery")
            before = len(plant.frames)
            plant.set(-50.0, BATTERY, SETPOINT)
            plant.set(109.0)
            await plant.scanned(20)
            assert len(plant.frames) == before, "a step from a value of before"
            reads.set()
            await until(lambda: plant.get() == 49.0, "the rule, from what the device holds")
            await stop(run)
    assert plant.values()[before:] == [-25.0, 0.0, 25.0, 49.0]


# -- commands --------------------------------------------------------------------------------------------------------


@needs_broker
async def test_p8_commands_act_once_and_are_answered(tmp_path: Path) -> None:
    """Answers on both topics, the same message twice, the same id otherwise, a SIGKILL between, a retained one."""
    port = free_port()
    async with site() as plant:
        made = configuration(plant, {}, broker_port=port, uplink={"reply_prefix": "answers/"})
        with mosquitto(tmp_path, port), Operator(port) as operator:
            operator.send(command("kept", {"battery.setpoint": 44.0}), retain=True)
            with running(tmp_path, made) as run:
                await until(lambda: operator.replies, "an answer to the retained one")
                assert operator.replies[0]["id"] == "kept"
                assert "retained" in operator.replies[0]["error"]
                assert (await operator.ask(b"", retain=True))["error"].startswith(
                    "not JSON"
                )  # it is taken away
                await plant.scanned(2, BATTERY)
                first = command("a", {"battery.setpoint": 10.0})
                options = {"answer_to": "answers/me", "correlation": b"17"}
                assert await operator.ask(first, **options) == {"id": "a", "ok": True}
                await until(lambda: any(a[0] == "answers/me" for a in operator.answers), "the other answer")
                own = next(a for a in operator.answers if a[0] == "answers/me")
                assert own == ("answers/me", {"id": "a", "ok": True}, b"17")
                plant.set(3.0, BATTERY, SETPOINT)  # would be seen if the command were done anew
                await until(lambda: plant.values() == [10.0, 10.0], "what it holds to be held")
                assert await operator.ask(first) == {"id": "a", "ok": True}
                other = await operator.ask(command("a", {"battery.setpoint": 20.0}))
                assert (other["ok"], other["error"]) == (False, "this id was already acted on")
                await kill(run)
            with running(tmp_path, made) as run:
                await until(lambda: run.said("online"), "the link")
                await plant.scanned(3, BATTERY)
                again = await operator.ask(first)
                assert (again["ok"], again["error"]) == (False, "this id was already acted on")
                assert plant.values() == [10.0, 10.0], "it was done again, or written for nothing"
                assert await operator.ask(command("b", {"battery.setpoint": 11.0})) == {"id": "b", "ok": True}
                await stop(run)
    assert plant.values() == [10.0, 10.0, 11.0]
    owners = [e["owner"] for e in records(tmp_path, "authority")]
    assert owners == ["command:a", "command:b"], "authority outlives a kill"


@needs_broker
async def test_p8_a_lease_ends_in_safe_or_in_the_rule_that_is_on(tmp_path: Path) -> None:
    port = free_port()
    rules = {"plain": {"when": "meter.kw > 80.0", "do": {"battery.plain": 5.0}}}
    async with site() as plant:
        plant.set(90.0)
        made = configuration(plant, rules, broker_port=port, limits={"safe": 1.0, "ramp": "40/s"})
        with mosquitto(tmp_path, port), Operator(port) as operator, running(tmp_path, made) as run:
            await event(tmp_path, "link", state="online")
            await until(lambda: plant.values(PLAIN) == [5.0], "the rule")
            asked_s = time.monotonic()
            both = {"battery.plain": 6.0, "battery.setpoint": 10.0}
            assert (await operator.ask(command("a", both, lease="1500ms")))["ok"]
            await until(lambda: plant.values(PLAIN) == [5.0, 6.0, 5.0], "the rule again")
            assert 1.4 < plant.frames[-1].at_s - asked_s < 2.5
            await until(lambda: plant.get() == 1.0, "safe")
            await event(tmp_path, "authority", tag="battery.setpoint", owner=None)
            await stop(run)
    assert plant.values() == [10.0, 1.0]
    owners = [(e["tag"], e["owner"]) for e in records(tmp_path, "authority")]
    assert owners == [
        ("battery.plain", "rule:plain"),
        ("battery.plain", "command:a"), ("battery.setpoint", "command:a"),
        ("battery.plain", "rule:plain"), ("battery.setpoint", "failsafe"),
        ("battery.setpoint", None),
    ]  # fmt: skip


@needs_broker
async def test_p8_a_command_whose_id_cannot_be_kept_is_not_acted_on(tmp_path: Path) -> None:
    """Without a durable id it could act twice; a rule goes on acting."""
    port = free_port()
    rules = {"plain": {"when": "meter.kw > 80.0", "do": {"battery.plain": 5.0}}}
    async with site() as plant:
        made = configuration(plant, rules, broker_port=port)
        blocked = [tmp_path / "journal.db.ids", tmp_path / "journal.db.control.new"]
        for file in blocked:
            file.mkdir()  # nothing can be written there
        with mosquitto(tmp_path, port), Operator(port) as operator, running(tmp_path, made) as run:
            await event(tmp_path, "link", state="online")
            answer = await operator.ask(command("a", {"battery.setpoint": 10.0}))
            assert (answer["ok"], answer["error"]) == (
                False,
                "the journal cannot take it; nothing was written",
            )
            plant.set(90.0)
            await until(lambda: plant.values(PLAIN) == [5.0], "the rule")
            for file in blocked:
                file.rmdir()
            assert (await operator.ask(command("b", {"battery.setpoint": 11.0})))["ok"]
            await stop(run)
    assert plant.values() == [11.0]
    assert [e for e in records(tmp_path, "write") if e.get("late") and e["new"] == 5.0]


# -- clocks ----------------------------------------------------------------------------------------------------------


@needs_faketime
@needs_broker
@pytest.mark.parametrize("jump", ["+2d", "-2d"])
async def test_p7_a_clock_that_jumps_by_two_days_changes_no_timer(tmp_path: Path, jump: str) -> None:
    """`for`, `min_on`, `hold` and a lease run while the clock jumps; each ends when it would have."""
    port = free_port()
    rules = {
        "timed": {"when": "meter.kw > 80.0", "for": "5s", "min_on": "5s", "do": {"battery.plain": 5.0},
                  "finally": {"battery.plain": 1.0}},
    }  # fmt: skip
    fake = FakeClock(tmp_path / "time")
    async with site() as plant:
        plant.set(70.0)
        made = configuration(plant, rules, broker_port=port, limits={"safe": 0.0})
        made["device"]["battery"]["timeout"] = "5s"  # it is never lost on a busy machine
        with (
            mosquitto(tmp_path, port),
            Operator(port) as operator,
            running(tmp_path, made, *fake.prefix) as run,
        ):
            await event(tmp_path, "link", state="online")
            await plant.scanned(2)
            begun_s = time.monotonic()
            plant.set(90.0)
            answer = await operator.ask(command("a", {"battery.setpoint": 10.0}, lease="5s"))
            assert answer["ok"], "\n".join([str(answer), *run.lines])
            fake.set(jump)
            await until(lambda: len(plant.values()) == 2 and plant.values(PLAIN), "lease and rule")
            ends = {f.address: f.at_s - begun_s for f in plant.frames}
            assert 4.0 < ends[SETPOINT] < 60.0, ends  # as exact as a busy machine is, but not two days
            assert 4.0 < ends[PLAIN] < 60.0, ends
            on_s = begun_s + ends[PLAIN]
            plant.set(70.0)
            fake.set("+0")
            await until(lambda: plant.values(PLAIN) == [5.0, 1.0], "the rule's end")
            assert 1.5 < plant.frames[-1].at_s - on_s < 60.0
            await stop(run)
    assert plant.values() == [10.0, 0.0]
    stamps = [e["ts"] for e in records(tmp_path)]
    assert max(stamps) - min(stamps) > 86_400_000, "the clock did not jump"


@needs_broker
async def test_p7_a_command_without_a_lease_does_not_come_back_after_a_reboot(tmp_path: Path) -> None:
    """The boot's identity is exchanged in what control remembers: that is all of a reboot that it can see."""
    port = free_port()
    async with site() as plant:
        made = configuration(plant, {}, broker_port=port, limits={"safe": 2.0})
        with mosquitto(tmp_path, port), Operator(port) as operator, running(tmp_path, made) as first:
            await event(tmp_path, "link", state="online")
            await plant.scanned(1, BATTERY)
            assert (await operator.ask(command("monday", {"battery.setpoint": 40.0})))["ok"]
            await stop(first)
        assert plant.values() == [40.0]
        memory = tmp_path / "journal.db.control"
        memory.write_text(memory.read_text().replace(clock.boot_id(), "another"))
        plant.set(7.0, BATTERY, SETPOINT)
        with running(tmp_path, made) as second:
            await until(lambda: plant.get() == 2.0, "safe")
            await plant.scanned(10, BATTERY)
            await stop(second)
    assert plant.values() == [40.0, 2.0]


@needs_faketime
@needs_broker
async def test_p8_a_clock_that_stands_before_the_journals_records_lets_no_command_act(tmp_path: Path) -> None:
    """The gateway comes up two days back, with nothing to synchronise it: an expired command would act again."""
    port = free_port()
    fake = FakeClock(tmp_path / "time", "-2d")
    async with site() as plant:
        made = configuration(
            plant, {}, broker_port=port, limits={}
        )  # a link that is slow to come leaves nothing
        with mosquitto(tmp_path, port), Operator(port) as operator:
            with running(tmp_path, made) as first:
                await event(tmp_path, "link", state="online")
                assert (await operator.ask(command("a", {"battery.setpoint": 1.0})))["ok"]
                await stop(first)
            with running(tmp_path, made, *fake.prefix) as second:
                await event(tmp_path, "link", 2, state="online")
                day_ms = 86_400_000
                answer = await operator.ask(
                    command("b", {"battery.setpoint": 2.0}, expires_ms=60_000 - 2 * day_ms)
                )
                assert (answer["ok"], "the gateway's clock says" in answer["error"]) == (False, True), answer
                await stop(second)
    assert set(plant.values()) == {1.0}
    (refused,) = [e for e in records(tmp_path, "command") if not e["ok"]]
    assert refused["write"] == {"battery.setpoint": 2.0}


# -- kills -----------------------------------------------------------------------------------------------------------


async def restarted(plant: Site, folder: Path, made: dict[str, Any], run: Process) -> Process:
    """Kill the gateway and start it again."""
    await kill(run)
    return running(folder, made)


async def test_p7_killed_while_for_runs_it_goes_on_where_it_was(tmp_path: Path) -> None:
    async with site() as plant:
        plant.set(90.0)
        made = configuration(plant, {"peak": PEAK | {"for": "6s"}})
        with running(tmp_path, made) as first:
            scanned = plant.scans[METER]
            await until(lambda: scanned and time.monotonic() - scanned[0] > 4.5, "most of it")
            ran_s = time.monotonic() - plant.scans[METER][0]
            assert plant.frames == []
            await kill(first)
        scans = len(plant.scans[METER])
        with running(tmp_path, made) as second:
            await until(lambda: plant.frames, "the rule")
            again_s = plant.frames[0].at_s - plant.scans[METER][scans]
            assert 6.0 - ran_s - 0.2 < again_s, "it counted the time between"
            assert again_s < 5.0, "it began anew, and not with all but the last second"
            await stop(second)


STATES: dict[str, tuple[dict[str, Any], dict[str, Any], float, list[float], list[float]]] = {
    # rule over PEAK, limits, kW at the restart, writes before it, writes after it
    "on": (PEAK, {"safe": 0.0}, 90.0, [30.0], []),
    "on, wanting something else now": (PEAK, {"safe": 0.0}, 85.0, [30.0], [25.0]),
    "on, over meanwhile": (PEAK, {"safe": 0.0}, 50.0, [30.0], [0.0]),
    "on a ramp": (PEAK, {"ramp": "10/s", "min_interval": "1s", "safe": 0.0}, 90.0, [10.0], [20.0, 30.0]),
}


@pytest.mark.parametrize("state", list(STATES))
async def test_p7_killed_in_a_state_it_goes_on_in_it(tmp_path: Path, state: str) -> None:
    """The rule stays on, its setpoint its own, and nothing is written that is there already."""
    rule, limits, kw, before, after = STATES[state]
    async with site() as plant:
        plant.set(90.0)
        made = configuration(plant, {"peak": rule}, limits=limits)
        with running(tmp_path, made) as first:
            await until(lambda: len(plant.values()) >= len(before), "what comes before")
            await event(tmp_path, "rule-on")
            await kill(first)
        assert plant.values() == before
        plant.set(kw)
        with running(tmp_path, made) as second:
            await until(lambda: len(plant.values()) >= len(before) + len(after), "what comes after")
            await plant.scanned(10, BATTERY)
            assert plant.values() == before + after
            await stop(second)
    over = kw < 60.0
    assert [e["event"] for e in records(tmp_path) if e["event"].startswith("rule")] == ["rule-on"] + [
        "rule-off"
    ] * over
    owners = [e["owner"] for e in records(tmp_path, "authority")]
    assert owners == ["rule:peak"] + [None] * over


async def test_p7_killed_it_counts_as_just_switched(tmp_path: Path) -> None:
    rule = PEAK | {"min_on": "3s", "min_off": "3s", "do": {"battery.setpoint": 30.0}}
    async with site() as plant:
        plant.set(90.0)
        made = configuration(plant, {"peak": rule})
        with running(tmp_path, made) as first:
            await until(lambda: plant.values() == [30.0], "the rule, min_off after the start")
            await until(lambda: time.monotonic() - plant.frames[0].at_s > 2.7, "most of min_on")
            await kill(first)
        plant.set(50.0)
        started_s = time.monotonic()
        with running(tmp_path, made) as second:
            await until(lambda: plant.values() == [30.0, 0.0], "the end of the rule")
            assert plant.frames[-1].at_s - started_s > 3.0, "min_on was not begun anew"
            await kill(second)
        plant.set(90.0)
        started_s = time.monotonic()
        with running(tmp_path, made) as third:
            await until(lambda: plant.values() == [30.0, 0.0, 30.0], "the rule again")
            assert plant.frames[-1].at_s - started_s > 3.0, "min_off was not begun anew"
            await stop(third)


async def test_p7_killed_while_a_hold_runs_it_ends_when_it_would_have(tmp_path: Path) -> None:
    async with site() as plant:
        plant.set(90.0)
        rule = PEAK | {"hold": "3s", "stale_after": "300ms"}
        made = configuration(plant, {"peak": rule}, limits={"safe": 2.0})
        with running(tmp_path, made) as first:
            await until(lambda: plant.values() == [30.0], "the rule")
            plant.set(float("nan"))
            failed_s = time.monotonic()
            await until(lambda: time.monotonic() - failed_s > 1.5, "the memory to be saved")
            await kill(first)
        with running(tmp_path, made) as second:
            await until(lambda: plant.values() == [30.0, 2.0], "safe")
            assert 2.9 < plant.frames[-1].at_s - failed_s < 4.5
            await stop(second)


async def test_p7_killed_at_random_moments_no_setpoint_is_left_where_no_rule_wants_it(tmp_path: Path) -> None:
    """Kills while rule, ramp and last value are under way; in the end the plant holds what the rule says."""
    limits = {"ramp": "100/s", "min_interval": "100ms", "safe": 0.0}
    async with site() as plant:
        made = configuration(plant, {"peak": PEAK}, limits=limits)
        for number in range(8):
            plant.set(90.0 if number % 2 else 50.0)
            with running(tmp_path, made) as run:
                await plant.scanned(number + 1, BATTERY)
                await kill(run)
        plant.set(95.0)
        with running(tmp_path, made) as run:
            await until(lambda: plant.get() == 35.0, "what the rule wants")
            plant.set(10.0)
            await until(lambda: plant.get() == 0.0, "its last value")
            await stop(run)
    assert all(-50.0 <= value <= 50.0 for value in plant.values())
    steps = [b - a for a, b in zip([0.0, *plant.values()], plant.values(), strict=False)]
    assert max(map(abs, steps)) <= 25.0 + 1e-3, "a jump"


async def test_p7_a_reload_forgets_nothing_also_on_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    """A rule that stays is on all the while; what one held that is gone goes to safe."""
    rules = {"peak": PEAK, "plain": {"when": "meter.kw > 80.0", "do": {"battery.relay": True}}}
    async with site() as plant:
        plant.set(90.0)
        (tmp_path / "journal.db.control.new").mkdir()  # control's memory cannot be written
        with running(tmp_path, configuration(plant, rules)) as run:
            await until(lambda: plant.get() == 30.0 and plant.coils[BATTERY][RELAY], "both rules")
            made = configuration(plant, {"peak": PEAK})
            (tmp_path / "config.toml").write_text(toml(made))
            run.send(signal.SIGHUP)
            await until(lambda: not plant.coils[BATTERY][RELAY], "safe")
            await plant.scanned(5, BATTERY)
            plant.set(95.0)
            await until(lambda: plant.get() == 35.0, "the rule that stays")
            await stop(run)
    assert plant.values() == [30.0, 35.0]
    assert [e["rule"] for e in records(tmp_path, "rule-on")] == ["peak", "plain"]
    assert records(tmp_path, "rule-off") == []
