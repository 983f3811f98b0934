"""Windows, pure: what stretches of readings come to, when they are over, and what late readings change."""

from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rig import Hand

from edgegw.domain.record import DeviceStatus, Event, Record, Scan, WindowResult
from edgegw.series.history import History
from edgegw.series.window import CLOCK_SET_MS, NO_READING, Input, Spec, Window

T = 1_700_000_000_000
"""Where time begins: a multiple of every period here."""
ALL = ("mean", "min", "max", "sum", "count", "first", "last", "integral")


def spec(
    size: int = 10, every: int = 0, lateness: int = 0, hold: float = 3, tags: str = "m.a",
    agg: tuple[str, ...] = ALL, sourced: bool = False,
) -> Spec:  # fmt: skip
    inputs = tuple(
        Input(device, tag, hold, sourced) for device, _, tag in (full.partition(".") for full in tags.split())
    )
    return Spec("w", inputs, size, every or size, lateness, agg)


def reading(at: int, value: Any, tag: str = "m.a", why: str | None = None) -> Scan:
    device, _, name = tag.partition(".")
    return Scan(T + at, device, {name: value}, {name: why} if why else None)


def lost(at: int, device: str = "m") -> DeviceStatus:
    return DeviceStatus(T + at, device, "bad", "timeout")


def back(at: int, device: str = "m") -> DeviceStatus:
    return DeviceStatus(T + at, device, "good")


def start(at: int) -> Event:
    return Event(T + at, "start", {})


def steady(begin: int, end: int, value: float = 1.0) -> list[Record]:
    return [reading(at, value) for at in range(begin, end)]


def run(made: Spec | Window, records: list[Record], until: int | None = None) -> list[WindowResult]:
    """Feed records one by one; return all that was told, as a service does that looks after each."""
    window = made if isinstance(made, Window) else Window(made)
    told = []
    for record in records:
        window.take(record)
        told += window.results()
    if until is not None:
        window.advance(T + until)
        told += window.results()
    return told


class Case(NamedTuple):
    """Records, and for each result told: its end, its revision, its coverage, and some of its values."""

    spec: Spec
    records: list[Record]
    until: int
    told: list[tuple[int, int, float, dict[str, Any]]]


CASES = {
    "the mean is of the time, the sum of the readings": Case(
        spec(hold=inf), [reading(0, 0.0), reading(8, 10.0)], 10,
        [(10, 0, 1.0, {
            "mean": 2.0, "min": 0.0, "max": 10.0, "sum": 10.0, "count": 2, "first": 0.0, "last": 10.0,
            "integral": 20.0 / 3_600_000,
        })],
    ),
    "the end is not part of it": Case(
        spec(hold=inf), [reading(0, 1.0), reading(10, 99.0)], 10, [(10, 0, 1.0, {"max": 1.0, "count": 1})],
    ),
    "what is held when it begins is part of it": Case(
        spec(hold=inf), [reading(0, 5.0), reading(15, 1.0)], 20,
        [(10, 0, 1.0, {"count": 1}), (20, 0, 1.0, {"mean": 3.0, "max": 5.0, "count": 1, "first": 1.0})],
    ),
    "a reading is held no longer than it is good for": Case(
        spec(), [reading(0, 5.0), reading(7, 1.0)], 20,
        [(10, 0, 0.6, {"mean": 3.0, "integral": 18.0 / 3_600_000})],
    ),
    "where nothing is known there is no result, and later there is again": Case(
        spec(), [reading(0, 1.0), reading(55, 2.0)], 70,
        [(10, 0, 0.3, {"mean": 1.0}), (60, 0, 0.3, {"mean": 2.0})],
    ),
    "held without readings, sums are nothing and firsts are null": Case(
        spec(hold=inf), [reading(0, 4.0)], 20,
        [(10, 0, 1.0, {}), (20, 0, 1.0, {"mean": 4.0, "sum": 0.0, "count": 0, "first": None, "last": None})],
    ),
    "bad, uncertain and null readings are holes": Case(
        spec(hold=inf),
        [
            reading(0, 1.0), reading(2, None, why="bad:x"), reading(4, 1.0), reading(6, 9.0, why="uncertain:x"),
            reading(8, 1.0),
        ],
        10, [(10, 0, 0.6, {"mean": 1.0, "max": 1.0, "count": 3})],
    ),
    "what is no number is a hole": Case(
        spec(hold=inf), [reading(0, 1.0), reading(5, "x")], 10, [(10, 0, 0.5, {"count": 1})],
    ),
    "bools count as 0 and 1": Case(
        spec(hold=inf), [reading(0, True), reading(4, False)],
        10, [(10, 0, 1.0, {"mean": 0.4, "sum": 1.0, "max": 1.0, "last": 0.0})],
    ),
    "a lost device ends what is held": Case(
        spec(hold=inf), [reading(0, 1.0), lost(4), back(7), reading(8, 3.0)], 10, [(10, 0, 0.6, {"mean": 10.0 / 6})],
    ),
    "another device's loss does not": Case(
        spec(hold=inf), [reading(0, 1.0), lost(4, "other")], 10, [(10, 0, 1.0, {"mean": 1.0})],
    ),
    "a restart ends what is held where the gateway was last alive": Case(
        spec(hold=inf), [reading(0, 1.0), reading(3, 1.0), start(6), reading(8, 1.0)],
        10, [(10, 0, 0.5, {"mean": 1.0})],
    ),
    "a subscribed value that is said again after a loss holds from then on, and is one reading": Case(
        spec(hold=inf), [reading(0, 1.0), lost(4), back(7), reading(0, 1.0)],
        10, [(10, 0, 0.7, {"mean": 1.0, "count": 1})],
    ),
    "so does one from long before the start": Case(
        spec(hold=inf, sourced=True), [start(2), reading(-10**9, 6.0)], 20,
        [(10, 0, 0.8, {"mean": 6.0, "count": 0, "first": None}), (20, 0, 1.0, {"mean": 6.0})],
    ),
    "a change that a subscribed device made while it was lost is held from its own time": Case(
        spec(hold=inf, lateness=20), [reading(0, 1.0), lost(4), back(8), reading(6, 3.0)], 10,
        [(10, 0, 0.8, {"mean": 2.0, "count": 2})],
    ),
    "a polled value that its source gives the old time is one reading": Case(
        spec(hold=inf, sourced=True), [reading(0, 1.0), reading(0, 1.0), reading(0, 1.0)],
        10, [(10, 0, 1.0, {"count": 1})],
    ),
    "several tags: the mean is weighted by what is known of each": Case(
        spec(hold=inf, tags="m.a m.b"), [reading(0, 1.0), reading(5, 4.0, "m.b")], 10,
        [(10, 0, 0.75, {
            "mean": 2.0, "min": 1.0, "max": 4.0, "sum": 5.0, "count": 2, "first": 1.0, "last": 4.0,
            "integral": 30.0 / 3_600_000,
        })],
    ),
    "several devices": Case(
        spec(hold=inf, tags="m.a n.a"), [reading(0, 1.0), reading(0, 3.0, "n.a"), lost(5, "n")], 10,
        [(10, 0, 0.75, {"mean": 25.0 / 15})],
    ),
    "sliding": Case(
        spec(size=20, every=10, hold=inf), [reading(0, 1.0), reading(10, 3.0)], 30,
        [(10, 0, 0.5, {"mean": 1.0}), (20, 0, 1.0, {"mean": 2.0, "count": 2}), (30, 0, 1.0, {"mean": 3.0, "count": 1})],
    ),
    "a late reading revises": Case(
        spec(hold=inf, lateness=5), [reading(0, 0.0), reading(11, 0.0), reading(5, 10.0)], 20,
        [(10, 0, 1.0, {"mean": 0.0}), (10, 1, 1.0, {"mean": 5.0, "count": 2}), (20, 0, 1.0, {"mean": 1.0})],
    ),
    "one that changes nothing does not": Case(
        spec(hold=inf, lateness=5, agg=("mean",)), [reading(0, 1.0), reading(11, 1.0), reading(5, 1.0)], 20,
        [(10, 0, 1.0, {}), (20, 0, 1.0, {})],
    ),
    "one that covers less does not": Case(
        spec(hold=inf, lateness=5), [reading(0, 1.0), reading(11, 1.0), reading(5, None, why="bad:x")], 20,
        [(10, 0, 1.0, {"mean": 1.0}), (20, 0, 0.9, {})],
    ),
    "one that gives a stretch its first value is no revision": Case(
        spec(lateness=20), [reading(0, 1.0), reading(21, 1.0), reading(15, 2.0)], 30,
        [(10, 0, 0.3, {}), (20, 0, 0.3, {"mean": 2.0}), (30, 0, 0.3, {})],
    ),
    "one that is too late holds from there on all the same": Case(
        spec(hold=inf, tags="m.a n.a"), [reading(0, 1.0), reading(11, 1.0, "n.a"), reading(9, 5.0)], 20,
        [(10, 0, 0.5, {"mean": 1.0}), (20, 0, 0.95, {"mean": 59.0 / 19, "count": 1})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_told(case: Case) -> None:
    told = run(case.spec, case.records, case.until)
    assert [(r.ts - T, r.rev, r.coverage) for r in told] == [
        (end, rev, pytest.approx(covered)) for end, rev, covered, _ in case.told
    ]
    for result, (_, _, _, values) in zip(told, case.told, strict=True):
        assert result.start == result.ts - case.spec.size_ms
        assert set(result.values) == set(case.spec.aggregates)
        assert {name: result.values[name] for name in values} == pytest.approx(values)
        nulls = {name: NO_READING for name, value in result.values.items() if value is None}
        assert (result.quality or {}) == nulls


def test_silence_ends_nothing_before_time_has_passed() -> None:
    window = Window(spec(hold=inf))
    assert run(window, [reading(0, 1.0)], 9) == []
    (told,) = run(window, [], 10)
    assert told.ts == T + 10


def test_too_late_is_counted_and_changes_nothing_that_was_told() -> None:
    window = Window(spec(lateness=5))
    run(window, steady(0, 16))
    assert window.late == 0
    assert run(window, [reading(7, 99.0), reading(9, 99.0)]) == []
    assert window.late == 2


def test_within_a_stretch_that_is_not_over_order_does_not_matter() -> None:
    in_order = run(spec(hold=inf), [reading(0, 1.0), reading(2, 5.0), reading(8, 2.0)], 10)
    assert run(spec(hold=inf), [reading(8, 2.0), reading(0, 1.0), reading(2, 5.0)], 10) == in_order


def test_a_clock_set_forward_by_years_holds_nothing_over_them_and_is_quick() -> None:
    year_ms = 365 * 86_400_000
    later = 50 * year_ms // 10 * 10
    for hold in (3, inf):
        told = run(spec(hold=hold), [reading(0, 1.0), reading(later, 2.0)], later + 10)
        assert [(r.ts - T, r.values["mean"]) for r in told] == [
            (10, 1.0 if hold == 3 else None),
            (later + 10, 2.0),
        ]


def test_a_clock_set_back_begins_anew_and_says_again_what_it_said_wrongly() -> None:
    window = Window(spec(hold=inf, agg=("mean", "max")))
    back_ms = CLOCK_SET_MS * 2
    first = run(window, [reading(at, 1.0) for at in range(0, back_ms, 5)])
    second = run(window, [reading(at, 2.0) for at in range(25, back_ms + 50, 5)])
    assert {r.rev for r in first} == {0}
    assert (second[0].ts, second[0].coverage) == (T + 30, 0.5), "half was before the clock was set"
    assert all(r.rev == (1 if r.ts < T + back_ms else 0) for r in second)
    assert all(r.values["mean"] == 2.0 for r in second)
    assert window.late == 0


def test_memory_is_bounded_by_panes_and_what_may_still_come() -> None:
    """A day, sliding each minute, over ten readings a second: a pane a minute, and a minute of readings."""
    window = Window(spec(size=86_400_000, every=60_000, hold=6000, agg=("mean",)))
    for at in range(0, 2 * 86_400_000, 2000):  # a twentieth of them, for the test's sake
        window.take(reading(at, 1.0))
        if window.due:
            window.results()
    assert len(window._panes) <= 1441
    assert len(window._signals[0]._points) <= 31


# -- whatever comes ------------------------------------------------------------------------------------------

TAGS = ("m.a", "m.b", "n.c")
specs = st.builds(
    lambda every, panes, lateness, hold: spec(
        every * panes, every, lateness, hold, " ".join(TAGS), ("mean", "min", "max", "sum", "count", "integral")
    ),
    st.sampled_from([4, 10]), st.integers(1, 4), st.integers(0, 25), st.sampled_from([3, 7, inf]),
)  # fmt: skip
entries = st.tuples(
    st.integers(0, 120), st.sampled_from([*TAGS, "lost"]), st.none() | st.integers(-5, 5), st.floats(0, 0.999)
)


def records(drawn: list[tuple[int, str, int | None, float]], lateness: int) -> list[Record]:
    """Return readings and losses, each at most `lateness` out of order, no two of a tag at one time."""
    unique = {(at, tag): (at, tag, value, delay) for at, tag, value, delay in drawn}
    arriving = sorted(unique.values(), key=lambda entry: (entry[0] + entry[3] * lateness, entry[1]))
    return [
        lost(at) if tag == "lost" else reading(at, value, tag, None if value is not None else "bad:x")
        for at, tag, value, _ in arriving
    ]


def brute(made: Spec, arrived: list[Record], end: int) -> tuple[float, dict[str, Any]] | None:
    """Look at every millisecond of a stretch, and sum up."""
    known: list[float] = []
    seen: list[float] = []
    for at in made.inputs:
        points = []
        for record in arrived:
            if isinstance(record, Scan) and record.device == at.device and at.tag in record.values:
                points.append((record.ts, 0, record.values[at.tag]))
            elif isinstance(record, DeviceStatus) and record.device == at.device:
                points.append((record.ts, 1, None))
        points.sort(key=lambda point: point[:2])
        for ts in range(end - made.size_ms, end):
            before = [point for point in points if point[0] <= ts]
            if before and before[-1][2] is not None and ts < before[-1][0] + at.hold_ms:
                known.append(before[-1][2])
        seen += [value for ts, _, value in points if end - made.size_ms <= ts < end and value is not None]
    if not known and not seen:
        return None
    values: dict[str, Any] = {"mean": None, "min": None, "max": None, "integral": None}
    if known:
        values = {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}
        values["integral"] = sum(known) / 3_600_000
    values |= {"sum": sum(seen), "count": len(seen)}
    return len(known) / (made.size_ms * len(made.inputs)), values


@settings(deadline=None)
@given(specs, st.lists(entries, max_size=40), st.booleans())
def test_the_last_that_is_told_is_what_looking_at_every_millisecond_gives(
    made: Spec, drawn: list[tuple[int, str, int | None, float]], in_order: bool
) -> None:
    arrived = records(drawn, 0 if in_order else made.lateness_ms)
    window = Window(made)
    told = run(window, arrived, 200)
    assert window.late == 0
    last = {result.ts: result for result in told}
    assert [r.rev for end in last for r in told if r.ts == end] == [
        n for end in last for n in range(sum(r.ts == end for r in told))
    ], "revisions count up from 0"
    for end in range(T + made.every_ms, T + 200 + 1, made.every_ms):
        expected, result = brute(made, arrived, end), last.get(end)
        if expected is None:
            assert result is None or not in_order
            continue
        assert result is not None
        if in_order or expected[0] >= result.coverage - 1e-6:
            assert result.coverage == pytest.approx(expected[0], abs=1e-6)
            assert result.values == pytest.approx(expected[1])
        else:
            assert result.rev < sum(record.ts <= end for record in arrived), (
                "it is never told with less coverage"
            )


@settings(deadline=None)
@given(specs, st.lists(entries, max_size=40))
def test_a_sliding_window_is_its_stretches_put_together(
    made: Spec, drawn: list[tuple[int, str, int | None, float]]
) -> None:
    arrived = records(drawn, 0)
    short = {r.ts: r for r in run(made._replace(size_ms=made.every_ms), arrived, 200)}
    for result in run(made, arrived, 200):
        parts = [
            short[end]
            for end in range(result.start + made.every_ms, result.ts + 1, made.every_ms)
            if end in short
        ]
        share = made.every_ms / made.size_ms
        assert result.coverage == pytest.approx(sum(part.coverage for part in parts) * share, abs=1e-5)
        for name, join in (("sum", sum), ("count", sum), ("min", min), ("max", max), ("integral", sum)):
            values = [part.values[name] for part in parts if part.values[name] is not None]
            assert result.values[name] == (pytest.approx(join(values)) if values else None)  # type: ignore[operator]


def live(window: Window, arrived: list[Record]) -> list[Record]:
    """Return what a journal holds in the end: the records, and results as soon as time has come to their ends."""
    journal: list[Record] = []
    for record in arrived:
        window.advance(record.ts - 1)
        journal += window.results()
        window.take(record)
        journal += [record, *window.results()]
    window.advance(T + 200)
    return [*journal, *window.results()]


@settings(max_examples=30, deadline=None)
@given(specs, st.lists(entries, min_size=10, max_size=60), st.data())
def test_a_restart_at_any_point_tells_what_no_restart_tells(
    tmp_path_factory: pytest.TempPathFactory,
    made: Spec,
    drawn: list[tuple[int, str, int | None, float]],
    data: Any,
) -> None:
    made = made._replace(inputs=tuple(at._replace(hold_ms=min(at.hold_ms, 50)) for at in made.inputs))
    arrived = records(drawn, 0)
    journal = live(Window(made), arrived)
    reference = [record for record in journal if isinstance(record, WindowResult)]
    cut = data.draw(st.integers(0, len(journal)))
    path = tmp_path_factory.mktemp("journal") / "journal.db"
    hand = Hand(path)
    for at in range(0, cut, 7):
        hand.turn(*journal[at : min(cut, at + 7)])
    hand.close()
    told = [record for record in journal[:cut] if isinstance(record, WindowResult)]
    window = Window(made)
    history = History(path, hand.writer.head, [window], T + 10**6)
    while history.step():
        pass
    told += history.finish(window)
    rest = live(window, [record for record in journal[cut:] if not isinstance(record, WindowResult)])
    told += [record for record in rest if isinstance(record, WindowResult)]
    assert [(r.ts, r.rev, r.coverage) for r in told] == [(r.ts, r.rev, r.coverage) for r in reference]
    for one, other in zip(told, reference, strict=True):
        assert one.values == pytest.approx(other.values)


def test_what_the_journal_has_lost_is_a_hole(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db")
    made = spec(hold=inf, agg=("mean",))
    for at in range(9):
        hand.turn(reading(at, 1.0))
    (gone,) = hand.turn(reading(9, 5.0))
    hand.turn(reading(12, 1.0))
    hand.close()
    window = Window(made)
    history = History(tmp_path / "journal.db", hand.writer.head, [window], T + 100)
    db = apsw.Connection(str(tmp_path / "journal.db"))
    db.execute("DELETE FROM batch WHERE seq = ?", (gone.batch.seq,))
    db.close()
    while history.step():
        pass
    (told,) = history.finish(window)
    assert told.coverage == 0.8, "known up to the last that is there, and not over what is gone"
