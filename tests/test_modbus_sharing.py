"""Units behind one connection: turns at a gateway that serves one request at a time, and what dead units may cost."""

import asyncio
import itertools

import pytest
from field import Field, field, frame
from gateway_rig import until
from hypothesis import given, settings
from hypothesis import strategies as st
from serial_gateway import serial_gateway
from test_modbus_driver import config, drivers, scanned

from edgegw.config.schema import AnyDevice, ModbusDevice
from edgegw.drivers.modbus.probes import Probes
from edgegw.errors import NoAnswer
from edgegw.scan.schedule import SHARED_SPREAD_MAX_S, SPREAD_S, first_delays

# ---- when a failing unit may be asked, as a pure function of time

REQUEST, REFUSED = b"\x03\x02\x00\x07", b"\x83\x02"
SILENT = b"\x83\x0b"


def may_ask(probes: Probes, unit: int, now_s: float) -> bool:
    """Tell whether a unit may be asked."""
    try:
        probes.check(unit, now_s)
    except NoAnswer:
        return False
    return True


@settings(deadline=None)
@given(failing=st.integers(1, 60), occupied_s=st.floats(0.1, 120.0), by_gateway=st.booleans())
def test_failing_units_occupy_a_bounded_share_of_the_connection(
    failing: int, occupied_s: float, by_gateway: bool
) -> None:
    """Each asks whenever it may; a healthy unit answers at once. Time is simulated."""
    probes = Probes()
    probes.heard(200, REQUEST, 0.0, 0.0)
    now_s = occupied = 0.0
    asked = dict.fromkeys(range(failing), 0)
    while now_s < 20 * occupied_s * (20 + 5 * failing):
        ready = [unit for unit in asked if may_ask(probes, unit, now_s)]
        for unit in ready:
            sent_s, now_s = now_s, now_s + occupied_s
            occupied += occupied_s
            asked[unit] += 1
            if by_gateway:
                probes.heard(unit, SILENT, now_s, sent_s)
            else:
                probes.failed(unit, "timeout", now_s, sent_s)
        if not ready:
            now_s = min(found.until_s for found in probes._failing.values())
    settling_s = occupied_s * failing * 6  # the first round, and pauses that have not doubled yet
    assert occupied <= now_s * 0.26 + settling_s
    if occupied_s <= 3.0 and failing <= 3:
        assert occupied <= now_s * 0.05 * failing + settling_s
    assert min(asked.values()) >= max(asked.values()) - 2, "each gets its share"
    pause_s = max(60.0, occupied_s * 4 * failing)
    assert min(asked.values()) >= now_s / (pause_s + occupied_s * failing) - 2, "none is forgotten"


def test_the_pauses_of_a_failing_unit_begin_short_and_end_with_its_first_answer() -> None:
    probes = Probes()
    probes.heard(2, REQUEST, 0.0, 0.0)
    now_s, pauses = 0.0, []
    for _ in range(5):
        probes.failed(1, "timeout", now_s + 1.0, now_s)
        until_s = probes._failing[1].until_s
        assert not may_ask(probes, 1, until_s - 0.001)
        assert may_ask(probes, 1, until_s)
        pauses.append(until_s - now_s - 1.0)
        now_s = until_s
    assert pauses == [4.0, 8.0, 16.0, 20.0, 20.0]
    probes.heard(1, REFUSED, now_s, now_s)
    assert may_ask(probes, 1, now_s), "a refusal is an answer"
    probes.failed(1, "timeout", now_s + 1.0, now_s)
    assert may_ask(probes, 1, now_s + 5.0)


def test_what_a_failing_unit_says_is_why_and_for_how_long() -> None:
    probes = Probes()
    probes.heard(2, REQUEST, 0.0, 0.0)
    probes.heard(1, SILENT, 2.0, 0.0)
    with pytest.raises(NoAnswer, match=r"no answer to 1 requests .* another 8 s") as caught:
        probes.check(1, 2.0)
    assert caught.value.reason == "gateway-target-silent"


def test_a_unit_has_no_pause_where_nobody_else_answers() -> None:
    probes = Probes()
    for unit in (1, 2):
        probes.heard(unit, REQUEST, 0.0, 0.0)
    probes.failed(1, "timeout", 1.0, 0.0)
    assert not may_ask(probes, 1, 1.0)
    probes.failed(2, "timeout", 2.0, 1.0)
    assert may_ask(probes, 1, 2.0)
    assert may_ask(probes, 2, 2.0)


def test_a_request_that_occupies_the_gateway_beyond_its_time_out_counts_as_long_as_it_does() -> None:
    probes = Probes()
    probes.heard(2, REQUEST, 0.0, 0.0)
    probes.failed(1, "timeout", 1.0, 0.0)
    probes.freed(1, 3.0, 0.0)
    assert not may_ask(probes, 1, 14.9)
    assert may_ask(probes, 1, 15.0)


# ---- when the first scans are due


def devices(*units: tuple[str, int, str]) -> dict[str, AnyDevice]:
    """Return devices of these urls, units and periods."""
    return {f"d{i:02}": config(url, unit=unit, every=every) for i, (url, unit, every) in enumerate(units)}


def test_units_of_one_url_begin_at_even_distances_within_their_period() -> None:
    shared = first_delays(devices(*[("tcp://10.0.0.1", unit, "10s") for unit in range(10)]))
    assert list(shared.values()) == pytest.approx(range(10))
    slow = first_delays(devices(*[("serial:///dev/ttyS0", unit, "15m") for unit in range(3)]))
    assert list(slow.values()) == pytest.approx([0, SHARED_SPREAD_MAX_S / 3, SHARED_SPREAD_MAX_S * 2 / 3])


def test_devices_with_a_connection_of_their_own_begin_soon() -> None:
    alone = first_delays(devices(*[(f"tcp://10.0.0.{i}", 1, "15m") for i in range(20)]))
    assert all(0 <= delay < SPREAD_S for delay in alone.values())
    assert len(set(alone.values())) > 15
    fast = first_delays(devices(*[(f"tcp://10.0.0.{i}", 1, "10ms") for i in range(20)]))
    assert all(0 <= delay < 0.01 for delay in fast.values())


# ---- a gateway that serves one request at a time


def units(port: int, numbers: range, **keys: str) -> list[ModbusDevice]:
    """Return the configurations of units behind a gateway."""
    return [config(f"tcp://127.0.0.1:{port}", unit=number, **keys) for number in numbers]


async def test_p6_a_slow_gateway_is_never_asked_twice_at_once() -> None:
    """Ten units, a quarter of a second each: the last has waited longer than its time-out before it is asked."""
    async with serial_gateway(0.25) as made, drivers(*units(made.port, range(1, 11), timeout="2s")) as ten:
        for n in (1, 2):
            scans = await asyncio.gather(*(scanned(driver) for driver in ten))
            assert [scan.values["n"] for scan in scans] == [n] * 10
        assert made.most == 1


async def test_a_time_out_begins_when_the_gateway_is_free_of_the_request_before() -> None:
    """The gateway still waits for a dead unit when its time-out is over here; the next unit is not to blame."""
    async with serial_gateway(0.6) as made:
        made.dead, made.dead_s = {9}, 1.6
        async with drivers(*units(made.port, range(8, 10), timeout="1s")) as (well, dead):
            asking = asyncio.create_task(scanned(dead))
            await until(lambda: made.asked[9], "the dead unit to be asked")
            assert (await scanned(well)).values == {"n": 1}
            assert made.asked[8][0] - made.asked[9][0] < 1.5, "it was sent when the other's time-out was over"
            await asyncio.wait([asking])
            assert isinstance(asking.exception(), NoAnswer)


async def test_a_late_answer_of_a_cancelled_request_frees_the_gateway_too() -> None:
    async with (
        serial_gateway(0.8) as made,
        drivers(*units(made.port, range(1, 3), timeout="1s")) as (one, two),
    ):
        scan = asyncio.create_task(scanned(one))
        await until(lambda: made.asked[1], "the request")
        scan.cancel()
        await asyncio.wait([scan])
        assert (await scanned(two)).values == {"n": 1}


async def test_a_request_that_is_never_answered_delays_the_next_ones_time_out_once() -> None:
    """What a gateway has forgotten does not postpone time-outs for ever."""
    async with field() as made:
        made.behave.update({1: made.silent, 2: made.silent})
        async with drivers(*units(made.port, range(1, 4), timeout="200ms")) as (one, two, three):
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            with pytest.raises(NoAnswer):
                await scanned(one)
            with pytest.raises(NoAnswer, match=r"no answer in 0\.2 s"):
                await scanned(two)
            assert loop.time() - began_s >= 0.59, "its own time-out begins one time-out later"
            assert (await scanned(three)).values == {"n": 1}


async def test_a_late_answer_is_never_taken_for_the_awaited_one() -> None:
    async with field() as made:
        late: list[bytes] = []

        async def keep(tid: int, unit: int, pdu: bytes) -> None:
            late.append(frame(tid, unit, b"\x03\x04\xde\xad\xbe\xef"))

        async def late_first(tid: int, unit: int, pdu: bytes) -> bytes:
            (writer,) = made._writers
            writer.write(late[0])
            await asyncio.sleep(0.01)
            return await Field.well(made, tid, unit, pdu)

        made.behave.update({1: keep, 2: late_first})
        async with drivers(*units(made.port, range(1, 3), timeout="100ms")) as (one, two):
            with pytest.raises(NoAnswer):
                await scanned(one)
            assert (await scanned(two)).values == {"n": 1}
        assert made.connections == 1


async def test_requests_to_dead_units_leave_most_of_the_gateway_to_the_others() -> None:
    """Two of four are dead, and each is asked as often as possible while the others are read on and on."""
    async with serial_gateway(0.01) as made:
        made.dead, made.dead_s = {3, 4}, 0.15
        async with drivers(*units(made.port, range(1, 5), timeout="2s")) as (one, two, *dead):
            for driver in (one, two):
                await scanned(driver)
            for _ in range(60):
                await asyncio.gather(*(scanned(driver) for driver in (one, two)))
                outcomes = await asyncio.gather(*(driver.scan() for driver in dead), return_exceptions=True)
                assert all(isinstance(outcome, NoAnswer) for outcome in outcomes)
            for unit in (3, 4):
                asked = made.asked[unit]
                assert 1 <= len(asked) <= 5
                assert all(b - a > 0.15 * 5 * 0.95 for a, b in itertools.pairwise(asked))
        assert made.most == 1
