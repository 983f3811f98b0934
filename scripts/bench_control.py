"""Measures control's reaction: from the bytes of an answer to the bytes of the write, as the field sees them.

50 devices are scanned each 100 ms or so, and 100 rules read them. Now and then a device's value crosses its rule's
threshold; the time from sending that answer to receiving the write is one sample. Every fdatasync and fsync of the
gateway is delayed, as a stalling card delays it.
"""

import asyncio
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

DEVICES, RULES = 50, 100


class Device:
    """One device: register 0-1 its value, 2-3 and 4-5 its setpoints, all float32."""

    def __init__(self, samples: list[float], seed: int) -> None:
        self.samples = samples
        self.walk = random.Random(seed)
        self.value = 0.0
        self.until = time.monotonic() + 2.0 + self.walk.random() * 2.0
        self.crossed: float | None = None
        self.setpoints = [0.0, 0.0]

    def answer(self, pdu: bytes) -> bytes:
        """Return the answer to a request, noting what it shows or what was written."""
        now = time.monotonic()
        function, start = pdu[0], int.from_bytes(pdu[1:3], "big")
        if function == 16:
            if start == 2 and self.crossed is not None:
                self.samples.append(now - self.crossed)
                self.crossed = None
            self.setpoints[(start - 2) // 2] = struct.unpack(">f", pdu[6:10])[0]
            return pdu[:5]
        count = int.from_bytes(pdu[3:5], "big")
        if start == 0 and now >= self.until:
            self.value = 0.0 if self.value else 100.0
            self.until = now + 1.0 + self.walk.random()
            self.crossed = now
        data = struct.pack(">fff", self.value, *self.setpoints)[start * 2 : (start + count) * 2]
        return bytes((function, len(data))) + data


class Wire(asyncio.Protocol):
    """One connection to a device; a request is one segment."""

    device: Device

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        while data:
            length = int.from_bytes(data[4:6], "big")
            answer = self.device.answer(data[7 : 6 + length])
            header = data[:4] + struct.pack(">HB", len(answer) + 1, data[6])
            self._transport.write(header + answer)  # type: ignore[attr-defined]
            data = data[6 + length :]


def configuration(port: int, broker_port: int, every_ms: int) -> str:
    """Return the configuration of 50 devices and 100 rules, half of which look at two devices."""
    text = f'[gateway]\nid = "bench"\n[status]\nhttp = ""\n[uplink]\nurl = "mqtt://127.0.0.1:{broker_port}"\n'
    for i in range(DEVICES):
        text += (
            f'[device.d{i}]\ndriver = "modbus"\nurl = "tcp://127.0.0.1:{port + i}"\nevery = "{every_ms}ms"\n'
        )
        text += f"[device.d{i}.tags]\n"
        text += 'v = { address = "holding:0", type = "float32" }\n'
        for name, at in (("sp", 2), ("sp2", 4)):
            limits = "writable = true, min = 0.0, max = 100.0"
            text += f'{name} = {{ address = "holding:{at}", type = "float32", {limits} }}\n'
    for i in range(RULES // 2):
        other = (i + 1) % DEVICES
        text += f'[rule.a{i}]\nwhen = "d{i}.v > 50.0"\ndo = {{ "d{i}.sp" = 1.0 }}\nfinally = {{ "d{i}.sp" = 0.0 }}\n'
        text += f'[rule.b{i}]\nwhen = "d{i}.v > 50.0 && d{other}.v > 50.0"\n'
        text += f'do = {{ "d{i}.sp2" = "math.least(d{other}.v, 10.0)" }}\nfinally = {{ "d{i}.sp2" = 0.0 }}\n'
    return text


async def measure(
    folder: Path, port: int, broker_port: int, seconds: float, delay_us: int = 0, every_ms: int = 100,
    confine: Callable[[int], None] = lambda pid: None,
) -> dict[str, float]:  # fmt: skip
    """Run the gateway against the field for so long, perhaps confined; return the figures in milliseconds."""
    loop = asyncio.get_running_loop()
    samples: list[float] = []
    for i in range(DEVICES):
        kind = type("Wire", (Wire,), {"device": Device(samples, i)})
        await loop.create_server(kind, "127.0.0.1", port + i)
    path = folder / "config.toml"
    path.write_text(configuration(port, broker_port, every_ms))
    delayed = f"inject=fdatasync,fsync:delay_enter={delay_us}"
    strace = (
        "strace",
        "-D",
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-e",
        "trace=fdatasync,fsync",
        "-e",
        delayed,
        "-o",
        "/dev/null",
    )
    command = (sys.executable, "-m", "edgegw", "run", "-c", str(path), "--log-level", "error")
    gateway = await asyncio.create_subprocess_exec(*(strace if delay_us else ()), *command)
    confine(gateway.pid)
    await asyncio.sleep(seconds)
    gateway.terminate()
    await gateway.wait()
    ordered = sorted(samples[DEVICES:] or samples)
    return {
        "writes": len(ordered),
        "every_ms": every_ms,
        "fsync_delay_ms": delay_us / 1000,
        "p50_ms": round(ordered[len(ordered) // 2] * 1000, 2),
        "p99_ms": round(ordered[len(ordered) * 99 // 100] * 1000, 2),
        "max_ms": round(ordered[-1] * 1000, 2),
    }
