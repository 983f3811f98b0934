"""Wear: what keeping the readings costs the card."""

from collections.abc import Callable
from typing import NamedTuple

from edgegw import clock

NOTE_EVERY_S = 60.0


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


class Odometer:
    """Counts a journal's wear, in the thread that writes it, on from what was noted last."""

    def __init__(self) -> None:
        self._noted = Wear()
        self._noted_s = self._since_s = clock.mono_s()
        self._meter = Meter()
        self._readings = 0

    def start(self) -> None:
        """Count the bytes that this thread writes from here on."""
        self._meter.take()

    def begin(self, noted: Wear) -> None:
        """Go on from what a journal says of itself."""
        self._noted, self._since_s = noted, clock.mono_s()

    def count(self, readings: int) -> None:
        """Count readings."""
        self._readings += readings

    @property
    def run_ms(self) -> int:
        """How long the journal has been open, in all its life."""
        return self._noted.run_ms + round((clock.mono_s() - self._since_s) * 1000)

    def due(self, take_fsyncs: Callable[[], int], *, now: bool = False) -> Wear | None:
        """Return what the journal has written so far, if it is time to note it."""
        if not now and clock.mono_s() - self._noted_s < NOTE_EVERY_S:
            return None
        self._noted_s = clock.mono_s()
        run_ms = self.run_ms - self._noted.run_ms
        self._noted = self._noted.plus(Wear(run_ms, self._readings, self._meter.take(), take_fsyncs()))
        self._since_s, self._readings = clock.mono_s(), 0
        return self._noted
