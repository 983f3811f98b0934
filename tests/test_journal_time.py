"""The journal and time: the index by time, the eras of a clock that steps, and what must not follow it."""

import asyncio
import itertools
import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from field import field
from gateway_rig import Subscriber, device, gateway, until
from gateway_rig import config as gateway_config
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rig import MIB, Hand, chain, config, kept
from rig import FAKETIME, FakeClock, free_port, mosquitto, needs_mosquitto

from edgegw import clock
from edgegw.domain.batch import decode
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record, Scan
from edgegw.journal import keeper, spanner
from edgegw.journal.journal import Journal
from edgegw.journal.store import Reader
from edgegw.journal.timekeeper import STEP_MS, Timekeeper

needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="libfaketime (Debian's faketime) is not here")
START_MS = 1_700_000_000_000 - 1_700_000_000_000 % 900_000
MINUTE_MS = 60_000


# -- the index by time -----------------------------------------------------------------------------------------------


def holding(path: Path, from_ms: int, to_ms: int) -> set[int]:
    """Return the batches in a file that hold a record of this time; a summary's are of all that they stand for."""
    found = set()
    for seq, body in kept(path).bodies.items():
        length_ms = max(0, 1000 * (decode(body).period or 0) - 1)
        for record in json.loads(body)["records"]:
            if record["ts"] <= to_ms and record["ts"] + length_ms >= from_ms:
                found.add(seq)
    return found


def between(path: Path, from_ms: int, to_ms: int) -> Ranges:
    """Return what the index says of this time."""
    reader = Reader(path)
    try:
        return Ranges(reader.spans_between(from_ms, to_ms))
    finally:
        reader.close()


TIMES = st.integers(0, 60 * MINUTE_MS).map(lambda ms: START_MS + ms)
RECORDS = st.one_of(
    st.builds(lambda ts, device: Scan(ts, device, {"t": 1.5}), TIMES, st.sampled_from("mn")),
    st.builds(lambda ts: Event(ts, "config", {}), TIMES),
)
STEPS = st.one_of(
    st.lists(RECORDS, min_size=1, max_size=6),
    st.sampled_from(["thin", "acknowledge", "prune", "restart", "crash"]),
)


@given(
    st.lists(STEPS, max_size=30),
    st.lists(st.tuples(TIMES, st.integers(0, 5 * MINUTE_MS)), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=150)
def test_the_index_by_time_never_misses_a_batch(
    steps: list[list[Record] | str], asked: list[tuple[int, int]]
) -> None:
    """Whatever is thinned, pruned or lost, and wherever the clock jumps to."""
    folder = Path(tempfile.mkdtemp(prefix="edgegw-index-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "GAIN", 100.0)  # so that any few batches are thinned
        patch.setattr(spanner, "BATCHES", 3)
        hand = Hand(folder / "journal.db", config(4 * MIB, keep_ms=0, when_full="thin"), 2000)
        try:
            for life, step in enumerate(steps, 1):
                match step:
                    case "thin":
                        hand.thin()
                    case "acknowledge":
                        hand.acknowledge(hand.told[: len(hand.told) // 2])
                    case "prune":
                        hand.writer._keeper._pruned_at = -1e9
                        hand.turn()
                    case "restart":
                        hand.close()
                        hand = Hand(hand.path, config(4 * MIB, when_full="thin"), 2000)
                    case "crash":
                        copy = hand.copy_to(folder / str(life))
                        hand.writer.close()
                        hand = Hand(copy, config(4 * MIB, when_full="thin"), 2000)
                    case records:
                        hand.turn(*records)
                assert hand.writer.error is None
            for from_ms, length_ms in asked:
                found = between(hand.path, from_ms, from_ms + length_ms)
                wanted = holding(hand.path, from_ms, from_ms + length_ms)
                assert all(found.covers(seq, seq) for seq in wanted), (wanted, found)
        finally:
            hand.writer.close()
            shutil.rmtree(folder)


def test_asking_for_a_minute_reads_little_beyond_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgegw.clock.wall_ms", lambda: START_MS)
    hand = Hand(tmp_path / "journal.db", config(when_full="thin"))
    for second in range(1500):
        hand.turn(Scan(START_MS + 1000 * second, "m", {"t": 1.5}))
    minute = (START_MS + 600_000, START_MS + 659_999)
    wanted = holding(hand.path, *minute)
    assert len(wanted) == 60
    found = between(hand.path, *minute)
    assert all(found.covers(seq, seq) for seq in wanted)
    assert found.total() <= 60 + 2 * spanner.BATCHES
    monkeypatch.setattr(keeper, "THIN_BATCHES", 1000)
    assert hand.thin()
    for at in (START_MS + 600_000, START_MS + 1_300_000):  # within what was thinned, and beside it
        wanted = holding(hand.path, at, at + 59_999)
        found = between(hand.path, at, at + 59_999)
        assert wanted
        assert all(found.covers(seq, seq) for seq in wanted)
        read = [seq for seq in kept(hand.path).batches if found.covers(seq, seq)]
        assert len(read) <= len(wanted) + 2 * spanner.BATCHES
    assert between(hand.path, START_MS - 10_000, START_MS - 1).total() <= spanner.BATCHES
    hand.close()


# -- eras --------------------------------------------------------------------------------------------------------------


class Clocks:
    """Both clocks, and whether the kernel's is synchronised, as a test sets them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall, self.mono, self.synced = START_MS, 5000.0, False
        patch.setattr(clock, "wall_ms", lambda: self.wall)
        patch.setattr(clock, "mono_s", lambda: self.mono)
        patch.setattr(clock, "synchronised", lambda: self.synced)

    def run(self, s: float, *, step_ms: int = 0) -> None:
        """Have time pass, and the wall clock step besides."""
        self.mono += s
        self.wall += round(s * 1000) + step_ms


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Clocks that stand still."""
    return Clocks(monkeypatch)


@pytest.mark.parametrize("step_ms", [-3_600_000, -STEP_MS, STEP_MS, 3_600_000])
def test_a_step_of_the_clock_begins_an_era(clocks: Clocks, step_ms: int) -> None:
    keeper = Timekeeper()
    clocks.run(100.0)
    assert keeper.look() is None
    clocks.run(0.1, step_ms=step_ms)
    era = keeper.look()
    assert era == keeper.era == (False, clock.boot_id(), clocks.wall, 5_100_100)
    assert keeper.look() is None


def test_a_clock_that_is_slewed_begins_none(clocks: Clocks) -> None:
    keeper = Timekeeper()
    for at in range(100):
        clocks.run(10.0, step_ms=(STEP_MS - 1) * (at % 2 * 2 - 1) if at else 0)
        assert keeper.look() is None


def test_a_clock_that_becomes_synchronised_begins_an_era_within_the_second(clocks: Clocks) -> None:
    keeper = Timekeeper()
    clocks.synced = True
    clocks.run(0.5)
    assert keeper.look() is None
    clocks.run(0.5)
    era = keeper.look()
    assert era is not None
    assert era.synced
    assert era.offset_ms == START_MS - 5_000_000


@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000])
async def test_what_was_read_before_a_step_stays_in_the_era_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_ms: int
) -> None:
    """The scan comes to the journal after the clock was set; another after it was synchronised."""
    clocks = Clocks(monkeypatch)
    journal = Journal(tmp_path / "journal.db", "site-7", config(), 16 * 1024)
    told: list[bytes] = []
    journal.listen(lambda committed: told.extend(committed.bodies))
    journal.start()
    late = Scan(clocks.wall, "m", {"n": 1})
    clocks.run(0.2, step_ms=step_ms)
    journal.append(late)
    journal.append(Scan(clocks.wall, "m", {"n": 2}))
    clocks.synced = True
    clocks.run(2.0)
    journal.append(Scan(clocks.wall, "m", {"n": 3}))
    assert await journal.close()
    messages = [json.loads(body) for body in told]
    of = {r["values"]["n"]: m for m in messages if m["kind"] == "data" for r in m["records"]}
    assert of[1]["mono"] == {"boot": clock.boot_id(), "ts": START_MS, "ms": 5_000_000}
    assert of[2]["mono"] == {"boot": clock.boot_id(), "ts": START_MS + 200 + step_ms, "ms": 5_000_200}
    assert (of[3]["clock"], "mono" in of[3]) == ("synced", False)
    steps = [r for m in messages for r in m["records"] if r.get("event") == "clock-step"]
    assert [(r["step_ms"], r["clock"]) for r in steps] == [(step_ms, "unsynced"), (0, "synced")]
    assert steps[0]["mono"] == of[2]["mono"]
    assert chain(told).intact


@needs_faketime
@needs_mosquitto
async def test_a_clock_that_steps_under_a_gateway_is_told_and_followed_by_nothing_else(
    tmp_path: Path,
) -> None:
    """An hour on, an hour back: each record can be put in its place, and none is lost, doubled or disordered."""
    port, fake = free_port(), FakeClock(tmp_path / "time")
    async with field() as meter:
        made = gateway_config(
            port, {"m": device(meter.port)}, journal={"commit_interval": "100ms", "keep": "30m"}
        )
        with (
            mosquitto(tmp_path, port),
            Subscriber(port) as seen,
            gateway(tmp_path, made, *fake.prefix) as run,
        ):
            for step, offset in enumerate(("+0", "+3600", "+0")):
                fake.set(offset)
                await until(lambda step=step: len(steps(seen)) == step, "the step to be told")
                count = meter.counts[1]
                await until(lambda count=count: meter.counts[1] > count + 20, "scans")
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
            await until(lambda: any(b'"stop"' in m.body for m in seen.batches()), "the last batch")
    bodies = {message.batch.seq: message.body for message in seen.batches()}
    assert chain(bodies.values()).intact
    assert kept(tmp_path / "journal.db").bodies == bodies, "nothing was pruned"
    assert [pytest.approx(step, abs=100) for step in (3_600_000, -3_600_000)] == [
        r["step_ms"] for r in steps(seen)
    ]
    true_ms, counts = [], []
    for seq in sorted(bodies):
        message = json.loads(bodies[seq])
        mono = message.get("mono")
        assert (message["clock"] == "synced") == (mono is None)
        for record in message["records"]:
            if "values" in record:
                counts.append(record["values"]["n"])
                true_ms += (
                    [record["ts"] - mono["ts"] + mono["ms"]] if mono else []
                )  # only where it is not synchronised
    assert counts == list(range(1, len(counts) + 1))
    assert true_ms == sorted(true_ms)
    assert all(later - early < 600_000 for early, later in itertools.pairwise(true_ms)), (
        "the steps leave no trace"
    )


def steps(seen: Subscriber) -> list[dict[str, Any]]:
    """Return the clock's steps that were told."""
    return [r for m in seen.batches("event", "backfill") for r in m.records if r.get("event") == "clock-step"]
