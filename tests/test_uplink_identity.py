"""Who we are to a broker: client ids, a second client with ours, and topics that a broker rewrites."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from control_field import command, stop
from field import Field, field
from gateway_rig import Subscriber, config, device, gateway, until
from hypothesis import given
from hypothesis import strategies as st
from mqtt_proxy import LossyProxy, read_packet
from rig import free_port, mosquitto, needs_mosquitto, publish

from edgegw.uplink.attempts import DISPUTED_S, MAX_PAUSE_S, SUSPICIOUS, Attempts
from edgegw.uplink.login import check_id, client_id


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@given(IDS, IDS)
def test_no_two_gateways_have_one_client_id_and_none_holds_a_dot(one: str, other: str) -> None:
    assert (client_id(one) == client_id(other)) == (one == other)
    assert "." not in client_id(one)
    assert check_id(one) != client_id(other), "trying a broker takes no gateway's connection"


def test_ids_of_gateways_without_a_dot_are_as_ever() -> None:
    assert client_id("site-7") == "edgegw-site-7"
    assert client_id("site.7") == "edgegw-site~7"


# -- a second client with our id ---------------------------------------------------------------------------


def longest(low: float, high: float) -> float:
    return high


def test_each_takeover_makes_the_pause_longer_until_a_connection_lasts() -> None:
    attempts, pauses = Attempts(0.0, longest), []
    for _ in range(5):
        assert not attempts.ended(30.0, taken_over=True), "the broker's own words are said with the loss"
        pauses.append(attempts.pause_s())
    assert pauses == [5.0, 10.0, 20.0, 30.0, MAX_PAUSE_S]
    attempts.ended(DISPUTED_S)
    assert attempts.pause_s() == 0.0, "it is over"


def test_ends_without_a_reason_are_suspicious_only_in_a_row_and_while_the_broker_is_there() -> None:
    attempts = Attempts(0.0, longest)
    for _ in range(10):
        assert not attempts.ended(30.0, sudden=True)
        assert not attempts.ended(30.0, sudden=True)
        attempts.failed()
    for _ in range(10):
        assert not attempts.ended(3600.0, sudden=True), "that is an ordinary loss"
    said = [attempts.ended(10.0, sudden=True) for _ in range(SUSPICIOUS + 3)]
    assert said == [n == SUSPICIOUS - 1 for n in range(len(said))], "once"
    assert attempts.pause_s() == MAX_PAUSE_S
    attempts.ended(DISPUTED_S, sudden=True)
    assert attempts.pause_s() == 0.0, "an ordinary loss, which is over at once"


@needs_mosquitto
@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_two_gateways_of_one_id_both_suspect_it_and_neither_crashes(
    tmp_path: Path, meter: Field, version: str
) -> None:
    """mosquitto 2.0 closes the older connection without a word, also with MQTT 5."""
    port = free_port()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    made = config(port, {"m": device(meter.port)}, uplink={"protocol": version})
    with (
        mosquitto(tmp_path, port),
        gateway(tmp_path / "a", made) as first,
        gateway(tmp_path / "b", made) as second,
    ):
        both = (first, second)
        said = "does another client connect with the id edgegw-site-7"
        await until(lambda: any(run.said(said) for run in both), "one to suspect it", 120.0)
        await until(lambda: all(run.said(said) for run in both), "the other, too", 300.0)
        for run in both:
            assert sum(said in line for line in run.lines) == 1
            assert not run.said("crashed")
            await stop(run)


async def test_a_broker_that_says_that_the_session_was_taken_over_is_quoted(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            await read_packet(reader)
            writer.write(b"\x20\x03\x00\x00\x00")
            await read_packet(reader)
            writer.write(b"\xe0\x02\x8e\x00")
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with gateway(tmp_path, config(port, {"m": device(free_port())})) as run:
            said = (
                "another client connects with the id edgegw-site-7; is a second gateway of this id running?"
            )
            await until(lambda: run.said(f"{said}; records stay in the journal"), "the cause")
            await stop(run)


# -- brokers that map dots ---------------------------------------------------------------------------------


@needs_mosquitto
async def test_p10_a_command_arrives_where_the_broker_maps_dots_on_slashes(
    tmp_path: Path, meter: Field
) -> None:
    """As RabbitMQ does, which has one topic exchange for AMQP, where a dot separates levels, and MQTT."""
    port = free_port()
    async with LossyProxy(port) as way:
        way.rewrite = (b"edgegw/site.7/cmd", b"edgegw/site/7/cmd")
        made = config(way.port, {"m": device(meter.port)}) | {"gateway": {"id": "site.7"}}
        with (
            mosquitto(tmp_path, port),
            Subscriber(port, "edgegw/site.7/reply") as replies,
            gateway(tmp_path, made) as run,
        ):
            await until(lambda: run.said("online"), "the link")
            name = 0

            def answered() -> bool:  # until the gateway is subscribed
                nonlocal name
                name += 1
                publish(port, [("edgegw/site.7/cmd", command(f"c{name}", {"m.none": 1.0}))])
                return bool(replies.messages)

            await until(answered, "an answer")
            assert way.rewritten
            await stop(run)
