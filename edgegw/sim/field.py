"""The running plant, which the simulated servers share."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from edgegw import clock
from edgegw.errors import EdgegwError
from edgegw.sim import plant
from edgegw.sim.plant import State

TICK_S = 0.1
DIP_S = 4.0
"""How long the grid's frequency stays low after SIGUSR1."""


class ListenError(EdgegwError):
    """A simulated device cannot have its address."""

    def __init__(self, what: str, host: str, port: int, why: OSError) -> None:
        reason = os.strerror(why.errno).lower() if why.errno else str(why)
        super().__init__(
            f"sim.{what} ({host}:{port}): cannot listen: {reason}; expected a free port; "
            "stop what holds it, or choose another"
        )


class Field:
    """Hold the plant's state and let its time pass."""

    def __init__(self, state: State) -> None:
        self.state = state

    def dip(self, lasts_s: float) -> None:
        """Have the grid's frequency dip."""
        self.state = plant.dip(self.state, lasts_s)

    async def run(self) -> None:
        """Step the plant in real time until cancelled."""
        before_s = clock.mono_s()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = clock.mono_s()
            self.state = plant.step(self.state, now_s - before_s)
            before_s = now_s


async def serve(
    *,
    host: str = "127.0.0.1",
    meter_port: int = 5020,
    battery_port: int = 5021,
    solar_port: int = 5022,
    genset_port: int = 5023,
    opcua_port: int | None = 4840,
    day_s: float = 3600.0,
    hour: float = 10.0,
    seed: int = 1,
    ready: Callable[[list[str]], None] | None = None,
) -> None:
    """Simulate the site until cancelled; with `opcua_port` None there is no OPC UA server.

    SIGUSR1 makes the grid's frequency dip for a few seconds.
    `ready` is called with a line for each endpoint once all listen. Raises ListenError.
    """
    from edgegw.sim import modbus

    field = Field(plant.start(day_s=day_s, hour=hour, seed=seed))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, field.dip, DIP_S)
    ports = {"meter1": meter_port, "battery": battery_port, "solar": solar_port, "genset": genset_port}
    work: list[Callable[[], Coroutine[Any, Any, None]]] = [field.run]
    async with AsyncExitStack() as stack:
        lines = []
        for name, port in ports.items():
            await stack.enter_async_context(modbus.listening(field, name, host, port))
            lines.append(f"{name:<8} modbus tcp://{host}:{port} unit 1")
        if opcua_port is not None:
            from edgegw.sim import opcua

            work.append(await stack.enter_async_context(opcua.listening(field, host, opcua_port)))
            lines.append(f"{'plant':<8} opcua  opc.tcp://{host}:{opcua_port}/")
        if ready is not None:
            ready(lines)
        async with asyncio.TaskGroup() as tasks:
            for job in work:
                tasks.create_task(job())
