"""Replays on a real broker: the same bytes once more, beside and behind everything else, and each id once."""

import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from control_field import Operator, kill, stop
from field import Field, field
from gateway_rig import Proxy, Subscriber, config, device, gateway, toml, union, until
from hypothesis import given
from hypothesis import strategies as st
from journal_rig import Hand, Told, scan
from rig import Process, free_port, mosquitto, needs_mosquitto

from edgegw.domain.command import Replay, ReplayCommand
from edgegw.domain.ranges import Ranges
from edgegw.uplink import replay
from edgegw.uplink.replay import Replays, planned

pytestmark = needs_mosquitto


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


def journal(folder: Path, records: int = 400) -> list[Told]:
    """Make a journal of batches of at most 8 KiB, all of them acknowledged, for a gateway to go on with."""
    hand = Hand(folder / "journal.db", max_message=8 * 1024)
    for part in range(0, records, 200):
        hand.turn(*(scan(part + n, tags=20) for n in range(min(200, records - part))))
    hand.acknowledge(hand.told)
    hand.close()
    return hand.told


def asking(name: str, stream: str, first: int, last: int) -> bytes:
    return json.dumps({"id": name, "replay": {"stream": stream, "from": first, "to": last}}).encode()


def made(port: int, meter: Field, **sections: Any) -> dict[str, Any]:
    return config(port, {"meter1": device(meter.port)}, **sections)


def slow(folder: Path, configuration: dict[str, Any], bytes_s: int) -> Process:
    """Start a gateway that replays no faster than this."""
    path = folder / "config.toml"
    path.write_text(toml(configuration))
    program = (
        f"from edgegw.uplink import replay; replay.BYTES_S = {bytes_s}; from edgegw.cli import main; main()"
    )
    return Process(sys.executable, "-c", program, "run", "-c", str(path))


def repeated(seen: Subscriber) -> dict[int, list[bytes]]:
    """Return the bytes of what came on TOPIC/backfill, by seq."""
    found: dict[int, list[bytes]] = {}
    for message in seen.batches("backfill"):
        found.setdefault(message.batch.seq, []).append(message.body)
    return found


async def test_p2_a_replay_sends_whole_batches_as_the_same_bytes_and_says_what_is_missing(
    tmp_path: Path, meter: Field
) -> None:
    port, told = free_port(), journal(tmp_path)
    stream, batches = told[0].stream, [one.batch for one in told]
    gone, first, last = batches[1], batches[3], batches[6]
    connection = apsw.Connection(str(tmp_path / "journal.db"))
    connection.execute("DELETE FROM batch WHERE seq <= ?", (gone.seq,))
    connection.close()
    with mosquitto(tmp_path, port), Subscriber(port) as seen, Operator(port) as operator:
        with gateway(tmp_path, made(port, meter)) as run:
            await until(lambda: seen.batches("data"), "live batches")
            asked = asking("a", stream, first.seq + 1, last.seq)
            answer = await operator.ask(asked)
            assert answer == {"id": "a", "ok": True, "from": first.seq + 1, "to": last.seq, "missing": []}
            await until(lambda: len(repeated(seen)) == 4, "four batches")
            assert repeated(seen) == {one.batch.seq: [one.body] for one in told[3:7]}
            assert await operator.ask(asked) == answer, "the same message, the same answer"
            used = await operator.ask(asking("a", stream, 1, 9))
            assert (used["ok"], used["error"]) == (False, "this id was already acted on")

            answer = await operator.ask(asking("b", stream, 1, batches[2].seq))
            assert (answer["ok"], answer["missing"]) == (True, [[1, gone.last]])
            answer = await operator.ask(asking("c", stream, batches[-1].seq, 2**62))
            assert answer["to"] < 2**40, "beyond the head is clipped"
            for name, command, error in (
                ("d", asking("d", stream, 1, 2), "replay: records 1 to 2 are no longer kept"),
                ("e", asking("e", stream, 2**50, 2**51), "this stream ends at"),
                ("f", asking("f", "another", 1, 2), "replay.stream: found another; this journal's is"),
            ):
                answer = await operator.ask(command)
                assert (answer["id"], answer["ok"]) == (name, False)
                assert error in answer["error"]
            await until(lambda: batches[-1].seq in repeated(seen), "the last")
            operator.send(asking("g", stream, first.seq, last.seq), retain=True)
            await operator.ask(asking("h", "another", 1, 2))
            operator.send(b"", retain=True)
            await kill(run)
        with gateway(tmp_path, made(port, meter)) as run:
            count = len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > count, "live batches of the next life")
            used = await operator.ask(asking("b", stream, 1, 99))
            assert used["error"] == "this id was already acted on"
            await stop(run)
        assert all(len(bodies) <= 2 for bodies in repeated(seen).values())
        union(seen.batches())  # equal seqs, equal bytes
        entries = [r for m in seen.batches() for r in m.records if r.get("event") == "command"]
    assert {entry["id"]: entry["replay"]["from"] for entry in entries if entry["ok"]}["b"] == 1


async def test_p3_live_batches_are_not_delayed_by_a_large_replay_on_a_slow_link(
    tmp_path: Path, meter: Field
) -> None:
    port, told = free_port(), journal(tmp_path, 3000)
    async with Proxy(port, bytes_s=200_000) as link:
        many = made(link.port, meter, journal={"commit_interval": "500ms"}, uplink={"max_message": "8KiB"})
        upstream = mosquitto(tmp_path, port)
        with upstream, Subscriber(port) as seen, Operator(port) as operator, gateway(tmp_path, many) as run:
            await until(lambda: len(seen.batches("data")) > 1, "live batches")
            answer = await operator.ask(asking("a", told[0].stream, 1, told[-1].batch.last))
            assert answer["ok"]
            await until(lambda: len(repeated(seen)) > 10, "the replay to be under way")
            began_ms = time.time() * 1000
            await until(lambda: len(repeated(seen)) > 80, "much of the replay", 40)
            live = [m for m in seen.batches("data") if m.at_ms > began_ms]
            await kill(run)
    ages = [m.at_ms - m.records[0]["ts"] for m in live]
    assert len(ages) > 2
    assert max(ages) < 2 * 500, ages


async def test_p2_a_replay_keeps_to_its_rate_and_goes_on_over_a_lost_connection(
    tmp_path: Path, meter: Field
) -> None:
    port, told, rate = free_port(), journal(tmp_path), 50_000
    with slow(tmp_path, made(port, meter), rate) as run:
        with mosquitto(tmp_path, port) as broker, Subscriber(port) as seen, Operator(port) as operator:
            await until(lambda: seen.batches("data"), "live batches")
            for n in range(replay.MOST):
                asked = asking(f"a{n}", told[0].stream, 1, told[-1].batch.last)
                assert (await operator.ask(asked))["ok"]
            busy = await operator.ask(asking("z", told[0].stream, 1, 2))
            assert busy["error"] == f"busy with {replay.MOST} replays; try again later"
            await until(lambda: len(repeated(seen)) >= 8, "some of it")
            came = seen.batches("backfill")
            span_s = (came[-1].at_ms - came[0].at_ms) / 1000
            assert sum(len(m.body) for m in came[1:]) <= rate * span_s + 2 * 8192
            broker.send(signal.SIGKILL)
            await until(lambda: run.said("records stay in the journal"), "the loss")
            before = dict(repeated(seen))
        assert len(before) < len(told)
        with mosquitto(tmp_path, port), Subscriber(port) as later:
            wanted = {one.batch.seq: one.body for one in told}
            await until(lambda: set(wanted) <= {*before, *repeated(later)}, "the rest")
            for found in (before, repeated(later)):
                assert all(set(bodies) == {wanted[seq]} for seq, bodies in found.items() if seq in wanted)
            again = len([seq for seq in repeated(later) if seq in before])
            assert again <= 8, "what was confirmed before the loss is not sent once more"
            await stop(run)


# -- the decisions alone -----------------------------------------------------------------------------------


def test_a_plan_ends_at_the_head_and_tells_what_is_missing() -> None:
    asked = ReplayCommand("a", "s", 5, 99)
    plan = planned(asked, Ranges([(3, 10), (21, 40)]), head=40)
    assert isinstance(plan, Replay)
    assert (plan.first, plan.last, plan.missing) == (5, 40, [(11, 20)])
    assert planned(asked, Ranges(), head=40) == "replay: records 5 to 40 are no longer kept"
    assert planned(asked, Ranges(), head=4) == "replay.from: found 5; this stream ends at 4"


@given(
    st.lists(st.sets(st.integers(0, 30), min_size=1), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=200),
)
def test_a_replay_is_over_when_all_of_it_was_sent_whatever_is_lost_meanwhile(
    wanted: list[set[int]], fates: list[tuple[int, bool]]
) -> None:
    """Batches of ten records; each is read, put on its way, and taken or lost there."""
    replays, under_way, sent = Replays(), Ranges(), set[int]()
    for at, batches in enumerate(wanted):
        kept = tuple(Ranges((10 * n + 1, 10 * n + 10) for n in batches))
        replays.add(Replay(str(at), "s", 1, 310, kept))
    for _, taken in [*fates, *[(0, True)] * 130]:
        gap = replays.following("s", under_way)
        if gap is None:
            break
        n = (gap[0] - 1) // 10
        under_way.add(10 * n + 1, 10 * n + 10)
        if taken:
            replays.sent("s", 10 * n + 1, 10 * n + 10)
            assert n not in sent, "no batch is sent twice for replays that overlap"
            sent.add(n)
        under_way.remove(10 * n + 1, 10 * n + 10)
    assert sent == set().union(*wanted)
    assert replays.following("s", Ranges()) is None
    assert not replays.full


def test_a_replay_of_a_stream_that_has_ended_is_over() -> None:
    replays = Replays()
    for n in range(replay.MOST):
        replays.add(Replay(str(n), "s", 1, 9, ((1, 9),)))
    assert replays.full
    assert replays.following("t", Ranges()) is None
    assert not replays.full


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.0, 3.0)), min_size=1, max_size=50))
def test_the_rate_is_kept_to_however_batches_come(batches: list[tuple[int, float]]) -> None:
    replays, now_s, total = Replays(), 100.0, 0
    for size, pause_s in batches:
        now_s += pause_s
        now_s += replays.wait_s(now_s)
        assert total <= replay.BYTES_S * (now_s - 100.0) + 1e-3 * replay.BYTES_S
        assert replays.wait_s(now_s) <= 1e-9
        replays.goes(size, now_s)
        total += size
