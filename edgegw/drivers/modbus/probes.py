"""Limits how much of a shared connection the units that do not answer may occupy."""

from dataclasses import dataclass

from edgegw.drivers.modbus.pdu import gateway_reason
from edgegw.errors import NoAnswer

FIRST_PAUSE = 4
"""How many times as long as its first failed request a unit is left alone afterwards; each further one doubles it."""

UNIT_PAUSE = 20
"""The longest such pause: requests to one failing unit occupy at most a twentieth of the connection."""

UNIT_PAUSE_MAX_S = 60.0
"""A pause is not longer than this for the unit's own share, so that a unit that is back is found soon."""

TOTAL_PAUSE = 4
"""All failing units together occupy at most a quarter of the connection, however many they are."""


@dataclass(slots=True)
class _Failing:
    """A unit that did not answer: why, how often in a row, and until when it is left alone."""

    reason: str
    failures: int
    until_s: float


class Probes:
    """Says when a unit that did not answer may be asked again.

    Whoever waits for a dead unit keeps its neighbours waiting. Where no unit answers at all there is nobody to
    protect, and no pause; a connection with one unit therefore has none. `answering` are the units whose last
    request was answered: of theirs only an exception need be noted. Times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self.answering: set[int] = set()
        self._failing: dict[int, _Failing] = {}

    def check(self, unit: int, now_s: float) -> None:
        """Return if a unit may be asked now; raise NoAnswer, with the reason of its last failure, if not."""
        failing = self._failing.get(unit)
        if failing is not None and self.answering and now_s < failing.until_s:
            raise NoAnswer(
                failing.reason,
                f"no answer to {failing.failures} requests ({failing.reason}); "
                f"not asked for another {failing.until_s - now_s:.0f} s, since it delays the other units",
            )

    def heard(self, unit: int, answer: bytes, now_s: float, sent_s: float) -> None:
        """Note the answer to a request: a unit's, or a gateway's for a unit that was silent to it."""
        reason = gateway_reason(answer)
        if reason is not None:
            self.failed(unit, reason, now_s, sent_s)
            return
        self.answering.add(unit)
        if self._failing:
            self._failing.pop(unit, None)

    def failed(self, unit: int, reason: str, now_s: float, sent_s: float) -> None:
        """Note that a unit did not answer a request."""
        self.answering.discard(unit)
        failing = self._failing.setdefault(unit, _Failing(reason, 0, now_s))
        failing.reason = reason
        failing.failures += 1
        self._pause(failing, now_s, now_s - sent_s)

    def freed(self, unit: int, now_s: float, sent_s: float) -> None:
        """Note that the last request to a failing unit occupied the connection until now, beyond its time-out."""
        if (failing := self._failing.get(unit)) is not None:
            self._pause(failing, now_s, now_s - sent_s)

    def _pause(self, failing: _Failing, now_s: float, occupied_s: float) -> None:
        doubled = FIRST_PAUSE * 2 ** min(failing.failures - 1, 10)
        own_s = min(UNIT_PAUSE_MAX_S, occupied_s * min(UNIT_PAUSE, doubled))
        together_s = occupied_s * TOTAL_PAUSE * len(self._failing)
        failing.until_s = now_s + max(own_s, together_s)
