"""The demo's parts: each a process of its own, started, stopped and killed by its own id."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from edgegw.clock import mono_s
from edgegw.demo.site import DemoError

STOP_S = 20.0
"""How long a part may take to stop by itself."""
LOOK_S = 0.05
_NOT_FOR_PARTS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "EDGEGW_CONFIG", "STATE_DIRECTORY")
"""What the demo's own surroundings must not tell the gateway in it."""


class Part:
    """One program of the demo; what it says goes to NAME-RUN.out and NAME-RUN.log in the folder."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self._command = [sys.executable, *command]
        self._folder = folder
        self._runs = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        """What the last run printed."""
        return self._file("out").read_text(encoding="utf-8", errors="replace")

    @property
    def log(self) -> str:
        """What the last run logged."""
        return self._file("log").read_text(encoding="utf-8", errors="replace")

    def _file(self, ending: str) -> Path:
        return self._folder / f"{self.name}-{self._runs}.{ending}"

    def start(self) -> None:
        """Start the process, in a session of its own so that Ctrl-C reaches only the demo."""
        self._runs += 1
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_PARTS}
        with self._file("out").open("wb") as out, self._file("log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it has said `ready`; raise DemoError if it ends or takes too long."""
        deadline_s = mono_s() + timeout_s
        while "ready" not in f"{self.output}\n{self.log}".splitlines():
            self.check()
            if mono_s() > deadline_s:
                raise DemoError(f"demo: {self.name} was not ready in {timeout_s:.0f} s{self._last_words()}")
            time.sleep(LOOK_S)

    def check(self) -> None:
        """Raise DemoError if the process is not there."""
        if not self.running:
            code = None if self._process is None else self._process.returncode
            raise DemoError(f"demo: {self.name} ended by itself, exit code {code}{self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.strip().splitlines()
        return f"; it said: {lines[-1]}" if lines else ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if the process is there."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """End it with SIGTERM, or SIGKILL if that does not help."""
        self.signal(signal.SIGTERM)
        self.wait(STOP_S)

    def kill(self) -> None:
        """End it with SIGKILL: nothing of it is asked."""
        self.signal(signal.SIGKILL)
        self.wait(STOP_S)

    def wait(self, timeout_s: float) -> None:
        """Wait for the end; kill it when the time is up."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def end(parts: Iterable[Part]) -> None:
    """End all that are still there, together, whatever interrupts it."""
    parts = list(parts)
    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.kill)
        for part in parts:
            part.signal(signal.SIGTERM)
        for part in parts:
            part.wait(STOP_S)
