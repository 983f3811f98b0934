"""float32 as the decimals that are meant by them."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgegw.drivers.decimals import as_decimals

singles = st.floats(width=32)


def single(value: float) -> float:
    """Return the nearest float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@given(values=st.lists(singles, min_size=1, max_size=70))
def test_no_float32_is_taken_for_another(values: list[float]) -> None:
    found = as_decimals(values)
    assert [single(value) for value in found] == pytest.approx(values, rel=0, abs=0, nan_ok=True)


@given(digits=st.integers(-9_999_999, 9_999_999), point=st.integers(0, 7))
def test_what_seven_digits_say_comes_out_as_these(digits: int, point: int) -> None:
    meant = float(f"{digits}e-{point}")
    assert as_decimals([single(meant)]) == [meant]


@given(value=st.one_of(singles, st.integers(-(10**8), 10**8).map(lambda n: single(n / 1e4))))
def test_it_is_seven_digits_if_they_read_back_else_nine(value: float) -> None:
    seven, nine = float(f"{value:.7g}"), float(f"{value:.9g}")
    meant = seven if math.isnan(value) or single(seven) == value else nine
    assert as_decimals([value]) == pytest.approx([meant], rel=0, abs=0, nan_ok=True)


@given(values=st.lists(singles, min_size=1, max_size=30))
def test_neighbours_change_nothing(values: list[float]) -> None:
    alone = [as_decimals([value])[0] for value in values]
    assert repr(list(as_decimals(values))) == repr(alone)


def test_what_is_no_number_does_not_hide_its_neighbours() -> None:
    found = as_decimals([single(230.1), math.inf, math.nan, single(0.1), single(1e-7)])
    assert repr(found) == "[230.1, inf, nan, 0.1, 1e-07]"
