"""Times of a clock that was not synchronised, corrected at the receiver: how far, which, once, in any order."""

import asyncio
import json
import random
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from field import field
from gateway_rig import Subscriber, config, device, gateway, until
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import (
    FAKETIME,
    ROOT,
    FakeClock,
    Process,
    free_port,
    mosquitto,
    needs_mosquitto,
    publish,
    receive,
    run,
)
from test_receiver_sinks import postgres  # noqa: F401  the fixture

from edgegw.domain.batch import GENESIS, TAIL, Kind, head, timing
from edgegw.domain.era import Era
from edgegw.receiver import target
from edgegw.receiver.corrector import Applied, Correctable, Corrector
from edgegw.receiver.dedupe import Key
from edgegw.receiver.intake import Intake
from edgegw.receiver.sqlite import SqliteSink
from edgegw.receiver.timing import Eras, Move, read_era, unsynced_era
from edgegw.receiver.wire import read

BOOT, STREAM = "boot-1", "0b0e6e5e-0000-4000-8000-000000000001"
TRUE_MS = 1_732_256_000_000
"""What a right clock says when the boot's monotonic clock stands at nothing."""
WRONG_MS = 1_000_000_000
"""What the gateway's clock says then, until it is set."""
TABLES = ("readings", "events", "device_status", "summaries", "corrections")


def unsynced(mono_ms: int, offset_ms: int = WRONG_MS, boot: str = BOOT) -> Era:
    return Era(False, boot, offset_ms + mono_ms, mono_ms)


def synced(mono_ms: int, offset_ms: int = TRUE_MS, boot: str = BOOT) -> Era:
    return Era(True, boot, offset_ms + mono_ms, mono_ms)


def batch(
    seq: int, era: Era, records: Sequence[dict[str, Any]], kind: Kind = Kind.DATA, stream: str = STREAM,
    gateway: str = "site-7",
) -> bytes:  # fmt: skip
    start = head(gateway, stream, seq, len(records), kind, GENESIS, timing(era))
    tail = b'],"last_prev":"%s"}' % GENESIS.hex().encode() if kind is Kind.SUMMARY else TAIL
    return start + ",".join(json.dumps(record) for record in records).encode() + tail


def scan(ts: int, device: str = "meter1") -> dict[str, Any]:
    return {"ts": ts, "device": device, "values": {"kw": 1.5, "on": True}}


def begins(seq: int, era: Era, name: str = "clock-step", of: Era | None = None, **more: str) -> bytes:
    """Return the batch that names an era; it is of that era itself, if nothing else is said."""
    event = {"ts": era.wall_ms, "event": name, **era.wire()}
    return batch(seq, of or era, [event], Kind.EVENT, **more)


def story() -> list[bytes]:
    """A start with a wrong clock, records, a step that is no better, records, the right time, and records."""
    began, set_, right = unsynced(1_000), unsynced(50_000, WRONG_MS + 77_000), synced(100_000)
    status = {"ts": WRONG_MS + 3_000, "device": "meter2", "status": "bad", "reason": "timeout"}
    minute = {"ts": WRONG_MS + 5_000, "device": "meter1", "values": {"kw": {"mean": 1.5, "count": 2}}}
    return [
        begins(1, began, "start"),
        batch(2, began, [scan(WRONG_MS + 2_000), status, scan(TRUE_MS - 500, "plc")]),
        batch(5, began, [minute, minute | {"ts": WRONG_MS + 65_000}], Kind.SUMMARY),
        begins(7, set_),
        batch(8, set_, [scan(set_.wall_ms + 10_000)]),
        begins(9, right),
        batch(10, right, [scan(TRUE_MS + 101_000)]),
    ]


RIGHT = {
    "readings": [(2, 2_000), (4, -500), (8, 60_000), (10, 101_000)],
    "device_status": [(3, 3_000)],
    "summaries": [(5, 5_000), (5, WRONG_MS + 65_000 - TRUE_MS)],
    "events": [(1, 1_000), (7, 50_000), (9, 100_000)],
}
"""seq and true time of the story's records, for each table; what began after its era had ended is not moved."""


def rows(sink: Any, table: str) -> list[tuple[Any, ...]]:
    """Return a table's rows in an order of their own."""
    return sorted((tuple(row) for row in sink._conn.execute(f"SELECT * FROM {table}")), key=repr)


def taken(sink: Any, bodies: Sequence[bytes], *, correct: bool = True, commits: int = 3) -> list[Applied]:
    """Take bodies in as a receiver does, once, with the option or without."""
    corrector = None
    if correct:
        corrector = Corrector(sink)
        corrector.settle()
    intake = Intake(sink, corrector=corrector)
    for at, body in enumerate(bodies):
        intake.add(read(body), "a test")
        if at % commits == 0:
            intake.commit()
    intake.commit()
    return corrector.applied() if corrector else []


@pytest.fixture(params=["sqlite", "postgres"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        made = target.open_sink(f"sqlite:///{tmp_path}/kept.db")
    else:
        url: str = request.getfixturevalue("postgres")
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        made = target.open_sink(url)
    assert isinstance(made, Correctable)
    yield made
    made.close()


@pytest.mark.parametrize("when", ["as it comes", "backwards", "afterwards", "twice"])
def test_every_table_says_what_the_clock_should_have_said(sink: Any, when: str) -> None:
    bodies = story()
    if when == "backwards":
        bodies.reverse()
    if when == "afterwards":
        taken(sink, bodies, correct=False)
        assert min(row[3] for row in rows(sink, "readings")) < TRUE_MS / 2
        bodies = []
    taken(sink, bodies)
    if when == "twice":
        before = {table: rows(sink, table) for table in TABLES}
        assert taken(sink, bodies) == []
        assert {table: rows(sink, table) for table in TABLES} == before
    for table, right in RIGHT.items():
        found = {(row[2], row[3] - TRUE_MS) for row in rows(sink, table)}
        assert found == set(right), table
    delta_ms = TRUE_MS - WRONG_MS
    assert [row[2:5] for row in rows(sink, "corrections")] == [
        (1, 1, delta_ms), (2, 2, delta_ms), (5, 1, delta_ms), (7, 1, delta_ms - 77_000), (8, 1, delta_ms - 77_000),
    ]  # fmt: skip
    assert len(rows(sink, "readings")) == 8, "each reading once"
    (stored,) = [row for row in rows(sink, "batches") if row[2] == 2]
    assert stored[-1].encode() == story()[1], "the body stays as it came"


def test_what_was_applied_is_told_by_stream_and_step(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / "kept.db")
    taken(sink, story(), correct=False)
    key, delta_ms = Key("site-7", STREAM), TRUE_MS - WRONG_MS
    assert taken(sink, []) == [Applied(key, delta_ms - 77_000, 2, 2), Applied(key, delta_ms, 3, 4)]
    assert taken(sink, []) == []
    sink.close()


def test_nothing_is_moved_without_a_reference_of_the_same_gateway_and_boot(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / "kept.db")
    others = [begins(1, synced(9_000), gateway="site-8"), begins(90, synced(9_000, boot="boot-2"))]
    before = [*story()[:3], *others]
    assert taken(sink, before) == []
    assert not rows(sink, "corrections")
    assert taken(sink, [begins(1, synced(9_000), stream="0b0e6e5e-0000-4000-8000-000000000002")]), (
        "another stream of the same boot will do"
    )
    sink.close()


@needs_mosquitto
def test_live_and_offline_on_the_command_line(tmp_path: Path) -> None:
    port, to = free_port(), f"sqlite:///{tmp_path}/kept.db"
    bodies = story()
    with mosquitto(tmp_path, port), Subscriber(port, "edgegw/site-7/ack") as acks:
        with receive(port, to, "--once", "--idle", "700ms", "--correct-time") as process:
            process.wait_said("ready")
            publish(port, [("edgegw/site-7/data", body) for body in bodies[2:]])
            assert process.end()[0] == 1  # 1 to 4 are missing
        assert acks.messages
        with receive(port, to, "--once", "--idle", "700ms") as process:
            process.wait_said("ready")
            publish(port, [("edgegw/site-7/data", body) for body in bodies[:2]])
            process.end()
    code, out, _ = run("--to", to, "--correct-time", "--json")
    delta_ms = TRUE_MS - WRONG_MS
    expected = {"gateway": "site-7", "stream": STREAM, "batches": 2, "records": 3, "delta_ms": delta_ms}
    assert (code, json.loads(out)) == (0, [expected])
    code, out, _ = run("--to", to, "--correct-time")
    assert (code, out) == (0, "nothing to correct\n")
    connection = sqlite3.connect(tmp_path / "kept.db")
    assert connection.execute("SELECT count(*), sum(count) FROM corrections").fetchone() == (5, 6)
    connection.close()


@pytest.mark.parametrize(
    "arguments",
    [("--to", "-"), ("--to", "sqlite:///x.db", "--report"), ("--to", "sqlite:////nowhere/x.db")],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    code, _, errors = run(*arguments, "--correct-time")
    assert code == 2
    assert "--correct-time" in errors


# -- the decisions alone -----------------------------------------------------------------------------------

OF = unsynced(5_000)
MOVES = [
    ([], None),
    ([unsynced(9_000)], None),
    ([synced(9_000, boot="boot-2")], None),
    ([synced(9_000)], Move(TRUE_MS - WRONG_MS, 9_000)),
    ([synced(5_000)], Move(TRUE_MS - WRONG_MS, None)),
    ([synced(9_000), synced(20_000, TRUE_MS + 1)], Move(TRUE_MS - WRONG_MS, 9_000)),
    ([synced(20_000), unsynced(7_000)], Move(TRUE_MS - WRONG_MS, 7_000)),
    ([synced(4_000)], Move(TRUE_MS - WRONG_MS, None)),
    ([synced(4_000), synced(3_000, TRUE_MS + 1)], Move(TRUE_MS - WRONG_MS, None)),
    ([synced(4_000, TRUE_MS + 1), synced(9_000)], Move(TRUE_MS - WRONG_MS, 9_000)),
    ([synced(9_000, TRUE_MS + 1), synced(9_000)], Move(TRUE_MS - WRONG_MS, 9_000)),
]


@pytest.mark.parametrize(("known", "move"), MOVES)
def test_the_first_synchronised_era_after_a_batch_tells_else_the_last_before(
    known: list[Era], move: Move | None
) -> None:
    for order in (known, known[::-1]):
        eras = Eras()
        for era in order:
            assert eras.add("site-7", era)
            assert not eras.add("site-7", era)
        assert eras.move("site-7", OF) == move
        assert eras.move("site-8", OF) is None


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{}", b'{"clock":"unsynced"}', b'{"clock":"unsynced","mono":7}',
        b'{"clock":"unsynced","mono":{"boot":"","ts":1,"ms":1}}', b'{"clock":"odd","mono":{"boot":"b","ts":1,"ms":1}}',
        b'{"clock":"unsynced","mono":{"boot":"b","ts":1e300,"ms":1}}',
        b'{"clock":"unsynced","mono":{"boot":"b","ts":9223372036854775807,"ms":1}}',
        b'{"clock":"unsynced","mono":{"boot":"b","ts":true,"ms":1}}',
    ],
)  # fmt: skip
def test_an_era_that_makes_no_sense_is_none(text: bytes) -> None:
    assert read_era(text) is None
    assert unsynced_era(text) is None


ERAS = st.builds(
    Era,
    st.booleans(),
    st.sampled_from([BOOT, "boot-2"]),
    st.just(0),
    st.integers(0, 20).map(lambda n: n * 50_000),
).flatmap(
    lambda era: st.sampled_from([TRUE_MS, WRONG_MS, WRONG_MS + 30_000]).map(
        lambda offset: era._replace(wall_ms=offset + era.mono_ms)
    )
)
RECORDS = st.lists(st.integers(-700_000, 1_100_000), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(ERAS, st.sampled_from([Kind.DATA, Kind.SUMMARY]), RECORDS), max_size=5),
    st.lists(st.tuples(ERAS, ERAS), max_size=5),
    st.integers(0, 10**6),
    st.lists(st.booleans(), min_size=1, max_size=3),
)
def test_any_order_of_arrival_gives_the_same_tables(
    data: list[tuple[Era, Kind, list[int]]], named: list[tuple[Era, Era]], seed: int, sessions: list[bool]
) -> None:
    """Batches of all sorts come in any order, to receivers with the option and without; the last one has it."""
    bodies = []
    for at, (era, kind, moments) in enumerate(data):
        records = [scan(era.offset_ms + ms) for ms in moments]
        if kind is Kind.SUMMARY:
            records = [record | {"values": {"kw": {"mean": 1.0}}} for record in records]
        bodies.append(batch(100 * at + 1, era, records, kind))
    bodies += [begins(1000 + at, era, of=of) for at, (era, of) in enumerate(named)]
    one, other = SqliteSink(Path(":memory:")), SqliteSink(Path(":memory:"))
    taken(one, bodies)
    shuffled = random.Random(seed).sample(bodies, len(bodies))
    for at, correct in enumerate(sessions):
        taken(other, shuffled[at :: len(sessions)], correct=correct, commits=1 + seed % 4)
    taken(other, [])
    for table in TABLES:
        assert rows(one, table) == rows(other, table), table
    one.close()
    other.close()


# -- a real gateway whose clock is wrong -------------------------------------------------------------------

HOURS_WRONG = 5
COMMIT_MS = 500


class Wrong:
    """The environment of a gateway whose wall clock is wrong, until it is `set`.

    The kernel that this runs on cannot be told that its clock is synchronised: a file says so instead.
    """

    def __init__(self, folder: Path) -> None:
        self._clock, self._synced = FakeClock(folder / "offset", f"-{HOURS_WRONG}h"), folder / "synced"
        self._synced.write_text("no")
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "from pathlib import Path\nfrom edgegw import clock\n"
            f"clock.synchronised = lambda: Path({str(self._synced)!r}).read_text() == 'yes'\n"
        )
        self.prefix = (*self._clock.prefix, f"PYTHONPATH={site}:{ROOT}")

    async def set(self, daemon: Process | None) -> None:
        """Have the clock step to the right time, under a running gateway or none, and then be synchronised."""
        self._clock.set("+0")
        if daemon is not None:
            await until(lambda: daemon.said("clock: stepped"), "the step")
        self._synced.write_text("yes")


@needs_mosquitto
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime (Debian's faketime) is not here")
@pytest.mark.parametrize("when", ["while it runs", "while it is stopped"])
async def test_a_gateway_whose_clock_was_wrong_by_hours_is_put_right(tmp_path: Path, when: str) -> None:
    port, file = free_port(), tmp_path / "kept.db"
    asked_ms: dict[int, float] = {}
    wrong = Wrong(tmp_path)

    async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
        asked_ms[plant.counts[unit] + 1] = time.time() * 1000
        return await plant.well(tid, unit, pdu)

    async def more() -> None:
        wanted = plant.counts[1] + 20
        await until(lambda: plant.counts[1] >= wanted, "scans")

    async with field() as plant:
        plant.behave[1] = answer
        meters = {"meter": device(plant.port)}
        made = config(port, meters, journal={"commit_interval": f"{COMMIT_MS}ms"})
        with (
            mosquitto(tmp_path, port),
            receive(port, f"sqlite:///{file}", "--correct-time") as receiver,
        ):
            receiver.wait_said("ready")
            for running in (1, 2):
                with gateway(tmp_path, made, *wrong.prefix) as daemon:
                    await until(lambda daemon=daemon: daemon.said("online"), "the broker")
                    await more()
                    if running == 1:
                        await until(lambda: moments(file), "batches of the wrong time")
                        assert max(moments(file).values()) < min(asked_ms.values()) - 3_600_000
                    if (running, when) == (2, "while it runs"):
                        await wrong.set(daemon)
                        await more()
                    daemon.send(signal.SIGTERM)
                    assert (await asyncio.to_thread(daemon.end))[0] == 0
                if when == "while it is stopped":
                    await wrong.set(None)
            await until(lambda: ends(file) == 2, "the last batches")
            receiver.send(signal.SIGINT)
            assert receiver.end()[0] == 0, receiver.lines
    assert run("--to", f"sqlite:///{file}", "--report")[0] == 0
    found = moments(file)
    assert len(found) > 40
    for n, ts in found.items():  # on a slow machine an answer may wait, but not beyond the next question
        assert asked_ms[n] - COMMIT_MS < ts < asked_ms.get(n + 1, asked_ms[n]) + COMMIT_MS, n
    with closing(sqlite3.connect(file)) as db:
        moved = {delta_ms for (delta_ms,) in db.execute("SELECT DISTINCT delta_ms FROM corrections")}
        references = {
            event for (event,) in db.execute("SELECT event FROM events WHERE body LIKE '%\"synced\"%'")
        }
        others = [ts for (ts,) in db.execute("SELECT ts FROM events")]
    far = {delta_ms for delta_ms in moved if abs(delta_ms) > COMMIT_MS}  # near: set, and not yet said to be
    assert far, moved
    assert all(abs(delta_ms - HOURS_WRONG * 3_600_000) < COMMIT_MS for delta_ms in far), moved
    assert ("clock-step" if when == "while it runs" else "start") in references
    assert min(others) > min(asked_ms.values()) - 10_000, "events are put right, too"


def moments(file: Path) -> dict[int, int]:
    """Return when each count of the field was read, by what a receiver's table says."""
    with closing(sqlite3.connect(file)) as db:
        return dict(db.execute("SELECT value, ts FROM readings WHERE tag = 'n'").fetchall())


def ends(file: Path) -> int:
    """Return how many orderly ends a receiver heard of."""
    with closing(sqlite3.connect(file)) as db:
        return int(db.execute("SELECT count(*) FROM events WHERE event = 'stop'").fetchone()[0])
