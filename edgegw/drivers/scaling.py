"""Scale and offset in decimals: raw 269 with scale 0.1 is 26.9, not 26.900000000000002.

Scale and offset are the decimals that are written in the configuration, and a value is the double that is nearest to
raw times scale plus offset, worked out exactly.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from math import lcm
from typing import NamedTuple

_ROUND = 1.5 * 2.0**52
"""Added and subtracted again it leaves the nearest integer, as in `decimals`."""
_HELD = 2.0**53
"""Up to here a double holds every integer."""
_MAX_EXACT = 10**16
"""A scale with a longer numerator or denominator is no decimal that somebody means: doubles will do."""


class Scaling(NamedTuple):
    """From raw to engineering values."""

    whole: Callable[[int], float]
    """Of an integer; 40 to 70 ns."""
    real: Callable[[float], float]
    """Of a double, as the decimal that is meant by it if that has up to nine digits; about 100 ns.

    Of one with more, the product of doubles.
    """


@cache
def scaling(scale: float, offset: float) -> Scaling:
    """Return what applies a tag's scale and offset. A value too large for a double becomes infinite."""
    factor, add = _decimal(scale), _decimal(offset)
    below = lcm(factor.denominator, add.denominator)
    times, plus = int(factor * below), int(add * below)
    if max(abs(times), abs(plus), below) > _MAX_EXACT:
        return Scaling(lambda raw: raw * scale + offset, lambda raw: raw * scale + offset)
    return Scaling(_whole(times, plus, below), _real(times, plus, below, scale, offset))


def unscaled(value: float, scale: float, offset: float) -> Fraction:
    """Return the raw number that an engineering value stands for: the exact inverse."""
    return (_decimal(value) - _decimal(offset)) / _decimal(scale)


def _decimal(value: float) -> Fraction:
    return Fraction(value) if isinstance(value, int) else Fraction(repr(value))


def _whole(times: int, plus: int, below: int) -> Callable[[int], float]:
    """Return (raw * times + plus) / below: a quotient of integers is rounded once, whatever their size."""
    if times == 1 and plus == 0:
        return lambda raw: raw / below
    return lambda raw: (raw * times + plus) / below


def _real(times: int, plus: int, below: int, scale: float, offset: float) -> Callable[[float], float]:
    """Return the same for doubles: those with at most nine places are integers of billionths, which doubles hold.

    A quotient of integers that doubles hold is rounded once, too. What has more digits is hardly ever a decimal that
    is meant, but for a float32 that is very small or very large.
    """
    divisor, summand = below * 1e9, plus * 1e9
    small = (_HELD / 1e9 - abs(plus)) / max(1, abs(times))
    large = (_HELD / 1e6 - abs(plus)) / max(1, abs(times))

    def other(raw: float) -> float:
        size = abs(raw)
        if small <= size < large:
            millionths = raw * 1e6 + _ROUND - _ROUND
            if millionths / 1e6 == raw:
                return (millionths * times + plus * 1e6) / (below * 1e6)
        elif (size < 0.1 or large <= size < _MAX_EXACT) and float(f"{raw:.12g}") == raw:
            return float((_decimal(raw) * times + plus) / below)
        return raw * scale + offset

    def lifted(raw: float) -> float:
        billionths = raw * 1e9 + _ROUND - _ROUND
        if billionths / 1e9 == raw and -small < raw < small:
            return (billionths * times + summand) / divisor
        return other(raw)

    def unlifted(raw: float) -> float:
        billionths = raw * 1e9 + _ROUND - _ROUND
        return billionths / divisor if billionths / 1e9 == raw else other(raw)

    return unlifted if times == 1 and plus == 0 else lifted
