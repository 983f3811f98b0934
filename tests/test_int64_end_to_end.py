"""Integers beyond what a double holds are exact: read, written and read back, journaled and queried."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import config as gateway_config
from gateway_rig import device, gateway, until
from pymodbus.simulator import DataType, SimData, SimDevice
from rig import Process, free_port
from test_modbus_driver import config, drivers, scanned, served
from test_opcua_write import Field, connected, field, shared_field

__all__ = ["field", "shared_field"]
COUNTERS = {
    "signed": {"address": "holding:0", "type": "int64"},
    "unsigned": {"address": "holding:4", "type": "uint64", "order": "CDAB"},
}


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**64 - 1])
async def test_modbus_registers_are_written_and_read_back_exactly(value: int) -> None:
    tag = "unsigned" if value >= 2**63 else "signed"
    registers = SimDevice(1, [SimData(0, values=[0] * 8, datatype=DataType.REGISTERS)])
    async with (
        served(registers) as (_, port, _),
        drivers(config(f"tcp://127.0.0.1:{port}", COUNTERS)) as (driver,),
    ):
        assert await driver.write(tag, value) == value
        assert (await scanned(driver)).values[tag] == value


@pytest.mark.parametrize("value", [2**53 + 1, 2**64 - 1])
async def test_an_opc_ua_node_is_written_and_read_back_exactly(field: Field, value: int) -> None:
    async with connected(field) as driver:
        assert await driver.write("uint64", value) == value
        (one,) = await driver.scan()
        assert one.values["uint64"] == value
    assert await field.writes() == [["UInt64", "UInt64", value]]


async def test_a_counter_stands_in_the_journal_as_the_device_has_it(tmp_path: Path) -> None:
    held = SimDevice(
        1,
        [
            SimData(0, values=[2**53 + 1], datatype=DataType.INT64),
            SimData(4, values=[0xFFFF] * 4, datatype=DataType.REGISTERS),
        ],
    )
    asked: list[Any] = []

    def seen(sending: bool, pdu: Any) -> Any:
        asked.append(pdu)
        return pdu

    async with served(held, trace_pdu=seen) as (_, port, _):
        made = gateway_config(free_port(), {"meter": device(port, tags=COUNTERS)})
        with gateway(tmp_path, made) as run:
            await until(lambda: len(asked) > 8, "a few scans")
            run.send(signal.SIGTERM)
            await asyncio.to_thread(run.end)
    words = ["journal", "query", "meter.signed", "meter.unsigned", "--json"]
    with Process(sys.executable, "-m", "edgegw", *words, "-c", str(tmp_path / "config.toml")) as query:
        code, out = await asyncio.to_thread(query.end)
    assert code == 0, query.lines
    found = {(row["tag"], row["value"]) for row in map(json.loads, out.splitlines())}
    assert found == {("signed", 2**53 + 1), ("unsigned", 2**64 - 1)}
