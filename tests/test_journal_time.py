"""The journal and time: the index by time, the eras of a clock that steps, and what must not follow it."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rig import MIB, Hand, config, kept

from edgegw.domain.batch import decode
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record, Scan
from edgegw.journal import keeper, spanner
from edgegw.journal.store import Reader

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
