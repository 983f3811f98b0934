"""Attempts to connect: how long to wait before the next one, and whether a connection has proved itself. Pure."""

from collections.abc import Callable

STABLE_S = 5.0
"""How long a connection must last to prove itself."""
MAX_PAUSE_S = 30.0
FLAPPING = 2
"""Connections in a row that did not last, from which on the link counts as down until one has."""
DISPUTED_S = 60.0
"""A connection that ends without a reason within that may have been taken over by another client of our id."""
DISPUTE_PAUSE_S = 5.0
SUSPICIOUS = 3
"""Such ends in a row that make it likely."""


class Attempts:
    """Counts the connections that ended soon after they began; `uniform(low, high)` returns a random number."""

    def __init__(self, jitter_s: float, uniform: Callable[[float, float], float]) -> None:
        self._jitter_s = jitter_s
        self._uniform = uniform
        self._short = 0
        self._sudden = 0
        self._takeovers = 0

    def ended(self, lasted_s: float, *, taken_over: bool = False, sudden: bool = False) -> bool:
        """Note that a connection ended; tell whether that makes it likely, now, that another client takes them over.

        `taken_over`: the broker said so. `sudden`: it closed the connection without a reason.
        """
        self._short = 0 if lasted_s >= STABLE_S else self._short + 1
        disputed = lasted_s < DISPUTED_S
        self._takeovers = (self._takeovers if disputed else 0) + taken_over
        self._sudden = self._sudden + 1 if sudden and disputed else 0
        return self._sudden == SUSPICIOUS

    def failed(self) -> None:
        """Note that an attempt failed: the broker is away, which explains an end without a reason."""
        self._sudden = 0

    def pause_s(self) -> float:
        """Return how long to wait: after an ordinary loss the jitter, then exponentially longer."""
        pause_s = self._uniform(0.0, self._jitter_s)
        if self._short >= FLAPPING:
            pause_s += min(MAX_PAUSE_S, 2.0 ** min(self._short - 1, 10)) * self._uniform(0.5, 1.0)
        if (disputes := max(self._takeovers, self._sudden - SUSPICIOUS + 1)) > 0:
            longest_s = min(MAX_PAUSE_S, DISPUTE_PAUSE_S * 2.0 ** min(disputes - 1, 10))
            pause_s = max(pause_s, longest_s * self._uniform(0.5, 1.0))
        return pause_s

    def proven(self, lasted_s: float) -> bool:
        """Tell whether a connection counts: the last ones lasted, or this one has."""
        return self._short < FLAPPING or lasted_s >= STABLE_S
