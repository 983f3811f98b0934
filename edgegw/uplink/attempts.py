"""Attempts to connect: how long to wait before the next one, and whether a connection has proved itself. Pure."""

from collections.abc import Callable

STABLE_S = 5.0
"""How long a connection must last to prove itself."""
MAX_PAUSE_S = 30.0
FLAPPING = 2
"""Connections in a row that did not last, from which on the link counts as down until one has."""


class Attempts:
    """Counts the connections that ended soon after they began; `uniform(low, high)` returns a random number."""

    def __init__(self, jitter_s: float, uniform: Callable[[float, float], float]) -> None:
        self._jitter_s = jitter_s
        self._uniform = uniform
        self._short = 0

    def ended(self, lasted_s: float) -> None:
        """Note that a connection ended."""
        self._short = 0 if lasted_s >= STABLE_S else self._short + 1

    def pause_s(self) -> float:
        """Return how long to wait: after an ordinary loss the jitter, then exponentially longer."""
        pause_s = self._uniform(0.0, self._jitter_s)
        if self._short >= FLAPPING:
            pause_s += min(MAX_PAUSE_S, 2.0 ** min(self._short - 1, 10)) * self._uniform(0.5, 1.0)
        return pause_s

    def proven(self, lasted_s: float) -> bool:
        """Tell whether a connection counts: the last ones lasted, or this one has."""
        return self._short < FLAPPING or lasted_s >= STABLE_S
