"""Scale and offset as decimals, both ways, against exact fractions."""

import struct
from decimal import Decimal
from fractions import Fraction
from math import inf, isinf, isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgegw.config.schema import ModbusTag
from edgegw.config.units import ModbusAddress
from edgegw.control.grid import Grid
from edgegw.drivers.decimals import as_decimals
from edgegw.drivers.modbus.registers import CODES
from edgegw.drivers.modbus.writing import encode
from edgegw.drivers.scaling import scaling, unscaled


def decimals(digits: int, places: int) -> st.SearchStrategy[float]:
    """Return decimals as somebody writes them into a configuration."""
    most = 10**digits
    return st.builds(
        lambda whole, point: float(Decimal(whole).scaleb(-point)),
        st.integers(-most, most), st.integers(0, places),
    )  # fmt: skip


scales = st.one_of(
    st.sampled_from([0.1, 0.01, 0.001, 0.0001, 0.25, 0.5, 10.0, 100.0, 1000.0, -0.1, 0.30517578125, 1.0]),
    decimals(5, 8).filter(bool),
)
offsets = st.one_of(st.just(0.0), decimals(6, 4))
integers = st.sampled_from(["int16", "uint16", "int32", "uint32", "int64", "uint64"])


def exact(raw: float, scale: float, offset: float) -> float:
    """Return the double nearest to what is meant."""
    meant = Fraction(repr(raw)) * Fraction(repr(scale)) + Fraction(repr(offset))
    return float(meant)


@st.composite
def raws(draw: st.DrawFn) -> tuple[str, int]:
    """A type, and an integer that it holds."""
    kind = draw(integers)
    bits = int(kind.lstrip("uint"))
    low = 0 if kind[0] == "u" else -(2 ** (bits - 1))
    return kind, draw(st.integers(low, low + 2**bits - 1))


@pytest.mark.parametrize(
    ("raw", "scale", "offset", "value"),
    [
        (269, 0.1, 0.0, 26.9),
        (3, 0.1, 0.0, 0.3),
        (7991, 0.001, 0.0, 7.991),
        (-1, 0.01, 0.0, -0.01),
        (230, 0.1, -40.0, -17.0),
        (7, 10.0, 0.0, 70.0),
        (3, 0.25, 0.0, 0.75),
        (2982, 0.1, -273.15, 25.05),
        (2**63 - 1, 0.001, 0.0, 9223372036854775.807),
        (36386.12, 0.001, 0.0, 36.38612),
        (230.1, 0.001, 0.0, 0.2301),
        (0.0001234567, 0.001, 0.0, 1.234567e-07),
        (3.4028235e38, 1e10, 0.0, 3.4028235e48),
    ],
)
def test_a_raw_number_becomes_the_decimal_that_is_meant(
    raw: float, scale: float, offset: float, value: float
) -> None:
    applied = scaling(scale, offset)
    assert (applied.whole if isinstance(raw, int) else applied.real)(raw) == value  # type: ignore[arg-type]


@given(raw=raws(), scale=scales, offset=offsets)
def test_an_integer_becomes_the_nearest_double_to_the_exact_result(
    raw: tuple[str, int], scale: float, offset: float
) -> None:
    assert scaling(scale, offset).whole(raw[1]) == exact(raw[1], scale, offset)


@given(
    raw=st.floats(-1e6, 1e6, width=32),
    scale=st.one_of(scales.filter(lambda scale: scale == round(scale, 4)), decimals(3, 4).filter(bool)),
    offset=st.sampled_from([0.0, 32.0, -40.0, -273.15, 100.0]),
)
def test_a_float32_becomes_the_nearest_double_to_the_exact_result_of_its_decimal(
    raw: float, scale: float, offset: float
) -> None:
    meant = float(as_decimals([raw])[0])
    assert scaling(scale, offset).real(meant) == exact(meant, scale, offset)


@given(raw=st.floats(), scale=scales, offset=offsets)
def test_of_any_double_no_digit_is_lost(raw: float, scale: float, offset: float) -> None:
    found, product = scaling(scale, offset).real(raw), raw * scale + offset
    if isnan(product) or isinf(product):
        assert found == product or isnan(found) == isnan(product)
    else:
        assert found == pytest.approx(
            product, rel=1e-14, abs=1e-14 * (abs(raw * scale) + abs(offset)) + 1e-300
        )


def test_what_is_no_finite_number_stays_none() -> None:
    for scale, offset in ((0.1, 0.0), (2.5, 1.0), (1e300, 0.0)):
        applied = scaling(scale, offset)
        assert applied.real(inf) == inf
        assert isnan(applied.real(nan))


@given(raw=raws(), scale=scales, offset=offsets)
def test_what_was_read_is_written_back_as_the_same_integer(
    raw: tuple[str, int], scale: float, offset: float
) -> None:
    """As long as a double tells neighbours apart."""
    kind, sent = raw
    tag = ModbusTag(address=ModbusAddress("holding", 0, None), type=kind, scale=scale, offset=offset)
    value = scaling(scale, offset).whole(sent)
    if abs(sent) < 2**50 and abs(offset) < abs(scale) * 2**50:
        assert unscaled(value, scale, offset) == pytest.approx(sent, abs=0.49)
        assert encode(tag, value) == struct.pack(">" + CODES[kind], sent)


@given(
    raw=raws(),
    scale=st.sampled_from([0.1, 0.01, 0.001, 0.0001, 0.25, 0.5, 10.0, 100.0, 1000.0, -0.1]),
    offset=st.sampled_from([0.0, 40.0, -40.0, -273.15]),
)
def test_the_guard_knows_each_value_as_it_is_read(raw: tuple[str, int], scale: float, offset: float) -> None:
    """What the guard lets out, rounded to what a register holds, is what is read back.

    As long as it has fifteen digits, and the offset does not cancel most of them.
    """
    value = scaling(scale, offset).whole(raw[1])
    if abs(value) < 1e10 and raw[1] * scale * offset >= 0.0:
        assert Grid("integer", scale, offset).nearest(value) == value
