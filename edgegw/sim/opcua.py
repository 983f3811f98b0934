"""OPC UA server of the simulated site's weather station and inverters."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any

from asyncua import ua
from asyncua.server.server import Server

from edgegw import clock
from edgegw.sim.field import Field, ListenError
from edgegw.sim.plant import State

NAMESPACE = "urn:edgegw:sim:plant"
PERIOD_S = 0.5
STRINGS = 4

_Node = tuple[str, ua.VariantType, Callable[[State], Any]]
_NODES: tuple[_Node, ...] = (
    ("Irradiance", ua.VariantType.Double, lambda s: s.irradiance_w_m2),
    ("ModuleTemperature", ua.VariantType.Double, lambda s: s.module_c),
    ("Cloudy", ua.VariantType.Boolean, lambda s: s.cloudy),
    ("Sky", ua.VariantType.String, lambda s: _sky(s)),
    ("StringPower", ua.VariantType.Double, lambda s: _string_power_w(s)),
)


def _sky(state: State) -> str:
    return "night" if state.irradiance_w_m2 <= 0.0 else "cloudy" if state.cloudy else "clear"


def _string_power_w(state: State) -> list[float]:
    """Share the solar power out over strings that face a little differently."""
    shares = [1.0 + 0.02 * (i - (STRINGS - 1) / 2) for i in range(STRINGS)]
    return [state.solar_kw * 1000.0 * share / sum(shares) for share in shares]


def _node(name: str, space: int) -> ua.NodeId:
    return ua.NodeId.from_string(f"ns={space};s={name}")


@asynccontextmanager
async def listening(
    field: Field, host: str, port: int
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Serve the site's nodes while entered; yield what must run to move them. Raises ListenError."""
    logging.getLogger("asyncua").setLevel(
        logging.CRITICAL
    )  # it logs a lost client and a taken port as errors
    server = Server()
    await server.init()
    server.set_endpoint(f"opc.tcp://{host}:{port}/")
    server.set_server_name("edgegw simulated plant")
    server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
    space = await server.register_namespace(NAMESPACE)
    folder = await server.nodes.objects.add_object(_node("Plant", space), ua.QualifiedName("Plant", space))
    for name, kind, read in _NODES:
        await folder.add_variable(
            _node(name, space), ua.QualifiedName(name, space), read(field.state), varianttype=kind
        )
    try:
        await server.start()
    except OSError as error:
        raise ListenError("plant", host, port, error) from error

    async def run() -> None:
        while True:
            at = ua.DateTime.fromtimestamp(clock.wall_ms() / 1000, UTC)
            for name, kind, read in _NODES:
                value = ua.Variant(read(field.state), kind)
                await server.write_attribute_value(
                    _node(name, space), ua.DataValue(value, SourceTimestamp=at, ServerTimestamp=at)
                )
            await asyncio.sleep(PERIOD_S)

    try:
        yield run
    finally:
        await server.stop()
