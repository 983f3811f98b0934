"""The soak's verdict: it must find what is wrong, or a clean run says nothing; and a short run of the whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import ROOT, needs_mosquitto

sys.path.insert(0, str(ROOT / "scripts"))
from soak_judge import Evidence, Kill, Row, Verdict, Write, judge

from edgegw.domain.batch import GENESIS, digest

STREAM = "5f0c1f0e-0000-4000-8000-000000000000"


def reading(number: int, **more: Any) -> dict[str, Any]:
    return {"ts": number, "device": "a", "values": {"n": number}} | more


def rows(*batches: list[dict[str, Any]] | int) -> list[Row]:
    """Return batches of these records, each a link; a number stands for so many records that are not there."""
    made, seq, prev = [], 1, GENESIS
    for records in batches:
        if isinstance(records, int):
            seq += records
            continue
        kind = "event" if "event" in records[0] else "data"
        body = json.dumps({"prev": prev.hex(), "records": records}).encode()
        made.append(Row(STREAM, seq, len(records), kind, body))
        seq, prev = seq + len(records), digest(body)
    return made


def verdict(received: list[Row], *, given: int, kills: list[Kill] | None = None, **more: Any) -> Verdict:
    head = max(row.seq + row.count - 1 for row in received)
    evidence = Evidence(received, 0, head, {"a": given}, kills or [], [], {"a.setpoint": (-40.0, 40.0)})
    return judge(evidence._replace(**more))


def test_a_run_without_a_fault_is_clean() -> None:
    found = verdict(rows([reading(1), reading(2)], [reading(3)]), given=3)
    assert found.wrong == []
    assert found.figures["a: received"] == 3


FAILED = {"ts": 1, "device": "a", "status": "bad", "reason": "timeout"}
STOP = {"ts": 1, "event": "stop"}


EXCUSES = {
    "status": FAILED,
    "stop": STOP,
    "reload": {"ts": 1, "event": "config", "stopped": ["a"]},
    "bad tag": reading(3, quality={"n": "bad:x"}, values={"n": None}),
}


@pytest.mark.parametrize("excuse", EXCUSES.values(), ids=EXCUSES)
def test_numbers_of_a_scan_that_is_said_to_have_failed_may_be_missing(excuse: dict[str, Any]) -> None:
    assert verdict(rows([reading(1)], [excuse], [reading(4)]), given=4).wrong == []
    for other in ({"ts": 1, "event": "link"}, FAILED | {"device": "b"}):
        assert len(verdict(rows([reading(1)], [other], [reading(4)]), given=4).wrong) == 1


def test_numbers_that_a_kill_may_have_cost_may_be_missing_and_no_others() -> None:
    received = rows([reading(1), reading(2)], [reading(6)])
    assert verdict(received, given=6, kills=[Kill({"a": 2}, {"a": 5})]).wrong == []
    found = verdict(received, given=6, kills=[Kill({"a": 3}, {"a": 5})])
    assert found.wrong == ["a: 3 to 5 are missing between seqs 2 and 3, and nothing says why"]


@pytest.mark.parametrize(
    ("received", "given", "what"),
    [
        (rows([reading(1), reading(1)]), 1, "a: 1 at seq 2 comes after 1 at seq 1"),
        (rows([reading(2)], [reading(1)]), 2, "a: 1 at seq 2 comes after 2 at seq 1"),
        (rows([reading(1)], 2, [reading(2)]), 2, "seqs 2 to 3 are missing and named by no gap"),
        (rows([reading(1)]), 9, "a: gave 9, and 1 is the last that was received"),
    ],
)
def test_what_is_doubled_disordered_or_missing_is_found(received: list[Row], given: int, what: str) -> None:
    assert what in verdict(received, given=given).wrong


def test_a_changed_batch_another_stream_conflicts_and_a_short_tail_are_found() -> None:
    one, two = rows([reading(1)], [reading(2)])
    assert verdict([one._replace(body=one.body + b" "), two], given=2).wrong == ["the chain breaks at seq 2"]
    assert "2 streams; expected one" in verdict([one, two._replace(stream="other")], given=2).wrong[0]
    assert "3 batches came with other bytes" in verdict([one, two], given=2, conflicts=3).wrong[0]
    assert verdict([one, two], given=2, head=5).wrong == [
        "the gateway's head is 5, and the last seq received 2"
    ]


def test_writes_out_of_limits_or_without_an_entry_are_found() -> None:
    intent = {"ts": 1, "event": "write", "tag": "a.setpoint", "new": 1.0}
    received = rows([reading(1)], [intent])
    assert verdict(received, given=1, writes=[Write("a.setpoint", 1.0)]).wrong == []
    assert len(verdict(received, given=1, writes=[Write("a.setpoint", 41.0)]).wrong) == 1
    assert len(verdict(received, given=1, writes=[Write("a.setpoint", 1.0)] * 2).wrong) == 1


@needs_mosquitto
def test_a_short_soak_is_clean(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "soak_run.py"), "0.3", "4"]
    made = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=None, check=False, cwd=tmp_path
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "seed 4: clean" in made.stdout
