"""The benchmarks: real processes on this machine, each figure counted outside the gateway.

`sustained` raises the demand until less than 97 % of it arrives at a subscriber; `drain` builds a backlog
and lets the broker come back; `start` measures from exec to the first published batch; `control` from an answer's
bytes to the bytes of the write that a rule makes of it; `opcua` is `sustained` for OPC UA, by poll and by
subscription, beside what asyncua alone makes of the same servers.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEVICES, TAGS = 100, 62
TICK = os.sysconf("SC_CLK_TCK")


def free_port(count: int = 1) -> int:
    """Return the first of `count` neighbouring ports that are free."""
    for port in range(20_000 + 7 * count, 30_000, count):
        try:
            for i in range(count):
                with socket.create_server(("127.0.0.1", port + i)):
                    pass
        except OSError:
            continue
        return port
    raise RuntimeError("no free ports")


@contextmanager
def process(*command: str, wait_for: str = "", **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program, until it has printed `wait_for` and then for as long as the block lasts."""
    started = subprocess.Popen(command, text=True, **more)
    try:
        if wait_for:
            pipe = started.stdout or started.stderr
            assert pipe
            while wait_for not in (line := pipe.readline()):
                assert line, f"{command[0]} ended"
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        started.wait(30)


@contextmanager
def mosquitto(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run a broker that queues without limit."""
    conf = folder / "mosquitto.conf"
    conf.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nmax_queued_messages 0\n"
        "max_inflight_messages 0\n"
    )
    with process("mosquitto", "-c", str(conf), wait_for="running", stderr=subprocess.PIPE) as broker:
        yield broker


@contextmanager
def field(port: int) -> Iterator[subprocess.Popen[str]]:
    """Run the fast field."""
    command = (sys.executable, str(HERE / "bench_field.py"), str(port), str(DEVICES), str(TAGS * 2))
    with process(*command, wait_for="ready", stdout=subprocess.PIPE) as made:
        yield made


def config(folder: Path, field_port: int, broker_port: int, readings_s: float, **uplink: Any) -> Path:
    """Write a configuration that asks for so many readings a second."""
    every_ms = max(1, round(1000 * DEVICES * TAGS / readings_s))
    tags = "\n".join(f't{i:02} = {{ address = "holding:{2 * i}", type = "float32" }}' for i in range(TAGS))
    extra = "\n".join(f"{key} = {json.dumps(value)}" for key, value in uplink.items())
    text = f'[gateway]\nid = "bench"\n[journal]\nmax_size = "8GiB"\n[status]\nhttp = ""\n[uplink]\n{extra}\n'
    text += f'url = "mqtt://127.0.0.1:{broker_port}"\nreconnect_jitter = "0s"\n'
    for i in range(DEVICES):
        url = f"tcp://127.0.0.1:{field_port + i}"
        text += f'[device.d{i:03}]\ndriver = "modbus"\nurl = "{url}"\nevery = "{every_ms}ms"\n'
        text += f"[device.d{i:03}.tags]\n{tags}\n"
    path = folder / "config.toml"
    path.write_text(text)
    return path


def run(path: Path) -> Any:
    """Start the gateway."""
    return process(sys.executable, "-m", "edgegw", "run", "-c", str(path), "--log-level", "error")


class Counter:
    """What the subscriber has counted so far."""

    def __init__(self, port: int, tags: int = TAGS) -> None:
        command = (sys.executable, str(HERE / "bench_count.py"), str(port), str(tags))
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def now(self) -> tuple[float, int, int, int]:
        """Return time, readings, bytes and batches, the newest that was printed."""
        assert self._process.stdout
        at, readings, size, batches = self._process.stdout.readline().split()
        return float(at), int(readings), int(size), int(batches)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def written_bytes(pid: int) -> int:
    """Return the bytes a process has handed to the kernel for a disk (proc(5), write_bytes)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def rss_mb(pid: int) -> float:
    """Return a process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def sustained_at(readings_s: float, seconds: float, folder: Path) -> dict[str, float]:
    """Measure one demand for so many seconds, after three to warm up."""
    with ExitStack() as stack:
        field_port, broker_port = free_port(DEVICES), free_port(1)
        stack.enter_context(mosquitto(folder, broker_port))
        stack.enter_context(field(field_port))
        counter = Counter(broker_port)
        stack.callback(counter.close)
        path = config(folder, field_port, broker_port, readings_s)
        demand = DEVICES * TAGS * 1000 / max(1, round(1000 * DEVICES * TAGS / readings_s))
        gateway = stack.enter_context(run(path))
        wait(counter, 3.0)
        at, readings, size, _ = counter.now()
        cpu, written = cpu_s(gateway.pid), written_bytes(gateway.pid)
        wait(counter, seconds)
        later, more, more_size, _ = counter.now()
        used, wrote = cpu_s(gateway.pid) - cpu, written_bytes(gateway.pid) - written
        got = more - readings
        return {
            "demand": round(demand),
            "arrived": round(got / (later - at)),
            "share": round(got / (later - at) / demand, 4),
            "cpu_us_per_reading": round(used / max(1, got) * 1e6, 3),
            "cores": round(used / (later - at), 2),
            "bytes_written_per_reading": round(wrote / max(1, got), 2),
            "bytes_sent_per_reading": round((more_size - size) / max(1, got), 1),
            "rss_mb": round(rss_mb(gateway.pid), 1),
        }


def wear(folder: Path) -> Any:
    """Return what the journal counted in its life, after it was closed."""
    from edgegw.journal.store import Reader

    reader = Reader(folder / "journal.db")
    try:
        return reader.wear()
    finally:
        reader.close()


def wait(counter: Counter, seconds: float) -> None:
    """Let time pass, reading what the counter prints."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counter.now()


def sustained(seconds: float, demands: list[float]) -> list[dict[str, float]]:
    """Raise the demand until less than 97 % arrives."""
    rows: list[dict[str, float]] = []
    for demand in demands:
        with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as folder:
            row = sustained_at(demand, seconds, Path(folder))
            counted = wear(Path(folder))
            rows.append(row | {"readings_per_fsync": round(counted.readings / max(1, counted.fsyncs))})
        if rows[-1]["share"] < 0.97:
            break
    return rows


def drain(readings: int, asked_s: float = 800_000) -> dict[str, float]:
    """Build a backlog, stop the field, bring the broker back, and time the drain."""
    with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        field_port, broker_port = free_port(DEVICES), free_port(1)
        gateway = stack.enter_context(run(config(folder, field_port, broker_port, min(asked_s, readings))))
        with field(field_port):
            time.sleep(1.0)
            rest = rss_mb(gateway.pid)
            time.sleep(readings / min(asked_s, readings))
            built = rss_mb(gateway.pid)
        time.sleep(2.0)
        gateway.send_signal(signal.SIGSTOP)  # until there is somebody to count
        stack.enter_context(mosquitto(folder, broker_port))
        counter = Counter(broker_port)
        stack.callback(counter.close)
        wait(counter, 1.0)
        used = cpu_s(gateway.pid)
        peak, began, last = built, time.monotonic(), (0.0, 0)
        gateway.send_signal(signal.SIGCONT)
        while not last[1] or time.monotonic() - last[0] < 3.0:
            at, count, *_ = counter.now()
            if count:
                last = (at, count)
            else:
                began = at  # the last moment at which nothing had come
            peak = max(peak, rss_mb(gateway.pid))
        took = last[0] - began
        used = cpu_s(gateway.pid) - used
        gateway.terminate()
        gateway.wait(30)
        return {
            "journaled": wear(folder).readings,
            "readings": last[1],
            "drain_s": round(took, 2),
            "readings_s": round(last[1] / took),
            "cpu_us_per_reading": round(used / last[1] * 1e6, 3),
            "rss_early_mb": round(rest, 1),
            "rss_backlog_mb": round(built, 1),
            "rss_drain_peak_mb": round(peak, 1),
        }


def start() -> dict[str, float]:
    """Time from exec to the first request in the field and to the first batch at the broker."""
    with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        field_port, broker_port = free_port(DEVICES), free_port(1)
        stack.enter_context(mosquitto(folder, broker_port))
        stack.enter_context(field(field_port))
        counter = Counter(broker_port)
        stack.callback(counter.close)
        wait(counter, 1.0)
        began = time.monotonic()
        gateway = stack.enter_context(run(config(folder, field_port, broker_port, 6_200)))
        while not (got := counter.now())[1]:
            pass
        batch = got[0] - began
        wait(counter, 3.0)
        return {"first_batch_s": round(batch, 2), "rss_at_rest_mb": round(rss_mb(gateway.pid), 1)}


def control(seconds: float) -> list[dict[str, float]]:
    """Measure control's reaction, with a quick disk and with one that stalls."""
    import uvloop
    from bench_control import DEVICES as CONTROLLED
    from bench_control import measure

    rows = []
    for delay_us in (0, 200_000):
        with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name:
            ports = free_port(CONTROLLED), free_port(1)
            with mosquitto(Path(name), ports[1]):
                rows.append(uvloop.run(measure(Path(name), *ports, seconds, delay_us)))
    return rows


def first_request() -> float:
    """Time from exec to the first bytes that a device gets."""
    with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name, ExitStack() as stack:
        port = free_port(DEVICES)
        device = stack.enter_context(socket.create_server(("127.0.0.1", port)))
        path = config(Path(name), port, free_port(1), 6_200)
        began = time.monotonic()
        stack.enter_context(run(path))
        peer = stack.enter_context(device.accept()[0])
        peer.recv(12)
        return time.monotonic() - began


def help_s() -> float:
    """Time `edgegw --help`, the best of five."""
    took = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "edgegw", "--help"], stdout=subprocess.DEVNULL, check=True)
        took.append(time.monotonic() - began)
    return min(took)


def ceilings(seconds: float) -> dict[str, float]:
    """Measure what the machine does without a gateway, in readings a second."""
    import bench_ceilings as bare
    import uvloop
    from bench_field import answers

    with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        field_port, broker_port = free_port(DEVICES), free_port(1)
        with field(field_port):
            read = uvloop.run(bare.pymodbus(field_port, DEVICES, TAGS, seconds))
            wire = uvloop.run(bare.wire(field_port, DEVICES, TAGS, seconds))
        made, readings = bare.batches([answers(2 * TAGS, i) for i in range(DEVICES)], TAGS, 97)
        inserted = bare.sqlite(folder, made, readings, seconds)
        stack.enter_context(mosquitto(folder, broker_port))
        published = bare.paho(broker_port, made, readings, seconds)
    return {
        "bare_pymodbus_loop": round(read),
        "bare_protocol_loop": round(wire),
        "bare_sqlite_insert": round(inserted),
        "bare_paho_publish": round(published),
    }


def beside(row: dict[str, float], rate: str, bare: dict[str, float]) -> dict[str, float]:
    """Put a rate beside what the machine does without a gateway, as shares of each."""
    return row | {name.replace("bare", "of"): round(row[rate] / most, 4) for name, most in bare.items()}


def measures(asked: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name, in the order of `all`."""

    def all_sustained() -> Any:
        bare = ceilings(min(5.0, asked.seconds))
        rows = sustained(asked.seconds, asked.demand or [200e3, 400e3, 600e3, 775e3, 886e3, 1033e3, 1240e3])
        return [*(beside(row, "arrived", bare) for row in rows), bare]

    def all_drained() -> Any:
        bare = ceilings(min(5.0, asked.seconds))
        sent = {name: bare[name] for name in ("bare_sqlite_insert", "bare_paho_publish")}
        return [beside(drain(asked.backlog), "readings_s", sent), sent]

    def all_opcua() -> Any:
        from bench_opcua import opcua

        return opcua(asked.seconds, asked.demand or [20e3, 60e3, 100e3, 150e3, 200e3, 300e3])

    def grown(what: str) -> Any:
        import bench_growth

        return getattr(bench_growth, what)(asked.seconds)

    return {
        "start": lambda: {
            **start(),
            "first_request_s": round(first_request(), 2),
            "help_s": round(help_s(), 3),
        },
        "sustained": all_sustained,
        "drain": all_drained,
        "control": lambda: control(max(20.0, asked.seconds)),
        "opcua": all_opcua,
        "growth": lambda: grown("growth"),
        "slow": lambda: grown("slow"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["start", "sustained", "drain", "control", "opcua", "growth", "slow"]
    parser.add_argument("what", nargs="?", default="all", choices=[*names, "all"])
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each demand is measured")
    parser.add_argument("--demand", type=float, action="append", help="readings a second to ask for")
    parser.add_argument("--backlog", type=int, default=10_000_000, help="readings of the backlog to drain")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    chosen = names if asked.what == "all" else [asked.what]
    measured = measures(asked)
    results: dict[str, Any] = {}
    for what in chosen:
        found = measured[what]()
        results |= found if what == "opcua" else {what: found}
    if asked.json:
        print(json.dumps(results, indent=2))
        return
    for what, rows in results.items():
        print(what)
        for row in rows if isinstance(rows, list) else [rows]:
            print("  " + "  ".join(f"{key} {value:,}" for key, value in row.items()))


if __name__ == "__main__":
    main()
