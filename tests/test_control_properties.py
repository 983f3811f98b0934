"""What holds for the guard, the arbiter and the engine, whatever comes: random sites, demands, failures and times."""

import itertools
from collections import defaultdict
from math import inf
from typing import Any

import pytest
from control_rig import Site, plant
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgegw.control.arbiter import Demand, arbitrate
from edgegw.control.grid import Grid
from edgegw.control.guard import RAMP_TICK_S, History, Limits, Refuse, Wait, Write, check, guard, settled
from edgegw.control.guard import pace_s as guard_pace_s
from edgegw.control.plant import Plant

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))
ANYTHING = st.one_of(
    NUMBERS, st.floats(), st.integers(), st.booleans(), st.text(max_size=3), st.just(10**400)
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.sampled_from("abcd"), st.integers(0, 3), NUMBERS), max_size=12
    ),
    st.randoms(use_true_random=False),
)
def test_one_has_each_setpoint_and_it_is_the_same_whatever_the_order(wanted: list[Any], order: Any) -> None:
    unique = {(setpoint, owner): (priority, value) for setpoint, owner, priority, value in wanted}
    demands = [Demand(at, who, priority, value, who) for (at, who), (priority, value) in unique.items()]
    winners = arbitrate(demands)
    assert winners.keys() == {demand.setpoint for demand in demands}
    for demand in demands:
        winner = winners[demand.setpoint]
        assert winner.priority > demand.priority or (
            winner.priority == demand.priority and winner.owner <= demand.owner
        )
    order.shuffle(demands)
    assert arbitrate(demands) == winners


GRIDS = st.sampled_from(
    [Grid(), Grid("float32"), Grid("integer"), Grid("integer", 0.1), Grid("integer", 0.5, 0.25)]
)


@st.composite
def limits(draw: Any) -> Limits:
    low, high = sorted((draw(NUMBERS), draw(NUMBERS)))
    maybe = lambda strategy: draw(st.none() | strategy)  # noqa: E731
    return Limits(
        True, "number", maybe(st.just(low)), maybe(st.just(high)),
        maybe(st.sampled_from([0.5, 5.0, 25.0])), maybe(st.sampled_from([0.01, 1.0, 10.0])),
        draw(st.sampled_from([0.0, 0.1, 1.0, 60.0])), maybe(st.integers(1, 4)),
        grid=draw(GRIDS),
    )  # fmt: skip


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.01, 0.1, 0.25, 1.0, 30.0, 1000.0, 4000.0]),
        ANYTHING,
        st.sampled_from(["confirmed", "confirmed", "lost", "moved"]),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(limits(), STEPS, NUMBERS)
def test_p8_no_sequence_of_demands_times_and_failures_takes_a_setpoint_past_its_limits(
    of: Limits, steps: list[Any], start: float
) -> None:
    """Type, range, step, ramp, interval and writes an hour, for what is written, from what the setpoint held."""
    now_s, history, held = 1000.0, History(), of.grid.nearest(start) or 0.0
    known: float | None = held
    written: list[float] = []
    for pause_s, wanted, fate in steps:
        now_s += pause_s
        verdict = guard(of, history, known, wanted, now_s)
        if isinstance(verdict, Refuse):
            unreachable = of.max_step is not None and of.max_step < of.resolution
            assert (
                check(of, wanted) is not None
                or settled(of, wanted) is None
                or (verdict.limit == "present" and known is None)
                or (verdict.limit == "max_step" and unreachable)
            )
        elif isinstance(verdict, Wait):
            assert verdict.until_s > now_s
        else:
            within(of, verdict, known, wanted, written, now_s)
            written.append(now_s)
            history = history.wrote(verdict.value, now_s, of.max_per_hour)
            held, known = (verdict.value, verdict.value) if fate != "lost" else (held, None)  # type: ignore[assignment]
            continue
        if fate == "moved":
            held = known = of.grid.nearest(start) or 0.0
        elif fate == "confirmed":
            known = held


def within(
    of: Limits, write: Write, present: float | None, wanted: Any, written: list[float], now_s: float
) -> None:
    value = write.value
    assert isinstance(value, int | float)
    assert not isinstance(value, bool)
    assert of.min is None or value >= of.min
    assert of.max is None or value <= of.max
    wanted = settled(of, wanted)
    assert value == wanted or not write.final
    assert of.grid.nearest(value) == value, "the register holds something else"
    if of.max_per_hour is not None:
        assert sum(now_s - at < 3600.0 for at in written) < of.max_per_hour
    if written:
        assert now_s - written[-1] >= of.min_interval_s - 1e-9
    if of.max_step is None and of.ramp_per_s is None:
        return
    assert present is not None, "a step from an unknown value"
    pace_s = guard_pace_s(of)
    paced = not write.final or of.ramp_per_s is None
    assert not paced or not written or now_s - written[-1] >= pace_s - 1e-9, "steps too close to each other"
    inside = (of.min is None or present >= of.min) and (of.max is None or present <= of.max)
    if not inside:
        return  # it is brought into its range first
    moved = abs(value - present)
    assert of.max_step is None or moved <= of.max_step + 1e-6
    if of.ramp_per_s is not None:
        since_s = min(now_s - written[-1], pace_s) if written else pace_s
        assert moved <= of.ramp_per_s * since_s + 1e-6
    assert min(present, float(wanted)) - 1e-9 <= value <= max(present, float(wanted)) + 1e-9, "the wrong way"


TAGS = {
    "src.a": "number",
    "src.b": "number",
    "src.ok": "bool",
    "out.ramped": "number writable min=-50 max=50 ramp=10/s min_interval=1s safe=0",
    "out.stepped": "int writable min=0 max=99.6 max_step=24.5 min_interval=500ms max_per_hour=20 safe=50",
    "out.free": "number writable",
    "out.relay": "bool writable min_interval=2s safe=false",
}
RULES = {
    "base": {
        "when": "src.a > 10.0", "do": {"out.ramped": "src.b", "out.free": "src.a"}, "finally": {"out.ramped": 0.0},
    },
    "over": {
        "when": "src.a > 20.0 || src.ok", "until": "src.a < 5.0", "priority": 5, "for": "1s", "hold": "3s",
        "do": {"out.ramped": "src.a + src.b", "out.stepped": "src.b", "out.relay": "src.ok"},
        "finally": {"out.relay": False, "out.stepped": "src.b"},
    },
    "island": {
        "when": "src.b > 0.0", "link": "offline", "priority": 101, "min_on": "2s", "min_off": "1s",
        "do": {"out.stepped": "src.b / src.a", "out.free": 7.0}, "finally": {"out.stepped": 0.0},
    },
    "same": {"when": "src.b > 10.0", "priority": 5, "do": {"out.free": "src.b", "out.stepped": 200.0 / 3}},
}  # fmt: skip
SITE, PROBLEMS = plant(TAGS, RULES)

ACTS = st.one_of(
    st.tuples(st.just("see"), st.sampled_from(["src.a", "src.b"]), st.none() | NUMBERS),
    st.tuples(st.just("see"), st.just("src.ok"), st.none() | st.booleans()),
    st.tuples(st.just("move"), st.sampled_from(["out.ramped", "out.stepped", "out.free"]), NUMBERS),
    st.tuples(st.just("link"), st.sampled_from(["online", "offline", "islanded"])),
    st.tuples(st.just("broken"), st.sets(st.sampled_from(["out.ramped", "out.stepped", "out.relay"]))),
    st.tuples(st.just("command"), st.sampled_from(["out.ramped", "out.stepped", "out.free"]), NUMBERS),
    st.tuples(st.just("mute"), st.sampled_from(["src", "out"])),
    st.tuples(st.just("away"), st.booleans(), NUMBERS),
    st.tuples(st.just("booted")),
    st.tuples(st.just("restart"), st.booleans()),
)
STORY = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, 5.0, 60.0]), ACTS), max_size=40)


@settings(max_examples=300, deadline=None)
@example(  # an input that grows too old in the last digit of a double
    [
        (60.0, ("restart", True)), (0.1, ("see", "src.a", None)), (0.1, ("see", "src.a", None)),
        (5.0, ("see", "src.a", 21.0)), (60.0, ("see", "src.ok", False)), (0.0, ("see", "src.ok", None)),
        (5.0, ("see", "src.ok", None)),
    ]
)  # fmt: skip
@given(STORY)
def test_p8_whatever_happens_to_a_site_its_setpoints_are_written_within_their_limits_by_one_owner(
    story: list[Any],
) -> None:
    """The whole engine with the plant's reaction: rules, commands, leases, lost inputs, failed writes, restarts.

    That no cycle writes a setpoint twice, and that a cycle with a memory comes to what one without does, is checked
    by the site itself.
    """
    assert PROBLEMS == []
    site = Site(SITE)
    site.values = {
        "src.a": 0.0,
        "src.b": 0.0,
        "src.ok": False,
        "out.ramped": 0.0,
        "out.stepped": 50.0,
        "out.free": 0.0,
    }
    site.values["out.relay"] = False
    lines: list[str] = []
    at_s = 0.0
    unread = False
    for number, (pause_s, act) in enumerate(story):
        at_s += max(pause_s, 0.001)  # nothing happens at just the moment of a scan
        lines += site.until(at_s)
        unread = act[0] in ("away", "booted") or (unread and act[0] == "mute")
        mute = perform(site, number, act) | ({"out"} if unread else set())
        for device in {"src", "out"} - mute:
            site.scan(device)
        lines += site.cycles()
        owners = [line.split()[-2] for line in lines if line.startswith("owner ")]
        assert set(owners) <= set(TAGS)
    check_writes(site)


def perform(site: Site, number: int, act: Any) -> set[str]:
    match act:
        case ("see", name, value):
            site.values[name] = value
            site.quality.pop(name, None)
            if value is None:
                site.quality[name] = "bad:timeout"
        case ("move", name, value):
            moved = max(-50.0, min(50.0, value)) if name == "out.ramped" else abs(value)
            site.values[name] = float(round(moved)) if name == "out.stepped" else moved
        case ("link", state):
            site.link = state
        case ("broken", names):
            site.broken = names
        case ("command", name, value):
            if check(SITE.limits[name], value) is None:
                site.command(f"c{number}", {name: value}, 3.0 if number % 2 else None)
        case ("mute", device):
            return {device}
        case ("away", noticed, value):  # it comes back as it likes: at values of its own, and answers writes
            site.away = {"out"} if value < 0.0 else set()
            site.values |= {
                "out.ramped": value / 2.0,
                "out.stepped": float(round(abs(value))),
                "out.free": value,
            }
            if noticed or site.image.devices.get("out") is None:
                site.lose("out")
            else:  # a scan that hangs
                site.image.devices["out"] = site.image.devices["out"]._replace(
                    at_s=-inf, seen_s=-inf, held=False
                )
        case ("booted",):
            site.away = set()
        case ("restart", reboot):
            site.restart(site.now_s, reboot=reboot)
    return set()


def check_writes(site: Site, made: Plant = SITE) -> None:
    """Check every write of a story against the limits of its tag, from the plant's side."""
    by_tag: dict[str, list[tuple[float, Any, Any]]] = defaultdict(list)
    for at_s, name, value, before in site.written:
        by_tag[name].append((at_s, value, before))
    for name, writes in by_tag.items():
        of = made.limits[name]
        assert of.writable
        for at_s, value, before in writes:
            assert check(of, value) is None
            assert of.grid.nearest(value) == value
            if of.max_step is not None and isinstance(before, float):
                assert abs(value - before) <= of.max_step + 1e-6, (name, at_s)
        for (one_s, *_), (other_s, *_) in itertools.pairwise(writes):
            assert other_s - one_s >= of.min_interval_s - 1e-6, (name, one_s, other_s)
        if of.max_per_hour is not None:
            for i in range(len(writes) - of.max_per_hour):
                assert writes[i + of.max_per_hour][0] - writes[i][0] >= 3600.0 - 1e-6, name
        if of.ramp_per_s is not None:
            check_ramp(of, writes)


def check_ramp(of: Limits, writes: list[Any]) -> None:
    """No two writes move the setpoint faster than its ramp allows."""
    pace_s = max(of.min_interval_s, RAMP_TICK_S)
    for (one_s, *_), (other_s, value, before) in itertools.pairwise(writes):
        assert of.ramp_per_s is not None
        assert abs(value - before) <= of.ramp_per_s * min(other_s - one_s, pace_s) + 1e-6


FED, FED_PROBLEMS = plant(
    {"src.a": "number", "out.x": "number writable min=0 max=50 refresh=5s min_interval=1s max_per_hour=1000 safe=1",
     "out.y": "coarse writable max_step=11 max=46 refresh=3s"},
    {"one": {"when": "src.a > 10.0", "do": {"out.x": "src.a", "out.y": "math.least(src.a, 46.0)"},
             "finally": {"out.y": 0.0}}},
)  # fmt: skip
TICKS = st.lists(
    st.one_of(
        st.just(("on",)),
        st.tuples(st.just("a"), st.floats(0.0, 49.0)),
        st.tuples(st.just("command"), st.floats(0.0, 50.0), st.none() | st.sampled_from([2.0, 20.0])),
        st.tuples(st.just("broken"), st.booleans()),
        st.tuples(st.just("away"), st.booleans()),
        st.tuples(st.just("restart"), st.booleans()),
        st.tuples(st.just("wait"), st.integers(2, 20)),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(TICKS)
def test_p8_between_two_refreshes_there_is_no_more_than_refresh_and_a_cycle_while_the_device_answers(
    story: list[Any],
) -> None:
    assert FED_PROBLEMS == []
    site = Site(FED)
    site.values = {"src.a": 0.0, "out.x": 0.0, "out.y": 0.0}
    owned: dict[str, int] = {}
    tick = 0
    for act in [*story, ("wait", 20)]:
        for _ in range(act[1] if act[0] == "wait" else 1):
            tick += 1
            site.until(float(tick))
            fed_as_often_as_it_must(site, owned, tick)
            feed(site, tick, act)
            site.scan("src")
            if site.away:
                site.lose("out")
            else:
                site.scan("out")
            site.cycles()
    check_writes(site, FED)


def feed(site: Site, tick: int, act: Any) -> None:
    match act:
        case ("a", value):
            site.values["src.a"] = value
        case ("command", value, lease_s):
            site.command(f"c{tick}", {"out.x": value}, lease_s)
        case ("broken", broken):
            site.broken = {"out.x"} if broken else set()
        case ("away", away):
            site.away = {"out"} if away else set()
        case ("restart", reboot):
            site.restart(site.now_s, reboot=reboot)


def fed_as_often_as_it_must(site: Site, owned: dict[str, int], tick: int) -> None:
    """Check each setpoint that somebody has, and whose device answers and takes writes, against its last write."""
    for name, of in FED.limits.items():
        if not of.writable:
            continue
        if name not in site.state.owners or site.away or name in site.broken or site.state.failures.get(name):
            owned.pop(name, None)
            continue
        since = owned.setdefault(name, tick)
        assert of.refresh_s is not None
        last = max((at_s for at_s, at, *_ in site.written if at == name), default=-inf)
        assert tick - max(last, since) <= of.refresh_s + 1.0, (name, tick, last, since)


def test_the_properties_see_writes() -> None:
    """The stories are not idle: a simple one writes to every setpoint."""
    site = Site(SITE)
    site.values = {
        "src.a": 30.0, "src.b": 20.0, "src.ok": True, "out.ramped": 0.0, "out.stepped": 50.0, "out.free": 0.0,
        "out.relay": False,
    }  # fmt: skip
    for at_s in range(5):
        site.until(float(at_s))
        site.scan("src")
        site.scan("out")
        site.cycles()
    assert {name for _, name, _, _ in site.written} == {"out.ramped", "out.stepped", "out.free", "out.relay"}
    assert site.values["out.ramped"] == pytest.approx(50.0)
