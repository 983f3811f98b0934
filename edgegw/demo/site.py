"""The demo's site: where its parts listen, what each is started with, and the gateway's configuration."""

import json
import random
import socket
from pathlib import Path
from typing import NamedTuple

from edgegw.errors import EdgegwError

HOST = "127.0.0.1"
GATEWAY = "demo-site"
MQTT = "3.1.1"
"""All that the demo's broker speaks."""
COMMIT_INTERVAL_MS = 250
MODBUS_PERIODS_MS = {"meter1": 500, "battery": 250, "solar": 500, "genset": 1000}
OPCUA_PERIODS_MS = {"plant": 500}
LOW_HZ, WELL_HZ = 49.8, 49.9
SUPPORT_KW = 30.0
SETPOINT = "battery.setpoint_kw"
"""What the battery gives while the grid's frequency is low and nobody upstream can ask for it."""
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below what the kernel gives to outgoing connections: one of those could take the broker's place."""


class DemoError(EdgegwError):
    """The demo cannot go on; what it says is about the demo, not a verdict on the gateway."""


class Site(NamedTuple):
    """A site in a folder: seven neighbouring ports of the loopback, from `port` on."""

    folder: Path
    port: int
    opcua: bool
    island_after: str

    @property
    def broker_port(self) -> int:
        """Where the broker listens."""
        return self.port + 5

    @property
    def status_url(self) -> str:
        """Where the gateway tells its state."""
        return f"http://{HOST}:{self.port + 6}/api/status"

    @property
    def database(self) -> Path:
        """The receiver's database."""
        return self.folder / "received.db"

    @property
    def journal(self) -> Path:
        """The gateway's journal."""
        return self.folder / "journal.db"

    @property
    def periods_ms(self) -> dict[str, int]:
        """How often each device is polled."""
        return MODBUS_PERIODS_MS | (OPCUA_PERIODS_MS if self.opcua else {})

    def commands(self) -> dict[str, list[str]]:
        """Return what follows the interpreter on each part's command line."""
        edgegw = ["-m", "edgegw"]
        sim = ["sim", "--modbus-port", str(self.port), "--opcua-port", str(self.port + 4)]
        return {
            "sim": [*edgegw, *sim, *([] if self.opcua else ["--no-opcua"])],
            "broker": ["-m", "edgegw.demo.broker", str(self.broker_port)],
            "gateway": [*edgegw, "run", "-c", str(self.folder / "config.toml")],
            "receiver": [
                *edgegw, "receive", "--url", f"mqtt://{HOST}:{self.broker_port}", "--topic", "edgegw/#",
                "--to", f"sqlite:///{self.database}", "--protocol", MQTT, "--json",
            ],
        }  # fmt: skip

    def config(self) -> str:
        """Return the gateway's configuration."""
        devices = (_METER, _BATTERY, _SOLAR, _GENSET)
        text = _GATEWAY.format(
            gateway=GATEWAY,
            journal=json.dumps(str(self.journal)),
            commit_interval=COMMIT_INTERVAL_MS,
            broker=f"mqtt://{HOST}:{self.broker_port}",
            mqtt=MQTT,
            island_after=self.island_after,
            http=f"{HOST}:{self.port + 6}",
        )
        for at, (name, tags) in enumerate(zip(MODBUS_PERIODS_MS, devices, strict=True)):
            url = f"tcp://{HOST}:{self.port + at}"
            text += _DEVICE.format(name=name, driver="modbus", url=url, every=MODBUS_PERIODS_MS[name])
            text += f"[device.{name}.tags]\n{tags}"
        if self.opcua:
            url = f"opc.tcp://{HOST}:{self.port + 4}/"
            text += _DEVICE.format(name="plant", driver="opcua", url=url, every=OPCUA_PERIODS_MS["plant"])
            text += f'mode = "poll"\ntimestamp = "gateway"\n[device.plant.tags]\n{_PLANT}'
        text += _RULE
        return text


def free_port() -> int:
    """Return a port that is free together with the six above it."""
    for first in random.sample(range(_FIRST_PORT, _LAST_PORT, 8), 50):
        if all(_is_free(port) for port in range(first, first + 7)):
            return first
    raise DemoError(f"demo: no seven neighbouring ports of {HOST} are free in {_FIRST_PORT}-{_LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


_RULE = f"""
[rule.support]
when    = "meter1.frequency < {LOW_HZ}"
until   = "meter1.frequency > {WELL_HZ}"
link    = "offline"
do      = {{ "{SETPOINT}" = {SUPPORT_KW} }}
finally = {{ "{SETPOINT}" = 0.0 }}
"""

_GATEWAY = """\
[gateway]
id = "{gateway}"

[journal]
path = {journal}
commit_interval = "{commit_interval}ms"
keep = "24h"

[uplink]
url = "{broker}"
protocol = "{mqtt}"
reconnect_jitter = "0s"
island_after = "{island_after}"

[status]
http = "{http}"
"""

_DEVICE = """
[device.{name}]
driver = "{driver}"
url = "{url}"
every = "{every}ms"
"""

_METER = """\
voltage   = { address = "holding:0", type = "float32", unit = "V" }
power_kw  = { address = "holding:2", type = "float32", unit = "kW", scale = 0.001 }
frequency = { address = "holding:4", type = "float32", unit = "Hz" }
breaker   = { address = "coil:0", type = "bool" }
"""

_BATTERY = """\
soc         = { address = "input:0", type = "uint16", unit = "%", scale = 0.1 }
power_kw    = { address = "input:1", type = "int32", unit = "kW", scale = 0.001 }
temperature = { address = "input:3", type = "int16", unit = "°C", scale = 0.1 }
setpoint_kw = { address = "holding:10", type = "float32", writable = true, min = -50.0, max = 50.0, safe = 0.0 }
"""

_SOLAR = """\
power_kw   = { address = "input:0", type = "uint32", order = "CDAB", unit = "kW", scale = 0.001 }
energy_kwh = { address = "input:2", type = "uint64", order = "CDAB", unit = "kWh", scale = 0.001 }
"""

_GENSET = """\
state    = { address = "input:0", type = "uint16" }
power_kw = { address = "input:1", type = "float32", unit = "kW" }
fuel     = { address = "input:3", type = "uint16", unit = "%", scale = 0.1 }
"""

_PLANT = """\
irradiance         = { address = "ns=2;s=Irradiance", type = "float64", unit = "W/m2" }
module_temperature = { address = "ns=2;s=ModuleTemperature", type = "float64", unit = "°C" }
"""
