"""The timekeeper: notices that the wall clock has stepped, or is synchronised now and was not before.

On Linux an adjustment that slews the clock moves the monotonic one alike (clock_gettime(2)): the difference of
the two changes by steps alone.
"""

from edgegw import clock
from edgegw.domain.era import Era

STEP_MS = 50
"""A difference below this is a virtual machine's or the scheduler's, and is followed without a word."""
LOOK_S = 1.0
"""How often the kernel is asked whether its clock is synchronised."""
_ATTEMPTS = 5


class Timekeeper:
    """Knows the present era."""

    def __init__(self) -> None:
        self._begin(present())
        self._look_at_s = clock.mono_s() + LOOK_S

    def look(self) -> Era | None:
        """Return the era that has just begun, None if the old one goes on; it costs two readings of a clock."""
        now_s = clock.mono_s()
        if self._least_ms < clock.wall_ms() - now_s * 1000 < self._most_ms and now_s < self._look_at_s:
            return None
        self._look_at_s = now_s + LOOK_S
        era = present()
        if abs(era.offset_ms - self.era.offset_ms) < STEP_MS and era.synced == self.era.synced:
            return None
        self._begin(era)
        return era

    def _begin(self, era: Era) -> None:
        self.era = era
        self._least_ms, self._most_ms = era.offset_ms - STEP_MS, era.offset_ms + STEP_MS


def present() -> Era:
    """Read both clocks at one moment, as nearly as the scheduler lets us."""
    best = (float("inf"), 0, 0.0)
    for _ in range(_ATTEMPTS):
        before_s, wall_ms, after_s = clock.mono_s(), clock.wall_ms(), clock.mono_s()
        best = min(best, (after_s - before_s, wall_ms, before_s))
    _, wall_ms, mono_s = best
    return Era(clock.synchronised(), clock.boot_id(), wall_ms, round(mono_s * 1000))
