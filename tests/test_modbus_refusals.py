"""What a device refuses, on real servers that count requests: holes, limits, a slow start, wrong lengths, hang-ups."""

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import pytest
from field import Answer, Field, field, frame
from pymodbus.simulator import DataType, SimData, SimDevice
from test_modbus_driver import FAR, config, drivers, scanned, served

from edgegw.drivers.modbus import driver as driver_module
from edgegw.drivers.modbus.read_plan import PATIENCE, SAMPLES
from edgegw.errors import BadAnswer, NoAnswer, NotConnected

ROW = {f"r{i}": {"address": f"holding:{i}", "type": "uint16"} for i in range(120)}
GAPPED = {name: tag for name, tag in list(ROW.items())[:100] if name not in ("r40", "r41", "r42")}
Refuses = Callable[[int, int], bool]
"""(first register, number of registers) to whether a read is refused."""


def touches(*holes: int) -> Refuses:
    """Return what refuses reads of registers that are not there."""
    return lambda start, count: any(start <= hole < start + count for hole in holes)


def refusing(made: Field, refuses: Refuses, code: int = 2) -> Answer:
    """Return a device that holds each register's address in it, and refuses some reads with an exception."""
    refuse = made.exception(code)

    async def answer(tid: int, unit: int, pdu: bytes) -> bytes | None:
        start, count = struct.unpack(">HH", pdu[1:5])
        if refuses(start, count):
            return await refuse(tid, unit, pdu)
        data = struct.pack(f">{count}H", *range(start, start + count))
        return frame(tid, unit, bytes((pdu[0], len(data))) + data)

    return answer


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the driver has logged, without the place."""
    return [line.getMessage().split("): ", 1)[1] for line in caplog.records if "drivers.modbus" in line.name]


TOGETHER = "since it refuses to read some of them together"


@pytest.mark.parametrize(
    ("tags", "refuses", "code", "bad", "first", "then", "line"),
    [
        (GAPPED, touches(40, 41, 42), 2, (), 15, 2, f"97 tags in 2 reads now, {TOGETHER}"),
        (GAPPED, touches(41), 4, (), 15, 2, f"97 tags in 2 reads now, {TOGETHER}"),
        (ROW, touches(7), 2, ("r7",), 15, 3, "120 tags in 3 reads now; it refuses r7"),
        (ROW, touches(7), 4, ("r7",), 15, 3, "120 tags in 3 reads now; it refuses r7"),
        (ROW, lambda _, count: count > 60, 3, (), 3, 2, f"120 tags in 2 reads now, {TOGETHER}"),
        (ROW, lambda _, count: count > 1, 3, (), 243, 120, f"120 tags in 120 reads now, {TOGETHER}"),
    ],
    ids=["hole", "hole by exception 4", "no such tag", "no such tag by exception 4", "limit", "singly"],
)
async def test_p6_a_refusal_costs_no_good_value_and_few_requests(
    caplog: pytest.LogCaptureFixture, tags: Any, refuses: Refuses, code: int, bad: tuple[str, ...], first: int,
    then: int, line: str,
) -> None:  # fmt: skip
    expected = {name: None if name in bad else int(name[1:]) for name in tags}
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", tags)) as (driver,):
        made.behave[1] = refusing(made, refuses, code)
        requests = []
        for _ in range(5):
            made.requests.clear()
            scan = await scanned(driver)
            assert scan.values == expected
            assert set(scan.quality or {}) == set(bad)
            requests.append(len(made.requests))
        assert requests[0] <= first
        assert requests[2:] == [then] * 3
    assert told(caplog) == [line]


async def test_a_hole_of_a_real_server_is_read_around() -> None:
    """pymodbus refuses every read that touches registers 4 and 5."""
    holed = SimDevice(
        1,
        [
            SimData(0, values=[10, 11, 12, 13], datatype=DataType.REGISTERS),
            SimData(6, values=[16, 17], datatype=DataType.REGISTERS),
        ],
    )
    asked: list[tuple[int, int]] = []

    def saw(sending: bool, pdu: Any) -> Any:
        if not sending:
            asked.append((pdu.address, pdu.count))
        return pdu

    tags = {f"r{i}": {"address": f"holding:{i}", "type": "uint16"} for i in range(8)}
    async with (
        served(holed, trace_pdu=saw) as (_, port, _),
        drivers(config(f"tcp://127.0.0.1:{port}", tags)) as (driver,),
    ):
        for _ in range(3):
            scan = await scanned(driver)
            assert scan.values == {f"r{i}": None if i in (4, 5) else 10 + i for i in range(8)}
            assert scan.quality == {"r4": "bad:illegal-address", "r5": "bad:illegal-address"}
    assert asked[-6:] == [(0, 4), (4, 2), (6, 2)] * 2


@pytest.mark.parametrize("code", [1, 2, 3, 4])
async def test_a_device_that_refuses_everything_while_it_starts_is_read_in_one_afterwards(
    caplog: pytest.LogCaptureFixture, code: int
) -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):
        made.behave[1] = refusing(made, lambda *_: True, code)
        requests = []
        for _ in range(4):
            made.requests.clear()
            scan = await scanned(driver)
            assert set(scan.quality or {}) == set(ROW)
            requests.append(len(made.requests))
        assert requests == [PATIENCE + SAMPLES, 2, 2, 2]
        made.behave[1] = refusing(made, lambda *_: False)
        for _ in range(3):
            made.requests.clear()
            scan = await scanned(driver)
            assert scan.quality is None
            assert len(made.requests) == 1
    (line,) = told(caplog)
    assert line == "120 tags in 1 read now; it refuses r0, r1, r10, r100, r101 and 115 more"


async def test_a_busy_device_is_not_searched() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):
        made.behave[1] = refusing(made, lambda *_: True, 6)
        assert set((await scanned(driver)).quality.values()) == {"bad:busy"}
        assert len(made.requests) == 1


async def test_a_device_that_fails_in_the_middle_of_a_search_is_searched_again() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):
        made.behave[1] = refusing(made, touches(7))
        await scanned(driver)
        answer = refusing(made, touches(50))

        async def ends(tid: int, unit: int, pdu: bytes) -> bytes | None:
            return None if len(made.requests) > 4 else await answer(tid, unit, pdu)

        driver._plan.forget()
        made.behave[1] = ends
        made.requests.clear()
        with pytest.raises(NoAnswer):
            await scanned(driver)
        made.behave[1] = answer
        for _ in range(2):
            assert (await scanned(driver)).quality == {"r50": "bad:illegal-address"}


async def test_everything_is_tried_again_after_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    """Another device, or a new firmware, that has no holes."""
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):
        made.behave[1] = refusing(made, touches(7))
        for _ in range(2):
            await scanned(driver)

        async def hangs_up(tid: int, unit: int, pdu: bytes) -> None:
            made.drop_connections()

        made.behave[1] = hangs_up
        with pytest.raises(NotConnected):
            await scanned(driver)
        made.behave[1] = refusing(made, lambda *_: False)
        made.requests.clear()
        driver._log_after_s = 0.0
        assert (await scanned(driver)).quality is None
        assert len(made.requests) == 1
    assert told(caplog)[1:] == ["120 tags in 1 read now"]


async def test_everything_is_tried_again_after_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour later nothing has changed, and nothing is said; then the hole is filled."""
    now_s = 1000.0
    monkeypatch.setattr(driver_module.clock, "mono_s", lambda: now_s)
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):
        made.behave[1] = refusing(made, touches(7))
        for _ in range(2):
            await scanned(driver)
        now_s += 3600
        for n in (15, 3, 3):
            made.requests.clear()
            assert (await scanned(driver)).quality == {"r7": "bad:illegal-address"}
            assert len(made.requests) == n
        made.behave[1] = refusing(made, lambda *_: False)
        assert (await scanned(driver)).quality is None
        made.requests.clear()
        await scanned(driver)
        assert len(made.requests) == 1
    assert told(caplog) == ["120 tags in 3 reads now; it refuses r7", "120 tags in 1 read now"]


async def test_what_comes_and_goes_is_said_once_a_minute_at_most(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(driver_module.clock, "mono_s", lambda: now_s)
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):
        for n in range(75):
            now_s += 1
            made.behave[1] = refusing(made, lambda *_: n % 10 < 5, 4)  # noqa: B023
            await scanned(driver)
    assert len(told(caplog)) == 2


# ---- an answer of the wrong length


async def test_p6_an_answer_of_the_wrong_length_harms_what_was_asked_only() -> None:
    """Some servers answer a read out of range with no data at all."""

    async with field() as made:
        well = refusing(made, lambda *_: False)

        async def answer(tid: int, unit: int, pdu: bytes) -> bytes | None:
            start, count = struct.unpack(">HH", pdu[1:5])
            return frame(tid, unit, b"\x03\0") if start + count > 100 else await well(tid, unit, pdu)

        made.behave[1] = answer
        tags = dict(list(ROW.items())[:101]) | {"far": {"address": "holding:900", "type": "uint16"}}
        async with drivers(config(f"tcp://127.0.0.1:{made.port}", tags)) as (driver,):
            for _ in range(3):
                made.requests.clear()
                scan = await scanned(driver)
                assert scan.quality == {"r100": "bad:wrong-length", "far": "bad:wrong-length"}
                assert [scan.values[f"r{i}"] for i in range(100)] == list(range(100))
            assert len(made.requests) == 3
        assert made.connections == 1


async def test_a_device_of_which_every_answer_has_a_wrong_length_is_bad() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", ROW)) as (driver,):

        async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
            return frame(tid, unit, b"\x03\0")

        made.behave[1] = answer
        requests = []
        for _ in range(3):
            made.requests.clear()
            with pytest.raises(BadAnswer) as caught:
                await scanned(driver)
            assert caught.value.reason == "wrong-length"
            requests.append(len(made.requests))
        assert requests == [PATIENCE + SAMPLES, 2, 2], "it is searched once"


# ---- a device that closes the connection after each answer


async def test_p6_a_device_that_hangs_up_after_each_answer_is_read_block_by_block() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", FAR)) as (driver,):

        async def once(tid: int, unit: int, pdu: bytes) -> None:
            answer = await refusing(made, lambda *_: False)(tid, unit, pdu)
            for writer in list(made._writers):
                writer.write(answer or b"")
                writer.close()

        made.behave[1] = once
        for _ in range(4):
            made.requests.clear()
            scan = await scanned(driver)
            assert scan.values == {f"n{i}": 200 * i for i in range(5)}
            assert scan.quality is None
            assert {pdu for _, pdu in made.requests} == {struct.pack(">BHH", 3, 200 * i, 1) for i in range(5)}


async def test_a_device_that_hangs_up_without_an_answer_is_asked_twice_only() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}", FAR)) as (driver,):
        await scanned(driver)
        made.requests.clear()

        async def hangs_up(tid: int, unit: int, pdu: bytes) -> bytes | None:
            if pdu[1:3] == b"\0\0":
                return await made.well(tid, unit, pdu)
            made.drop_connections()
            return None

        made.behave[1] = hangs_up
        with pytest.raises(NotConnected):
            async with asyncio.timeout(10):
                await scanned(driver)
        assert [pdu[1:3] for _, pdu in made.requests] == [b"\0\0", b"\0\xc8", b"\0\xc8"]
