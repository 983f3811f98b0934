"""`acknowledge = "auto"`: the broker's word until a receiver has confirmed, then the receiver's alone."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from field import Field, field
from gateway_rig import Subscriber, config, device, gateway, journal_head, until
from hypothesis import given
from hypothesis import strategies as st
from mqtt_proxy import PUBACK, LossyProxy
from rig import MOSQUITTO, Process, free_port, mosquitto, needs_mosquitto, publish, receive
from test_receipts import covered, ended, status_of

from edgegw.uplink.messages import Ack
from edgegw.uplink.outcome import MAX_PAUSE_S, Outcome, Refusals, judge

ACK = "edgegw/site-7/ack"
GOOD, UNHEARD, REFUSED = (
    Ack(True, True, "Success"),
    Ack(True, False, "No"),
    Ack(False, True, "Not authorized"),
)

# -- the decisions alone -----------------------------------------------------------------------------------

S, A, P = Outcome.SETTLED, Outcome.AWAITED, Outcome.PENDING
MEANINGS = [  # acknowledge, end to end, PUBACK, of a live batch, of another
    ("broker", False, GOOD, S, S),
    ("broker", False, UNHEARD, S, P),
    ("broker", True, GOOD, S, S),
    ("broker", False, REFUSED, P, P),
    ("subscriber", False, GOOD, S, S),
    ("subscriber", False, UNHEARD, P, P),
    ("subscriber", True, REFUSED, P, P),
    ("receiver", False, GOOD, A, A),
    ("receiver", False, UNHEARD, P, P),
    ("receiver", True, REFUSED, P, P),
    ("auto", False, GOOD, S, S),
    ("auto", False, UNHEARD, S, P),
    ("auto", False, REFUSED, P, P),
    ("auto", True, GOOD, A, A),
    ("auto", True, UNHEARD, P, P),
    ("auto", True, REFUSED, P, P),
]


@pytest.mark.parametrize(("acknowledge", "end_to_end", "ack", "live", "other"), MEANINGS)
def test_what_a_puback_means(
    acknowledge: str, end_to_end: bool, ack: Ack, live: Outcome, other: Outcome
) -> None:
    assert judge(acknowledge, ack, live=True, end_to_end=end_to_end) is live
    assert judge(acknowledge, ack, live=False, end_to_end=end_to_end) is other


def test_live_batches_that_nobody_hears_pause_the_backlog_and_the_first_heard_one_lets_it_go() -> None:
    refusals = Refusals()
    assert refusals.refused(10.0, live=True)
    assert refusals.paused_until_s == 11.0
    assert not refusals.refused(10.5, live=True), "said once"
    assert refusals.paused_until_s == 11.0, "the backlog is tried all the same when the pause ends"
    assert refusals.refused(11.0, live=False) is False
    assert refusals.paused_until_s == 13.0
    assert refusals.accepted(live=True) == 0, "it is not over before the backlog gets through"
    assert refusals.paused_until_s == 0.0
    assert refusals.accepted(live=False) == 3
    assert refusals.refused(50.0, live=False), "anew"
    assert refusals.paused_until_s == 51.0


def test_with_a_dashboard_on_live_batches_alone_the_backlog_is_tried_at_doubling_times_and_nothing_flips() -> (
    None
):
    refusals, said, tried = Refusals(), 0, []
    for n in range(1000):  # a live batch each half second
        now_s = n / 2
        if now_s >= refusals.paused_until_s:
            tried.append(now_s)
            said += refusals.refused(now_s, live=False)
        said += refusals.accepted(live=True)
    assert said == 1
    assert len(tried) < 500 / MAX_PAUSE_S + 6


@given(st.lists(st.tuples(st.sampled_from([GOOD, UNHEARD]), st.booleans())))
def test_begin_and_end_of_a_refusal_are_said_in_turn(steps: list[tuple[Ack, bool]]) -> None:
    refusals, open_, now_s = Refusals(), False, 0.0
    for ack, live in steps:
        now_s += 1.0
        if ack.heard:
            if refusals.accepted(live=live):
                assert open_
                open_ = False
                assert refusals.paused_until_s <= now_s
        elif refusals.refused(now_s, live=live):
            assert not open_
            open_ = True


# -- on the real parts -------------------------------------------------------------------------------------


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


@contextmanager
def debians(folder: Path, port: int) -> Iterator[Process]:
    """Run mosquitto as Debian ships it: persistent, and saved each half hour."""
    (folder / "mosquitto").mkdir(exist_ok=True)
    path = folder / "debian.conf"
    path.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\n"
        f"persistence true\npersistence_location {folder}/mosquitto/\n"
    )
    with Process(MOSQUITTO, "-c", str(path)) as broker:
        broker.wait_said("running")
        yield broker


def plain(broker: int, meter: int, status: int) -> dict[str, Any]:
    """Return a configuration with the defaults of everything about delivery."""
    return {
        "gateway": {"id": "site-7"},
        "uplink": {"url": f"mqtt://127.0.0.1:{broker}"},
        "status": {"http": f"127.0.0.1:{status}"},
        "device": {"meter1": device(meter)},
    }


async def settled_up_to(status: int, seq: int, deadline_s: float) -> None:
    """Wait until all up to there is settled."""
    end_s = time.monotonic() + deadline_s
    while (figures := await status_of(status))["acked"] < seq:
        assert time.monotonic() < end_s, f"not in {deadline_s} s: acked {seq}; {figures}"
        await asyncio.sleep(0.1)


async def settled_up_to_head(status: int, deadline_s: float) -> int:
    """Wait until all that there is now is settled; return the head."""
    head = int((await status_of(status))["head"])
    await settled_up_to(status, head, deadline_s)
    return head


@needs_mosquitto
async def test_p2_with_the_defaults_a_power_cycled_broker_loses_nothing(tmp_path: Path, meter: Field) -> None:
    port, status, kept = free_port(), free_port(), tmp_path / "kept.db"
    with receive(port, f"sqlite:///{kept}"), gateway(tmp_path, plain(port, meter.port, status)) as run:
        with debians(tmp_path, port) as broker:
            await until(lambda: run.said("a receiver confirms this stream"), "the first receipt")
            await ended(broker, signal.SIGKILL)
        await until(lambda: run.said("records stay in the journal"), "the loss")
        head = journal_head(tmp_path)
        await until(lambda: journal_head(tmp_path) > head + 100, "an outage of 100 records", 40)
        with debians(tmp_path, port):
            await until(lambda: run.said("online, MQTT 5 after"), "the link", 40)
            head = await settled_up_to_head(status, 100)
            assert covered(kept).covers(1, head)
            await ended(run)


HASTY = """
from edgegw.cli import main
from edgegw.uplink import confirmation, receipts
receipts.FIRST_S, confirmation.LOOK_S = 2.0, 0.1
main()
"""


@needs_mosquitto
async def test_p2_with_the_defaults_a_brokers_short_queue_loses_nothing(tmp_path: Path, meter: Field) -> None:
    port, status, kept = free_port(), free_port(), tmp_path / "kept.db"
    made = plain(port, meter.port, status) | {"journal": {"commit_interval": "100ms"}}
    short = "allow_anonymous true\nmax_queued_messages 10\nmax_inflight_messages 10"
    with mosquitto(tmp_path, port, short), gateway(tmp_path, made, program=HASTY) as run:
        with receive(port, f"sqlite:///{kept}") as receiver:
            await until(lambda: run.said("a receiver confirms this stream"), "the first receipt")
            await ended(receiver)
        head = journal_head(tmp_path)
        await until(lambda: journal_head(tmp_path) > head + 150, "far more batches than the queue holds")
        with receive(port, f"sqlite:///{kept}") as receiver:
            await asyncio.to_thread(receiver.wait_said, "ready")
            head = await settled_up_to_head(status, 60)
            assert covered(kept).covers(1, head)
        assert run.said("were lost between broker and receiver")
        await ended(run)


@needs_mosquitto
async def test_without_a_receiver_the_brokers_word_settles_also_over_a_restart_and_then_the_receivers(
    tmp_path: Path, meter: Field
) -> None:
    port, status = free_port(), free_port()
    made = plain(port, meter.port, status)
    with mosquitto(tmp_path, port), Subscriber(port) as seen:
        with gateway(tmp_path, made) as run:
            await until(lambda: len(seen.batches("data")) > 3, "batches")
            await settled_up_to_head(status, 20)
            with receive(port, f"sqlite:///{tmp_path}/kept.db") as receiver:
                await until(lambda: run.said("a receiver confirms this stream"), "the first receipt")
                await ended(receiver)
            assert sum("a receiver confirms" in line for line in run.lines) == 1
            await ended(run)
        with gateway(tmp_path, made) as run:
            count = len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > count + 5, "batches of the next life")
            figures = await status_of(status)
            assert figures["acked"] + 5 < figures["head"], "the broker's word settles nothing any more"
            assert not run.said("a receiver confirms"), "that is known already"
            await ended(run)


@needs_mosquitto
async def test_p2_a_receipt_settles_nothing_that_was_not_sent(tmp_path: Path, meter: Field) -> None:
    """One message is in flight and is never acknowledged; somebody makes up a receipt for everything."""
    port, status = free_port(), free_port()
    async with LossyProxy(port) as way:
        made = plain(way.port, meter.port, status)
        made |= {"uplink": made["uplink"] | {"inflight": 1}, "journal": {"commit_interval": "100ms"}}
        way.lose = {PUBACK}
        with mosquitto(tmp_path, port), Subscriber(port) as seen, gateway(tmp_path, made) as run:
            await until(lambda: seen.batches() and journal_head(tmp_path) > 20, "a batch, and more that wait")
            stream = seen.batches()[0].batch.stream
            publish(port, [(ACK, json.dumps({"stream": stream, "ranges": [[1, 10**9]]}).encode())])
            await until(lambda: run.said("a receiver confirms this stream"), "the receipt")
            await settled_up_to(status, 1, 20)
            figures = await status_of(status)
            sent = seen.batches()
            assert len(sent) == 1
            assert figures["acked"] == sent[0].batch.seq + sent[0].batch.count - 1
            assert figures["pending_records"] > 10
            await ended(run)


@needs_mosquitto
async def test_where_nobody_is_subscribed_the_backlog_waits_live_batches_count_and_it_is_said_once(
    tmp_path: Path, meter: Field
) -> None:
    port, status = free_port(), free_port()
    made = plain(port, meter.port, status) | {"journal": {"commit_interval": "100ms"}}
    with gateway(tmp_path, made) as run:
        await until(lambda: meter.counts[1] > 30, "a backlog")
        backlog = journal_head(tmp_path)
        with mosquitto(tmp_path, port), Subscriber(port, "edgegw/site-7/data") as dashboard:
            await until(lambda: len(dashboard.batches("data")) > 30, "live batches")
            figures = await status_of(status)
            assert figures["acked"] < backlog <= figures["pending_records"] + 1
            assert figures["pending_records"] < figures["head"] - 30, "live batches count as delivered"
            assert sum("nobody is subscribed" in line for line in run.lines) == 1
            assert not run.said("get through again")
            with receive(port, f"sqlite:///{tmp_path}/kept.db") as receiver:
                await until(lambda: run.said("get through again"), "the backlog", 45)
                await until(lambda: covered(tmp_path / "kept.db").covers(1, backlog), "all of it", 45)
                await ended(receiver)
            assert sum("get through again" in line for line in run.lines) == 1
            await ended(run)


async def test_subscriber_says_that_it_needs_mqtt_5(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    made = config(port, {"meter1": device(meter.port)}, uplink={"acknowledge": "subscriber"})
    server = await asyncio.start_server(refuse_version, "127.0.0.1", port)
    async with server:
        with gateway(tmp_path, made) as run:
            await until(
                lambda: run.said('acknowledge = "subscriber" needs MQTT 5, which this broker does not speak'),
                "why",
            )
            await ended(run)


async def refuse_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as a broker of MQTT 3.1.1 does to a version that it does not speak (3.1.1, 3.1.2.2)."""
    await reader.read(1024)
    writer.write(b"\x20\x02\x00\x01")
    await writer.drain()
    writer.close()
