"""The receiver outlives its database: nothing unkept is confirmed, and afterwards everything is there once."""

import json
import resource
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chains import Chain
from postgres_rig import Postgres
from rig import Process, free_port, mosquitto, needs_mosquitto, publish, receive, run, until
from test_receiver_poison import highest_kib, rows

pytestmark = needs_mosquitto
DATA = "edgegw/site-7/data"
HIGH_KIB = 150 * 1024


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    number = free_port()
    with mosquitto(tmp_path, number):
        yield number


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A server that is not running yet."""
    with tempfile.TemporaryDirectory() as name:
        made = Postgres(Path(name))
        yield made
        made.stop("immediate")


def count(url: str, table: str = "batches") -> int:
    import psycopg

    with psycopg.connect(url) as connection:
        row = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
        assert row is not None
        return int(row[0])


def lines(process: Process, text: str) -> int:
    return sum(text in line for line in process.lines)


def finished(process: Process) -> dict[str, object]:
    """End a receiver that was started with --json; return the report's only stream."""
    process.send(signal.SIGTERM)
    code, out = process.end()
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True), out
    (stream,) = report["streams"]
    return dict(stream)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_p2_postgresql_stops_in_the_middle_comes_back_and_has_each_record_once(
    mode: str, port: int, server: Postgres
) -> None:
    server.start()
    chain = Chain()
    with receive(port, server.url, "--json") as process:
        process.wait_said("ready")
        publish(port, [(DATA, chain.data(20, tags=20)) for _ in range(300)])
        until(lambda: count(server.url) > 0, "the first batches")
        server.stop(mode)
        publish(port, [(DATA, chain.data(20, tags=20)) for _ in range(300)])
        process.wait_said("database lost: postgresql: ")
        server.start()
        process.wait_said("database back after")
        publish(port, [(DATA, chain.data(20, tags=20)) for _ in range(100)])
        until(lambda: count(server.url) == 700, "all batches")
        assert highest_kib(process) < HIGH_KIB
        stream = finished(process)
    assert (stream["batches"], stream["readings"], stream["head"]) == (700, 700 * 400, 700 * 20)
    assert (lines(process, "database lost"), lines(process, "database back")) == (1, 1)
    assert lines(process, "broker lost") == 0


def test_p2_a_connection_that_the_server_ends_is_made_anew(port: int, server: Postgres) -> None:
    import psycopg

    server.start()
    chain = Chain()
    with receive(port, server.url, "--json") as process:
        process.wait_said("ready")
        for _ in range(3):
            publish(port, [(DATA, chain.data(2))])
            until(lambda: lines(process, "database back") == lines(process, "database lost"), "the return")
            with psycopg.connect(server.url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                    " AND backend_type = 'client backend'"
                )
        publish(port, [(DATA, chain.data(2))])
        until(lambda: count(server.url) == 4, "all batches")
        assert finished(process)["batches"] == 4


def test_a_server_that_is_not_there_yet_is_waited_for(port: int, server: Postgres) -> None:
    chain = Chain()
    with receive(port, server.url, "--json") as process:
        process.wait_said("no database yet: postgresql: connection is bad")
        server.start()
        process.wait_said("ready")
        publish(port, [(DATA, chain.data(2))])
        until(lambda: count(server.url) == 1, "the batch")
        assert finished(process)["batches"] == 1
    assert lines(process, "no database yet") == 1


@pytest.mark.parametrize("ever", [False, True], ids=["never there", "gone"])
def test_it_stops_at_once_while_there_is_no_database(ever: bool, port: int, server: Postgres) -> None:
    server.start()
    if not ever:
        server.stop("fast")
    with receive(port, server.url) as process:
        if ever:
            process.wait_said("ready")
            server.stop("immediate")
            publish(port, [(DATA, Chain().data(2))])
        process.wait_said("database lost" if ever else "no database yet")
        process.send(signal.SIGTERM)
        assert process.end() == (0, "")
    server.start()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("/postgres?", "/nowhere?"), 'database "nowhere" does not exist'),
        (("user=edgegw", "user=nobody"), 'role "nobody" does not exist'),
    ],
    ids=["database", "user"],
)
def test_what_only_a_person_can_mend_ends_the_first_start(
    wrong: tuple[str, str], said: str, port: int, server: Postgres
) -> None:
    server.start()
    code, _, errors = run("--url", f"mqtt://127.0.0.1:{port}", "--to", server.url.replace(*wrong))
    assert (code, said in errors, "\n" in errors) == (1, True, False), errors


def test_an_import_beside_a_receiver_does_not_end_it(port: int, tmp_path: Path) -> None:
    """Another writer has put in what comes here next."""
    from edgegw.receiver.sqlite import SqliteSink
    from edgegw.receiver.wire import read

    kept, chain = tmp_path / "kept.db", Chain()
    bodies = [chain.data(2) for _ in range(3)]
    with receive(port, f"sqlite:///{kept}", "--json") as process:
        process.wait_said("ready")
        publish(port, [(DATA, bodies[0])])
        until(lambda: rows(kept, "SELECT count(*) FROM batches") == [(1,)], "the first batch")
        other = SqliteSink(kept)
        other.add(read(bodies[1]), 0)
        other.commit()
        other.close()
        publish(port, [(DATA, bodies[1]), (DATA, bodies[2])])
        until(lambda: rows(kept, "SELECT count(*) FROM batches") == [(3,)], "the last batch")
        assert finished(process)["batches"] == 3


def test_p2_a_locked_file_is_waited_for(port: int, tmp_path: Path) -> None:
    kept, chain = tmp_path / "kept.db", Chain()
    program = "from edgegw.receiver import sqlite\nsqlite.LOCKED_S = 0.2\nfrom edgegw.cli import main\nmain()"
    command = ("receive", "--url", f"mqtt://127.0.0.1:{port}", "--to", f"sqlite:///{kept}", "--json")
    with Process(sys.executable, "-c", program, *command) as process:
        process.wait_said("ready")
        other = sqlite3.connect(kept, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        publish(port, [(DATA, chain.data(2)) for _ in range(50)])
        process.wait_said("database lost: ")
        assert other.execute("SELECT count(*) FROM batches").fetchone() == (0,)
        other.execute("ROLLBACK")
        other.close()
        process.wait_said("database back after")
        until(lambda: rows(kept, "SELECT count(*) FROM batches") == [(50,)], "all batches")
        assert finished(process)["batches"] == 50
    assert process.said("database is locked")


def test_p2_a_file_that_may_not_grow_is_waited_for(port: int, tmp_path: Path) -> None:
    """A full disk, for one process: the kernel refuses to let any file of it grow."""
    kept, chain = tmp_path / "kept.db", Chain()
    with receive(port, f"sqlite:///{kept}", "--json") as process:
        process.wait_said("ready")
        publish(port, [(DATA, chain.data(2))])
        until(lambda: rows(kept, "SELECT count(*) FROM batches") == [(1,)], "the first batch")
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64 * 1024, unlimited[1]))
        publish(port, [(DATA, chain.data(20, tags=20)) for _ in range(100)])
        process.wait_said("database lost: ")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        process.wait_said("database back after")
        until(lambda: rows(kept, "SELECT count(*) FROM batches") == [(101,)], "all batches")
        assert finished(process)["batches"] == 101
