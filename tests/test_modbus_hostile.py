"""Modbus endpoints that send what nobody asked for: how much of it is looked at, and what it costs the neighbours."""

import asyncio
import time
from contextlib import AsyncExitStack

import pytest
from field import field
from gateway_rig import until
from hostile import hostile, mbap
from pymodbus.framer import FramerSocket
from test_modbus_driver import after_reconnecting, config, drivers, scanned
from test_scanner import scanning

from edgegw.drivers.modbus import tcp
from edgegw.drivers.modbus.rtu import RtuTransport
from edgegw.drivers.modbus.tcp import MAX_UNREQUESTED, TcpTransport
from edgegw.errors import DeviceError, NotConnected, Spoilt

TCP_KINDS = ["stream", "burst", "between", "garbage"]
SCANS = 30


async def skipped_beside(url: str | None) -> int:
    """Return how many scans a healthy device skips while it does SCANS, beside a device at this url."""
    async with AsyncExitStack() as stack:
        healthy = await stack.enter_async_context(field())
        if url is not None:
            await stack.enter_async_context(scanning(config(url, every="100ms", timeout="500ms")))
        url = f"tcp://127.0.0.1:{healthy.port}"
        made = await stack.enter_async_context(scanning(config(url, every="100ms", timeout="10s")))
        await until(lambda: made.scans + made.skipped >= SCANS, "the scans to be due", 60.0)
        return made.skipped


def counting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows with each attempt to connect."""
    attempts: list[float] = []
    connect = TcpTransport.connect

    async def counted(self: TcpTransport, timeout_s: float) -> None:
        attempts.append(time.monotonic())
        await connect(self, timeout_s)

    monkeypatch.setattr(TcpTransport, "connect", counted)
    return attempts


@pytest.mark.parametrize("kind", [*TCP_KINDS, "rtu_stream", "rtu_drip"])
async def test_p6_an_endpoint_that_sends_unasked_costs_a_neighbour_nothing(kind: str) -> None:
    """Against a run without it, since the machine may be busy."""
    alone = await skipped_beside(None)
    async with hostile(kind) as made:
        scheme = "rtu+tcp" if kind.startswith("rtu") else "tcp"
        beside = await skipped_beside(f"{scheme}://127.0.0.1:{made.port}")
    assert beside <= alone + SCANS // 3


@pytest.mark.parametrize("kind", TCP_KINDS)
async def test_few_frames_that_nobody_asked_for_are_looked_at_and_connections_become_rare(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = counting(monkeypatch)
    frames = 0
    decode = FramerSocket.decode

    def counted(self: FramerSocket, data: bytes) -> tuple[int, int, int, bytes]:
        nonlocal frames
        frames += 1
        return decode(self, data)

    monkeypatch.setattr(FramerSocket, "decode", counted)
    async with hostile(kind) as made, drivers(config(f"tcp://127.0.0.1:{made.port}")) as (driver,):
        answered = 0
        reasons: set[str] = set()
        began_s = time.monotonic()
        while time.monotonic() - began_s < 1.5:
            try:
                await driver.scan()
                answered += 1
            except DeviceError as error:
                reasons.add(error.reason)
            await asyncio.sleep(0.01)
        assert 1 <= len(attempts) <= 14, "by chance a wait may be short, but not each"
        assert ("garbage" if kind == "garbage" else "unrequested") in reasons
        assert frames <= len(attempts) * (MAX_UNREQUESTED + 1) + answered


@pytest.mark.parametrize("kind", ["rtu_stream", "rtu_drip"])
async def test_bytes_that_no_line_could_carry_end_a_connection_and_these_become_rare(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[float] = []
    connect = RtuTransport.connect

    async def counted(self: RtuTransport, timeout_s: float) -> None:
        attempts.append(time.monotonic())
        await connect(self, timeout_s)

    monkeypatch.setattr(RtuTransport, "connect", counted)
    async with hostile(kind) as made, drivers(config(f"rtu+tcp://127.0.0.1:{made.port}")) as (driver,):
        began_s = time.monotonic()
        reasons: set[str] = set()
        while time.monotonic() - began_s < 1.5:
            with pytest.raises(DeviceError) as caught:
                await driver.scan()
            reasons.add(caught.value.reason)
            await asyncio.sleep(0.01)
        assert "unrequested" in reasons
        assert 1 <= len(attempts) <= 14, "by chance a wait may be short, but not each"


async def test_frames_in_a_row_that_answer_nothing_end_the_connection_and_the_reason_is_told() -> None:
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}")) as (driver,):

        async def more(tid: int, unit: int, pdu: bytes) -> bytes:
            return mbap(0xFFFF) * MAX_UNREQUESTED + await made.well(tid, unit, pdu)

        made.behave[1] = more
        for n in range(1, 4):
            assert (await scanned(driver)).values == {"n": n}, "an answer ends the row"
        assert made.connections == 1

        async def too_many(tid: int, unit: int, pdu: bytes) -> bytes:
            return mbap(0xFFFF) + await more(tid, unit, pdu)

        made.behave[1] = too_many
        with pytest.raises(NotConnected, match="found 17 answers in a row to no request") as caught:
            await scanned(driver)
        assert caught.value.reason == "unrequested"
        assert not isinstance(caught.value, Spoilt), "no reason for a connection of its own"
        made.behave.clear()
        assert (await after_reconnecting(driver)).values


async def test_late_answers_are_no_reason_to_end_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that answers all but in time, for longer than unrequested frames would be borne."""
    monkeypatch.setattr(tcp, "MAX_UNREQUESTED", 2)
    async with field() as made:
        url = f"tcp://127.0.0.1:{made.port}"
        async with drivers(config(url, unit=1, timeout="40ms")) as (driver,):
            made.behave[1] = made.slow(0.06)
            for _ in range(6):
                with pytest.raises(DeviceError):
                    await driver._ask(await driver._ready(), driver._reads[0])
                await until(lambda: not driver._session.connection._wire._late, "the late answer")  # type: ignore[union-attr]
        assert made.connections == 1


async def test_a_connection_that_lasted_is_made_anew_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst now and then is no reason to stay away."""
    attempts = counting(monkeypatch)
    monkeypatch.setattr("edgegw.drivers.session.STABLE_AFTER_S", 0.0)
    async with field() as made, drivers(config(f"tcp://127.0.0.1:{made.port}")) as (driver,):

        async def burst(tid: int, unit: int, pdu: bytes) -> bytes:
            return mbap(0xFFFF) * 99

        for n in range(1, 5):
            made.behave.clear()
            assert (await scanned(driver)).values == {"n": n}
            made.behave[1] = burst
            with pytest.raises(NotConnected):
                await scanned(driver)
        assert len(attempts) == made.connections == 8
