"""Messages that a broker does not accept: tried alone and held aside, while all others are sent; and no storm."""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from field import Field, field
from gateway_rig import Subscriber, config, device, gateway, journal_head, until
from hypothesis import given
from hypothesis import strategies as st
from journal_rig import kept
from mqtt_proxy import LossyProxy
from rig import Process, free_port, mosquitto, needs_mosquitto, receive
from test_receipts import covered, ended

from edgegw.uplink.attempts import FLAPPING, MAX_PAUSE_S, STABLE_S, Attempts
from edgegw.uplink.sizes import MIN_LIMIT, RETRY_S, SETTLE_S, Fate, Sizes, largest_json

# -- the decisions alone -----------------------------------------------------------------------------------


class HangingUp:
    """A broker that hangs up on messages above a limit; one connection after the other, a window of four."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes = Sizes()
        self.now_s = 0.0
        self.losses = 0
        self.passed: list[int] = []

    def connection(self, waiting: list[int]) -> None:
        """Send what is waiting over one connection, until that ends or nothing is left that may go."""
        self.sizes.connected(None, 20)
        queue, flight = list(waiting), list[int]()
        while queue or flight:
            while queue and len(flight) < 4 and self.sizes.trial is None:
                fate = self.sizes.fate(queue[0], self.now_s)
                if fate is Fate.ALONE:
                    if flight:
                        break
                    self.sizes.try_alone(queue[0], self.now_s)
                size = queue.pop(0)
                if fate is not Fate.ASIDE:
                    flight.append(size)
            if not flight:
                continue
            if flight[0] > self.limit:
                self.losses += 1
                self.sizes.lost(flight, self.now_s, stable=False)
                return
            size = flight.pop(0)
            self.sizes.answered(size, self.now_s, accepted=True)
            self.now_s += 0.1 if self.sizes.trial is None else SETTLE_S + 0.1
            self.sizes.settle(self.now_s)
            self.passed.append(size)
            waiting.remove(size)


@given(st.lists(st.integers(100, 20_000), min_size=1, max_size=60), st.integers(MIN_LIMIT, 20_000))
def test_whatever_is_not_too_large_gets_through_and_few_connections_end(sizes: list[int], limit: int) -> None:
    broker, waiting = HangingUp(limit), list(sizes)
    for _ in range(200):
        losses = broker.losses
        broker.connection(waiting)
        broker.now_s += 1.0
        if broker.losses == losses:
            break
    assert sorted(broker.passed) == sorted(size for size in sizes if size <= limit)
    assert broker.losses <= 2 + len({size for size in sizes if size > limit})
    refused = broker.sizes.refused
    assert refused is None or refused > limit


def test_new_batches_are_halved_until_they_pass() -> None:
    broker = HangingUp(3000)
    size = 16_000
    for _ in range(20):
        losses = broker.losses
        broker.connection([size] * 8)
        broker.now_s += 1.0
        if broker.losses == losses and broker.passed:
            break
        size = min(size, broker.sizes.limit or size)
    assert MIN_LIMIT <= size <= 3000
    assert broker.losses <= 6


def test_a_size_that_was_refused_is_tried_again_later_and_freed_if_it_passes() -> None:
    broker = HangingUp(3000)
    for _ in range(4):
        broker.connection([8000])
    assert broker.sizes.refused == 8000
    assert broker.sizes.fate(9000, broker.now_s) is Fate.ASIDE
    assert broker.sizes.fate(7000, broker.now_s) is Fate.ALONE
    broker.now_s += RETRY_S
    losses = broker.losses
    broker.connection([8000])
    assert broker.losses == losses + 1
    broker.now_s += RETRY_S
    broker.connection([8000])
    assert broker.losses == losses + 1, "the pause doubles"
    broker.now_s += RETRY_S
    broker.limit = 10_000
    broker.connection([8000, 9000])
    assert broker.passed == [8000, 9000]
    assert broker.sizes.refused is None


def test_links_that_break_and_small_messages_accuse_no_size() -> None:
    sizes = Sizes()
    for _ in range(10):
        sizes.connected(None, 20)
        sizes.answered(5000, 0.0, accepted=True)
        sizes.lost([4000, 3000, 4999], SETTLE_S, stable=False)
        sizes.connected(None, 20)
        sizes.lost([MIN_LIMIT], 0.0, stable=False)
        sizes.lost([], 0.0, stable=False)
    assert sizes.fate(100_000, 0.0) is Fate.SEND


def test_an_acknowledgement_right_before_the_end_proves_nothing() -> None:
    sizes = Sizes()
    for _ in range(3):
        sizes.connected(None, 20)
        if sizes.fate(8000, 0.0) is Fate.ALONE:
            sizes.try_alone(8000, 0.0)
        sizes.answered(8000, 0.0, accepted=True)
        sizes.lost([], 0.1, stable=False)
    assert sizes.refused == 8000


def test_what_the_broker_told_is_kept_to() -> None:
    sizes = Sizes()
    sizes.connected(4096, 20)
    assert sizes.limit == 4096 - 20 - 64
    assert sizes.fate(sizes.limit, 0.0) is Fate.SEND
    assert sizes.fate(sizes.limit + 1, 0.0) is Fate.ASIDE
    assert largest_json(sizes.limit, packed=False) == sizes.limit
    assert largest_json(sizes.limit, packed=True) == 2 * sizes.limit
    sizes.connected(None, 20)
    assert sizes.limit is None
    assert largest_json(None, packed=True) is None


def test_connections_that_do_not_last_are_made_at_longer_and_longer_times() -> None:
    dice = random.Random(1)
    attempts = Attempts(5.0, dice.uniform)
    assert attempts.pause_s() <= 5.0
    assert attempts.proven(0.0)
    attempts.ended(1.0)
    assert attempts.proven(0.0), "once is no reason"
    pauses = []
    for _ in range(10):
        attempts.ended(1.0)
        pauses.append(attempts.pause_s())
    assert not attempts.proven(STABLE_S - 1)
    assert attempts.proven(STABLE_S)
    assert max(pauses) <= MAX_PAUSE_S + 5.0
    assert min(pauses[5:]) >= MAX_PAUSE_S / 2
    attempts.ended(STABLE_S)
    assert attempts.proven(0.0)
    assert attempts.pause_s() <= 5.0
    assert FLAPPING == 2


# -- on the real parts -------------------------------------------------------------------------------------


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


async def with_large_batches(folder: Path, port: int, meter: Field, **uplink: Any) -> dict[str, Any]:
    """Make a journal with a backlog of batches of about 10 kB; return a configuration that makes small ones."""
    made = config(port, {"m": device(meter.port, every="5ms")}, uplink=uplink)
    large = made | {"journal": {"commit_interval": "1s"}}
    with gateway(folder, large) as run:
        await until(lambda: meter.counts[1] > 600, "records", 40)
        run.send(signal.SIGTERM)
        assert (await asyncio.to_thread(run.end))[0] == 0, run.lines
    assert max(batch.size for batch in kept(folder / "journal.db").batches.values()) > 6000
    return made


def pending(folder: Path, through: int = 1 << 62) -> list[int]:
    """Return the sizes of what is not settled, up to a seq."""
    journal = kept(folder / "journal.db")
    found = [batch for batch in journal.batches.values() if batch.last <= through]
    return [batch.size for batch in found if not journal.acked.covers(batch.seq, batch.last)]


async def stopped(run: Process) -> None:
    run.send(signal.SIGTERM)
    assert (await asyncio.to_thread(run.end))[0] == 0, run.lines


@needs_mosquitto
async def test_p2_what_the_broker_told_it_does_not_accept_is_held_aside_and_zstd_frees_it(
    tmp_path: Path, meter: Field
) -> None:
    port = free_port()
    made = await with_large_batches(tmp_path, port, meter)
    before = journal_head(tmp_path)
    broker = mosquitto(tmp_path, port, "allow_anonymous true\nmax_packet_size 4096")
    with broker, Subscriber(port) as seen:
        with gateway(tmp_path, made) as run:
            await until(lambda: run.said("accepts messages of 4010 bytes at most; batch"), "the hint")
            assert run.said('set uplink.compression = "zstd", with which it has')
            await until(lambda: len(seen.batches("data")) > 20, "live batches")
            assert not run.said("records stay in the journal"), "the broker hung up on a message too large"
            assert sum("is held aside" in line for line in run.lines) == 1
            await stopped(run)
        assert min(pending(tmp_path, before)) > 4010
        with gateway(tmp_path, made | {"uplink": made["uplink"] | {"compression": "zstd"}}) as run:
            count = len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > count + 5, "live batches")
            await stopped(run)
        journal = kept(tmp_path / "journal.db")
        assert journal.acked.covers(1, journal.head)


@needs_mosquitto
async def test_new_batches_are_no_larger_than_what_the_broker_told(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    made = config(port, {"m": device(meter.port, every="5ms")}, journal={"commit_interval": "1s"})
    broker = mosquitto(tmp_path, port, "allow_anonymous true\nmax_packet_size 2048")
    with broker, Subscriber(port) as seen, gateway(tmp_path, made) as run:
        await until(lambda: len(seen.batches("data")) > 20, "live batches")
        assert max(len(message.body) for message in seen.batches()) > 1000
        assert not run.said("is held aside")
        await stopped(run)
        assert kept(tmp_path / "journal.db").acked.prefix() == journal_head(tmp_path)


@needs_mosquitto
async def test_p2_what_a_broker_hangs_up_on_is_held_aside_and_neither_connections_nor_events_are_many(
    tmp_path: Path, meter: Field
) -> None:
    port = free_port()
    made = await with_large_batches(tmp_path, port, meter, protocol="5")
    before = journal_head(tmp_path)
    broker = mosquitto(tmp_path, port, "allow_anonymous true\nmessage_size_limit 3000")
    with broker, Subscriber(port) as seen:
        with gateway(tmp_path, made) as run:
            await until(lambda: run.said("ends the connection at messages of"), "the hint", 60)
            count = len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > count + 20, "live batches", 100)
            await until(lambda: run.said("is held aside in the journal, the others are sent"), "the rest")
            head = journal_head(tmp_path)
            await until(lambda: min(pending(tmp_path, head)) > 3000, "all that is small enough", 60)
            connections = sum("online, MQTT" in line for line in run.lines)
            assert connections <= 8, run.lines
            await stopped(run)
        states = [
            record["state"]
            for body in kept(tmp_path / "journal.db").bodies.values()
            for record in json.loads(body)["records"]
            if record.get("event") == "link"
        ]
        assert states.count("online") <= 3, states
        with gateway(tmp_path, made | {"uplink": made["uplink"] | {"compression": "zstd"}}) as run:
            count = len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > count + 5, "live batches")
            await until(lambda: kept(tmp_path / "journal.db").acked.covers(1, before), "the backlog", 60)
            await stopped(run)


@needs_mosquitto
async def test_live_batches_that_a_broker_hangs_up_on_become_smaller_until_they_pass(
    tmp_path: Path, meter: Field
) -> None:
    port = free_port()
    made = config(port, {"m": device(meter.port, every="5ms")}, journal={"commit_interval": "1s"})
    broker = mosquitto(tmp_path, port, "allow_anonymous true\nmessage_size_limit 3000")
    with broker, Subscriber(port) as seen, gateway(tmp_path, made) as run:
        await until(lambda: len(seen.batches("data")) > 10, "live batches", 100)
        assert sum("online, MQTT" in line for line in run.lines) <= 8, run.lines
        await stopped(run)


HASTY = """
from edgegw.cli import main
from edgegw.uplink import confirmation, receipts
receipts.FIRST_S, confirmation.LOOK_S = 1.0, 0.1
main()
"""


async def confirmed(folder: Path, port: int, meter: Field) -> None:
    """Have a receiver confirm the stream of the journal in a folder."""
    with mosquitto(folder, port), receive(port, f"sqlite:///{folder}/kept.db") as receiver:
        await asyncio.to_thread(receiver.wait_said, "ready")
        with gateway(folder, config(port, {"m": device(meter.port, every="5ms")})) as run:
            await until(lambda: run.said("a receiver confirms this stream"), "the first receipt")
            await stopped(run)
        await ended(receiver)


@needs_mosquitto
@pytest.mark.parametrize("hangs_up", [True, False])
async def test_p2_what_a_broker_acknowledges_and_discards_is_held_aside_with_its_size(
    tmp_path: Path, meter: Field, hangs_up: bool
) -> None:
    """With MQTT 3.1.1 a broker has no way to say that a message is too large; mosquitto 2.0.11 hangs up besides."""
    port, database = free_port(), tmp_path / "kept.db"
    await confirmed(tmp_path, port, meter)
    made = await with_large_batches(tmp_path, port, meter, protocol="3.1.1")
    before = journal_head(tmp_path)
    limit = "message_size_limit 3000" if hangs_up else ""
    said = "ends the connection at messages of" if hangs_up else "no receipt, though they were sent 4 times"
    broker = mosquitto(tmp_path, port, f"allow_anonymous true\n{limit}")
    with broker, receive(port, f"sqlite:///{database}", "--no-replay") as receiver:
        await asyncio.to_thread(receiver.wait_said, "ready")
        async with LossyProxy(port) as way:
            way.discard_above = 1 << 30 if hangs_up else 3000
            through = {"uplink": made["uplink"] | {"url": f"mqtt://127.0.0.1:{way.port}"}}
            with gateway(tmp_path, made | through, program=HASTY) as run:
                await until(lambda: run.said(said), "the hint", 60)
                await until(
                    lambda: covered(database).overlaps(before + 500, before + 600), "live records", 60
                )
                await stopped(run)
            assert max(pending(tmp_path)) > 6000
            zstd = {"uplink": made["uplink"] | {"compression": "zstd"}}
            with gateway(tmp_path, made | zstd, program=HASTY) as run:
                await until(lambda: covered(database).covers(1, before), "what was held aside", 60)
                await stopped(run)
        await ended(receiver)
