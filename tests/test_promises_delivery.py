"""Promises 1, 2 and 3 on the real process, with a real broker and a real field."""

import asyncio
import itertools
import json
import random
import signal
import statistics
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from field import Field, field
from gateway_rig import Message, Proxy, Subscriber, config, device, gateway, journal_head, union, until
from rig import Process, free_port, mosquitto, needs_mosquitto, needs_strace

KILLS = 8


def counted(records: list[dict], name: str = "meter1") -> list[int]:
    """Return the field's own count out of each scan, in the order of the records."""
    return [r["values"]["n"] for r in records if r.get("device") == name and "values" in r]


async def stopped(process: Process) -> None:
    process.send(signal.SIGTERM)
    code, _ = await asyncio.to_thread(process.end)
    assert code == 0, process.lines


@needs_strace
async def test_p1_a_batch_is_on_the_disk_before_it_is_published(tmp_path: Path) -> None:
    """Every fdatasync is delayed: no batch may reach the broker before the one for its commit has returned."""
    port = free_port()
    async with field() as meter:
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            strace = (
                "strace",
                "-D",
                "-f",
                "-qq",
                "-e",
                "trace=fdatasync",
                "-e",
                "inject=fdatasync:delay_enter=400000",
            )
            run = gateway(tmp_path, config(port, {"meter1": device(meter.port)}), *strace, "-o", "/dev/null")
            with run:
                await until(lambda: len(seen.batches("data")) >= 3, "batches")
                ages = [m.at_ms - m.records[-1]["ts"] for m in seen.batches("data")]
                assert min(ages) > 400, ages
                await stopped(run)


async def test_p1_p2_killed_at_random_moments_no_seq_is_missing_or_used_twice(tmp_path: Path) -> None:
    port = free_port()
    moments = random.Random(7)
    lost_most = 0
    async with field() as meter:
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            made = config(port, {"meter1": device(meter.port, every="5ms")})
            for _ in range(KILLS):
                with gateway(tmp_path, made) as run:
                    before = len(seen.batches("data"))
                    await until(lambda before=before: len(seen.batches("data")) > before, "live batches")
                    await asyncio.sleep(moments.random() * 0.3)
                    run.send(signal.SIGKILL)
                    answered = meter.counts[1]
                    await asyncio.to_thread(run.end)
                newest = max(counted(union(seen.batches()).records()), default=0)
                lost_most = max(lost_most, answered - newest)
            with gateway(tmp_path, made) as run:
                before = len(seen.batches("data"))
                await until(lambda: len(seen.batches("data")) > before + 1, "live batches")
                await stopped(run)
            await until(lambda: union(seen.batches()).covered.covers(1, journal_head(tmp_path)), "all seqs")
    got = union(seen.batches())
    assert got.chain.intact, got.chain
    counts = counted(got.records())
    assert counts == sorted(set(counts)), "a reading was numbered twice or out of order"
    # what a kill may cost: the readings of one commit interval (100 ms at 5 ms each), and some slack
    holes = [b - a - 1 for a, b in itertools.pairwise(counts)]
    assert sorted(holes)[-1] <= 45, sorted(holes)[-KILLS - 1 :]
    assert sum(1 for hole in holes if hole > 3) <= KILLS, "readings were lost without a kill"


async def test_p1_sigterm_loses_nothing(tmp_path: Path) -> None:
    port = free_port()
    async with field() as meter:
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            made = config(
                port, {"meter1": device(meter.port, every="5ms")}, journal={"commit_interval": "2s"}
            )
            with gateway(tmp_path, made) as run:
                await until(lambda: meter.counts[1] > 100, "scans")
                await stopped(run)
            await until(lambda: any("stop" in m.body.decode() for m in seen.batches()), "the last batch")
            counts = counted(union(seen.batches()).records())
    assert counts == list(range(1, len(counts) + 1))
    assert meter.counts[1] - len(counts) <= 1, "at most the scan that was on the wire is not recorded"


async def test_p2_after_outages_of_link_and_broker_the_union_is_complete(tmp_path: Path) -> None:
    port = free_port()
    async with field() as meter:
        with gateway(tmp_path, config(port, {"meter1": device(meter.port)})) as run:
            seen = []
            for _ in range(3):
                with mosquitto(tmp_path, port), Subscriber(port) as subscriber:
                    await until(lambda s=subscriber: len(s.batches("data")) >= 3, "live batches")
                    await until(
                        lambda s=subscriber, before=tuple(seen): complete_above(s, before), "the backlog"
                    )
                    seen += subscriber.batches()
                scans = meter.counts[1]
                await until(
                    lambda scans=scans: meter.counts[1] > scans + 10, "scans while the broker is away"
                )
            await stopped(run)
    got = union(seen)
    head = max(seq for seq in got.bodies)
    assert got.covered.prefix() >= head - 1
    assert got.chain.intact
    counts = counted(got.records())
    assert counts == list(range(1, len(counts) + 1))
    states = [event["state"] for event in got.events("link")]
    assert states[:3] == ["online", "offline", "online"], states


def complete_above(subscriber: Subscriber, earlier: Sequence[Message] = ()) -> bool:
    got = union([*earlier, *subscriber.batches()])
    return bool(got.bodies) and got.covered.prefix() >= max(got.bodies)


class MeanBroker:
    """Speaks enough MQTT 3.1.1 to accept publishes, and then does not acknowledge, or cuts."""

    def __init__(self, acknowledge: int, cut_after: int | None = None) -> None:
        self.acknowledge = acknowledge
        self.cut_after = cut_after
        self.publishes: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    def hang_up(self) -> None:
        """End what connections there are."""
        for writer in self._writers:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        mine = 0
        try:
            while True:
                kind, body = await self._packet(reader)
                if kind >> 4 == 1:
                    v5 = body[6] == 5
                    writer.write(b"\x20\x03\x00\x00\x00" if v5 else b"\x20\x02\x00\x00")
                elif kind >> 4 == 3:
                    size = struct.unpack(">H", body[:2])[0]
                    topic, mid = body[2 : 2 + size], body[2 + size : 4 + size]
                    self.publishes.append((topic, body[4 + size :]))
                    mine += 1
                    if self.cut_after is not None and mine >= self.cut_after:
                        return
                    if mine <= self.acknowledge:
                        writer.write(b"\x40\x02" + mid)
                elif kind >> 4 == 12:
                    writer.write(b"\xd0\x00")
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def _packet(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        kind = (await reader.readexactly(1))[0]
        length, shift = 0, 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return kind, await reader.readexactly(length)


@pytest.fixture
async def meter():
    async with field() as made:
        yield made


@pytest.mark.parametrize(("acknowledge", "cut_after"), [(10**9, 4), (3, 6), (0, 3)])
async def test_p2_cut_between_publish_and_puback_comes_again_as_the_same_bytes(
    tmp_path: Path, meter: Field, acknowledge: int, cut_after: int
) -> None:
    """The broker hangs up after a few publishes, the last of them unacknowledged; then a sound one takes over."""
    mean = MeanBroker(acknowledge, cut_after)
    server = await asyncio.start_server(mean.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = config(port, {"meter1": device(meter.port, every="20ms")}, uplink={"protocol": "3.1.1"})
    with gateway(tmp_path, made) as run:
        await until(lambda: mean.connections >= 4, "connections")
        server.close()
        mean.hang_up()
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            await until(lambda: len(seen.batches("data")) >= 3, "live batches")
            mean_batches = [p for topic, p in mean.publishes if not topic.endswith(b"status")]
            acked_there = {json.loads(p)["seq"] for p in mean_batches}
            await until(lambda: complete_above_of(seen, acked_there), "everything not acknowledged before")
            await stopped(run)
            got = union(seen.batches())
    sent_before = {json.loads(p)["seq"]: p for p in mean_batches}
    again = set(sent_before) & set(got.bodies)
    if acknowledge < 10**9:
        assert again, "what was not acknowledged must come again"
    for seq in again:
        assert sent_before[seq] == got.bodies[seq]
    everything = {**sent_before, **got.bodies}
    assert sorted(everything) == sorted(set(everything))
    first = 1
    for seq in sorted(everything):
        assert seq == first, "a seq is missing"
        first = seq + json.loads(everything[seq])["count"]


def complete_above_of(seen: Subscriber, elsewhere: set[int]) -> bool:
    """Tell whether the batches here and those seen elsewhere leave no hole."""
    bodies = {m.batch.seq: m.batch.count for m in seen.batches()}
    first = 1
    for seq in sorted(set(bodies) | elsewhere):
        if seq != first:
            return False
        if seq in bodies:
            first = seq + bodies[seq]
        else:
            following = sorted(s for s in set(bodies) | elsewhere if s > seq)
            if not following:
                return True
            first = following[0]
    return True


async def test_p2_a_broker_that_is_down_at_boot_gets_everything_later(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    with gateway(tmp_path, config(port, {"meter1": device(meter.port)})) as run:
        await until(lambda: meter.counts[1] > 20, "scans without a broker")
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            await until(lambda: len(seen.batches("data")) >= 2, "live batches")
            await until(lambda: complete_above(seen), "the backlog")
            await stopped(run)
            got = union(seen.batches())
    assert got.covered.prefix() >= max(got.bodies)
    assert counted(got.records())[0] == 1


async def test_p3_a_new_reading_arrives_within_two_commit_intervals_whatever_the_backlog(
    tmp_path: Path, meter: Field
) -> None:
    """A backlog is built, then a slow link comes back: live batches must not queue behind it."""
    port = free_port()
    many = {f"m{i}": device(meter.port, unit=i + 1, every="20ms") for i in range(10)}
    async with Proxy(port, bytes_s=200_000) as link:
        made = config(link.port, many, journal={"commit_interval": "500ms"}, uplink={"max_message": "8KiB"})
        with gateway(tmp_path, made) as run:
            await until(lambda: sum(meter.counts.values()) > 8_000, "a backlog", 60)
            with mosquitto(tmp_path, port), Subscriber(port) as seen:
                await until(lambda: len(seen.batches("backfill")) > 0, "the backlog to begin")
                await until(lambda: complete_above(seen), "the backlog", 60)
                await stopped(run)
                live, late = seen.batches("data"), seen.batches("backfill")
    assert sum(m.batch.count for m in late) > 5_000, "there was no backlog to speak of"
    during = [m for m in live if m.at_ms < late[-1].at_ms]
    ages = [m.at_ms - m.records[0]["ts"] for m in during]
    assert during, "no live batch came while the backlog drained"
    assert max(ages) < 2 * 500, (statistics.median(ages), max(ages))


async def test_p2_a_half_open_link_is_noticed_and_loses_nothing(tmp_path: Path, meter: Field) -> None:
    """A proxy goes silent without closing, as a dead radio link does; a way round it opens later."""
    broker_port = free_port()
    with mosquitto(tmp_path, broker_port), Subscriber(broker_port) as seen:
        async with Proxy(broker_port) as link:
            with gateway(tmp_path, config(link.port, {"meter1": device(meter.port)})) as run:
                await until(lambda: len(seen.batches("data")) >= 3, "live batches")
                link.frozen = True
                await until(lambda: run.said("records stay in the journal"), "the loss to be noticed", 60)
                link.frozen = False
                before = len(seen.batches("data"))
                await until(lambda: len(seen.batches("data")) > before + 2, "live batches again", 30)
                await until(lambda: complete_above(seen), "the backlog")
                await stopped(run)
    counts = counted(union(seen.batches()).records())
    assert counts == list(range(1, len(counts) + 1))


@needs_mosquitto
async def test_p2_acknowledge_subscriber_keeps_what_nobody_heard(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    made = config(port, {"meter1": device(meter.port)}, uplink={"acknowledge": "subscriber"})
    with mosquitto(tmp_path, port), gateway(tmp_path, made) as run:
        await until(lambda: run.said("nobody is subscribed"), "the refusal")
        await until(lambda: meter.counts[1] > 30, "scans")
        with Subscriber(port) as seen:
            await until(lambda: bool(seen.batches()) and complete_above(seen), "everything from seq 1", 40)
            assert counted(union(seen.batches()).records())[0] == 1
            await stopped(run)


async def test_p2_several_brokers_are_tried_in_order(tmp_path: Path, meter: Field) -> None:
    dead, port = free_port(), free_port()
    urls = [f"mqtt://127.0.0.1:{dead}", f"mqtt://127.0.0.1:{port}"]
    made = config(port, {"meter1": device(meter.port)}, uplink={"url": urls})
    with mosquitto(tmp_path, port), Subscriber(port) as seen, gateway(tmp_path, made) as run:
        await until(lambda: seen.batches("data"), "batches by the second broker")
        await stopped(run)
