"""The demo: a run of it from outside, and a verdict that can fail."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chains import STREAM, Chain
from rich.console import Console

from edgegw.demo import story
from edgegw.demo.evidence import gather, read_database, read_journal
from edgegw.demo.judge import Course, Evidence, Journaled, Received, Span, judge, longest_hole
from edgegw.demo.screen import Screen
from edgegw.demo.site import MODBUS_PERIODS_MS
from edgegw.demo.support import Support
from edgegw.errors import EdgegwError
from edgegw.receiver import wire

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 110.0
LONG_AGO = Course(250, MODBUS_PERIODS_MS, 0, 0, 0)


def demo(*options: str) -> list[str]:
    return [sys.executable, "-m", "edgegw", "demo", "--fast", *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


class Run:
    """A finished run: what it printed, how it ended, what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        done = subprocess.run(
            demo("--json", "--keep", str(folder)),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env=environment(),
            check=False,
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pytest.importorskip("amqtt")
    return Run(tmp_path_factory.mktemp("demo") / "kept")


def test_the_fast_demo_loses_nothing_and_says_so(run: Run) -> None:
    assert run.code == 0, run.err
    verdict: dict[str, Any] = json.loads(run.out)
    assert verdict["ok"], verdict
    assert verdict["failed"] == []
    assert verdict["records"]["made"] == verdict["records"]["received"] > 50
    assert verdict["records"]["lost"] == 0
    assert verdict["chain"]["verified"]
    assert (verdict["streams"], verdict["starts"], verdict["altered"]) == (1, 2, 0)
    assert verdict["backlog_records"] > 10
    assert verdict["control"]["dips"] == len(verdict["control"]["answers_ms"]) == 2
    assert max(verdict["control"]["answers_ms"]) < 500
    assert verdict["control"]["handed_back"]
    assert verdict["latency_ms"]["median"] <= verdict["latency_ms"]["limit"] == 500
    assert set(verdict["holes_ms"]) == set(MODBUS_PERIODS_MS)


def test_progress_is_plain_lines_where_there_is_no_terminal(run: Run) -> None:
    for chapter in ("start:", "poll:", "stop the broker:", "kill the gateway:", "drain:", "verdict: ok"):
        assert chapter in run.err
    assert "\x1b" not in run.err


def test_the_verdict_fails_when_a_batch_is_not_in_the_receivers_database(run: Run, tmp_path: Path) -> None:
    database = tmp_path / "received.db"
    with sqlite3.connect(run.folder / "received.db") as whole, sqlite3.connect(database) as copy:
        whole.backup(copy)
        untouched = judge(gather(database, [], run.folder / "journal.db"), LONG_AGO)
        seq, count = copy.execute("SELECT seq, count FROM batches ORDER BY seq LIMIT 1 OFFSET 7").fetchone()
        copy.execute("DELETE FROM batches WHERE seq = ?", (seq,))
    robbed = judge(gather(database, [], run.folder / "journal.db"), LONG_AGO)
    assert (untouched.lost, untouched.chain.intact) == ([], True)
    assert robbed.lost == [(seq, seq + count - 1)]
    assert robbed.records_lost == count
    assert not robbed.ok
    assert {"records lost", "hash chain"} <= set(robbed.as_json()["failed"])


def test_the_verdict_is_counted_from_files_that_the_gateway_has_left(run: Run) -> None:
    received, conflicts = read_database(run.folder / "received.db")
    journaled = read_journal(run.folder / "journal.db")
    assert conflicts == 0
    assert {item.batch.seq: item.batch.digest for item in received} == journaled.digests
    assert journaled.head == json.loads(run.out)["records"]["made"]


def test_a_demo_that_is_ended_ends_all_its_processes(tmp_path: Path) -> None:
    pytest.importorskip("amqtt")
    folder = tmp_path / "kept"
    with subprocess.Popen(demo("--keep", str(folder)), env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert any(b"poll:" in line for line in process.stdout)
        there = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    assert len(there) == 4
    assert not [pid for pid in there if Path(f"/proc/{pid}").exists()]


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").touch()
    done = subprocess.run(
        demo("--keep", str(tmp_path)), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 2
    assert "not empty" in done.stderr


def test_without_its_broker_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "find_spec", lambda name: None)
    tale = story.Story(tmp_path, story.FAST, Screen(Console()))
    with pytest.raises(EdgegwError, match=r"pip install 'edgegw\[demo\]'"):
        tale.run()


def children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


# -- the verdict on made-up evidence ---------------------------------------------------------------------

GONE, KILLED, BACK = 10_000, 12_000, 15_000
COURSE = Course(250, {"meter1": 500}, GONE, KILLED, BACK)


def scan(ts: int) -> dict[str, Any]:
    return {"ts": ts, "device": "meter1", "values": {"frequency": 49.6 if ts == 10_500 else 50.0}}


def wrote(ts: int, value: float) -> dict[str, Any]:
    return {"ts": ts, "event": "write", "tag": "battery.setpoint_kw", "new": value, "ok": True}


def told_story(latency_ms: int = 100) -> Iterator[tuple[bytes, int]]:
    """Yield bodies and when they came: polled until killed, started again, drained, live."""
    chain = Chain()
    yield chain.event({"ts": 9_000, "event": "start"}), 9_050
    for ts in range(9_000, 12_000, 500):
        yield chain.records([scan(ts)]), ts + 100 if ts < GONE else BACK + 300
    yield chain.event(wrote(10_507, 30.0), wrote(11_003, 0.0)), BACK + 300
    yield chain.event({"ts": 13_000, "event": "start"}), BACK + 300
    for ts in range(13_000, 15_000, 500):
        yield chain.records([scan(ts)]), BACK + 300
    yield chain.event({"ts": BACK + 200, "event": "link", "state": "online"}), BACK + 300
    for ts in range(BACK + 500, 17_000, 500):
        yield chain.records([scan(ts)]), ts + latency_ms


def evidence(told: list[tuple[bytes, int]], missing: int | None = None) -> Evidence:
    received = [Received(wire.read(body), at) for body, at in told]
    head = received[-1].batch.last
    journaled = Journaled(STREAM, head, {item.batch.seq: item.batch.digest for item in received})
    return Evidence([item for item in received if item.batch.seq != missing], 0, 0, journaled)


def test_a_story_without_loss_is_ok() -> None:
    verdict = judge(evidence(list(told_story())), COURSE)
    assert verdict.ok, verdict.as_json()["failed"]
    assert (verdict.made, verdict.received, verdict.starts) == (18, 18, 2)
    assert (verdict.outage_ms, verdict.backlog, verdict.drain_ms) == (BACK + 200 - GONE, 11, 100)
    assert verdict.latencies_ms == [100, 100, 100]
    assert verdict.blind_ms == 13_000 - 11_500


def test_the_dip_and_the_answer_are_read_from_the_records() -> None:
    found = judge(evidence(list(told_story())), COURSE).support
    assert found == Support(lowest_hz=49.6, dips=1, answers_ms=[7], written=2, handed_back=True)


@pytest.mark.parametrize(
    ("was", "becomes", "failed"),
    [
        (b'"new": 30.0', b'"new": 29.0', ["battery answered after"]),
        (b'"new": 0.0', b'"new": 1.0', ["setpoint on the return"]),
        (b"49.6", b"50.6", ["frequency dips seen"]),
    ],
)
def test_a_dip_without_an_answer_fails_the_verdict(was: bytes, becomes: bytes, failed: list[str]) -> None:
    told = [(body.replace(was, becomes), at) for body, at in told_story()]
    assert set(failed) <= set(judge(evidence(told), COURSE).as_json()["failed"])


def test_each_batch_that_is_missing_fails_the_verdict() -> None:
    told = list(told_story())
    for item in evidence(told).received:
        verdict = judge(evidence(told, missing=item.batch.seq), COURSE)
        assert not verdict.ok
        assert verdict.lost == [(item.batch.seq, item.batch.last)]


def test_an_altered_batch_fails_the_verdict() -> None:
    found = evidence(list(told_story()))
    digests = dict(found.journaled.digests) | {3: b"another"}
    verdict = judge(found._replace(journaled=found.journaled._replace(digests=digests)), COURSE)
    assert verdict.as_json()["failed"] == ["not as journaled"]


def test_a_second_stream_fails_the_verdict() -> None:
    found = evidence(list(told_story()))
    other = Received(wire.read(Chain(stream="0b0e6e5e-0000-4000-8000-000000000002").data()), BACK)
    verdict = judge(found._replace(received=[*found.received, other]), COURSE)
    assert verdict.as_json()["failed"] == ["streams begun"]


def test_slow_live_readings_fail_the_verdict() -> None:
    verdict = judge(evidence(list(told_story(latency_ms=501))), COURSE)
    assert verdict.as_json()["failed"] == ["live latency after it"]


def test_a_link_that_never_came_back_fails_the_verdict() -> None:
    told = [item for item in told_story() if b'"link"' not in item[0]]
    verdict = judge(evidence(told), COURSE)
    assert "link" in verdict.as_json()["failed"]


@pytest.mark.parametrize(
    ("stamps", "hole_ms"),
    [
        (range(9_900, 15_500, 500), 500),
        (
            [*range(9_900, 12_000, 500), *range(13_200, 15_500, 500)],
            500,
        ),  # the kill, to 13 000
        ([*range(9_900, 12_000, 500), *range(14_200, 15_500, 500)], 1_200),
        ([*range(9_900, 11_000, 500), *range(13_200, 15_500, 500)], 850),  # and a commit interval before it
        ([9_900, 10_400, 14_000, 14_500], 1_350),
        (range(9_900, 12_000, 500), 2_000),  # never polled again
        ([8_000, 9_000, 15_500], 2_750),
        ([], 2_000),
    ],
)
def test_the_longest_hole_leaves_the_crash_out(stamps: Sequence[int], hole_ms: int) -> None:
    assert longest_hole(stamps, Span(GONE, BACK), Span(KILLED - 250, 13_000)) == hole_ms
