"""Builds the plant that the engine works on from the configuration, and finds what is wrong with its rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgegw.config.load import Problem, load
from edgegw.config.schema import STALE_PERIODS, Config, Guard, ModbusTag, OpcUaTag
from edgegw.config.schema import Rule as RuleConfig
from edgegw.config.schema import Window as WindowConfig
from edgegw.control.expression import Expression, did_you_mean
from edgegw.control.grid import Grid
from edgegw.control.guard import Limits, check, settled
from edgegw.control.plant import Plant
from edgegw.control.rule import Rule

if TYPE_CHECKING:
    from edgegw.control.compiler import Compiler

Problems = list[Problem]


def load_with_rules(path: Path) -> tuple[Config, Plant]:
    """Load a configuration and build its plant; raise ConfigError with every problem of either."""
    plants: list[Plant] = []

    def inspect(sound: Config) -> Problems:
        plant, problems = build(sound)
        plants.append(plant)
        return problems

    config = load(path, inspect=inspect)
    return config, plants[-1]


def build(config: Config) -> tuple[Plant, Problems]:
    """Compile the rules; return them with the limits of every tag, and each mistake with its place."""
    problems: Problems = []
    limits: dict[str, Limits] = {}
    shared: dict[tuple[Limits, type], Limits] = {}  # most tags are not written, and alike: 140 bytes each
    for device_name, device in config.device.items():
        for name, tag in device.tags.items():
            full = f"{device_name}.{name}"
            found = _limits(tag)
            limits[full] = shared.setdefault((found, type(found.safe)), found)
            problems += _odd_limits(("device", device_name, "tags", name), tag, limits[full])
    kinds = {name: limit.kind for name, limit in limits.items()}
    for name, window in config.window.items():
        problems += _odd_window(name, window, config)
        kinds |= {f"{name}.{figure}": "number" for figure in (*window.agg, "coverage")}
    rules: list[Rule] = []
    if config.rule:
        from edgegw.control.compiler import Compiler  # who has no rules need not have its 10 MB

        compiler = Compiler(kinds)
        for name, rule in config.rule.items():
            made, wrong = _rule(name, rule, compiler, limits)
            problems += wrong
            if made is not None:
                rules.append(made)
    stale = {name: STALE_PERIODS * device.every.s for name, device in config.device.items()}
    stale |= {name: STALE_PERIODS * window.period.s for name, window in config.window.items()}
    own = {name: rule.stale_after.s for name, rule in config.rule.items() if rule.stale_after is not None}
    overdue = {name: stale[name] + 2 * device.timeout.s for name, device in config.device.items()}
    return Plant(tuple(rules), limits, stale, own, config.uplink.hand_back, overdue), problems


def _odd_window(name: str, window: WindowConfig, config: Config) -> Problems:
    problems: Problems = []
    if name in config.device:
        problems.append((("window", name), f"{name} is the name of a device; expected one of its own"))
    tags = {f"{device}.{tag}": at for device, one in config.device.items() for tag, at in one.tags.items()}
    for full in window.of:
        where, tag = ("window", name, "of"), tags.get(full)
        if tag is None:
            problems.append((where, f"{full} is no tag of the configuration{did_you_mean(full, tags)}"))
        elif tag.type.endswith("[]") or kind_of(tag) == "string":
            problems.append((where, f"{full} is of type {tag.type!r}; expected a number or a bool"))
    return problems


def kind_of(tag: Guard) -> str:
    """Return what a tag's values are to expressions: number, bool or string."""
    if isinstance(tag, ModbusTag | OpcUaTag):
        if tag.type == "bool":
            return "bool"
        if tag.type.startswith("string"):
            return "string"
    return "number"


def _limits(tag: Guard) -> Limits:
    return Limits(
        tag.writable,
        kind_of(tag),
        tag.min,
        tag.max,
        tag.max_step,
        None if tag.ramp is None else float(tag.ramp),
        0.0 if tag.min_interval is None else tag.min_interval.s,
        tag.max_per_hour,
        tag.safe,
        grid_of(tag),
        None if tag.refresh is None else tag.refresh.s,
    )


def grid_of(tag: Guard) -> Grid:
    """Return what a tag's register can hold, as far as the configuration says it."""
    if not isinstance(tag, ModbusTag | OpcUaTag) or tag.scale == 0.0:
        return Grid()
    return Grid("float64", tag.scale, tag.offset).held_as(tag.type)


def _odd_limits(where: tuple[str, ...], tag: Guard, limits: Limits) -> Problems:
    if limits.kind != "number" and any(x is not None for x in (tag.min, tag.max, tag.max_step, tag.ramp)):
        return [(where, f"a {limits.kind} has no min, max, max_step or ramp")]
    if tag.max_step is not None and tag.max_step < limits.resolution:
        steps = f"a register that counts in {limits.resolution:g} would never move"
        return [((*where, "max_step"), f"found {tag.max_step:g}; {steps}")]
    if limits.kind == "number" and tag.writable and settled(limits, 0.0) is None:
        steps = f"a register that counts in {limits.resolution:g}"
        between = f"min {limits.min} to max {limits.max}"
        return [(where, f"found {between}; expected a range that holds a value of {steps}")]
    if tag.safe is not None and tag.writable and (refusal := check(limits, tag.safe)) is not None:
        return [((*where, "safe"), refusal.reason)]
    return []


def _rule(
    name: str, config: RuleConfig, compiler: "Compiler", limits: Mapping[str, Limits]
) -> tuple[Rule | None, Problems]:
    problems: Problems = []

    def compiled(key: tuple[str, ...], text: str, kind: str) -> Expression | None:
        try:
            return compiler.compile(text, kind)
        except ValueError as error:
            problems.append((("rule", name, *key), str(error)))
            return None

    def values(key: str, given: Mapping[str, str | bool | int | float]) -> dict[str, Expression]:
        made = {}
        for setpoint, value in given.items():
            limit = limits.get(setpoint)
            if limit is None or not limit.writable:
                unknown = f"is no tag of the configuration{did_you_mean(setpoint, limits)}"
                why = unknown if limit is None else "is not writable"
                problems.append((("rule", name, key, setpoint), f"{setpoint} {why}"))
                continue
            if not isinstance(value, str) and (refusal := check(limit, value)) is not None:
                problems.append((("rule", name, key, setpoint), refusal.reason))
                continue
            if (expression := compiled((key, setpoint), _text(value), limit.kind)) is not None:
                made[setpoint] = expression
        return made

    when = compiled(("when",), config.when, "bool")
    until = compiled(("until",), config.until, "bool") if config.until else None
    do, last = values("do", config.do), values("finally", config.finally_)
    if problems or when is None:
        return None, problems
    hold_s = None if config.hold is None else config.hold.s
    several = [when, *([until] if until else []), *do.values(), *last.values()]
    inputs = sorted({name for expression in several for name in expression.inputs})
    devices = sorted({name.partition(".")[0] for name in inputs})
    rule = Rule(
        name, when, until, do, last, config.link, config.priority,
        config.for_.s, config.min_on.s, config.min_off.s, hold_s, tuple(inputs), tuple(devices),
    )  # fmt: skip
    return rule, []


def _text(value: str | bool | int | float) -> str:
    """Return a configured value as an expression: a literal number is a double."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else repr(float(value))
