"""Expressions, compiled: undecided rather than wrong when they are evaluated.

cel-expr-python hands back an error as a value whose plain form is a non-empty string, hence true. So a result
counts only if it is of the type that was compiled for; anything else is None, undecided. An input that is
missing, bad or stale is left out of what is evaluated: CEL's `||` and `&&` then decide where they can without it.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any, NamedTuple, cast

from edgegw.domain.tag import Scalar

_PLAIN: dict[str, type] = {"number": float, "bool": bool, "string": str}


class Expression(NamedTuple):
    """A compiled expression, the kind of its result and the names that it reads."""

    text: str
    kind: str
    inputs: frozenset[str]
    compiled: Any

    def value(self, activation: Mapping[str, Scalar]) -> Scalar | None:
        """Return the result, None if it cannot be decided from these inputs."""
        try:
            result = self.compiled.eval(data=activation)
        except RuntimeError:  # the engine's own budgets
            return None
        plain = result.plain_value()
        if type(plain) is not _PLAIN[self.kind] or (
            self.kind == "string" and result.type().name() != "STRING"
        ):
            return None
        if isinstance(plain, float) and not isfinite(plain):
            return None
        return cast(Scalar, plain)


def activation(values: Iterable[tuple[str, Any]]) -> dict[str, Scalar]:
    """Return what expressions are evaluated with: numbers as doubles, nothing that is not a plain value."""
    made: dict[str, Scalar] = {}
    for name, value in values:
        if isinstance(value, bool | str):
            made[name] = value
        elif isinstance(value, int | float) and isfinite(value):
            made[name] = float(value)
    return made


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Return the hint at a known name that is much like an unknown one; nothing if none is."""
    near = get_close_matches(unknown, list(known), n=3, cutoff=0.5)
    best = max(near, key=lambda name: sum(a == b for a, b in zip(name, unknown, strict=False)), default=None)
    return f"; did you mean {best}?" if best else ""
