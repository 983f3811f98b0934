"""Wear: what keeping the readings costs the card."""

from typing import NamedTuple


class Wear(NamedTuple):
    """What a journal has written in its life: milliseconds open, readings, bytes handed to the kernel, fsyncs."""

    run_ms: int = 0
    readings: int = 0
    written_bytes: int = 0
    fsyncs: int = 0

    def plus(self, more: "Wear") -> "Wear":
        """Return the sum of both."""
        return Wear(*(one + other for one, other in zip(self, more, strict=True)))


def written_bytes() -> int:
    """Return the bytes that this thread has written so far (proc(5), wchar); 0 where the kernel does not count."""
    try:
        with open("/proc/thread-self/io", encoding="ascii") as file:
            for line in file:
                if line.startswith("wchar:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


class Meter:
    """Counts what one thread has written since it was last asked."""

    def __init__(self) -> None:
        self._at: int | None = None

    def take(self) -> int:
        """Return the bytes written since the last time, 0 at the first."""
        now = written_bytes()
        before, self._at = self._at, now
        return 0 if before is None else now - before
