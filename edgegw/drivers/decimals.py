"""Single-precision numbers as the decimals that are meant by them: 230.1, not 230.10000610351562.

Of a float32 seven digits are taken if they read back as the same float32, else nine. So nothing is lost, a message has
half the bytes, and a card half the wear.
"""

import struct
from collections.abc import Sequence
from math import isfinite, nan

import msgspec

_ROUND = 1.5 * 2.0**52
"""Added and taken away again it leaves the nearest integer, in a tenth of the time that `round` takes."""
_decode = msgspec.json.Decoder(list[float]).decode


def as_decimals(values: Sequence[float]) -> Sequence[float]:
    """Return the decimals of values that came as float32; what is no finite number stays as it is.

    Most have few places: to round to these takes a fifth of what it takes to find the digits.
    """
    found = [
        (value * 1e4 + _ROUND - _ROUND) / 1e4 if -1e3 < value < 1e3
        else (value * 1e2 + _ROUND - _ROUND) / 1e2 if -1e5 < value < 1e5
        else nan
        for value in values
    ]  # fmt: skip
    again = _read_back(found)
    if again == tuple(values):
        return found
    rest = iter(_rounded([value for value, back in zip(values, again, strict=True) if value != back]))
    return [a if b == c else next(rest) for a, b, c in zip(found, again, values, strict=True)]


def _rounded(values: Sequence[float]) -> Sequence[float]:
    """Return the values in seven digits, or nine where these are not enough."""
    if not isfinite(sum(values)):
        return [_rounded([value])[0] if isfinite(value) else value for value in values]
    short = _digits(values, 7)
    again = _read_back(short)
    if again == tuple(values):
        return short
    rest = iter(_digits([value for value, back in zip(values, again, strict=True) if value != back], 9))
    return [a if b == c else next(rest) for a, b, c in zip(short, again, values, strict=True)]


def _digits(values: Sequence[float], digits: int) -> list[float]:
    """Return the values rounded to so many digits: one call to format and one to read for all."""
    return _decode("[" + ",".join([f"%.{digits}g"] * len(values)) % tuple(values) + "]")


def _read_back(values: Sequence[float]) -> tuple[float, ...]:
    """Return the float32 nearest to each."""
    layout = f"{len(values)}f"
    return struct.unpack(layout, struct.pack(layout, *values))
