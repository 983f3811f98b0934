"""Limits hold for what arrives in the register: the guard's numbers through the drivers' own encoding."""

import struct
from fractions import Fraction
from typing import Any

import pytest
from control_rig import plant
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgegw.config.schema import ModbusTag
from edgegw.config.units import ModbusAddress
from edgegw.control.build import grid_of
from edgegw.control.grid import Grid
from edgegw.control.guard import History, Limits, Refuse, Write, guard, settled
from edgegw.drivers.modbus.registers import CODES
from edgegw.drivers.modbus.writing import encode

TYPES = ("int16", "uint16", "int32", "int64", "float32", "float64")
SCALES = (1.0, 10.0, 0.1, 0.5, 0.001, -1.0, -0.01)
OFFSETS = (0.0, 3.0, -0.5, 0.05)


def arrives(tag: ModbusTag, value: Any) -> Fraction:
    """Return what a value is in the register, in the tag's unit, exactly and in the decimals that are meant."""
    raw = struct.unpack(">" + CODES[tag.type], encode(tag, value))[0]
    return Fraction(raw) * Fraction(repr(tag.scale)) + Fraction(repr(tag.offset))


def tag(kind: str, scale: float, offset: float = 0.0) -> ModbusTag:
    return ModbusTag(
        address=ModbusAddress.parse("holding:0"), type=kind, scale=scale, offset=offset, writable=True
    )


@settings(max_examples=500, deadline=None)
@example(("int16", 10.0, 0.0), -46.0, 46.0, 46.0)
@example(("int16", 1.0, 0.0), -49.6, 49.6, 49.6)
@example(("int16", 0.5, 0.0), 0.0, 99.75, 99.75)
@example(("int32", 0.1, 0.0), 0.0, 46.1, 46.1)
@example(("float32", 1.0, 0.0), 0.0, 0.1, 0.1)
@given(
    st.tuples(st.sampled_from(TYPES), st.sampled_from(SCALES), st.sampled_from(OFFSETS)),
    st.decimals(-300, 300, places=2).map(float),
    st.decimals(-300, 300, places=2).map(float),
    st.decimals(-300, 300, places=3).map(float),
)
def test_p8_what_arrives_in_the_register_is_within_the_limits(
    of: tuple[str, float, float], one: float, other: float, wanted: float
) -> None:
    low, high = sorted((one, other))
    made = tag(*of)
    limits = Limits(True, "number", low, high, grid=grid_of(made))
    verdict = guard(limits, History(), None, min(max(wanted, low), high), 0.0)
    if isinstance(verdict, Refuse):
        assert settled(limits, low) is None, "there is a value that it could have been"
        return
    assert isinstance(verdict, Write)
    if made.type == "uint16" and (float(str(verdict.value)) - of[2]) / of[1] < 0:
        return  # the driver refuses it
    if abs((float(str(verdict.value)) - of[2]) / of[1]) > 32_767 and made.type.endswith("16"):
        return
    found = arrives(made, verdict.value)
    slack = Fraction(0) if made.type != "float64" and of[1] == 1.0 else Fraction(1, 10**11)
    assert Fraction(repr(low)) - slack <= found <= Fraction(repr(high)) + slack
    step = Fraction(repr(limits.resolution))
    inside = Fraction(repr(min(max(wanted, low), high)))
    assert abs(found - inside) <= max(step, Fraction(1, 1000)), "there was one nearer"


@settings(max_examples=300, deadline=None)
@example(("int32", 0.1), 0.1, 0.7, 3.0)
@given(
    st.tuples(st.sampled_from(("int32", "float32")), st.sampled_from(SCALES)),
    st.sampled_from([0.1, 0.3, 0.5, 1.0, 7.5, 25.0]),
    st.integers(-200, 200).map(float),
    st.integers(-200, 200).map(float),
)
def test_p8_no_step_is_longer_in_the_register_than_max_step_and_none_stands_still(
    of: tuple[str, float], max_step: float, start: float, goal: float
) -> None:
    made = tag(*of)
    limits = Limits(True, "number", -250.0, 250.0, max_step, grid=grid_of(made))
    present, target = settled(limits, start), settled(limits, goal)
    assert isinstance(present, float)
    assert isinstance(target, float)
    if max_step < limits.resolution:
        return  # the configuration is wrong
    history, now_s = History(), 0.0
    for _ in range(6000):
        if present == target:
            return
        verdict = guard(limits, history, present, goal, now_s)
        assert isinstance(verdict, Write), verdict
        assert isinstance(verdict.value, float)
        moved = abs(arrives(made, verdict.value) - arrives(made, present))
        assert 0 < moved <= Fraction(repr(max_step)) + (Fraction(1, 10**4) if made.type == "float32" else 0)
        present, now_s = verdict.value, now_s + 1.0
        history = history.wrote(present, now_s - 1.0, None)
    raise AssertionError("it never gets there")


def test_a_limit_is_no_further_out_than_its_register() -> None:
    assert Grid("integer", 10.0).nearest(46.0, -46.0, 46.0) == 40.0
    assert Grid("integer", -10.0, 3.0).nearest(-46.0, -46.0, 46.0) == -37.0
    assert Grid("integer", 0.1).nearest(46.1, 0.0, 46.1) == 46.1
    assert Grid("integer", 10.0).nearest(44.0, 41.0, 46.0) is None
    assert Grid("float32").nearest(0.1, 0.0, 0.1) == pytest.approx(0.1, rel=1e-6)
    assert Grid("float32").nearest(0.1, 0.0, 0.1) < 0.1  # type: ignore[operator]
    assert Grid("float32").nearest(12.1, -50.0, 50.0) == 12.1, (
        "what is within the limits stays as it was meant"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "int writable min=41.2 max=41.8",
            "found min 41.2 to max 41.8; expected a range that holds a value of a register that counts in 1",
        ),
        ("int writable max_step=0.5", "found 0.5; a register that counts in 1 would never move"),
    ],
)
def test_limits_between_which_the_register_holds_nothing_are_a_mistake(text: str, problem: str) -> None:
    _, problems = plant({"a.x": text}, {})
    assert [why for _, why in problems] == [problem]


def test_a_plant_learns_in_which_types_a_device_holds_its_tags_and_forgets_none_that_is_configured() -> None:
    made, _ = plant({"a.x": "number writable", "a.y": "int writable", "a.z": "number writable"}, {})
    learnt = made.learnt(
        "a", {"x": "int32", "y": "float64", "z": "float32", "not_configured_any_more": "int16"}
    )
    assert [learnt.limits[name].grid.kind for name in ("a.x", "a.y", "a.z")] == [
        "integer",
        "integer",
        "float32",
    ]
    assert made.limits["a.x"].grid.kind == "float64"


def test_what_the_grid_says_of_a_register_is_what_its_driver_tells() -> None:
    """Also where an offset takes away most digits of the product: 2731 * 0.1 - 273.15 is -0.05."""
    assert Grid("integer", 0.1, -273.15).nearest(-0.04) == -0.05
    assert Grid("integer", 0.1).nearest(26.91) == 26.9
