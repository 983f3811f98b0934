"""What is worth a line while batches come in: transitions, and what repeats no more often than it must."""

from edgegw.clock import mono_s

EVERY_S = 30.0
"""The least time between two lines about the same kind of trouble."""
SETTLE_S = 2.0
"""How long a hole must last to be worth a line: live and backfilled batches overtake each other."""


class Throttle:
    """Lets the first few of a kind through, then one in a while with the number held back."""

    def __init__(self, burst: int = 5) -> None:
        self._left = burst
        self._next_s = 0.0
        self._held = 0

    def line(self, text: str, now_s: float) -> str | None:
        """Return the line to say now, None if it is held back."""
        if self._left > 0:
            self._left -= 1
            self._next_s = now_s + EVERY_S
            return text
        if now_s < self._next_s:
            self._held += 1
            return None
        text = f"{text} (and {self._held} more)" if self._held else text
        self._held = 0
        self._next_s = now_s + EVERY_S
        return text


class HoleWatch:
    """Says when a stream has had a hole for a while, and when it has none any more."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._said = False

    @property
    def open(self) -> bool:
        """Whether the stream had a hole when it was last looked at."""
        return self._since_s is not None

    def line(self, missing: list[tuple[int, int]], head: int, now_s: float) -> str | None:
        """Return the line that a stream's state is worth now, if any."""
        if not missing:
            said, self._said, self._since_s = self._said, False, None
            return f"complete up to {head}" if said else None
        if self._since_s is None:
            self._since_s = now_s
        if self._said or now_s - self._since_s < SETTLE_S:
            return None
        self._said = True
        return f"missing so far: {spell(missing)}"


def spell(ranges: list[tuple[int, int]], most: int = 8) -> str:
    """Write ranges as people read them: `3, 12-40`."""
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    if len(ranges) > most:
        shown.append(f"and {len(ranges) - most} more ranges")
    return ", ".join(shown)


class Outage:
    """What to log while something is away: at once, then in a while with the count, and when it is back."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since_s: float | None = mono_s()
        self._said_s: float | None = None
        self._failures = 0
        self.ever = False
        """Whether it was ever there."""

    @property
    def seconds(self) -> float:
        """How long it has been away."""
        return 0.0 if self._since_s is None else mono_s() - self._since_s

    def lost(self, cause: str) -> str | None:
        """Note a loss or one more failure; return the line to log, if any."""
        now_s = mono_s()
        self._failures += 1
        if self._since_s is None:
            self._since_s, self._said_s, self._failures = now_s, None, 0
        if self._said_s is None:
            line = f"{f'{self._name} lost' if self.ever else f'no {self._name} yet'}: {cause}"
        elif now_s - self._said_s >= EVERY_S:
            line = f"{self._name} still away after {self._failures} failures, {self.seconds:.0f} s: {cause}"
        else:
            return None
        self._said_s = now_s
        return line

    def over(self) -> str | None:
        """Note that it is there; return the line to log, if any."""
        said = self._said_s is not None
        line = f"{self._name} back after {self._failures} failures, {self.seconds:.0f} s" if said else None
        self._since_s, self._said_s, self._failures = None, None, 0
        self.ever = True
        return line
