"""Promises 4 and 6 on the real process: what hangs, lies or is dead changes nothing elsewhere."""

import asyncio
import itertools
import os
import signal
import statistics
from pathlib import Path

import pytest
from field import Answer, Field, field, frame
from gateway_rig import Subscriber, config, device, gateway, union, until
from rig import NO_DISK, Process, free_port, mosquitto, needs_strace
from serial_gateway import serial_gateway


def rss_mb(process: Process) -> float:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


async def stopped(process: Process) -> None:
    process.send(signal.SIGTERM)
    code, _ = await asyncio.to_thread(process.end)
    assert code == 0, process.lines


async def garbage(tid: int, unit: int, pdu: bytes) -> bytes:
    return os.urandom(64)


async def wrong_transaction(tid: int, unit: int, pdu: bytes) -> bytes:
    return frame((tid + 7) % 65536, unit, bytes((pdu[0], 4)) + b"\xde\xad\xbe\xef")


async def wrong_unit(tid: int, unit: int, pdu: bytes) -> bytes:
    return frame(tid, unit + 1, bytes((pdu[0], 8)) + b"\xde\xad\xbe\xef" * 2)


async def wrong_function(tid: int, unit: int, pdu: bytes) -> bytes:
    return frame(tid, unit, bytes((pdu[0] + 1, 8)) + b"\xde\xad\xbe\xef" * 2)


async def wrong_length(tid: int, unit: int, pdu: bytes) -> bytes:
    return frame(tid, unit, bytes((pdu[0], 4)) + b"\xde\xad\xbe\xef")


async def half(tid: int, unit: int, pdu: bytes) -> bytes:
    return frame(tid, unit, bytes((pdu[0], 8)) + b"\xde\xad\xbe\xef" * 2)[:9]


def behaviours(made: Field) -> dict[str, Answer]:
    return {
        "mute": made.silent,
        "slow": made.slow(2.0),
        "garbage": garbage,
        "wrong-transaction": wrong_transaction,
        "wrong-unit": wrong_unit,
        "wrong-function": wrong_function,
        "wrong-length": wrong_length,
        "half": half,
        "exception": made.exception(4),
        "busy": made.exception(6),
        "gateway-silent": made.exception(11),
    }


@pytest.mark.parametrize("shared", [False, True], ids=["own connection", "shared connection"])
@pytest.mark.parametrize("behaviour", list(behaviours(Field())))
async def test_p6_a_mean_device_changes_nothing_for_its_neighbours(
    tmp_path: Path, behaviour: str, shared: bool
) -> None:
    """Healthy units beside a mean one, behind other ports and behind the same one, keep their cadence."""
    async with field() as healthy, field() as other:
        mean = healthy if shared else other
        mean.behave[9] = behaviours(mean)[behaviour]
        devices = {f"well{i}": device(healthy.port, unit=i + 1, every="100ms") for i in range(4)}
        devices["mean"] = device(mean.port, unit=9, every="100ms")
        with gateway(tmp_path, config(free_port(), devices)) as run:
            await until(lambda: len(mean.asked[9]) >= 1 and len(healthy.asked[1]) > 5, "the first scans")
            before = [len(healthy.asked[i + 1]) for i in range(4)]
            await until(lambda: len(healthy.asked[1]) > before[0] + 30, "scans of a healthy device")
            since = [healthy.asked[i + 1][before[i] :] for i in range(4)]
            await stopped(run)
        pauses = [b - a for times in since for a, b in itertools.pairwise(times)]
        assert statistics.median(pauses) == pytest.approx(0.1, abs=0.02)
        # who shares a connection waits while the mean unit is asked, once in a while; and bytes that are no Modbus end
        # the connection for all
        waits = {"mute": 0.3, "slow": 0.3, "wrong-transaction": 0.3, "garbage": 0.25, "half": 0.6}
        worst = 0.35 + (waits.get(behaviour, 0.0) if shared else 0.0)
        assert max(pauses) < worst, sorted(pauses)[-5:]
        assert sum(pause > 0.2 for pause in pauses) <= len(pauses) / 5
        assert min(len(times) for times in since) > 20


async def test_p6_dead_units_behind_a_slow_gateway_leave_the_others_their_cadence(tmp_path: Path) -> None:
    """Ten units on one bus, two of them dead, for which the gateway needs as long as the time-out to say so."""
    port = free_port()
    async with serial_gateway(0.02) as bus:
        bus.dead, bus.dead_s = {9, 10}, 1.0
        devices = {f"u{i}": device(bus.port, unit=i, every="1s", timeout="1s") for i in range(1, 11)}
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, config(port, devices)) as run:
                await until(
                    lambda: min(bus.scans[i] for i in range(1, 9)) >= 14, "scans of the healthy units", 60
                )
                await stopped(run)
            got = union(seen.batches())
        asked = len(bus.asked[9]) + len(bus.asked[10])
        starts = [bus.asked[i][0] for i in range(1, 9)]
    assert {event["device"] for event in got.events("device-down")} == {"u9", "u10"}
    missed = [round(bus.asked[i][-1] - bus.asked[i][0]) + 1 - len(bus.asked[i]) for i in range(1, 9)]
    assert 2 <= asked <= 12
    assert max(missed) <= asked, "a dead unit costs a scan each time that it is asked, and no more"
    assert max(starts) - min(starts) > 0.3, "they do not begin together"


async def test_p6_every_unit_of_a_slow_bus_is_read(tmp_path: Path) -> None:
    """Half of the bus's time is used, and an answer takes half of the time-out."""
    port = free_port()
    async with serial_gateway(0.5) as bus:
        devices = {f"u{i}": device(bus.port, unit=i, every="5s", timeout="1s") for i in range(1, 6)}
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, config(port, devices)) as run:
                await until(lambda: min(bus.scans[i] for i in range(1, 6)) >= 2, "two scans of each", 30)
                await stopped(run)
            got = union(seen.batches())
    assert got.events("device-down") == []
    assert bus.most == 1


async def test_p6_dead_device_gives_one_record_and_one_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    async with field() as healthy:
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            devices = {"well": device(healthy.port), "ill": device(healthy.port, unit=2)}
            with gateway(tmp_path, config(port, devices)) as run:
                await until(lambda: healthy.counts[2] > 5, "scans of both")
                healthy.behave[2] = healthy.silent
                scans = len(healthy.asked[1])
                asked = len(healthy.asked[2])
                await until(lambda: len(healthy.asked[2]) > asked + 3, "more tries", 30)
                del healthy.behave[2]
                count = healthy.counts[2]
                await until(lambda: healthy.counts[2] > count + 3, "it to be back", 30)
                assert len(healthy.asked[1]) > scans + 10
                await stopped(run)
            got = union(seen.batches())
    statuses = [
        (r["status"], r.get("reason")) for r in got.records() if r.get("device") == "ill" and "status" in r
    ]
    assert statuses == [("bad", "timeout"), ("good", None)]
    assert [e["device"] for e in got.events("device-down")] == ["ill"]
    assert [e["device"] for e in got.events("device-up")] == ["ill"]


async def test_p6_no_answer_is_taken_for_another_requests(tmp_path: Path) -> None:
    """Answers that come after their time-out, of several units on one connection, are never used."""
    port = free_port()

    async def late_then_well(tid: int, unit: int, pdu: bytes) -> bytes:
        if len(made.asked[unit]) % 3 == 0:
            await asyncio.sleep(0.35)  # a little more than the time-out
        registers = unit.to_bytes(4, "big") + len(made.asked[unit]).to_bytes(4, "big")
        return frame(tid, unit, bytes((pdu[0], 8)) + registers)

    tags = {
        "unit": {"address": "holding:0", "type": "uint32"},
        "n": {"address": "holding:2", "type": "uint32"},
    }
    async with field() as made:
        for unit in (1, 2, 3):
            made.behave[unit] = late_then_well
        devices = {f"u{unit}": device(made.port, unit=unit, every="20ms", tags=tags) for unit in (1, 2, 3)}
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, config(port, devices)) as run:
                await until(lambda: min(len(made.asked[u]) for u in (1, 2, 3)) > 12, "late answers", 60)
                await stopped(run)
            records = [r for r in union(seen.batches()).records() if "values" in r]
    assert records
    for record in records:
        assert record["values"]["unit"] == int(record["device"][1:])
    for name in devices:
        counts = [r["values"]["n"] for r in records if r["device"] == name]
        assert counts == sorted(set(counts)), "an answer was used twice"


async def test_p6_a_hole_in_a_block_costs_its_own_tags_only(tmp_path: Path) -> None:
    async with field() as made:

        async def holed(tid: int, unit: int, pdu: bytes) -> bytes:
            start, count = int.from_bytes(pdu[1:3], "big"), int.from_bytes(pdu[3:5], "big")
            if start <= 4 < start + count:
                return frame(tid, unit, bytes((pdu[0] | 0x80, 2)))
            return await made.well(tid, unit, pdu)

        made.behave[1] = holed
        tags = {f"t{i}": {"address": f"holding:{i}", "type": "uint16"} for i in range(8)}
        port = free_port()
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, config(port, {"meter": device(made.port, tags=tags)})) as run:
                await until(lambda: len(seen.batches("data")) > 2, "batches")
                await stopped(run)
            record = next(r for r in union(seen.batches()).records() if "values" in r)
    assert record["quality"] == {"t4": "bad:illegal-address"}
    assert record["values"]["t4"] is None
    assert all(record["values"][f"t{i}"] is not None for i in range(8) if i != 4)


WIDE = {f"t{i:02}": {"address": f"holding:{2 * i}", "type": "float32"} for i in range(60)}


@pytest.mark.slow
async def test_p4_memory_does_not_grow_with_a_backlog_of_a_million_readings(tmp_path: Path) -> None:
    port = free_port()
    async with field() as made:
        devices = {f"m{i}": device(made.port, unit=i + 1, every="10ms", tags=WIDE) for i in range(16)}
        readings = lambda: 60 * sum(made.counts.values())  # noqa: E731
        with gateway(tmp_path, config(port, devices)) as run:
            await until(lambda: readings() > 150_000, "a small backlog", 60)
            small = rss_mb(run)
            await until(lambda: readings() > 1_050_000, "a million readings", 120)
            large = rss_mb(run)
            with mosquitto(tmp_path, port), Subscriber(port) as seen:
                peak = large
                got = 0
                while got < 1_000_000:
                    await until(
                        lambda got=got: sum(m.batch.count for m in seen.batches()) * 60 > got, "the drain"
                    )
                    got = sum(m.batch.count for m in seen.batches()) * 60
                    peak = max(peak, rss_mb(run))
                await until(lambda: union(seen.batches()).covered.prefix() > 17_000, "no hole")
                await stopped(run)
    print(
        f"rss with a small backlog {small:.0f} MB, a large one {large:.0f} MB, while draining at most {peak:.0f} MB"
    )
    assert large - small < 12
    assert peak - small < 40


async def test_p4_memory_does_not_grow_with_a_broker_that_never_acknowledges(tmp_path: Path) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x20\x02\x00\x00")
        while await reader.read(65536):
            pass
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with field() as made:
        devices = {f"m{i}": device(made.port, unit=i + 1, every="10ms", tags=WIDE) for i in range(8)}
        with gateway(tmp_path, config(port, devices, uplink={"protocol": "3.1.1"})) as run:
            await until(lambda: sum(made.counts.values()) > 3_000, "scans", 60)
            early = rss_mb(run)
            await until(lambda: sum(made.counts.values()) > 12_000, "more scans", 60)
            late = rss_mb(run)
            await stopped(run)
    server.close()
    assert late - early < 12, (early, late)


@needs_strace
async def test_p4_memory_is_bounded_while_the_disk_hangs(tmp_path: Path) -> None:
    """Each fdatasync takes five seconds: the inbox fills to its bound, and polling goes on."""
    strace = (
        "strace",
        "-D",
        "-f",
        "-qq",
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:delay_enter=5000000:when=4+",
    )
    async with field() as made:
        devices = {f"m{i}": device(made.port, unit=i + 1, every="10ms", tags=WIDE) for i in range(8)}
        with gateway(tmp_path, config(free_port(), devices), *strace, "-o", "/dev/null") as run:
            await until(lambda: sum(made.counts.values()) > 1_000, "scans", 60)
            marks = []
            for _ in range(3):
                count = sum(made.counts.values())
                await until(lambda count=count: sum(made.counts.values()) > count + 2_000, "scans go on", 60)
                marks.append(rss_mb(run))
            run.send(signal.SIGKILL)
    assert marks[-1] < 160, marks


async def test_p6_devices_are_polled_whatever_the_broker_and_the_journal_do(tmp_path: Path) -> None:
    """No broker, and a disk that takes nothing."""
    async with field() as made:
        with gateway(tmp_path, config(free_port(), {"meter": device(made.port)}), *NO_DISK) as run:
            await until(lambda: made.counts[1] > 20 and run.said("records wait in memory"), "scans")
            run.send(signal.SIGTERM)
            await asyncio.to_thread(run.end)
