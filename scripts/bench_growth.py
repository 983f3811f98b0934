"""How the gateway's cost grows: with devices, tags and rules; and what is left of it on a quarter of a core.

Each row is a gateway of its own, measured for some seconds after some to warm up.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench_run import (
    HERE,
    TAGS,
    Counter,
    cpu_s,
    drain,
    mosquitto,
    process,
    rss_mb,
    run,
    wait,
    written_bytes,
)

WARM_S = 4.0
SLOW_QUOTA, SLOW_BYTES = 0.25, 256 * 1024**2


def site(
    folder: Path, ports: tuple[int, int, int], devices: int, tags: int, every_ms: int, rules: int = 0
) -> Path:
    """Write the configuration of a site; each rule reads one device and writes nothing."""
    field_port, broker_port, status_port = ports
    parts = [
        '[gateway]\nid = "bench"\n[journal]\npath = "journal.db"\n'
        f'[status]\nhttp = "127.0.0.1:{status_port}"\n[uplink]\n'
        f'url = "mqtt://127.0.0.1:{broker_port}"\nreconnect_jitter = "0s"\n'
    ]
    names = "\n".join(f't{i:02} = {{ address = "holding:{2 * i}", type = "float32" }}' for i in range(tags))
    parts += [
        f'[device.d{i:04}]\ndriver = "modbus"\nurl = "tcp://127.0.0.1:{field_port + i}"\n'
        f'every = "{every_ms}ms"\n[device.d{i:04}.tags]\n{names}\n'
        f's = {{ address = "holding:{2 * tags - 2}", type = "float32", writable = true }}\n'
        for i in range(devices)
    ]
    parts += [
        f'[rule.r{i:04}]\nwhen = "d{i % devices:04}.t00 > 1e6"\ndo = {{ "d{i % devices:04}.s" = "1.0" }}\n'
        for i in range(rules)
    ]
    path = folder / "config.toml"
    path.write_text("\n".join(parts))
    return path


def neighbours(count: int) -> int:
    """Return the first of `count` neighbouring ports that are free."""
    first = 20_000
    for port in range(20_000, 60_000):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            first = port + 1
        if port - first + 1 == count:
            return first
    raise RuntimeError("no free ports")


def measure(
    devices: int, tags: int, every_ms: int, seconds: float, rules: int = 0, *, slow: bool = False
) -> dict[str, Any]:
    """Run one site and return what it cost."""
    with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        first = neighbours(devices + 2)
        ports = first, first + devices, first + devices + 1
        command = (sys.executable, str(HERE / "bench_field.py"), str(ports[0]), str(devices), str(2 * tags))
        stack.enter_context(process(*command, wait_for="ready", stdout=-1))
        stack.enter_context(mosquitto(folder, ports[1]))
        counter = Counter(ports[1])
        stack.callback(counter.close)
        group = stack.enter_context(slow_machine()) if slow else None
        gateway = stack.enter_context(run(site(folder, ports, devices, tags, every_ms, rules)))
        if group is not None:
            group(gateway.pid)
        while not counter.now()[1]:
            pass
        wait(counter, WARM_S)
        at, readings, *_ = counter.now()
        cpu, written, rest = cpu_s(gateway.pid), written_bytes(gateway.pid), rss_mb(gateway.pid)
        wait(counter, seconds)
        later, more, *_ = counter.now()
        scans, skipped = scanned(folder)
        used, got = cpu_s(gateway.pid) - cpu, (more - readings) // TAGS * (tags + 1)
        return {
            "devices": devices,
            "tags": devices * (tags + 1),
            "rules": rules,
            "demand": round(devices * (tags + 1) * 1000 / every_ms),
            "arrived": round(got / (later - at)),
            "core_percent": round(100 * used / (later - at), 2),
            "cpu_us_per_reading": round(used / max(1, got) * 1e6, 2),
            "bytes_written_per_reading": round((written_bytes(gateway.pid) - written) / max(1, got), 1),
            "skipped_share": round(skipped / max(1, scans + skipped), 3),
            "rss_mb": round(rest, 1),
            "rss_later_mb": round(rss_mb(gateway.pid), 1),
        }


def scanned(folder: Path) -> tuple[int, int]:
    """Return how many scans there were and how many were passed over, as the gateway tells it."""
    command = (sys.executable, "-m", "edgegw", "status", "-c", str(folder / "config.toml"), "--json")
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    devices = json.loads(told.stdout)["devices"].values()
    return sum(one["scans"] for one in devices), sum(one["skipped"] for one in devices)


@contextmanager
def slow_machine() -> Iterator[Any]:
    """Make a control group (version 1) of a quarter of a core and 256 MB; yield what puts a process into it."""
    cpu, memory = (Path(f"/sys/fs/cgroup/{kind}/edgegw-bench-{os.getpid()}") for kind in ("cpu", "memory"))
    cpu.mkdir()
    memory.mkdir()
    (cpu / "cpu.cfs_period_us").write_text("100000")
    (cpu / "cpu.cfs_quota_us").write_text(str(round(SLOW_QUOTA * 100_000)))
    (memory / "memory.limit_in_bytes").write_text(str(SLOW_BYTES))

    def put(pid: int) -> None:
        for folder in (cpu, memory):
            (folder / "cgroup.procs").write_text(str(pid))

    try:
        yield put
    finally:
        for _ in range(100):
            try:
                cpu.rmdir()
                memory.rmdir()
            except OSError:
                time.sleep(0.1)  # the gateway is not quite gone
            else:
                break


def growth(seconds: float) -> list[dict[str, Any]]:
    """Measure ever more devices of ten tags, ever more tags, ever more rules, and drains of ever longer backlogs."""
    rows = [measure(devices, 10, 1000, seconds) for devices in (10, 100, 500, 1000, 2000)]
    rows += [
        measure(devices, tags, 1000, seconds)
        for devices, tags in ((1, 10), (10, 10), (20, 50), (200, 50), (1650, 60))
    ]
    rows += [measure(50, 10, 100, seconds, rules) for rules in (0, 1, 10, 100, 1000)]
    return rows + [drain(10**power) for power in (5, 6, 7, 8)]


def slow(seconds: float) -> list[dict[str, Any]]:
    """Measure a quarter of a core and 256 MB, up to far more than it can do; and control's reaction there."""
    import uvloop
    from bench_control import DEVICES
    from bench_control import measure as control

    rows = [measure(20, 50, every_ms, seconds, 20, slow=True) for every_ms in (1000, 100, 50, 20, 5)]
    for every_ms in (100, 5):
        with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name, slow_machine() as put:
            first = neighbours(DEVICES + 1)
            with mosquitto(Path(name), first + DEVICES):
                ports = first, first + DEVICES
                rows.append(
                    uvloop.run(
                        control(Path(name), *ports, max(20.0, seconds), every_ms=every_ms, confine=put)
                    )
                )
    return rows
