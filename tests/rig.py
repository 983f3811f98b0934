"""Real brokers and real `edgegw receive` processes for the receiver's tests."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0
MOSQUITTO = (
    shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if os.environ.get("EDGEGW_TEST_BROKER", "mosquitto") == "mosquitto"
    else None
)
"""The broker; where it is not, amqtt takes its place in what needs no more than MQTT 3.1.1."""
needs_mosquitto = pytest.mark.skipif(not MOSQUITTO, reason="needs what only mosquitto does; amqtt is here")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
PROTOCOL = mqtt.MQTTv5 if MOSQUITTO else mqtt.MQTTv311


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition; fail with `what` when the deadline passes."""
    deadline_s, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"not in {DEADLINE_S} s: {what}"
        pause.wait(0.02)


class Process:
    """A program whose standard error is read as it comes."""

    def __init__(self, *command: str) -> None:
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def said(self, text: str) -> bool:
        """Tell whether a line held `text`."""
        return any(text in line for line in self.lines)

    def wait_said(self, text: str) -> None:
        """Wait for a line that holds `text`."""
        with self._said:
            assert self._said.wait_for(lambda: self.said(text), DEADLINE_S), (text, self.lines)

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and standard output."""
        assert self._process.stdout
        out = self._process.stdout.read()
        code = self._process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code, out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the program and whatever it has started
        self._process.wait()
        self._reader.join(DEADLINE_S)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()


NO_DISK = ("prlimit", "--fsize=0")
"""Starts a program that no disk takes a byte of: each write to a file fails (setrlimit(2), RLIMIT_FSIZE)."""
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class FakeClock:
    """The wall clock of a program under libfaketime; the monotonic one stays as it is.

    The file is read once a second: a program that reads it at each look at a clock, which Python does at each change
    between its threads, comes to nothing else.
    """

    def __init__(self, file: Path, offset: str = "+0") -> None:
        self._file = file
        file.write_text(f"{offset:<8}")
        self.prefix = (
            "env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME_TIMESTAMP_FILE={file}", "FAKETIME_CACHE_DURATION=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1", "DONT_FAKE_MONOTONIC=1",
        )  # fmt: skip

    def set(self, offset: str) -> None:
        """Step the clock within a second or two, as in `-2d`; the file is never seen half written."""
        with self._file.open("r+") as file:
            file.write(f"{offset:<8}")


def wait_for_port(port: int) -> None:
    """Wait until somebody listens on a port of the loopback."""

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(listening, f"a listener on port {port}")


@contextmanager
def mosquitto(folder: Path, port: int, extra: str = "allow_anonymous true") -> Iterator[Process]:
    """Run a broker on a port of the loopback."""
    if not MOSQUITTO:
        if extra != "allow_anonymous true":
            pytest.skip("needs mosquitto's settings; only amqtt is here")
        with Process(sys.executable, "-m", "edgegw.demo.broker", str(port)) as broker:
            wait_for_port(port)
            yield broker
        return
    config = folder / f"mosquitto-{port}.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\npersistence false\nmax_queued_messages 0\nuser root\n{extra}\n"
    )
    with Process(MOSQUITTO, "-c", str(config)) as broker:
        broker.wait_said("running")
        wait_for_port(port)
        yield broker


def receive(port: int, to: str, *options: str) -> Process:
    """Start `edgegw receive`."""
    url = f"mqtt://127.0.0.1:{port}"
    return Process(sys.executable, "-m", "edgegw", "receive", "--url", url, "--to", to, *options)


def run(*arguments: str) -> tuple[int, str, str]:
    """Run `edgegw receive` to its end; return exit code, standard output and standard error."""
    with Process(sys.executable, "-m", "edgegw", "receive", *arguments) as process:
        code, out = process.end()
        return code, out, "\n".join(process.lines)


def publish(
    port: int, messages: Iterable[tuple[str, bytes]], protocol: int = PROTOCOL, username: str | None = None
) -> None:
    """Publish at QoS 1 and wait until the broker has confirmed each."""
    messages = list(messages)
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
    client.username_pw_set(username)
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert connected.wait(DEADLINE_S)
    infos = [client.publish(topic, payload, qos=1) for topic, payload in messages]
    for info in infos:
        info.wait_for_publish(DEADLINE_S)
        assert info.is_published()
    client.disconnect()
    client.loop_stop()
