"""float32 as the decimals that are meant by them."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgegw.drivers import decimals as module
from edgegw.drivers.decimals import Decimals, decimals

singles = st.floats(width=32)


def single(value: float) -> float:
    """Return the nearest float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@given(values=st.lists(singles, min_size=1, max_size=70))
def test_no_float32_is_taken_for_another(values: list[float]) -> None:
    found = Decimals().of(values)
    assert [single(value) for value in found] == pytest.approx(values, rel=0, abs=0, nan_ok=True)


@given(digits=st.integers(-9_999_999, 9_999_999), point=st.integers(0, 7))
def test_what_seven_digits_say_comes_out_as_these(digits: int, point: int) -> None:
    meant = float(f"{digits}e-{point}")
    assert Decimals().of([single(meant)]) == [meant]


@given(blocks=st.lists(st.lists(singles, min_size=1, max_size=9), min_size=1, max_size=30))
def test_what_is_remembered_changes_nothing(blocks: list[list[float]]) -> None:
    remembering = Decimals()
    for block in blocks:
        assert repr(remembering.of(block)) == repr(list(Decimals().of(block)))
        assert repr(remembering.of(block)) == repr(list(decimals(block)[0]))


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KNOWN", 100)
    remembering = Decimals()
    for i in range(1000):
        assert remembering.of([single(i / 10)]) == [i / 10]
        assert len(remembering._known) <= 101


def test_what_is_no_number_does_not_hide_its_neighbours() -> None:
    found = Decimals().of([single(230.1), math.inf, math.nan, single(0.1)])
    assert repr(found) == "[230.1, inf, nan, 0.1]"
