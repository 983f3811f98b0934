"""Messages that are published and not acknowledged: what counts as lost, and that it is sent again."""

import asyncio
import json
import signal
from pathlib import Path

import pytest
from field import field
from gateway_rig import Subscriber, config, device, gateway, journal_head, union, until
from hypothesis import given
from hypothesis import strategies as st
from mqtt_proxy import PUBACK, PUBLISH, LossyProxy
from rig import free_port, mosquitto

from edgegw.domain.batch import Batch, Kind
from edgegw.uplink.window import MAX_WRITTEN_OFF, PATIENCE_S, SILENCE_S, InFlight, Way, Window


def batch(seq: int) -> Batch:
    return Batch("s", seq, 1, Kind.DATA, b"", 100, b"")


def published(window: Window, *mids_at: tuple[int, float], way: Way = Way.LIVE) -> None:
    for mid, at_s in mids_at:
        window.publish(mid, InFlight(batch(mid), way, at_s, 100))


def lost(window: Window, now_s: float) -> list[int]:
    return [sent.batch.seq for sent in window.write_off(now_s)]


def test_what_a_much_later_acknowledgement_passes_by_was_lost() -> None:
    window = Window(32, 65535)
    published(window, (1, 0.0), (2, 0.2), (3, 3.0), (4, PATIENCE_S - 0.1), (5, PATIENCE_S + 0.1))
    window.acknowledge(2)
    window.acknowledge(4)
    assert lost(window, 11.0) == [], "a broker may reorder for some seconds"
    window.acknowledge(5)
    assert lost(window, 11.0) == [1]
    assert len(window) == 1
    assert lost(window, SILENCE_S + 2.9) == []
    assert lost(window, SILENCE_S + 3.1) == [3], "passed at all, and open for very long"
    assert window.dead(1000.0) is None


def test_without_any_later_acknowledgement_the_connection_is_dead_and_nothing_counts_as_lost() -> None:
    window = Window(32, 65535)
    published(window, (1, 0.0))
    window.acknowledge(1)
    published(window, *((mid, 1.0 + mid) for mid in range(2, 20)))
    assert window.dead(SILENCE_S + 2.9) is None
    assert lost(window, SILENCE_S + 3.1) == []
    assert window.dead(SILENCE_S + 3.1) == "no acknowledgement in 30 s"


def test_what_was_written_off_still_counts_for_the_broker_until_it_answers_after_all() -> None:
    window = Window(32, 4)
    published(window, (1, 0.0), (2, 0.0), (3, 20.0))
    window.acknowledge(3)
    assert lost(window, 20.0) == [1, 2]
    published(window, (4, 20.0))
    assert not window.full
    published(window, (5, 20.0))
    assert window.full, "two in flight, and two that the broker may still count"
    assert window.acknowledge(1) is None
    assert not window.full
    published(window, (6, 20.0))
    for mid in (4, 5):
        window.acknowledge(mid)
    assert len(window) == 1


def test_a_connection_that_loses_very_many_is_given_up() -> None:
    window = Window(1000, 65535)
    published(window, *((mid, 0.0) for mid in range(1, MAX_WRITTEN_OFF + 1)), (999, 20.0))
    assert window.dead(20.0) is None
    window.acknowledge(999)
    assert len(lost(window, 20.0)) == MAX_WRITTEN_OFF
    assert window.dead(20.0) == "64 messages were not acknowledged, though later ones were"


@given(st.lists(st.tuples(st.sampled_from(["publish", "backlog", "ack", "look"]), st.integers(1, 40))))
def test_every_batch_is_in_flight_acknowledged_or_returned_as_lost(steps: list[tuple[str, int]]) -> None:
    window, now_s, in_flight, mid = Window(8, 8), 0.0, {}, 0
    for what, n in steps:
        now_s += n / 4
        if what in ("publish", "backlog") and not window.full:
            mid += 1
            in_flight[mid] = Way.BACKLOG if what == "backlog" else Way.LIVE
            published(window, (mid, now_s), way=in_flight[mid])
        elif what == "ack" and (sent := window.acknowledge(n)) is not None:
            assert in_flight.pop(n) is sent.way
        elif what == "look":
            for seq in lost(window, now_s):
                del in_flight[seq]
        assert len(window) == len(in_flight) <= 8
        assert window.not_live == sum(way is Way.BACKLOG for way in in_flight.values())


@pytest.mark.parametrize("kind", [PUBLISH, PUBACK], ids=["PUBLISH", "PUBACK"])
async def test_p2_what_a_broker_swallows_is_sent_again_on_the_same_connection(
    tmp_path: Path, kind: int
) -> None:
    """For a while the broker acknowledges nothing, as one over its quota; commits come quicker than any pause."""
    port = free_port()
    async with field() as meter, LossyProxy(port) as way:
        made = config(
            way.port, {"meter1": device(meter.port)},
            journal={"commit_interval": "200ms"}, uplink={"acknowledge": "broker"},
        )  # fmt: skip
        with mosquitto(tmp_path, port), Subscriber(port) as seen, gateway(tmp_path, made) as run:
            await until(lambda: len(seen.batches("data")) >= 3, "live batches")
            way.lose = {kind}
            await until(lambda: way.lost >= 12, "messages without a PUBACK")
            way.lose = set()
            head, live = journal_head(tmp_path), len(seen.batches("data"))
            await until(lambda: len(seen.batches("data")) > live + 5, "live batches that pass")
            await until(
                lambda: run.said("not acknowledged, though later ones were; sent again"), "the loss", 45
            )
            await until(lambda: union(seen.batches()).covered.prefix() >= head, "every seq", 45)
            await until(lambda: len(seen.batches("backfill")) >= 12, "all of it once more", 45)
            assert way.connections == 1
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0, run.lines
        assert union(seen.batches()).chain.intact


HASTY = "from edgegw.uplink import outbox; outbox.RESEND_S = 0.5; from edgegw.cli import main; main()"


async def test_the_state_and_the_goodbye_come_through_a_broker_that_swallows(tmp_path: Path) -> None:
    port = free_port()

    def states() -> list[str]:
        return [json.loads(m.body)["state"] for m in seen.messages if m.topic.endswith("/status")]

    async with field() as meter, LossyProxy(port) as way:
        made = config(way.port, {"meter1": device(meter.port)})
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            way.lose = {PUBLISH}
            with gateway(tmp_path, made, program=HASTY) as run:
                await until(lambda: way.lost, "the status to be swallowed")
                way.lose = set()
                await until(lambda: states() == ["online"], "the state once more")
                await until(lambda: seen.batches("data"), "batches")
                way.lose = {PUBLISH}
                run.send(signal.SIGTERM)
                assert (await asyncio.to_thread(run.end))[0] == 0, run.lines
            await until(lambda: states() == ["online", "offline"], "the will in the goodbye's place")
            assert way.connections == 1
