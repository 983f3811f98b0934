"""The scanner with real drivers: how soon it reads a device that is back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from field import field
from gateway_rig import until
from rig import free_port
from test_modbus_driver import config
from test_opcua_driver import Field as OpcUaServer
from test_opcua_driver import config as opcua

from edgegw.config.schema import ModbusDevice, OpcUaDevice
from edgegw.domain.image import Image
from edgegw.domain.record import Record
from edgegw.drivers.registry import Drivers
from edgegw.scan import scanner as scanner_module
from edgegw.scan.scanner import Scanner


@asynccontextmanager
async def scanning(device: ModbusDevice | OpcUaDevice) -> AsyncIterator[Scanner]:
    """Run a scanner, and end it."""
    records: list[Record] = []
    made = Scanner("d", Drivers().make("d", device), records.append, Image(), lambda _: None)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scanner that leaves a failing device alone for a minute."""
    monkeypatch.setattr(scanner_module, "RETRY_FIRST_S", 120.0)
    monkeypatch.setattr(scanner_module, "RETRY_MOST_S", 120.0)


async def test_a_device_is_scanned_as_soon_as_it_is_connected_again() -> None:
    port = free_port()
    async with scanning(config(f"tcp://127.0.0.1:{port}", every="100ms")) as made:
        await until(lambda: made.state == "bad", "the device to be away")
        async with field(port):
            await until(lambda: made.state == "good", "it to be back")
        await until(lambda: made.state == "bad", "it to be away again")
        async with field(port):
            await until(lambda: made.state == "good", "it to be back")


@pytest.mark.parametrize("mode", ["poll", "subscribe"])
async def test_an_opc_ua_server_is_read_as_soon_as_it_is_connected_again(mode: str) -> None:
    server = OpcUaServer(free_port())
    try:
        async with scanning(opcua(server.url, mode=mode)) as made:
            await until(lambda: made.state == "bad", "the server to be away")
            await server.start()
            await until(lambda: made.state == "good", "it to be back")
            server.kill()
            await until(lambda: made.state == "bad", "it to be away again")
            await server.start()
            await until(lambda: made.state == "good", "it to be back")
    finally:
        server.kill()
