"""A site on a virtual clock, for tests of control: the engine as the controller runs it, and a plant that reacts."""

from collections.abc import Mapping
from math import inf, nextafter
from typing import Any

import msgspec

from edgegw.config.schema import Config
from edgegw.control import commands, engine, state
from edgegw.control.build import build
from edgegw.control.cycle import Cycle, Memo
from edgegw.control.plant import Plant
from edgegw.control.rule import LinkState
from edgegw.control.state import State
from edgegw.domain.image import Image
from edgegw.domain.record import Scan
from edgegw.domain.tag import Scalar, Value

BOOTED_S = 1000.0
TYPES = {"number": "float64", "int": "int16", "coarse": "int16", "bool": "bool", "text": "string:16"}


def tag(text: str, address: int) -> dict[str, Any]:
    """Return a tag's configuration from words, as in `number writable min=-50 ramp=10/s`."""
    kind, *words = text.split()
    made: dict[str, Any] = {"type": TYPES[kind], "address": f"holding:{address}"}
    if kind == "coarse":
        made["scale"] = 10.0
    if kind == "bool":
        made["address"] = f"coil:{address}"
    for word in words:
        key, _, value = word.partition("=")
        if not value:
            made[key] = True
        elif key in ("ramp", "min_interval", "refresh"):
            made[key] = value
        elif key == "max_per_hour":
            made[key] = int(value)
        elif value in ("true", "false"):
            made[key] = value == "true"
        else:
            made[key] = float(value)
    return made


def plant(
    tags: Mapping[str, str], rules: Mapping[str, Any], *, every: Mapping[str, str] | None = None,
    hand_back: str = "release", windows: Mapping[str, Any] | None = None,
) -> tuple[Plant, list[Any]]:  # fmt: skip
    """Build a plant as the gateway does, from a configuration."""
    devices: dict[str, Any] = {}
    for address, (full, text) in enumerate(tags.items()):
        device, _, name = full.partition(".")
        period = (every or {}).get(device, "1s")
        section = devices.setdefault(
            device, {"driver": "modbus", "url": "tcp://127.0.0.1:502", "every": period, "tags": {}}
        )
        section["tags"][name] = tag(text, 4 * address)
    config = Config.model_validate(
        {"gateway": {"id": "t"}, "device": devices, "rule": dict(rules), "uplink": {"hand_back": hand_back},
         "window": dict(windows or {})}
    )  # fmt: skip
    return build(config)


class Site:
    """Runs cycles at scans and when times fall due, and keeps what came of them as lines."""

    def __init__(self, made: Plant) -> None:
        self.plant = made
        self.at_s = 0.0
        self.base_s = BOOTED_S
        self.values: dict[str, Value] = {}
        self.quality: dict[str, str] = {}
        self.image = Image()
        self.seen_s: float | None = None
        """When readings count as seen; None: when they are."""
        self.link: LinkState = "online"
        self.broken: set[str] = set()
        self.denied: set[str] = set()
        """Setpoints that the device refuses for good."""
        self.away: set[str] = set()
        self.held: set[str] = set()
        self.due_s: float | None = None
        self.memo = Memo(made)
        self.state = state.restored(State(), made, self.now_s, saved_s=self.now_s, same_boot=True)
        self.written: list[tuple[float, str, Scalar, Scalar | None]] = []
        """When, what, the new value and the one that the plant held, whether that was known or not."""

    @property
    def now_s(self) -> float:
        """The monotonic clock."""
        return self.base_s + self.at_s

    def until(self, at_s: float) -> list[str]:
        """Let time pass, running a cycle whenever one falls due; return what happened, each with its time."""
        lines = []
        for _ in range(10_000):
            if self.due_s is None or self.due_s >= self.base_s + at_s:
                self.at_s = at_s
                return lines
            self.at_s = max(self.at_s, self.due_s - self.base_s)
            while self.now_s < self.due_s:  # what rounding took
                self.at_s = nextafter(self.at_s, inf)
            lines += [f"@{round(self.at_s, 2):g} {line}" for line in self.cycles()]
        raise AssertionError("cycles fall due without end")

    def scan(self, device: str) -> None:
        """Read a device: the image gets what the plant holds."""
        mine = {name: value for name, value in self.values.items() if name.partition(".")[0] == device}
        values = {name.partition(".")[2]: value for name, value in mine.items()}
        quality = {name.partition(".")[2]: self.quality[name] for name in mine if name in self.quality}
        if values:
            read = Scan(round(self.now_s * 1000), device, values, quality)
            self.image.take(read, self.now_s, held=device in self.held, seen_s=self.seen_s)

    def lose(self, device: str) -> None:
        """Have a device not answer, now."""
        self.image.lost(device, self.now_s)

    def cycles(self) -> list[str]:
        """Run a cycle, and the ones that its writes cause when they are over."""
        lines: list[str] = []
        for _ in range(10):
            cycle = self._cycle()
            lines += [line(event, fields) for event, fields in cycle.events]
            lines += self._carry_out(cycle)
            if not cycle.writes:
                return lines
        raise AssertionError(f"writes without end: {lines}")

    def _cycle(self) -> Cycle:
        frozen = self.image.frozen()
        plain = engine.step(self.plant, self.state, frozen, self.link, self.now_s)
        cycle = engine.step(self.plant, self.state, frozen, self.link, self.now_s, memo=self.memo)
        assert cycle == plain, "what is remembered from the last cycle changed this one"
        self.state, self.due_s = cycle.state, cycle.due_s
        setpoints = [planned.setpoint for planned in cycle.writes]
        assert len(setpoints) == len(set(setpoints)), (
            f"two writes for one setpoint in a cycle: {cycle.writes}"
        )
        return cycle

    def _carry_out(self, cycle: Cycle) -> list[str]:
        lines = []
        for setpoint, value, old, cause, repeat in cycle.writes:
            word = "refresh" if repeat else "write"
            lines.append(f"{word} {setpoint} {shown(old)} -> {shown(value)} by {cause}")
            self.written.append((self.at_s, setpoint, value, self.values.get(setpoint)))
            if setpoint in self.denied:
                self.state = state.failed(
                    self.state, setpoint, value, cause, "illegal-address", self.now_s, final=True
                )
                lines.append(f"denied {setpoint}")
            elif setpoint in self.broken or setpoint.partition(".")[0] in self.away:
                self.state = state.failed(self.state, setpoint, value, cause, "timeout", self.now_s)
                lines.append(f"unconfirmed {setpoint}")
            else:
                self.state = state.confirmed(self.state, setpoint, self.now_s)
                self.values[setpoint] = value
        return lines

    def command(self, name: str, write: Mapping[str, Scalar], lease_s: float | None) -> list[str]:
        """Give a command its setpoints, as the controller does; return why not, if not."""
        kinds = {at: self.plant.limits[at].kind for at in write}
        writes = {at: commands.as_number(value, kinds[at]) for at, value in write.items()}
        given = state.command(self.state, name, writes, lease_s, self.now_s)
        image = self.image.frozen()
        no = engine.objection(self.plant, given, f"command:{name}", writes, image, self.link, self.now_s)
        if no is not None:
            return [f"no {name}: {no}"]
        self.state = given
        return []

    def restart(self, saved_s: float, *, reboot: bool) -> None:
        """Begin anew with what is remembered, perhaps with another monotonic clock."""
        memory = msgspec.json.encode(self.state)
        if reboot:
            self.base_s = 5.0 - self.at_s
        self.image, self.memo, self.due_s = Image(), Memo(self.plant), None
        self.state = state.restored(
            msgspec.json.decode(memory, type=State), self.plant, self.now_s,
            saved_s=saved_s, same_boot=not reboot,
        )  # fmt: skip


def line(event: str, fields: Mapping[str, Any]) -> str:
    """Return an event as a line of a step table."""
    match event:
        case "rule-on" | "rule-off":
            return f"{event.removeprefix('rule-')} {fields['rule']}"
        case "authority":
            return f"owner {fields['tag']} {fields['owner'] or '-'}"
        case "write-refused":
            return (
                f"refused {fields['tag']} {shown(fields['value'])} by {fields['cause']}: {fields['reason']}"
            )
    raise AssertionError(event)


def shown(value: object) -> str:
    """Return a value as a step table has it."""
    if value is None:
        return "?"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
