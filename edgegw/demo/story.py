"""The story: poll, lose the broker, go on, be killed, start again, get the broker back, drain, count."""

import json
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import sleep
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from edgegw.clock import mono_s, wall_ms
from edgegw.demo.evidence import gather
from edgegw.demo.judge import Course, judge
from edgegw.demo.processes import Part, end
from edgegw.demo.screen import Screen, Status
from edgegw.demo.site import COMMIT_INTERVAL_MS, DemoError, Site, free_port
from edgegw.demo.verdict import Verdict

PATIENCE_S = 60.0
"""How long to wait for anything that must come; a busy machine takes its time."""
LOOK_S = 0.1
ASK_S = 2.0


class Pace(NamedTuple):
    """How long each chapter lasts at the least, and whether OPC UA takes part."""

    poll_s: float
    offline_s: float
    dead_s: float
    offline_again_s: float
    live_s: float
    island_after: str
    opcua: bool


MINUTE = Pace(10.0, 8.0, 2.0, 12.0, 10.0, "5s", opcua=True)
FAST = Pace(1.5, 2.0, 0.2, 1.5, 2.0, "1s", opcua=False)


class Story:
    """The parts and what is done to them, chapter by chapter."""

    def __init__(self, folder: Path, pace: Pace, screen: Screen) -> None:
        self._pace = pace
        self._screen = screen
        self._site = Site(folder, free_port(), pace.opcua, pace.island_after)
        self._parts = {name: Part(name, command, folder) for name, command in self._site.commands().items()}
        self._ask = build_opener(ProxyHandler({})).open
        self._reports: list[str] = []

    def run(self) -> Verdict:
        """Tell it from start to end and count; raise DemoError if it cannot go on."""
        if find_spec("amqtt") is None:
            raise DemoError("demo: its broker, amqtt, is not installed; pip install 'edgegw[demo]'")
        try:
            return self._tell()
        finally:
            end(reversed(self._parts.values()))

    def _tell(self) -> Verdict:
        self._begin()
        broker_gone_ms = self._lose_the_broker()
        killed_ms = self._kill_the_gateway()
        broker_back_ms = self._return()
        self._finish()
        course = Course(COMMIT_INTERVAL_MS, self._site.periods_ms, broker_gone_ms, killed_ms, broker_back_ms)
        return judge(gather(self._site.database, self._reports, self._site.journal), course)

    def _begin(self) -> None:
        devices = ", ".join(self._site.periods_ms)
        self._screen.phase("start", f"a simulated site ({devices}), an MQTT broker, a receiver, the gateway")
        (self._site.folder / "config.toml").write_text(self._site.config(), encoding="utf-8")
        self._parts["sim"].start()
        self._parts["broker"].start()
        self._parts["sim"].wait_ready(PATIENCE_S)
        self._parts["broker"].wait_ready(PATIENCE_S)
        self._start_receiver()
        self._parts["gateway"].start()
        self._until(lambda status: _polling(status) and _drained(status, 1), "every device answers")
        self._screen.phase("poll", "each reading is journaled, published, and kept by the receiver")
        self._stay(self._pace.poll_s)
        self._tell_figures()

    def _lose_the_broker(self) -> int:
        self._screen.phase("stop the broker", "the receiver has lost it too and is stopped with it")
        self._parts["broker"].stop()
        gone_ms = wall_ms()
        self._stop_receiver()
        self._until(lambda status: _link(status) in ("offline", "islanded"), "the gateway notices")
        self._screen.phase("go on", "the devices are polled as before; what is read waits in the journal")
        self._stay(self._pace.offline_s)
        self._until(lambda status: _waiting(status) > 0, "something waits in the journal")
        self._tell_figures()
        self._until(lambda status: _link(status) == "islanded", "the gateway takes over")
        self._screen.phase("the grid dips", "nobody upstream can be asked: the battery answers by rule")
        self._parts["sim"].signal(signal.SIGUSR1)
        self._until(lambda status: _rule_on(status), "the rule acts")
        self._until(lambda status: not _rule_on(status), "the dip is over")
        return gone_ms

    def _kill_the_gateway(self) -> int:
        gateway = self._parts["gateway"]
        head = self._head_now()
        self._screen.phase("kill the gateway", "SIGKILL: it can neither finish nor say anything")
        killed_ms = wall_ms()
        gateway.kill()
        self._stay(self._pace.dead_s)
        self._screen.phase("start it again", "the journal knows where it was; still no broker")
        gateway.start()
        self._until(lambda status: _polling(status) and _head(status) > head, "it polls again")
        self._stay(self._pace.offline_again_s)
        self._tell_figures()
        self._until(lambda status: _link(status) == "islanded", "it takes over again")
        self._screen.phase("it dips again", "and lasts until the link is back: the rule must then let go")
        self._parts["sim"].signal(signal.SIGUSR1)
        self._until(lambda status: _rule_on(status), "the rule acts")
        return killed_ms

    def _return(self) -> int:
        """Bring the broker back; return when broker and receiver were there."""
        self._screen.phase(
            "bring the broker back", "it remembers nothing; the receiver goes on with its database"
        )
        self._parts["broker"].start()
        self._parts["broker"].wait_ready(PATIENCE_S)
        self._start_receiver()
        back_ms = wall_ms()
        head = self._head_now()
        self._screen.phase("drain", "the backlog goes out beside the live readings")
        self._until(lambda status: _drained(status, head), "the backlog is gone")
        self._until(lambda status: not _rule_on(status), "the rule has let go")
        self._tell_figures()
        self._screen.phase("live again", "how soon is a new reading in the receiver's database?")
        self._stay(self._pace.live_s)
        head = self._head_now()
        self._until(lambda status: _drained(status, head + 1), "live readings go out")
        self._tell_figures()
        return back_ms

    def _finish(self) -> None:
        self._screen.phase("stop", "the gateway first, so that its last records still go out")
        self._parts["gateway"].stop()
        self._stop_receiver()

    def _start_receiver(self) -> None:
        self._parts["receiver"].start()
        self._parts["receiver"].wait_ready(PATIENCE_S)

    def _stop_receiver(self) -> None:
        self._parts["receiver"].stop()
        self._reports.append(self._parts["receiver"].output)

    def _status(self) -> Status | None:
        """Ask the gateway how it is, None if it does not say."""
        try:
            with self._ask(self._site.status_url, timeout=ASK_S) as answer:
                status = json.load(answer)
        except (URLError, OSError, ValueError):
            return None
        return status if isinstance(status, dict) else None

    def _until(
        self, reached: Callable[[Status | None], bool], what: str, least_s: float = 0.0
    ) -> Status | None:
        """Watch until something is reached and return that status; raise DemoError if it does not come."""
        expected = [part for part in self._parts.values() if part.running]
        began_s = mono_s()
        while True:
            status = self._status() if self._parts["gateway"].running else None
            self._screen.show(status, {name: part.running for name, part in self._parts.items()})
            if reached(status) and mono_s() - began_s >= least_s:
                return status
            for part in expected:
                part.check()
            if mono_s() - began_s > least_s + PATIENCE_S:
                raise DemoError(f"demo: waited {PATIENCE_S:.0f} s and it did not come to this: {what}")
            sleep(LOOK_S)

    def _head_now(self) -> int:
        """Return how many records the journal holds, as soon as the gateway says it."""
        return _head(self._until(lambda status: status is not None, "the gateway tells its state"))

    def _stay(self, seconds: float) -> None:
        self._until(lambda status: True, "time goes by", seconds)

    def _tell_figures(self) -> None:
        status = self._until(lambda status: status is not None, "the gateway tells its state")
        self._screen.note(
            f"link {_link(status)}; {_head(status)} records journaled, {_waiting(status)} of them waiting"
        )


def _link(status: Status | None) -> str:
    return str(status["link"]["state"]) if status else "unknown"


def _head(status: Status | None) -> int:
    return int(status["journal"]["head"]) if status else 0


def _waiting(status: Status | None) -> int:
    return int(status["journal"]["pending_records"]) if status else 0


def _rule_on(status: Status | None) -> bool:
    return bool(status and status["rules"]["support"]["active"])


def _polling(status: Status | None) -> bool:
    return status is not None and all(device["state"] == "good" for device in status["devices"].values())


def _drained(status: Status | None, head: int) -> bool:
    return status is not None and int(status["journal"]["acked"]) >= head
