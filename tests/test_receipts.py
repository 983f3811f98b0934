"""Receipts end to end: what they settle, what is sent again without them, and that nothing is lost or piled up."""

import asyncio
import itertools
import json
import signal
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chains import STREAM, Chain
from field import Field, field
from gateway_rig import Subscriber, config, device, journal_head, toml, union, until
from hypothesis import given
from hypothesis import strategies as st
from journal_rig import scan
from paho.mqtt import client as mqtt
from rig import DEADLINE_S, Process, free_port, mosquitto, needs_mosquitto, publish, receive

from edgegw.config.schema import Journal as JournalConfig
from edgegw.config.units import Duration
from edgegw.domain.ranges import Ranges
from edgegw.journal.journal import Journal
from edgegw.receiver import receipts as owed
from edgegw.receiver.dedupe import Key
from edgegw.uplink import receipts
from edgegw.uplink.receipts import ASIDE_S, MAX_RESENDS, Receipts

ONCE = ("--once", "--idle", "700ms", "--json")
ACK, DATA = "edgegw/site-7/ack", "edgegw/site-7/data"

# -- what a receipt says -----------------------------------------------------------------------------------

READ = [
    ('{"stream":"s","ranges":[[1,10]]}', [(1, 10)]),
    ('{"stream":"s","ranges":[[5,6],[1,2]],"new":1}', [(1, 2), (5, 6)]),
    ('{"stream":"s","ranges":[[1,9223372036854775807]]}', [(1, 100)]),
    ('{"stream":"s","ranges":[[101,200]]}', []),
    ('{"stream":"s","ranges":[]}', []),
]
ODD = [
    b"", b"xx", b"[" * 60_000, b"{}", b"\xff", b'{"stream":"s"}', b'{"stream":"other","ranges":[[1,2]]}',
    b'{"stream":"s","ranges":[[0,2]]}', b'{"stream":"s","ranges":[[2,1]]}', b'{"stream":"s","ranges":[[1]]}',
    b'{"stream":"s","ranges":[[true,2]]}', b'{"stream":"s","ranges":[["1",2]]}', b'{"stream":"s","ranges":[[1.5,2]]}',
    b'{"stream":"s","ranges":[[1,9223372036854775808]]}', b'{"stream":1,"ranges":[]}', b'{"stream":"s","ranges":7}',
    b'{"stream":"s","ranges":[' + b",".join([b"[1,1]"] * 5000) + b"]}",
]  # fmt: skip


@pytest.mark.parametrize(("payload", "confirmed"), READ)
def test_a_receipt_is_read_up_to_the_head(payload: str, confirmed: list[tuple[int, int]]) -> None:
    assert list(receipts.read(payload.encode(), "s", 100)) == confirmed


@pytest.mark.parametrize("payload", ODD, ids=lambda payload: f"{payload[:40]}")
def test_an_odd_receipt_confirms_nothing_and_says_why_in_few_words(payload: bytes) -> None:
    with pytest.raises(receipts.ReceiptError) as error:
        receipts.read(payload, "s", 100)
    assert 0 < len(str(error.value)) < 300


# -- what is overdue ---------------------------------------------------------------------------------------


class Wait:
    """Receipts, a clock, and batches of ten records each."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.of = Receipts("s", 0.0)

    def taken(self, *batches: int, live: bool = True) -> None:
        for n in batches:
            self.of.taken(10 * n + 1, 10 * n + 10, 1000, self.now_s, live=live)

    def confirmed(self, *batches: int) -> None:
        self.of.confirmed(Ranges((10 * n + 1, 10 * n + 10) for n in batches), self.now_s)

    def at(self, now_s: float) -> Any:
        """Look once a second until then; return what was overdue first."""
        while self.now_s < now_s:
            self.now_s += 1.0
            if (overdue := self.of.due(Ranges(), self.now_s)) is not None:
                if overdue.aside:
                    return "aside", list(overdue.aside)
                return "probe" if overdue.probe else list(overdue.ranges)
        return None


def test_what_a_later_receipt_passes_by_was_lost_and_is_sent_again() -> None:
    wait = Wait()
    wait.taken(0, 1, 2)
    assert wait.at(5) is None
    wait.confirmed(2)
    assert wait.at(31) is None, "the third shows nothing about the first two, which may come as late"
    wait.taken(3)
    wait.confirmed(3)
    assert wait.at(200) == [(1, 20)]
    assert wait.now_s <= 62
    assert not wait.of.awaited


def test_a_receiver_that_is_only_slow_gets_nothing_twice() -> None:
    wait = Wait()
    for n in range(300):  # a batch a second, confirmed 100 s later
        wait.taken(n)
        if n >= 100:
            wait.confirmed(n - 100)
        if n < 25 or n > 100:
            assert wait.at(wait.now_s + 1) is None
        else:
            assert wait.at(wait.now_s + 1) in (None, "probe")


def test_while_no_receipt_comes_there_is_a_probe_now_and_then_and_nothing_else() -> None:
    wait = Wait()
    probes = []
    for n in range(4000):
        wait.taken(n)
        if (overdue := wait.at(wait.now_s + 1)) is not None:
            assert overdue == "probe"
            probes.append(wait.now_s)
    waits = [b - a for a, b in itertools.pairwise([0.0, *probes])]
    assert waits[:5] == [30, 60, 120, 240, 480]
    assert set(waits[5:]) == {600}
    assert len(list(wait.of.awaited)) == 1, "what is awaited is ranges, however many batches"
    wait.confirmed(0)
    assert wait.of.silent_since_s is None
    assert wait.at(wait.now_s + 29) is None, "a receiver that is back has its broker's queue to take first"
    assert wait.at(wait.now_s + 1) == "probe", "the normal pace"


def test_what_is_never_confirmed_is_sent_again_a_few_times_and_then_tried_once_an_hour() -> None:
    wait = Wait()
    wait.taken(0)
    found: list[tuple[float, Any]] = []
    for n in range(1, 16000):
        wait.taken(n)
        wait.confirmed(n)
        if (overdue := wait.at(wait.now_s + 1)) is not None:
            found.append((wait.now_s, overdue))
            wait.taken(0)
        assert wait.of.awaited.covers(1, 10), "it stays awaited: a new connection does not send it again"
    resent, (_, aside), *tries = found[:MAX_RESENDS], found[MAX_RESENDS], *found[MAX_RESENDS + 1 :]
    assert [overdue for _, overdue in resent] == [[(1, 10)]] * MAX_RESENDS
    waits = [b - a for a, b in itertools.pairwise([at for at, _ in found[: MAX_RESENDS + 1]])]
    assert waits == sorted(waits)
    assert aside == ("aside", [(1, 10)])
    assert {overdue for _, overdue in tries} == {"probe"}
    assert [b - a for a, b in itertools.pairwise([at for at, _ in tries])] == [ASIDE_S] * (len(tries) - 1)
    assert len(tries) >= 3


def test_a_receipt_for_one_that_was_held_aside_frees_the_others() -> None:
    wait = Wait()
    wait.taken(0, 1)
    n = 1
    while (overdue := wait.at(wait.now_s + 1)) is None or overdue[0] != "aside":
        if overdue is not None:
            wait.taken(0, 1)
        n += 1
        wait.taken(n)
        wait.confirmed(n)
    wait.taken(0)
    assert wait.at(wait.now_s + 100) is None, "it is held aside"
    wait.confirmed(0)
    assert wait.at(wait.now_s + 1) == [(11, 20)]
    assert not wait.of.awaited


def test_the_backlog_waits_when_enough_of_it_has_no_receipt() -> None:
    wait = Wait()
    wait.taken(*range(2000), live=True)
    assert not wait.of.full, "live batches always go"
    wait.taken(*range(2000, 2000 + receipts.WITHOUT_BATCHES), live=False)
    assert wait.of.full
    wait.confirmed(2500)
    assert not wait.of.full
    wait.of.taken(10**6, 10**6 + 5, receipts.WITHOUT_BYTES, 0.0, live=False)
    assert wait.of.full


@given(
    st.lists(
        st.tuples(st.sampled_from(["taken", "confirmed", "settled", "look"]), st.integers(0, 20)), max_size=80
    )
)
def test_nothing_is_forgotten_what_is_taken_is_awaited_until_it_is_confirmed_or_sent_again(
    steps: list[tuple[str, int]],
) -> None:
    of, now_s, open_ = Receipts("s", 0.0), 0.0, set()
    for what, n in steps:
        seqs = 10 * n + 1, 10 * n + 10
        if what == "taken":
            of.taken(*seqs, 100, now_s, live=n % 2 == 0)
            open_.add(n)
        elif what == "confirmed":
            of.confirmed(Ranges([seqs]), now_s)
            open_.discard(n)
        else:
            now_s += n
            settled = Ranges([seqs] if what == "settled" else ())
            overdue = of.due(settled, now_s)
            if what == "settled":
                open_.discard(n)
            if overdue is not None and not overdue.probe:
                open_ = {n for n in open_ if not overdue.ranges.covers(10 * n + 1, 10 * n + 10)}
        assert of.awaited == Ranges((10 * n + 1, 10 * n + 10) for n in open_)


# -- what is owed ------------------------------------------------------------------------------------------


def told(due: list[tuple[str, bytes]]) -> list[tuple[str, str, list[list[int]]]]:
    return [(topic, said["stream"], said["ranges"]) for topic, body in due for said in [json.loads(body)]]


def test_a_receipt_goes_to_the_gateways_own_topic_for_each_stream_that_was_touched_and_not_too_often() -> (
    None
):
    due = owed.Receipts()
    held = {Key("a", "s"): Ranges([(1, 9), (20, 30)]), Key("b", "t"): Ranges([(1, 2)])}
    due.came(Key("a", "s"), "plant/a/backfill", 20, 30)
    assert told(due.due(held.__getitem__, 1.0)) == [("plant/a/ack", "s", [[1, 9], [20, 30]])]
    due.came(Key("b", "t"), "b/data", 1, 2)
    assert not due.due(held.__getitem__, 1.1)
    assert told(due.due(held.__getitem__, 1.3)) == [("b/ack", "t", [[1, 2]])]
    assert not due.due(held.__getitem__, 9.0)
    due.reconnected()
    assert len(due.due(held.__getitem__, 9.0)) == 2, "once more after a loss"


def test_of_very_many_islands_those_are_told_that_what_came_belongs_to() -> None:
    due, islands = owed.Receipts(), Ranges((10 * n, 10 * n + 4) for n in range(1, 5000))
    key = Key("a", "s")
    due.came(key, "a/data", 12, 13)
    due.came(key, "a/data", 5000, 5001)
    assert told(due.due(lambda _: islands, 1.0)) == [("a/ack", "s", [[10, 14], [5000, 5004]])]
    due.came(key, "a/data", 1, 10**6)
    parts = told(due.due(lambda _: islands, 2.0))
    assert all(len(ranges) <= owed.MOST_RANGES for _, _, ranges in parts)
    assert sum(len(ranges) for _, _, ranges in parts) == 4999


# -- what a receipt settles --------------------------------------------------------------------------------


@asynccontextmanager
async def journal_of_tens(path: Path) -> AsyncIterator[Journal]:
    """Run a journal of the batches 1, 2-11, 12-21, 22-31."""
    journal = Journal(path, "site-7", JournalConfig(commit_interval=Duration(50)), 16 * 1024)
    journal.start()
    try:
        await asyncio.wait_for(journal.flush(), DEADLINE_S)
        for batch in range(3):
            for n in range(10):
                journal.append(scan(10 * batch + n))
            await asyncio.wait_for(journal.flush(), DEADLINE_S)
        assert [b.seq for b, _ in (await journal.read(1, 99, 99)).batches] == [1, 2, 12, 22]
        yield journal
    finally:
        assert await journal.close()


SETTLES = [
    ([(1, 31)], [(1, 31)], 0),
    ([(1, 10**9)], [(1, 31)], 0),
    ([(1, 20)], [(1, 11)], 2),
    ([(3, 31)], [(12, 31)], 2),
    ([(1, 1), (12, 21)], [(1, 1), (12, 21)], 2),
    ([(2, 6), (8, 11)], [], 4),
    ([(13, 20)], [], 4),
    ([(32, 99)], [], 4),
    ([], [], 4),
]


@pytest.mark.parametrize(("ranges", "settled", "pending"), SETTLES)
async def test_p2_a_receipt_settles_exactly_the_batches_wholly_within_its_ranges(
    tmp_path: Path, ranges: list[tuple[int, int]], settled: list[tuple[int, int]], pending: int
) -> None:
    async with journal_of_tens(tmp_path / "journal.db") as journal:
        assert not await journal.acknowledge_ranges("another", [(1, 31)])
        for _ in range(2):  # once more changes nothing
            await journal.acknowledge_ranges(journal.stream, ranges)
            assert list(journal.settled()) == settled
            assert (await journal.condition()).pending_batches == pending


async def test_what_is_kept_is_found_in_whole_batches(tmp_path: Path) -> None:
    async with journal_of_tens(tmp_path / "journal.db") as journal:
        assert list(await journal.kept(journal.stream, 5, 12)) == [(2, 21)]
        assert list(await journal.kept(journal.stream, 12, 12)) == [(12, 21)]
        assert list(await journal.kept(journal.stream, 32, 40)) == []
        assert list(await journal.kept("another", 1, 31)) == []


# -- on the real parts -------------------------------------------------------------------------------------


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


HASTY = """
import sys
from edgegw.cli import main
from edgegw.uplink import confirmation, receipts
receipts.FIRST_S, confirmation.LOOK_S, receipts.WITHOUT_BATCHES = 1.0, 0.1, 20
main()
"""
"""The gateway, waiting for receipts a second instead of thirty."""


def hasty(folder: Path, broker: int, meter: int, status: int, **uplink: Any) -> Process:
    """Start a gateway that wants receipts and does not wait for long."""
    made = config(
        broker,
        {"meter1": device(meter, every="5ms")},
        uplink={"acknowledge": "receiver", "max_message": "1KiB"} | uplink,
        status={"http": f"127.0.0.1:{status}"},
        journal={"keep": "0s"},
    )
    path = folder / "config.toml"
    path.write_text(toml(made))
    return Process(sys.executable, "-c", HASTY, "run", "-c", str(path))


def journal_status(port: int) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=5) as answer:
            return dict(json.load(answer)["journal"])
    except urllib.error.URLError:
        return {"acked": -1, "head": -1}  # it is only starting


async def status_of(port: int) -> dict[str, Any]:
    return await asyncio.to_thread(journal_status, port)


async def acked_to(port: int, seq: int) -> None:
    """Wait until everything up to `seq` is settled."""
    end_s = time.monotonic() + DEADLINE_S
    while (figures := await status_of(port))["acked"] < seq:
        assert time.monotonic() < end_s, f"not in {DEADLINE_S} s: acked {seq}; {figures}"
        await asyncio.sleep(0.05)


def covered(file: Path) -> Ranges:
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return Ranges((s, s + n - 1) for s, n in connection.execute("SELECT seq, count FROM batches"))
    finally:
        connection.close()


async def ended(process: Process, number: signal.Signals = signal.SIGTERM) -> None:
    process.send(number)
    await asyncio.to_thread(process.end)


@needs_mosquitto
async def test_p2_a_broker_that_dies_between_puback_and_delivery_loses_nothing(
    tmp_path: Path, meter: Field
) -> None:
    """The receiver is away, the broker queues for it without persistence, and is killed with its queue."""
    port, status, kept = free_port(), free_port(), tmp_path / "kept.db"
    to = f"sqlite:///{kept}"
    with hasty(tmp_path, port, meter.port, status) as run:
        with mosquitto(tmp_path, port) as broker:
            with receive(port, to) as receiver:
                await asyncio.to_thread(receiver.wait_said, "ready")
                await acked_to(status, 50)
                await ended(receiver)
            before = (await status_of(status))["acked"]
            with Subscriber(port) as seen:
                await until(lambda: len(seen.batches("data")) > 5, "batches that the broker has")
                taken = max(message.batch.seq for message in seen.batches("data"))
            assert (await status_of(status))["acked"] < taken, "a PUBACK settles nothing"
            await ended(broker, signal.SIGKILL)
        with mosquitto(tmp_path, port), receive(port, to) as receiver:
            await acked_to(status, taken)
            assert run.said("were lost between broker and receiver") or run.said("no receipt comes")
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0, run.lines
            await until(lambda: covered(kept).prefix() >= journal_head(tmp_path), "every seq")
            await ended(receiver)
    assert 50 <= before < taken


@needs_mosquitto
async def test_p2_p4_while_the_receiver_is_away_nothing_is_let_go_and_little_is_sent_again(
    tmp_path: Path, meter: Field
) -> None:
    port, status, kept = free_port(), free_port(), tmp_path / "kept.db"
    with hasty(tmp_path, port, meter.port, status) as run:
        await until(lambda: meter.counts[1] > 900, "a backlog", 40)
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            await until(lambda: run.said("no receipt comes"), "the silence to be said")
            await until(lambda: len(seen.batches("data")) > 40, "live batches all the same")
            late = seen.batches("backfill")
            firsts = {message.batch.seq for message in late}
            assert len(firsts) < 20 + 32 + 10, "the backlog's first sending is held"
            assert len(late) < len(firsts) + 3 * 32, "probes are a window's worth"
            figures = await status_of(status)
            assert figures["acked"] == 0
            publish(port, [(ACK, b"xx"), (ACK, b'{"stream":"other","ranges":[[1,9]]}')])
            await until(lambda: run.said("such messages are passed over"), "odd receipts")
            assert sum("passed over" in line for line in run.lines) == 1
            assert (await status_of(status))["acked"] == 0
            with receive(port, f"sqlite:///{kept}") as receiver:
                await acked_to(status, figures["head"])
                await ended(receiver)
            assert run.said("receipts come again")
            assert union(seen.batches()).chain.breaks == []
        assert covered(kept).covers(1, figures["head"])


@needs_mosquitto
async def test_a_retained_receipt_counts_for_nothing(tmp_path: Path, meter: Field) -> None:
    port, status = free_port(), free_port()
    with mosquitto(tmp_path, port), Subscriber(port) as seen:
        with hasty(tmp_path, port, meter.port, status) as run:
            await until(lambda: seen.batches("data"), "batches")
            stream = seen.batches("data")[0].batch.stream
            retain(port, json.dumps({"stream": stream, "ranges": [[1, 10**9]]}).encode())
            await acked_to(status, 1)  # to one who was subscribed when it came it is a message like any other
            await ended(run)
        with hasty(tmp_path, port, meter.port, status) as run:
            count = len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > count + 5, "batches of the next life")
            figures = await status_of(status)
            assert figures["head"] > figures["acked"] + 5
            await ended(run)


def retain(port: int, payload: bytes) -> None:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", port)
    client.loop_start()
    client.publish(ACK, payload, qos=1, retain=True).wait_for_publish(DEADLINE_S)
    client.disconnect()
    client.loop_stop()


def acks(port: int, to: str, *bodies: bytes, options: tuple[str, ...] = ()) -> list[Any]:
    """Give a receiver batches; return what it says on TOPIC/ack."""
    with Subscriber(port, ACK) as seen:
        with receive(port, to, *ONCE, *options) as process:
            process.wait_said("ready")
            publish(port, [(DATA, body) for body in bodies])
            process.end()
        return [json.loads(message.body) for message in seen.messages]


@needs_mosquitto
def test_the_receiver_confirms_what_it_holds_also_when_it_comes_again(tmp_path: Path) -> None:
    port, chain, to = free_port(), Chain(), f"sqlite:///{tmp_path}/kept.db"
    first, second, third = chain.data(3), chain.data(4), chain.data(2)
    with mosquitto(tmp_path, port):
        assert acks(port, to, first, third)[-1] == {"stream": STREAM, "ranges": [[1, 3], [8, 9]]}
        assert acks(port, to, third) == [{"stream": STREAM, "ranges": [[1, 3], [8, 9]]}]
        assert acks(port, to, second)[-1] == {"stream": STREAM, "ranges": [[1, 9]]}
        assert acks(port, to, second, options=("--no-ack",)) == []
        assert acks(port, "-", second) == [], "what is only printed is not kept"


@needs_mosquitto
def test_p2_nothing_is_confirmed_that_is_not_committed(tmp_path: Path) -> None:
    """Killed at any moment: whatever a receipt named is in the file."""
    port, chain, kept = free_port(), Chain(), tmp_path / "kept.db"
    bodies = [chain.data(5, tags=20) for _ in range(600)]
    with mosquitto(tmp_path, port), Subscriber(port, ACK) as seen:
        for part in (bodies[:200], bodies[200:400], bodies[400:]):
            with receive(port, f"sqlite:///{kept}") as process:
                process.wait_said("ready")
                count = len(seen.messages)
                publish(port, [(DATA, body) for body in part])
                wait = asyncio.run(until_true(lambda count=count: len(seen.messages) > count))
                assert wait
                process.send(signal.SIGKILL)
                process.end()
            for message in list(seen.messages):
                for first, last in json.loads(message.body)["ranges"]:
                    assert covered(kept).covers(first, last)


async def until_true(condition: Any) -> bool:
    await until(condition, "a receipt")
    return True


@needs_mosquitto
def test_a_broker_that_lets_nobody_publish_receipts_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    port, chain, kept = free_port(), Chain(), tmp_path / "kept.db"
    (tmp_path / "acl").write_text("topic readwrite edgegw/site-7/data\ntopic read edgegw/#\n")
    broker = mosquitto(tmp_path, port, f"allow_anonymous true\nacl_file {tmp_path}/acl")
    with broker, receive(port, f"sqlite:///{kept}", *ONCE) as process:
        process.wait_said("ready")
        for _ in range(3):
            publish(port, [(DATA, chain.data(2))])
            process.wait_said("does not let us publish receipts: Not authorized")
        code, _ = process.end()
    assert code == 0
    assert sum("does not let us" in line for line in process.lines) == 1
    assert covered(kept).covers(1, 6)
