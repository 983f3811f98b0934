"""The soak's verdict, from the field's counters and the receiver's database. Pure.

The field answers each read of a unit with that unit's next number, once. So every number that is missing upstream was
lost, or was read by a scan that failed; and a number that comes twice was doubled.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from edgegw.domain.batch import Gap, Link, digest, verify
from edgegw.domain.ranges import Ranges


class Row(NamedTuple):
    """A batch as the receiver keeps it: its stream, bounds, kind and JSON bytes."""

    stream: str
    seq: int
    count: int
    kind: str
    body: bytes


class Kill(NamedTuple):
    """A SIGKILL of the gateway: what each unit had given when it came, and a while before."""

    before: Mapping[str, int]
    at: Mapping[str, int]


class Write(NamedTuple):
    """A write as it reached the field: the tag and the value."""

    tag: str
    value: float


class Evidence(NamedTuple):
    """What is known when all is over; `head` is the gateway's.

    `given` is the last number that each unit gave, `limits` the range of each setpoint.
    """

    rows: Sequence[Row]
    conflicts: int
    head: int
    given: Mapping[str, int]
    kills: Sequence[Kill]
    writes: Sequence[Write]
    limits: Mapping[str, tuple[float, float]]


@dataclass
class Verdict:
    """What was found: figures to show, and everything that must not be."""

    figures: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class _Reading(NamedTuple):
    seq: int
    number: int


def judge(evidence: Evidence) -> Verdict:
    """Decide from what was received how it went."""
    verdict = Verdict()
    rows = sorted(evidence.rows, key=lambda row: (row.stream, row.seq))
    streams = sorted({row.stream for row in rows})
    verdict.figures |= {"streams": len(streams), "batches": len(rows), "conflicts": evidence.conflicts}
    if len(streams) != 1:
        verdict.wrong.append(f"{len(streams)} streams; expected one: nothing damaged the journal")
    if evidence.conflicts:
        verdict.wrong.append(f"{evidence.conflicts} batches came with other bytes than before")
    records = [(row.seq + at, record) for row in rows for at, record in enumerate(_records(row))]
    gaps = [Gap(r["from"], r["to"], _hash(r)) for _, r in records if r.get("event") == "gap"]
    _judge_chain(verdict, rows, gaps, evidence.head)
    gone = Ranges((gap.first, gap.last) for gap in gaps)
    for row in rows:
        if row.kind == "summary":
            gone.add(row.seq, row.seq + row.count - 1)
    verdict.figures |= {"records in gaps or summaries": gone.total(), "kills": len(evidence.kills)}
    for unit, given in evidence.given.items():
        killed = Ranges((kill.before[unit] + 1, kill.at[unit] + 1) for kill in evidence.kills)
        _judge_unit(verdict, unit, records, gone, killed)
        last = max((r["values"]["n"] for _, r in records if _counts(r, unit)), default=0)
        if given - last > 1:
            verdict.wrong.append(f"{unit}: gave {given}, and {last} is the last that was received")
    _judge_writes(verdict, records, evidence)
    return verdict


def _records(row: Row) -> list[dict[str, Any]]:
    return [] if row.kind == "summary" else json.loads(row.body)["records"]


def _hash(gap: Mapping[str, Any]) -> bytes | None:
    return bytes.fromhex(gap["last_prev"]) if gap.get("last_prev") else None


def _judge_chain(verdict: Verdict, rows: Sequence[Row], gaps: Iterable[Gap], head: int) -> None:
    links = [_link(row) for row in rows]
    report = verify(links, gaps)
    last = max((link.last for link in links), default=0)
    verdict.figures |= {"head": head, "links verified": report.links}
    if last != head:
        verdict.wrong.append(f"the gateway's head is {head}, and the last seq received {last}")
    verdict.wrong += [
        f"seqs {first} to {end} are missing and named by no gap" for first, end in report.missing
    ]
    verdict.wrong += [f"the chain breaks at seq {seq}" for seq in report.breaks]


def _link(row: Row) -> Link:
    message = json.loads(row.body)
    summary = row.kind == "summary"
    follows = bytes.fromhex(message["last_prev"]) if summary else digest(row.body)
    return Link(row.seq, row.seq + row.count - 1, bytes.fromhex(message["prev"]), follows, summary)


def _judge_unit(
    verdict: Verdict, unit: str, records: Sequence[tuple[int, dict[str, Any]]], gone: Ranges, killed: Ranges
) -> None:
    """Look at each number of a unit that did not come, and at each that came out of order or twice.

    `killed` are the numbers that a SIGKILL may have cost, `gone` the seqs that gaps name or summaries stand for.
    """
    found = [_Reading(seq, r["values"]["n"]) for seq, r in records if _counts(r, unit)]
    failures = [seq for seq, record in records if _tells_of_failure(record, unit)]
    lost = failed = 0
    for a, b in pairwise(found):
        if b.number <= a.number:
            verdict.wrong.append(f"{unit}: {b.number} at seq {b.seq} comes after {a.number} at seq {a.seq}")
        if b.number <= a.number + 1 or gone.overlaps(a.seq, b.seq):
            continue
        rest = sum(last - first + 1 for first, last in killed.gaps(a.number + 1, b.number - 1))
        lost += b.number - a.number - 1 - rest
        if rest and not _any_between(failures, a.seq, b.seq):
            verdict.wrong.append(
                f"{unit}: {a.number + 1} to {b.number - 1} are missing between seqs {a.seq} and {b.seq}, "
                "and nothing says why"
            )
        failed += rest
    verdict.figures |= {
        f"{unit}: received": len(found), f"{unit}: lost to kills": lost, f"{unit}: in scans that failed": failed,
    }  # fmt: skip


def _counts(record: Mapping[str, Any], unit: str) -> bool:
    """Tell whether a record has a number of the unit."""
    return record.get("device") == unit and record.get("values", {}).get("n") is not None


def _tells_of_failure(record: Mapping[str, Any], unit: str) -> bool:
    """Tell whether a record says that a scan of the unit failed or was given up."""
    if record.get("device") == unit:
        return "status" in record or bool(record.get("quality"))
    if record.get("event") == "config":
        return unit in record.get("stopped", ()) or unit in record.get("started", ())
    return record.get("event") in ("stop", "start")


def _any_between(seqs: Sequence[int], first: int, last: int) -> bool:
    place = bisect_right(seqs, first)
    return place < len(seqs) and seqs[place] < last


def _judge_writes(
    verdict: Verdict, records: Sequence[tuple[int, dict[str, Any]]], evidence: Evidence
) -> None:
    """Compare the writes that reached the field with their limits, and with the entries that came before them."""
    intents = sum(r.get("event") == "write" and "ok" not in r for _, r in records)
    verdict.figures |= {"writes journaled": intents, "writes in the field": len(evidence.writes)}
    for write in evidence.writes:
        low, high = evidence.limits[write.tag]
        if not low <= write.value <= high:
            verdict.wrong.append(f"{write.tag}: {write.value} was written; its limits are {low} and {high}")
    named = sum(r.get("event") == "gap" for _, r in records)
    if not named and len(evidence.writes) > intents + len(evidence.kills):
        verdict.wrong.append(
            f"{len(evidence.writes)} writes reached the field, and {intents} are in the ledger"
        )
