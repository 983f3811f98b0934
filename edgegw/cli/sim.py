"""`edgegw sim`: the simulated field alone, as config.example.toml expects it."""

import asyncio
import signal

import click


@click.command("sim")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--modbus-port", type=click.IntRange(1, 65532), default=5020, show_default=True,
    help="The meter's port; battery, solar and genset have the next three.",
)  # fmt: skip
@click.option(
    "--opcua-port",
    type=click.IntRange(1, 65535),
    default=4840,
    show_default=True,
    help="The OPC UA server's port.",
)
@click.option("--no-opcua", is_flag=True, help="Leave the OPC UA server out.")
@click.option(
    "--day", "day_s", type=click.FloatRange(min=10.0), default=3600.0, show_default=True,
    help="Seconds that sun and demand take for a day; 86400 is real time.",
)  # fmt: skip
@click.option(
    "--hour", type=click.FloatRange(0.0, 24.0, max_open=True), default=10.0, show_default=True,
    help="The hour of the simulated day to begin at.",
)  # fmt: skip
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of clouds and demand: same seed, same day."
)
def command(
    host: str, modbus_port: int, opcua_port: int, no_opcua: bool, day_s: float, hour: float, seed: int
) -> None:
    """Run the simulated field that config.example.toml expects.

    A meter with the grid's breaker, a battery, a solar inverter and a genset over Modbus TCP, and a weather
    station over OPC UA: one small microgrid whose powers balance, and which acts on what is written to it.
    Prints a line for each endpoint and then `ready`; runs until SIGINT or SIGTERM. SIGUSR1 makes the grid's
    frequency dip for a few seconds.
    """
    from edgegw.sim import field

    def ready(lines: list[str]) -> None:
        click.echo("\n".join([*lines, "ready"]))

    async def run() -> None:
        serving = asyncio.ensure_future(
            field.serve(
                host=host,
                meter_port=modbus_port,
                battery_port=modbus_port + 1,
                solar_port=modbus_port + 2,
                genset_port=modbus_port + 3,
                opcua_port=None if no_opcua else opcua_port,
                day_s=day_s,
                hour=hour,
                seed=seed,
                ready=ready,
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, serving.cancel)
        await asyncio.wait([serving])
        if not serving.cancelled():
            serving.result()

    asyncio.run(run())
