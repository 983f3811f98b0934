"""Expressions: what is refused when they are loaded, and what counts as a result."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from control_rig import plant
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegw.control.compiler import Compiler
from edgegw.control.expression import activation

CASES = tomllib.loads((Path(__file__).parent / "cases" / "control_expressions.toml").read_text())
COMPILER = Compiler(
    {"meter.kw": "number", "meter.ok": "bool", "meter.name": "string", "battery.soc": "number"}
)


@pytest.mark.parametrize("case", CASES["wrong"], ids=lambda case: case["text"])
def test_what_is_wrong_is_said_with_its_place_and_a_hint(case: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as raised:
        COMPILER.compile(case["text"], case.get("kind", "bool"))
    message = case["message"]
    if "caret" in case:
        message += f"\n    {case.get('shown', case['text'])}\n    {' ' * case['caret']}^"
    assert str(raised.value) == message


@pytest.mark.parametrize("case", CASES["value"], ids=lambda case: f"{case['text']} of {case['inputs']}")
def test_what_an_expression_comes_to(case: dict[str, Any]) -> None:
    expression = COMPILER.compile(case["text"], case.get("kind", "bool"))
    assert case["inputs"].keys() <= expression.inputs
    value = expression.value(activation(case["inputs"].items()))
    assert value == case.get("is")
    assert type(value) is type(case.get("is"))


def test_an_expression_that_takes_too_long_is_undecided() -> None:
    row = f"[{', '.join(map(str, range(60)))}]"
    text = f"{row}.all(a, {row}.all(b, {row}.all(c, a + b + c >= 0)))"
    assert COMPILER.compile(text, "bool").value({}) is None


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["meter.kw", "meter.ok", "battery.soc"]), st.none() | st.text(), max_size=3
    )
)
def test_no_input_that_is_not_what_it_should_be_makes_a_condition_true(inputs: dict[str, Any]) -> None:
    """An error of the engine is a value whose plain form is a non-empty string: that must never count as true."""
    for text in ("meter.kw > 1.0", "meter.ok", "meter.ok && battery.soc > 1.0", "!(meter.kw > 1.0)"):
        assert COMPILER.compile(text, "bool").value(activation(inputs.items())) is None


def test_all_mistakes_of_all_rules_are_found_each_with_its_place() -> None:
    rules = {
        "one": {
            "when": "meter.kv > 1.0",
            "until": "meter.kw",
            "do": {"battery.kw": "meter.kw", "meter.kw": 1.0},
        },
        "two": {"when": "meter.kw > 1.0", "do": {"battery.kw": 70.0}, "finally": {"batery.kw": 0.0}},
        "three": {"when": "meter.kw > 1.0", "do": {"battery.kw": True, "relay.on": "meter.kw"}},
    }
    tags = {"meter.kw": "number", "battery.kw": "number writable max=50", "relay.on": "bool writable"}
    _, problems = plant(tags, rules)
    assert [(".".join(where), what.partition("\n")[0]) for where, what in problems] == [
        ("rule.one.when", "undeclared reference to 'meter.kv'; did you mean meter.kw?"),
        ("rule.one.until", "'meter.kw' is a number; expected a bool"),
        ("rule.one.do.meter.kw", "meter.kw is not writable"),
        ("rule.two.do.battery.kw", "70 is above max 50"),
        ("rule.two.finally.batery.kw", "batery.kw is no tag of the configuration; did you mean battery.kw?"),
        ("rule.three.do.battery.kw", "found True; expected a number"),
        ("rule.three.do.relay.on", "'meter.kw' is a number; expected a bool"),
    ]


def test_limits_that_cannot_be_are_found() -> None:
    tags = {
        "a.x": "number writable max=50 safe=60",
        "a.y": "bool writable max=1",
        "a.z": "number writable safe=true",
        "a.i": "int writable max_step=0.5",
    }
    _, problems = plant(tags, {})
    assert [(".".join(where), what) for where, what in problems] == [
        ("device.a.tags.x.safe", "60 is above max 50"),
        ("device.a.tags.y", "a bool has no min, max, max_step or ramp"),
        ("device.a.tags.z.safe", "found True; expected a number"),
        ("device.a.tags.i.max_step", "found 0.5; a register that counts in 1 would never move"),
    ]
