"""Single-precision numbers as the decimals that are meant by them: 230.1, not 230.10000610351562.

Of a float32 seven digits are enough, or nine: the first of the two that reads back as the same float32 is taken. So
nothing is lost, a message has half the bytes, and a card half the wear.
"""

import struct
from collections.abc import Sequence
from itertools import compress
from math import isfinite
from operator import eq

import msgspec

KNOWN = 16_384
"""Numbers remembered, 2 MB: what a transducer tells are the same few thousand over and over."""
_decode = msgspec.json.Decoder(list[float]).decode


class Decimals:
    """Finds the decimals of whole blocks: 30 ns for a number that it knows, 200 to 500 ns for a new one."""

    def __init__(self) -> None:
        self._known: dict[float, float] = {}

    def of(self, values: Sequence[float]) -> Sequence[float]:
        """Return the decimals of values that came as float32."""
        known = self._known
        try:
            return [known[value] for value in values]
        except KeyError:
            pass
        found = [known.get(value) for value in values]
        new = [value for value, decimal in zip(values, found, strict=True) if decimal is None]
        told, short = decimals(new)
        if len(known) > KNOWN:
            known.clear()
        known.update(
            compress(zip(new, told, strict=True), short)
        )  # what needs nine digits hardly comes again
        following = iter(told)
        return [next(following) if decimal is None else decimal for decimal in found]


def decimals(values: Sequence[float]) -> tuple[Sequence[float], Sequence[bool]]:
    """Return the decimals of values that came as float32, and which have seven digits at the most.

    What is no finite number stays as it is.
    """
    if not isfinite(sum(values)):
        return [decimals([value])[0][0] if isfinite(value) else value for value in values], [False] * len(
            values
        )
    short = _digits(values, 7)
    single = struct.Struct(f"{len(values)}f")
    same = list(map(eq, single.unpack(single.pack(*short)), values))
    if all(same):
        return short, same
    exact = _digits(values, 9)
    return [a if fine else b for a, b, fine in zip(short, exact, same, strict=True)], same


def _digits(values: Sequence[float], digits: int) -> list[float]:
    """Return the values rounded to so many digits: one call to format and one to read for all."""
    return _decode("[" + ",".join([f"%.{digits}g"] * len(values)) % tuple(values) + "]")
