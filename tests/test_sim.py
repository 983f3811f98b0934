"""The simulated site: its physics, and its servers as clients see them."""

import asyncio
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asyncua import Client, ua
from pymodbus.client import AsyncModbusTcpClient

from edgegw.sim import field, plant, weather
from edgegw.sim.plant import Genset, State

EXAMPLE = Path(__file__).parent.parent / "config.example.toml"
DEADLINE_S = 60.0


def after(state: State, seconds: float, dt_s: float = 0.1) -> State:
    for _ in range(round(seconds / dt_s)):
        state = plant.step(state, dt_s)
    return state


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


async def until(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    async with asyncio.timeout(deadline_s):
        while not (found := await condition()):  # noqa: ASYNC110  a device can only be asked again
            await asyncio.sleep(0.02)
    return found


CHANGES = {
    "as it is": {},
    "battery discharges": {"battery_setpoint_kw": 40.0},
    "battery charges": {"battery_setpoint_kw": -40.0},
    "genset runs": {"genset_start": True},
    "island": {"breaker": False},
    "island with a genset": {"breaker": False, "genset_start": True},
    "island with an empty battery": {"breaker": False, "stored_kwh": 0.0},
    "island with a full battery": {"breaker": False, "stored_kwh": plant.BATTERY_KWH},
    "solar limited": {"solar_limit": 0.2},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_power_balances_at_every_moment(changes: dict[str, Any]) -> None:
    state = replace(plant.start(day_s=600.0), **changes)
    for _ in range(300):
        state = plant.step(state, 0.1)
        sources = state.grid_kw + state.solar_kw + state.battery_kw + state.genset_kw
        assert sources == pytest.approx(state.load_kw, abs=1e-9)
        assert 0.0 <= state.soc <= 1.0
        assert abs(state.battery_kw) <= plant.BATTERY_KW
        if not state.breaker:
            assert state.grid_kw == 0.0


def test_the_battery_loses_energy_on_a_round_trip() -> None:
    begin = plant.start()
    charged = after(replace(begin, battery_setpoint_kw=-40.0), 60.0)
    taken_kwh = charged.stored_kwh - begin.stored_kwh
    assert taken_kwh == pytest.approx(40.0 / 60.0 * plant.BATTERY_EFFICIENCY, rel=0.02)
    given = after(replace(charged, battery_setpoint_kw=40.0), 60.0)
    assert charged.stored_kwh - given.stored_kwh == pytest.approx(
        40.0 / 60.0 / plant.BATTERY_EFFICIENCY, rel=0.02
    )


def test_an_empty_battery_gives_nothing_and_a_full_one_takes_nothing() -> None:
    empty = after(replace(plant.start(), stored_kwh=0.0, battery_setpoint_kw=50.0), 2.0)
    assert (empty.battery_kw, empty.stored_kwh) == (0.0, 0.0)
    full = after(replace(plant.start(), stored_kwh=plant.BATTERY_KWH, battery_setpoint_kw=-50.0), 2.0)
    assert (full.battery_kw, full.stored_kwh) == (0.0, plant.BATTERY_KWH)


def test_the_genset_starts_with_a_delay_and_ramps_up() -> None:
    asked = replace(plant.start(), genset_start=True, genset_setpoint_kw=30.0)
    early = after(asked, plant.GENSET_START_S - 0.5)
    assert (early.genset, early.genset_kw) == (Genset.STARTING, 0.0)
    running = after(early, 1.5)
    assert running.genset is Genset.RUNNING
    assert 0.0 < running.genset_kw < 30.0
    assert after(running, 5.0).genset_kw == 30.0
    assert after(replace(running, genset_start=False), 0.1).genset is Genset.STOPPED


def test_an_empty_island_without_sun_is_dark() -> None:
    dark = after(replace(plant.start(hour=0.0), breaker=False, stored_kwh=0.0), 1.0)
    assert (dark.load_kw, dark.voltage_v, dark.frequency_hz) == (0.0, 0.0, 0.0)


def test_the_sun_shines_by_day_only_and_clouds_differ_with_the_seed() -> None:
    assert weather.sun(0.1) == weather.sun(0.9) == 0.0
    assert weather.sun(0.5) == pytest.approx(1.0)
    curves = [[weather.clouds(seed, t) for t in range(0, 600, 10)] for seed in (1, 1, 2)]
    assert curves[0] == curves[1] != curves[2]
    assert all(0.0 <= share <= 0.8 for share in curves[0])


def test_meter_values_stay_plausible_over_a_day() -> None:
    state = plant.start(day_s=400.0, hour=0.0)
    peak = 0.0
    for _ in range(800):
        state = plant.step(state, 0.5)
        peak = max(peak, state.grid_kw)
        assert 220.0 < state.voltage_v < 240.0
        assert 49.9 < state.frequency_hz < 50.1
        assert -100.0 < state.grid_kw < 150.0
    assert peak > 80.0
    assert state.import_kwh > 0.0


@pytest.fixture
async def ports() -> AsyncIterator[dict[str, int]]:
    names = ["meter_port", "battery_port", "solar_port", "genset_port"]
    ports = dict(zip(names, free_ports(4), strict=True))
    listening = asyncio.Event()
    serving = asyncio.create_task(field.serve(**ports, opcua_port=None, ready=lambda _: listening.set()))
    async with asyncio.timeout(DEADLINE_S):
        await listening.wait()
    yield ports
    serving.cancel()
    await asyncio.wait([serving])
    assert serving.cancelled()


@pytest.fixture
async def battery(ports: dict[str, int]) -> AsyncIterator[AsyncModbusTcpClient]:
    client = AsyncModbusTcpClient("127.0.0.1", port=ports["battery_port"])
    assert await client.connect()
    yield client
    client.close()


def float_registers(value: float) -> list[int]:
    return AsyncModbusTcpClient.convert_to_registers(value, AsyncModbusTcpClient.DATATYPE.FLOAT32)


async def battery_power_w(client: AsyncModbusTcpClient) -> int:
    answer = await client.read_input_registers(1, count=2)
    power = client.convert_from_registers(answer.registers, client.DATATYPE.INT32)
    assert isinstance(power, int)
    return power


async def test_a_written_setpoint_moves_the_batterys_power_and_charge(battery: AsyncModbusTcpClient) -> None:
    before = (await battery.read_input_registers(0, count=1)).registers[0]
    assert await battery_power_w(battery) == 0
    assert not (await battery.write_registers(10, float_registers(50.0))).isError()

    async def at_setpoint() -> bool:
        return await battery_power_w(battery) == 50_000

    async def charge_fell() -> bool:
        return (await battery.read_input_registers(0, count=1)).registers[0] < before

    await until(at_setpoint)
    await until(charge_fell)
    assert (await battery.read_holding_registers(10, count=2)).registers == float_registers(50.0)


@pytest.mark.parametrize("wrong", [float("nan"), 50.1, -1e9, float("inf")])
async def test_a_setpoint_beyond_the_batterys_limits_is_refused(
    battery: AsyncModbusTcpClient, wrong: float
) -> None:
    answer = await battery.write_registers(10, float_registers(wrong))
    assert answer.isError()
    assert answer.exception_code == 3
    assert (await battery.read_holding_registers(10, count=2)).registers == float_registers(0.0)


async def test_what_is_not_there_is_refused(battery: AsyncModbusTcpClient) -> None:
    assert (await battery.read_input_registers(4, count=1)).exception_code == 2
    assert (await battery.read_holding_registers(0, count=1)).exception_code == 2
    assert (await battery.write_register(0, 1)).exception_code == 2


async def test_opening_the_breaker_over_modbus_makes_an_island(ports: dict[str, int]) -> None:
    client = AsyncModbusTcpClient("127.0.0.1", port=ports["meter_port"])
    assert await client.connect()
    assert (await client.read_coils(0, count=1)).bits[0] is True
    assert not (await client.write_coil(0, False)).isError()
    assert (await client.read_coils(0, count=1)).bits[0] is False

    async def no_power() -> bool:
        return (await client.read_holding_registers(2, count=2)).registers == [0, 0]

    await until(no_power)
    client.close()


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(field.ListenError, match=rf"meter1 \(127.0.0.1:{port}\): .*already in use"):
            await field.serve(meter_port=port, opcua_port=None)


def run_sim(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgegw", "sim", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def modbus_base() -> int:
    """Find a free port that is followed by three more."""
    while True:
        (base,) = free_ports(1)
        try:
            for port in range(base, base + 4):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return base


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_names_its_endpoints_and_stops_with_0(stop: signal.Signals) -> None:
    base = modbus_base()
    with run_sim("--no-opcua", "--modbus-port", str(base)) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        assert [line.split()[0] for line in lines] == ["meter1", "battery", "solar", "genset", "ready"]
        assert f"tcp://127.0.0.1:{base + 3}" in lines[3]
        process.send_signal(stop)
        assert process.wait(DEADLINE_S) == 0


def test_the_command_fails_with_1_when_a_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with run_sim("--no-opcua", "--modbus-port", str(port)) as process:
            _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in errors
    assert "Traceback" not in errors


async def test_every_tag_of_the_example_is_served_and_moves_where_it_should() -> None:
    devices = tomllib.loads(EXAMPLE.read_text())["device"]
    base, (opcua_port,) = modbus_base(), free_ports(1)
    with run_sim("--modbus-port", str(base), "--opcua-port", str(opcua_port)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "ready":
                break
        for offset, name in enumerate(["meter1", "battery", "solar", "genset"]):
            assert devices[name]["url"] == f"tcp://127.0.0.1:{5020 + offset}"
            await check_modbus(base + offset, devices[name]["tags"])
        await check_opcua(opcua_port, devices["plant"]["tags"])
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


async def check_modbus(port: int, tags: dict[str, dict[str, Any]]) -> None:
    client = AsyncModbusTcpClient("127.0.0.1", port=port)
    assert await client.connect()
    read = {
        "holding": client.read_holding_registers,
        "input": client.read_input_registers,
        "coil": client.read_coils,
    }
    sizes = {
        "bool": 1,
        "int16": 1,
        "uint16": 1,
        "int32": 2,
        "uint32": 2,
        "float32": 2,
        "uint64": 4,
        "string:12": 6,
    }
    for name, tag in tags.items():
        table, _, place = tag["address"].partition(":")
        answer = await read[table](int(place.partition(".")[0]), count=sizes[tag["type"]])
        assert not answer.isError(), name
    client.close()


async def check_opcua(port: int, tags: dict[str, dict[str, Any]]) -> None:
    kinds = {"float64": float, "bool": bool, "string": str, "float64[]": list}
    async with Client(f"opc.tcp://127.0.0.1:{port}/") as client:
        for tag in tags.values():
            read = await client.get_node(tag["address"]).read_data_value()
            assert read.StatusCode.is_good()
            assert type(read.Value.Value) is kinds[tag["type"]]
            assert read.SourceTimestamp is not None
        node = client.get_node(ua.NodeId.from_string("ns=2;s=Irradiance"))
        first = await node.read_value()

        async def moved() -> bool:
            return bool(await node.read_value() != first)

        await until(moved)
