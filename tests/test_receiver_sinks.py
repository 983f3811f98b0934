"""The contract of every sink, and what each does beside it."""

import io
import json
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import STREAM, Chain
from hypothesis import given
from hypothesis import strategies as st
from postgres_rig import Postgres

from edgegw.domain.batch import verify
from edgegw.errors import ConfigError
from edgegw.receiver import ndjson, target
from edgegw.receiver.dedupe import Key
from edgegw.receiver.intake import Intake
from edgegw.receiver.ndjson import Joined, NdjsonSink
from edgegw.receiver.sink import Sink, SinkError, SinkUnusable
from edgegw.receiver.sqlite import SqliteSink, plain
from edgegw.receiver.wire import read

KEY = Key("site-7", STREAM)
OLDER = STREAM.replace("0b0e", "0b0f")
Open = Callable[[], Sink]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of the tests' own; skipped where PostgreSQL or psycopg is not installed."""
    with tempfile.TemporaryDirectory() as name:
        server = Postgres(Path(name))
        server.start()
        try:
            yield server.url
        finally:
            server.stop("immediate")


@pytest.fixture(params=["sqlite", "ndjson", "postgres"])
def open_sink(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """How to open one and the same medium, as often as wanted."""
    if request.param == "ndjson":
        sink = NdjsonSink(io.BytesIO())
        return lambda: sink
    if request.param == "sqlite":
        return lambda: target.open_sink(f"sqlite:///{tmp_path}/kept.db")
    url: str = request.getfixturevalue("postgres")
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return lambda: target.open_sink(url)


def everything() -> list[bytes]:
    """One batch of each kind, chained."""
    chain = Chain()
    bodies = [chain.data(3), chain.event({"event": "start"}, {"event": "link", "state": "online"})]
    bodies.append(
        chain.records(
            [
                {"ts": 1, "device": "plc",
                 "values": {"a": True, "b": "x", "c": [1, 2.5], "d": None, "seq": 2**64 - 1},
                 "quality": {"d": "bad:not-a-number"}},
                {"ts": 2, "device": "plc", "status": "bad", "reason": "timeout"},
            ]
        )
    )  # fmt: skip
    prev = chain.prev
    replaced = [chain.data(2), chain.data(4)]
    bodies.append(chain.summary(replaced, 8, 6, prev))
    bodies.append(chain.data(1))
    return bodies


def test_what_is_added_is_there_in_order_and_in_one_chain(open_sink: Open) -> None:
    sink = open_sink()
    bodies = everything()
    for body in random.Random(3).sample(bodies, len(bodies)):
        sink.add(read(body), 5)
    sink.commit()
    assert verify(sink.links(KEY)).intact
    assert list(sink.links(Key("other", STREAM))) == []
    assert sink.figures() == {KEY: (5, 9 + 5 + 3, 2, 0)}
    sink.close()


def test_a_conflict_is_counted_and_kept_apart(open_sink: Open) -> None:
    sink = open_sink()
    intake = Intake(sink)
    body = Chain().data(2)
    other = body.replace(b"1.5", b"1.6")
    assert intake.take("edgegw/site-7/data", body)
    for again in (other, body, other):
        assert not intake.take("edgegw/site-7/backfill", again)
    intake.commit()
    (stream,) = intake.report().streams
    assert stream.kept.conflicts >= 1
    assert (stream.kept.batches, stream.duplicates, stream.ok) == (1, 1, False)
    sink.close()


def test_overlapping_bounds_are_found(open_sink: Open) -> None:
    sink = open_sink()
    chain = Chain()
    for _ in range(4):
        sink.add(read(chain.data(3)), 0)
    overlaps = {
        (seq, last): [kept.seq for kept in sink.kept(KEY, seq, last)] for seq, last in [(1, 3), (4, 5)]
    }
    assert overlaps == {(1, 3): [1], (4, 5): [4]}
    assert sorted(kept.seq for kept in sink.kept(KEY, 5, 7)) == [4, 7]
    assert sorted(kept.seq for kept in sink.kept(KEY, 2, 30)) == [1, 4, 7, 10]
    assert sink.kept(KEY, 13, 20) == []
    sink.close()


def test_p2_a_restart_knows_what_is_kept(open_sink: Open) -> None:
    chain = Chain()
    first, lost, third = chain.data(2), chain.data(3), chain.data(1)
    lost_hash = read(lost).digest
    gap = chain.gap(3, 5, lost_hash)
    sink = open_sink()
    intake = Intake(sink)
    for body in (third, first, gap):
        assert intake.take("edgegw/site-7/data", body)
    intake.commit()
    sink.close()
    sink = open_sink()
    if isinstance(sink, NdjsonSink):
        return  # it says that it knows nothing of earlier runs
    again = Intake(sink)
    assert not any(again.take("edgegw/site-7/backfill", body) for body in (first, third, gap))
    report = again.report()
    assert report.ok
    assert report.streams[0].duplicates == 3
    assert [(named.first, named.last, named.reason) for named in report.streams[0].gaps] == [(3, 5, "full")]
    sink.close()


def test_a_restart_knows_where_a_stream_begins(open_sink: Open) -> None:
    sink, chain = open_sink(), Chain()
    chain.data(4)
    intake = Intake(sink, from_here=True)
    assert intake.take("edgegw/site-7/data", chain.data(2))
    intake.commit()
    (stream,) = intake.report().streams
    assert (stream.begins, stream.missing, stream.ok) == (5, [], True)
    if isinstance(sink, NdjsonSink):
        return
    sink.close()
    sink = open_sink()
    assert list(sink.beginnings()) == [(KEY, 5)]
    for from_here in (False, True):
        (stream,) = Intake(sink, from_here=from_here).report().streams
        assert (stream.begins, stream.missing, stream.ok) == (5, [], True)
    sink.close()


def test_what_was_not_committed_is_not_kept(open_sink: Open) -> None:
    sink = open_sink()
    sink.add(read(Chain().data(2)), 0)
    sink.close()
    again = open_sink()
    if not isinstance(again, NdjsonSink):
        assert list(again.spans()) == []
    again.close()


def test_text_that_a_database_might_not_take_does_not_stop_anything(open_sink: Open) -> None:
    sink = open_sink()
    nasty = {
        "ts": 1,
        "device": "';--",
        "values": {"a": "\0", "';--": "\u2028\U0001f600"},
    }
    sink.add(read(Chain().records([nasty])), 0)
    sink.commit()
    assert sink.figures()[KEY].readings == 2
    sink.close()


def rows(file: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_the_sqlite_tables_are_those_of_the_contract(tmp_path: Path) -> None:
    file = tmp_path / "kept.db"
    sink = SqliteSink(file)
    for body in everything():
        sink.add(read(body), 5)
    sink.commit()
    names = {
        table: [column[1] for column in rows(file, f"PRAGMA table_info({table})")]
        for table in ("batches", "readings", "events")
    }
    assert names == {
        "batches": ["gateway", "stream", "seq", "count", "kind", "received_ts", "body"],
        "readings": ["gateway", "stream", "seq", "ts", "device", "tag", "value", "quality"],
        "events": ["gateway", "stream", "seq", "ts", "event", "body"],
    }
    assert rows(file, "SELECT body FROM batches ORDER BY seq") == [(body.decode(),) for body in everything()]
    assert rows(file, "SELECT seq, tag, value, quality FROM readings WHERE device = 'plc'") == [
        (6, "a", 1, None),
        (6, "b", "x", None),
        (6, "c", "[1,2.5]", None),
        (6, "d", None, "bad:not-a-number"),
        (6, "seq", float(2**64), None),
    ]
    assert rows(file, "SELECT seq, device, status, reason FROM device_status") == [
        (7, "plc", "bad", "timeout")
    ]
    assert rows(file, "SELECT seq, event FROM events") == [(4, "start"), (5, "link")]
    assert json.loads(rows(file, "SELECT body FROM events WHERE event = 'link'")[0][0])["state"] == "online"
    assert rows(file, "SELECT seq, tag FROM summaries") == [(8, "tag0")]
    assert rows(file, "PRAGMA journal_mode") == [("wal",)]
    with pytest.raises(sqlite3.IntegrityError):
        rows(file, "INSERT INTO batches SELECT * FROM batches LIMIT 1")
    sink.close()


def test_values_stand_in_columns_as_they_are() -> None:
    assert [plain(value) for value in (1, 1.5, "1", None)] == [1, 1.5, "1", None]
    assert plain(True) is not True
    assert plain(True) == 1
    assert plain(["a", True, 1]) == '["a",true,1]'
    assert plain(-(2**63)) == -(2**63)
    assert plain(2**63) == float(2**63)


def test_a_second_writer_is_found_out(tmp_path: Path) -> None:
    body = Chain().data(2)
    one, other = SqliteSink(tmp_path / "kept.db"), SqliteSink(tmp_path / "kept.db")
    one.add(read(body), 0)
    one.commit()
    with pytest.raises(SinkError, match="another receiver"):
        other.add(read(body), 0)


def test_a_file_that_is_no_database_is_an_error_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "kept.db"
    file.write_text("no database at all, but long enough to be looked at as one" * 20)
    with pytest.raises(SinkUnusable, match=r"kept\.db"):
        SqliteSink(file)
    with pytest.raises(SinkUnusable, match="nowhere"):
        SqliteSink(tmp_path / "nowhere" / "kept.db")


def test_ndjson_has_a_line_for_each_record() -> None:
    out = io.BytesIO()
    sink = NdjsonSink(out)
    chain = Chain()
    sink.add(read(chain.data(2, tags=1)), 0)
    sink.add(read(chain.gap(7, 9, bytes(32), stream=OLDER)), 0)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["gateway"], line["stream"], line["seq"]) for line in lines] == [
        (*KEY, n) for n in (1, 2, 3)
    ]
    assert lines[0]["values"] == {"tag0": 1.5}
    assert list(lines[0])[:4] == ["gateway", "stream", "seq", "ts"]
    assert lines[2]["event"] == "gap"
    assert lines[2]["event_stream"] == OLDER


def test_ndjson_forgets_old_batches_but_not_that_it_wrote_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ndjson, "REMEMBERED", 2)
    sink = NdjsonSink(io.BytesIO())
    intake = Intake(sink)
    chain = Chain()
    bodies = [chain.data(1) for _ in range(5)]
    assert all(intake.take("t/data", body) for body in bodies)
    assert not any(intake.take("t/data", body) for body in bodies)
    assert intake.report().streams[0].duplicates == 5


@given(st.permutations(range(8)), st.sets(st.integers(1, 7)))
def test_joined_links_verify_like_the_links(order: list[int], broken: set[int]) -> None:
    chain = Chain()
    links = [read(chain.data(2, tags=1)).link for _ in range(8)]
    links = [link._replace(prev=bytes(32)) if at in broken else link for at, link in enumerate(links)]
    joined = Joined()
    for at in order[:6]:
        joined.add(links[at])
    some = sorted((links[at] for at in order[:6]), key=lambda link: link.first)
    assert verify(joined)[1:] == verify(some)[1:]
    whole = Joined()
    for at in order:
        whole.add(links[at])
    assert len(list(whole)) == len(broken) + 1


@pytest.mark.parametrize(
    "to", ["", "file.db", "sqlite:///", "sqlite://x", "mysql://x", "postgresql://u:secret@h/d", "postgresql://h/d?password=secret"]
)  # fmt: skip
def test_a_target_that_is_none_is_refused(to: str) -> None:
    with pytest.raises(ConfigError) as caught:
        target.open_sink(to)
    assert "secret" not in str(caught.value)
