"""What is missing is requested from the gateway: late, one request at a time, and not again and again."""

import asyncio
import itertools
import json
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import STREAM, Chain
from field import Field, field
from gateway_rig import Subscriber, config, device, gateway, journal_head, until
from hypothesis import given
from hypothesis import strategies as st
from rig import Process, free_port, mosquitto, needs_mosquitto, publish, receive, run

from edgegw.domain.ranges import Ranges
from edgegw.receiver.dedupe import Key
from edgegw.receiver.requests import ANSWER_S, JOIN_RECORDS, MAX_ANSWER_S, MAX_TRIES, PATIENCE_S, Requests

DATA, CMD = "edgegw/site-7/data", "edgegw/site-7/cmd"
ONCE = ("--once", "--idle", "700ms", "--json")
KEY = Key("site-7", STREAM)

# -- the decisions alone -----------------------------------------------------------------------------------


class Asking:
    """Requests, a clock, and what is missing of one stream."""

    def __init__(self, *missing: tuple[int, int]) -> None:
        self.now_s = 1000.0
        self.missing = Ranges(missing)
        ids = itertools.count(1)
        self.of = Requests(lambda: f"r{next(ids)}")
        self.live()

    def live(self) -> None:
        self.of.came(KEY, DATA, self.now_s)

    def backlog(self, first: int, last: int) -> None:
        self.of.came(KEY, "edgegw/site-7/backfill", self.now_s)
        self.missing.remove(first, last)

    def reply(self, **fields: Any) -> None:
        self.of.reply("edgegw/site-7/reply", json.dumps(fields).encode(), self.now_s)

    def until(self, now_s: float, *, live: bool = True) -> list[tuple[float, int, int]]:
        """Poll each second until then; return what was requested, and after how long."""
        found = []
        while self.now_s < now_s:
            self.now_s += 1.0
            if live:
                self.live()
            for topic, payload in self.of.due(lambda _: list(self.missing), self.now_s):
                assert topic == CMD
                replay = json.loads(payload)["replay"]
                assert replay["stream"] == STREAM
                found.append((self.now_s - 1000.0, replay["from"], replay["to"]))
        return found


def test_a_hole_is_requested_when_nothing_of_the_backlog_has_come_for_a_while() -> None:
    asking = Asking((1, 90))
    assert asking.until(1010) == []
    asking.backlog(1, 10)
    assert asking.until(1010 + PATIENCE_S - 1) == []
    assert asking.until(1010 + PATIENCE_S) == [(10 + PATIENCE_S, 11, 90)]
    asking.reply(id="r1", ok=True, **{"from": 11, "to": 90}, missing=[[11, 20]])
    assert asking.until(1050) == []
    asking.backlog(21, 90)
    assert asking.until(9000) == [], "what the gateway no longer keeps is not requested again"
    assert asking.of.lines == [f"{KEY}: requesting 11-90 again", f"{KEY}: the gateway no longer keeps 11-20"]


def test_one_request_at_a_time_and_holes_that_are_close_are_one() -> None:
    far = 10 * JOIN_RECORDS
    asking = Asking((1, 5), (9, 9), (far, far + 5))
    (first,) = asking.until(1100 - 60)
    assert first[1:] == (1, 9)
    asking.reply(id="r1", ok=True, missing=[])
    asking.backlog(1, 9)
    (second,) = asking.until(asking.now_s + 1)
    assert second[1:] == (far, far + 5), "the next hole need not wait"


def test_without_an_answer_a_request_is_repeated_a_few_times_at_doubling_times_and_given_up() -> None:
    asking = Asking((1, 5))
    times = [at for at, *_ in asking.until(1000 + 10 * MAX_ANSWER_S)]
    assert times == [PATIENCE_S, PATIENCE_S + ANSWER_S, PATIENCE_S + 3 * ANSWER_S]
    assert len(times) == MAX_TRIES
    assert "nothing came of 1-5; it is not requested again" in asking.of.lines[-1]


def test_a_gateway_that_is_away_is_asked_again_when_it_is_back() -> None:
    asking = Asking((1, 5))
    assert len(asking.until(1100, live=False)) == 1
    assert asking.until(9000, live=False) == [], "nothing can be concluded from silence"
    assert len(asking.until(9100)) >= 1


@pytest.mark.parametrize(
    ("error", "again"),
    [
        ("replay: records 1 to 5 are no longer kept", [(5000, 5005)]),
        ("replay.stream: found a; this journal's is b", []),
        ("busy with 8 replays; try again later", [(1, 5)]),
    ],
)
def test_what_an_error_means(error: str, again: list[tuple[int, int]]) -> None:
    asking = Asking((1, 5), (5000, 5005))
    assert [r[1:] for r in asking.until(1021)] == [(1, 5)]
    asking.reply(id="r1", ok=False, error=error)
    assert [r[1:] for r in asking.until(1051)] == again
    assert error in asking.of.lines[1]


ODD = [b"", b"xx", b"[1]", b"[" * 60_000, b'{"id":null,"ok":false}', b'{"id":"other","ok":false,"error":"x"}',
       b'{"id":"r1","ok":true,"missing":[[0,5]]}', b'{"id":"r1"}', b'{"id":["r1"],"ok":true}']  # fmt: skip


@pytest.mark.parametrize("payload", ODD, ids=lambda payload: f"{payload[:40]}")
def test_answers_to_others_and_odd_ones_change_nothing(payload: bytes) -> None:
    asking = Asking((1, 5))
    asking.until(1021)
    asking.of.reply("edgegw/site-7/reply", payload, asking.now_s)
    assert len(asking.of.lines) == 1
    assert asking.until(1000 + PATIENCE_S + ANSWER_S)[0][1:] == (1, 5)


def test_at_the_end_each_hole_is_requested_once_and_at_once() -> None:
    asking = Asking((1, 5), (5000, 5005))
    commands = []
    while due := asking.of.due(lambda _: list(asking.missing), asking.now_s, at_once=True):
        commands += [json.loads(payload)["replay"]["from"] for _, payload in due]
    assert commands == [1, 5000]


@given(st.lists(st.tuples(st.sampled_from(["wait", "live", "backlog", "gone", "busy"]), st.integers(1, 60))))
def test_never_two_requests_open_and_no_storm(steps: list[tuple[str, int]]) -> None:
    asking, requests = Asking((1, 60)), 0
    for what, n in steps:
        requests += len(asking.until(asking.now_s + n, live=what == "live"))
        assert len(asking.of._asked) <= 1
        if what == "backlog":
            asking.backlog(n, n)
        elif what == "gone":
            asking.reply(id=f"r{requests}", ok=True, missing=[[n, n]])
        elif what == "busy":
            asking.reply(id=f"r{requests}", ok=False, error="busy")
    assert requests <= (asking.now_s - 1000.0) / min(PATIENCE_S, ANSWER_S) + 1 + 60


# -- on the real parts -------------------------------------------------------------------------------------


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    number = free_port()
    with mosquitto(tmp_path, number):
        yield number


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


def hasty(port: int, to: str, *options: str) -> Process:
    """Start a receiver that asks after half a second."""
    program = (
        "from edgegw.receiver import requests\nrequests.PATIENCE_S, requests.POLL_S = 0.5, 0.1\n"
        "from edgegw.cli import main\nmain()"
    )
    url = f"mqtt://127.0.0.1:{port}"
    return Process(sys.executable, "-c", program, "receive", "--url", url, "--to", to, *options)


def covered(file: Path) -> Ranges:
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return Ranges((s, s + n - 1) for s, n in connection.execute("SELECT seq, count FROM batches"))
    finally:
        connection.close()


@needs_mosquitto
async def test_p2_a_receiver_that_starts_after_the_gateway_gets_what_it_missed(
    tmp_path: Path, port: int, meter: Field
) -> None:
    with Subscriber(port) as seen, gateway(tmp_path, config(port, {"meter1": device(meter.port)})) as run:
        await until(lambda: len(seen.batches()) > 20, "records before there is a receiver")
        before = journal_head(tmp_path)
        with (
            Subscriber(port, CMD) as commands,
            hasty(port, f"sqlite:///{tmp_path}/kept.db", "--json") as late,
        ):
            await until(lambda: (tmp_path / "kept.db").exists() and late.said("ready"), "the receiver")
            await until(lambda: covered(tmp_path / "kept.db").covers(1, before), "all from the first seq")
            run.send(signal.SIGTERM)
            await asyncio.to_thread(run.end)
            late.send(signal.SIGTERM)
            code, out = await asyncio.to_thread(late.end)
            assert len(commands.messages) == 1
    assert (code, json.loads(out)["ok"]) == (0, True), out


@needs_mosquitto
async def test_once_asks_before_it_ends_and_what_is_no_longer_kept_is_asked_once(
    tmp_path: Path, port: int, meter: Field
) -> None:
    """First the gateway keeps all, then nothing; a receiver of its own each time."""
    made = config(port, {"meter1": device(meter.port)})
    with Subscriber(port) as seen, gateway(tmp_path, made) as run:
        await until(lambda: len(seen.batches()) > 20, "records before there is a receiver")
        run.send(signal.SIGTERM)
        await asyncio.to_thread(run.end)
    made["device"]["meter1"]["every"] = "60s"
    once = ("--once", "--idle", "3s", "--json", "--no-ack")
    for name, keep, expected in (("one.db", "24h", 0), ("two.db", "0s", 1)):
        with Subscriber(port, CMD) as commands, receive(port, f"sqlite:///{tmp_path}/{name}", *once) as late:
            await asyncio.to_thread(late.wait_said, "ready")
            with gateway(tmp_path, made | {"journal": {"keep": keep, "commit_interval": "100ms"}}) as run:
                if keep == "0s":
                    await until(lambda: run.said("online"), "the link")
                    code, _, _ = await prune(tmp_path)
                    assert code == 0
                code, out = await asyncio.to_thread(late.end)
                run.send(signal.SIGTERM)
                await asyncio.to_thread(run.end)
            assert (code, json.loads(out)["ok"]) == (expected, not expected), (out, late.lines)
            assert len(commands.messages) == 1
    assert late.said("no longer keep") or late.said("no longer kept")


async def prune(folder: Path) -> tuple[int, str, str]:
    command = (sys.executable, "-m", "edgegw", "journal", "prune", "-c", str(folder / "config.toml"))
    with Process(*command) as process:
        code, out = await asyncio.to_thread(process.end)
        return code, out, ""


def holes(port: int, to: str, *options: str, count: int = 3) -> tuple[int, dict[str, Any], list[str], int]:
    """Give a receiver batches of two records, the first of them missing; return what it makes of them."""
    chain = Chain()
    chain.data(2)
    with Subscriber(port, CMD) as commands, receive(port, to, *ONCE, *options) as process:
        process.wait_said("ready")
        publish(port, [(DATA, chain.data(2)) for _ in range(count)])
        code, out = process.end()
        report = out if to != "-" else "\n".join(line for line in process.lines if line[:1] in "{} ")
        return code, json.loads(report)["streams"][0], process.lines, len(commands.messages)


@needs_mosquitto
def test_no_replay_asks_for_nothing(tmp_path: Path, port: int) -> None:
    code, stream, _, asked = holes(port, f"sqlite:///{tmp_path}/kept.db", "--no-replay")
    assert (code, stream["missing"], asked) == (1, [[1, 2]], 0)


@needs_mosquitto
def test_without_an_answer_once_ends_all_the_same(tmp_path: Path, port: int) -> None:
    code, stream, lines, asked = holes(port, f"sqlite:///{tmp_path}/kept.db")
    assert (code, stream["missing"], asked) == (1, [[1, 2]], 1)
    assert any("nothing came of 1-2" in line for line in lines)


@needs_mosquitto
def test_from_here_takes_what_comes_as_the_beginning_and_the_database_remembers_it(
    tmp_path: Path, port: int
) -> None:
    to = f"sqlite:///{tmp_path}/kept.db"
    code, stream, _, asked = holes(port, to, "--from-here")
    assert (code, stream["missing"], stream["begins"], asked) == (0, [], 3, 0)
    code, text, _ = run("--to", to, "--report")
    assert code == 0
    assert "begins with 3 (--from-here)" in text
    chain = Chain()
    for _ in range(5):
        lost = chain.data(2)
    with receive(port, to, *ONCE, "--from-here", "--no-replay") as process:
        process.wait_said("ready")
        publish(port, [(DATA, chain.data(2)), (DATA, lost)])
        code, out = process.end()
    stream = json.loads(out)["streams"][0]
    assert (code, stream["missing"], stream["begins"]) == (0, [], 3), "a beginning stays"
    chain.data(2)
    with receive(port, to, *ONCE, "--from-here", "--no-replay") as process:
        process.wait_said("ready")
        publish(port, [(DATA, chain.data(2))])
        code, out = process.end()
    assert (code, json.loads(out)["streams"][0]["missing"]) == (1, [[13, 14]]), (
        "what is lost later is missing"
    )


@needs_mosquitto
def test_from_here_also_puts_right_a_database_whose_beginning_never_came(tmp_path: Path, port: int) -> None:
    to = f"sqlite:///{tmp_path}/kept.db"
    assert holes(port, to, "--no-replay")[0] == 1
    with receive(port, to, *ONCE, "--from-here") as process:
        code, out = process.end()
    assert (code, json.loads(out)["streams"][0]["begins"]) == (0, 3)
    assert run("--to", to, "--report")[0] == 0


@needs_mosquitto
def test_standard_output_has_no_memory_and_begins_with_what_comes(port: int) -> None:
    code, stream, _, asked = holes(port, "-")
    assert (code, stream["begins"], stream["missing"], asked) == (0, 3, [], 0)


@needs_mosquitto
def test_a_broker_that_lets_nobody_command_is_said_once_and_asked_no_more(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "acl").write_text(
        "topic readwrite edgegw/site-7/data\ntopic readwrite edgegw/site-7/ack\ntopic read #\n"
    )
    with mosquitto(tmp_path, port, f"allow_anonymous true\nacl_file {tmp_path}/acl"):
        code, stream, lines, asked = holes(port, f"sqlite:///{tmp_path}/kept.db")
    assert (code, stream["missing"], asked) == (1, [[1, 2]], 0)
    assert sum("does not let us publish commands: Not authorized" in line for line in lines) == 1


@needs_mosquitto
def test_a_gateway_that_had_another_name_on_the_same_journal_is_told_and_complete(
    tmp_path: Path, port: int
) -> None:
    chain = Chain(gateway="home")
    messages = [("edgegw/home/data", chain.data(3)), ("edgegw/home/data", chain.data(4))]
    chain.gateway = "site-7"
    messages += [(DATA, chain.data(2))]
    to = f"sqlite:///{tmp_path}/kept.db"
    with Subscriber(port, CMD) as commands, receive(port, to, *ONCE) as process:
        process.wait_said("ready")
        publish(port, messages)
        code, out = process.end()
        assert not commands.messages
    report = {stream["gateway"]: stream for stream in json.loads(out)["streams"]}
    assert (code, report["site-7"]["missing"], report["site-7"]["elsewhere"]) == (0, [], {"home": [[1, 7]]})
    assert "received from gateway home, of the same stream: 1-7" in run("--to", to, "--report")[1]
