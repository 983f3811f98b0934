"""Modbus TCP servers of the simulated devices."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from edgegw.sim import registers
from edgegw.sim.field import Field, ListenError
from edgegw.sim.registers import Point

_DEVICES = {
    "meter1": registers.METER,
    "battery": registers.BATTERY,
    "solar": registers.SOLAR,
    "genset": registers.GENSET,
}
_TABLES = {
    1: "coil", 5: "coil", 15: "coil", 2: "discrete", 4: "input",
    3: "holding", 6: "holding", 16: "holding", 22: "holding", 23: "holding",
}  # fmt: skip
"""Function codes and the table that each works on (Modbus Application Protocol 1.1b3, 6)."""


@asynccontextmanager
async def listening(field: Field, name: str, host: str, port: int) -> AsyncIterator[None]:
    """Serve a device as unit 1 as long as the context is entered; raise ListenError."""
    try:
        socket.create_server((host, port)).close()  # to learn why it cannot be had, which pymodbus only logs
    except OSError as error:
        raise ListenError(name, host, port, error) from error
    device = SimDevice(id=1, simdata=_blocks(_DEVICES[name]), action=_Device(field, _DEVICES[name]).access)
    server = ModbusTcpServer(device, address=(host, port))
    await server.serve_forever(background=True)
    try:
        yield
    finally:
        await server.shutdown()  # type: ignore[no-untyped-call]


def _blocks(points: tuple[Point, ...]) -> tuple[list[SimData], list[SimData], list[SimData], list[SimData]]:
    """Lay out the four tables; what lies between two points reads as 0, what lies beyond is refused."""
    tables = []
    for table in ("coil", "discrete", "holding", "input"):
        of_table = [point for point in points if point.table == table]
        if table in ("coil", "discrete"):
            tables.append([SimData(0, values=[False] * 16, datatype=DataType.BITS)])
        elif of_table:
            start = min(point.address for point in of_table)
            end = max(point.address + point.size for point in of_table)
            tables.append([SimData(start, values=[0] * (end - start), datatype=DataType.REGISTERS)])
        else:
            tables.append([SimData(0, datatype=DataType.INVALID)])
    return tables[0], tables[1], tables[2], tables[3]


class _Device:
    """Let requests see and change the plant."""

    def __init__(self, field: Field, points: tuple[Point, ...]) -> None:
        self._field = field
        self._points = points

    async def access(
        self,
        function_code: int,
        block_start: int,
        address: int,
        count: int,
        block: list[int],
        written: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        """Put the plant's values into the block before pymodbus reads it, or act on what a client writes.

        In a table of coils `block` holds 16 coils a word, and `address` counts coils.
        """
        table = _TABLES[function_code]
        points = [point for point in self._points if point.table == table]
        if written is not None:
            return self._write(points, block_start, address, block, written)
        for point in points:
            if point.format == "?":
                block[point.address // 16] &= ~(1 << point.address % 16)
                block[point.address // 16] |= int(bool(point.read(self._field.state))) << point.address % 16
            else:
                place = point.address - block_start
                block[place : place + point.size] = point.encode(self._field.state)
        return None

    def _write(
        self,
        points: list[Point],
        block_start: int,
        address: int,
        block: list[int],
        written: list[int] | list[bool],
    ) -> ExcCodes | None:
        state = self._field.state
        reach = range(address, address + len(written))
        touched = [p for p in points if p.address < reach.stop and p.address + p.size > reach.start]
        if not touched:
            return ExcCodes.ILLEGAL_ADDRESS
        for point in touched:
            if point.write is None:
                return ExcCodes.ILLEGAL_ADDRESS
            if point.format == "?":
                raw = float(written[point.address - address])
            else:
                words = point.encode(state)
                for place in set(reach) & set(range(point.address, point.address + point.size)):
                    words[place - point.address] = int(written[place - address])
                raw = point.decode(words)
            changed = point.write(state, raw)
            if changed is None:
                return ExcCodes.ILLEGAL_VALUE
            state = changed
        self._field.state = state
        return None
