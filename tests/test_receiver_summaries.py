"""Summaries at the receiver: beside whatever it holds of what they stand for, in any order, and nothing is lost."""

import io
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chains import Chain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_correct_time import TRUE_MS, WRONG_MS, begins, rows, scan, sink, synced, taken, unsynced  # noqa: F401
from test_correct_time import batch as timed
from test_receiver_sinks import postgres  # noqa: F401  the fixture

from edgegw.domain.batch import Kind, digest, head
from edgegw.domain.ranges import Ranges
from edgegw.receiver import ndjson, target
from edgegw.receiver.intake import Intake
from edgegw.receiver.ndjson import NdjsonSink
from edgegw.receiver.sink import Sink
from edgegw.receiver.sqlite import SqliteSink


class Piece(NamedTuple):
    """A batch or summary: the seqs that it covers, the hashes on either side, and its bytes."""

    first: int
    last: int
    period_s: int | None
    prev: bytes
    link: bytes
    body: bytes


class Story(NamedTuple):
    """All that a gateway ever had to send of a stream, and what it has at the end."""

    stream: str
    pieces: list[Piece]
    left: list[Piece]


def summary(stream: str, of: Sequence[Piece], period_s: int) -> Piece:
    """Thin pieces that follow on each other."""
    first, last, prev, link = of[0].first, of[-1].last, of[0].prev, of[-1].link
    more = b'"last_prev":"%s","period":%d,"clock":"synced",' % (link.hex().encode(), period_s)
    start = head("site-7", stream, first, last - first + 1, Kind.SUMMARY, prev, more)
    figures = {"mean": 1.5, "min": 1.0, "max": 2.0, "last": 2.0, "count": last - first + 1}
    records = [{"ts": first, "device": "meter0", "values": {"tag0": figures}}] if first % 3 else []
    return Piece(
        first, last, period_s, prev, link, start + ",".join(map(json.dumps, records)).encode() + b"]}"
    )


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Make a stream, then thin it twice, here and there, as a full journal does."""
    chain = Chain(stream=str(uuid.uuid4()))
    every: list[Piece] = []

    def made(body: bytes, prev: bytes, period_s: int | None = 0) -> Piece:
        first = json.loads(body)["seq"]
        every.append(Piece(first, chain.following - 1, period_s, prev, digest(body), body))
        return every[-1]

    left = []
    for count in draw(st.lists(st.integers(0, 3), min_size=1, max_size=14)):
        prev = chain.prev
        body = chain.data(count, tags=1) if count else chain.event({"event": "link", "state": "online"})
        left.append(made(body, prev, 0 if count else None))
    for finer, period_s in ((0, 60), (60, 900)):
        at = 0
        while at < len(left):
            run = 0
            while at + run < len(left) and left[at + run].period_s == finer and run < 4:
                run += 1
            run = draw(st.integers(0, run))
            if run:
                gone = left[at : at + run]
                left[at : at + run] = [summary(chain.stream, gone, period_s)]
                every.append(left[at])
                prev = chain.prev
                left.append(
                    made(chain.gap(gone[0].first, gone[-1].last, gone[-1].link, summary=True), prev, None)
                )
            at += 1
    return Story(chain.stream, every, left)


def tell(
    story: Story, came: Sequence[Piece], kept: Sink, restart: Callable[[], Intake] | None = None
) -> None:
    """Have a receiver take pieces in; nothing may be in conflict, lost, or missing without being told."""
    intake = Intake(kept)
    for at, piece in enumerate(came):
        if restart is not None and at % 5 == 4:
            intake.commit()
            intake = restart()
        intake.take("edgegw/site-7/backfill", piece.body)
    intake.commit()
    (report,) = [of for of in intake.report().streams if of.key.stream == story.stream]
    covered = Ranges((piece.first, piece.last) for piece in came)
    assert (report.kept.conflicts, report.chain.breaks) == (0, [])
    assert report.missing == list(covered.gaps(1, max(piece.last for piece in came)))
    assert report.records == covered.total()
    if set(story.left) <= set(came):
        assert report.ok
        assert report.chain.intact


def recorded(out: io.BytesIO) -> list[int]:
    """Return the seqs of the lines that are no summary's."""
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    return [line["seq"] for line in lines if not isinstance(line.get("values", {}).get("tag0"), dict)]


def arrivals(story: Story) -> st.SearchStrategy[list[Piece]]:
    """Some pieces or all that are left at the end, some of them twice, in any order."""
    some = st.lists(st.sampled_from(story.pieces), min_size=1)
    return st.tuples(some, st.sampled_from([[], story.left])).flatmap(
        lambda two: st.permutations([*two[0], *two[1]])
    )


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_p2_summaries_and_what_they_stand_for_come_in_any_order(data: st.DataObject) -> None:
    story = data.draw(stories())
    came = data.draw(arrivals(story))
    kept, out = SqliteSink(Path(":memory:")), io.BytesIO()
    tell(story, came, kept, restart=lambda: Intake(kept))
    tell(story, came, NdjsonSink(out))
    readings = {seq for (seq,) in kept._conn.execute("SELECT seq FROM readings")}
    fine = Ranges((piece.first, piece.last) for piece in came if piece.period_s == 0)
    assert readings == {seq for first, last in fine for seq in range(first, last + 1)}, (
        "what is finer is kept"
    )
    assert len(readings) == kept._conn.execute("SELECT count(*) FROM readings").fetchone()[0], "once"
    twice = kept._conn.execute(
        "SELECT seq, period, count(*) FROM summaries GROUP BY 1, 2 HAVING count(*) > 1"
    )
    assert not twice.fetchall()
    assert len(lines := recorded(out)) == len(set(lines))
    kept.close()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_p2_so_it_is_in_postgresql(postgres: str, data: st.DataObject) -> None:  # noqa: F811
    story = data.draw(stories())
    came = data.draw(arrivals(story))
    kept = target.open_sink(postgres)
    tell(story, came, kept, restart=lambda: Intake(kept))
    kept.close()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_stream_that_forgets_still_has_each_record_once(data: st.DataObject) -> None:
    story = data.draw(stories())
    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ndjson, "REMEMBERED", 2)
        tell(story, data.draw(arrivals(story)), NdjsonSink(out))
    assert len(lines := recorded(out)) == len(set(lines))


def test_the_tables_of_a_summary_that_begins_where_a_batch_does(tmp_path: Path) -> None:
    chain = Chain()
    pieces = []
    for _ in range(3):
        prev, first = chain.prev, chain.following
        body = chain.data(2, tags=1)
        pieces.append(Piece(first, first + 1, 0, prev, digest(body), body))
    minute = summary(chain.stream, pieces, 60)
    quarter = summary(chain.stream, [minute], 900)
    kept = SqliteSink(tmp_path / "kept.db")
    intake = Intake(kept)
    news = [
        intake.take("edgegw/site-7/data", p.body) for p in (pieces[0], quarter, minute, quarter, pieces[2])
    ]
    intake.commit()
    assert news == [True, True, True, False, True]
    found = {
        table: kept._conn.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
        for table, columns in {
            "batches": "seq, count, kind",
            "beside": "seq, period, count, kind",
            "summaries": "seq, period, tag",
            "conflicts": "seq, count",
        }.items()
    }
    assert found == {
        "batches": [(1, 2, "data")],
        "beside": [(1, 60, 6, "summary"), (1, 900, 6, "summary"), (5, 0, 2, "data")],
        "summaries": [(1, 60, "tag0"), (1, 900, "tag0")],
        "conflicts": [],
    }
    assert intake.report().streams[0].as_json() | {"gateway": "", "stream": ""} == {
        "gateway": "", "stream": "", "head": 6, "batches": 4, "records": 6, "readings": 4, "events": 0,
        "duplicates": 1, "conflicts": 0, "begins": 1, "missing": [], "elsewhere": {}, "gaps": [], "thinned": [],
        "chain": {"verified": True, "broken_at": []}, "ok": True,
    }  # fmt: skip
    kept.close()


def test_a_file_of_an_earlier_version_takes_summaries_in(tmp_path: Path) -> None:
    kept = SqliteSink(tmp_path / "kept.db")
    for statement in ("DROP TABLE beside", "ALTER TABLE summaries DROP COLUMN period"):
        kept._conn.execute(statement)
    kept.close()
    chain = Chain()
    body = chain.data(2)
    piece = summary(chain.stream, [Piece(1, 2, 0, bytes(32), digest(body), body)], 60)
    again = SqliteSink(tmp_path / "kept.db")
    assert Intake(again).take("edgegw/site-7/summary", piece.body)
    assert rows(again, "summaries")[0][-1] == 60
    again.close()


@pytest.mark.parametrize("when", ["as it comes", "afterwards"])
def test_times_are_corrected_of_batches_that_stand_beside_each_other(sink: Any, when: str) -> None:  # noqa: F811
    began, right = unsynced(1_000), synced(100_000)
    minute = {"ts": WRONG_MS + 2_000, "device": "meter1", "values": {"kw": {"mean": 1.5, "count": 2}}}
    bodies = [
        timed(1, began, [scan(WRONG_MS + 2_000)]),
        timed(1, began, [minute, minute], Kind.SUMMARY),
        timed(1, began, [minute] * 3, Kind.SUMMARY).replace(b'"last_prev"', b'"period":900,"last_prev"'),
        timed(2, began, [scan(WRONG_MS + 3_000)]),
    ]
    reference = [begins(4, right)]
    taken(sink, [*bodies, *reference], correct=when == "as it comes")
    taken(sink, [])
    assert [(row[2], row[3] - TRUE_MS) for row in rows(sink, "readings")] == [
        (1, 2_000), (1, 2_000), (2, 3_000), (2, 3_000)
    ]  # fmt: skip
    assert [(row[2], row[3] - TRUE_MS, row[-1]) for row in rows(sink, "summaries")] == (
        [(1, 2_000, 60)] * 2 + [(1, 2_000, 900)] * 3
    )
    delta_ms = TRUE_MS - WRONG_MS
    assert [row[2:] for row in rows(sink, "corrections")] == [
        (1, 1, delta_ms, 0), (1, 2, delta_ms, 60), (1, 3, delta_ms, 900), (2, 1, delta_ms, 0),
    ]  # fmt: skip
    assert taken(sink, []) == [], "once"
