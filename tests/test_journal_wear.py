"""What keeping the readings costs the card: counted as the kernel counts it, and little."""

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from journal_rig import Hand, config
from rig import ROOT, needs_strace

from edgegw import clock
from edgegw.domain.record import Scan
from edgegw.journal.store import Reader
from edgegw.journal.wear import Wear

ALONE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from journal_rig import Hand, config, scan
for life in range(2):
    hand = Hand(Path(sys.argv[1]), config(4 << 20))
    for n in range(int(sys.argv[2])):
        hand.acknowledge(hand.turn(*(scan(n, 40) for _ in range(10))))
    hand.close()
"""
CALL = re.compile(r"(\w+)\(\d+<([^>]*)>.* = (\d+)$")
OPEN_AND_CLOSE = 12
"""The fsyncs that making, opening and closing a file take at the most, which nobody counts."""


class Monotonic:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.s = clock.mono_s()
        monkeypatch.setattr(clock, "mono_s", lambda: self.s)
        monkeypatch.setattr(clock, "wall_ms", lambda: 1_700_000_000_000 + round(self.s * 1000))


def noted(path: Path) -> Wear:
    """Return what a journal's file says of its wear."""
    reader = Reader(path)
    try:
        return reader.wear()
    finally:
        reader.close()


@needs_strace
@pytest.mark.parametrize("turns", [5, 300])
def test_bytes_and_fsyncs_are_counted_as_the_kernel_counts_them(tmp_path: Path, turns: int) -> None:
    """Two lives of a journal, with checkpoints and without them."""
    folder = tmp_path / "j"
    folder.mkdir()
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-y", "-s", "0", "-o", str(trace), "-e", "trace=write,pwrite64,fdatasync,fsync")
    program = (sys.executable, "-c", ALONE, str(folder / "journal.db"), str(turns))
    subprocess.run([*strace, *program], cwd=ROOT, check=True)
    calls = [found for line in trace.read_text().splitlines() if (found := CALL.search(line))]
    mine = [call for call in calls if call[2].startswith(str(folder))]
    written = sum(int(call[3]) for call in mine if "write" in call[1])
    fsyncs = sum("sync" in call[1] for call in mine)
    wear = noted(folder / "journal.db")
    assert wear.readings == 2 * turns * 10 * 40
    closing = 2 * 300_000  # a checkpoint as a file is closed, which nobody can note in it
    assert written - closing <= wear.written_bytes <= written * 1.02
    assert fsyncs - 2 * OPEN_AND_CLOSE <= wear.fsyncs <= fsyncs


def a_day(hand: Hand, time: Monotonic, readings: int, interval_s: float, turns: int) -> Wear:
    """Journal one scan in each interval, acknowledged at once; return what a day of that costs."""
    noise = random.Random(1)
    values = {f"t{i}": 230.0 for i in range(readings)}
    for turn in range(turns):
        values = {tag: round(value + noise.gauss(0.0, 0.2), 1) for tag, value in values.items()}
        hand.acknowledge(hand.turn(Scan(clock.wall_ms(), "meter1", dict(values))))
        assert hand.writer.error is None
        time.s += interval_s
        if turn == 100:  # what begins a file is no matter
            began = hand.writer._odometer.due(hand.writer._ready()[0].take_fsyncs, now=True)
    ended = hand.writer._odometer.due(hand.writer._ready()[0].take_fsyncs, now=True)
    assert began
    assert ended
    days = (ended.run_ms - began.run_ms) / 86_400_000
    assert days > 0
    return Wear(*(round((late - early) / days) for late, early in zip(ended, began, strict=True)))


def test_at_rest_a_day_costs_less_than_a_gigabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten readings a second in the default interval; checkpoints, pruning and what is settled included."""
    time = Monotonic(monkeypatch)
    hand = Hand(tmp_path / "journal.db", config(1024**3, commit_ms=500, keep_ms=600_000))
    day = a_day(hand, time, 5, 0.5, 3000)
    hand.close()
    assert day.readings == pytest.approx(864_000, rel=0.01)
    assert day.written_bytes < 1e9, day
    assert day.fsyncs < 1.1 * 2 * 86_400 + 86_400 / 10


def test_at_full_load_a_reading_costs_four_bytes_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred devices of 62 values with the resolution of a tenth, ten times a second."""
    time = Monotonic(monkeypatch)
    hand = Hand(tmp_path / "journal.db", config(1024**3))
    noise = random.Random(1)
    devices: list[list[float]] = [[noise.uniform(10.0, 500.0) for _ in range(62)] for _ in range(100)]
    for _ in range(40):
        scans: list[Any] = []
        for at, device in enumerate(devices):
            for scan in range(5):
                devices[at] = device = [value + noise.gauss(0.0, 0.2) for value in device]
                values = {f"f{tag:02}": round(value, 1) for tag, value in enumerate(device)}
                scans.append(Scan(clock.wall_ms() + 100 * scan, f"meter{at:02}", values))
        hand.acknowledge(hand.turn(*scans))
        time.s += 0.5
    hand.close()
    wear = noted(hand.path)
    assert wear.readings == 40 * 5 * 6200
    assert wear.written_bytes / wear.readings <= 4.0, wear
