"""What is told of writes that repeat: when failures and refreshes begin, now and then how many, and when they end."""

import logging
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from edgegw.control.cycle import Planned
from edgegw.domain.tag import Scalar

log = logging.getLogger(__name__)

SAY_S = 600.0
"""How often a write that goes on failing is said again, with its count."""
REPEATS_S = 3600.0
"""How often the ledger is told how many refreshes there were."""


class Trouble(NamedTuple):
    """Writes of a setpoint that fail one after the other: for what, how often, and when it was last said."""

    error: str
    times: int
    said_s: float


class Repeats(NamedTuple):
    """Refreshes of a setpoint since the ledger was told of them last."""

    value: Scalar
    cause: str
    times: int
    since_s: float


class Outcomes:
    """Counts failures and refreshes of each setpoint; `tell` takes the fields of a `write` event."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._troubles: dict[str, Trouble] = {}
        self._repeats: dict[str, Repeats] = {}

    def confirmed(self, planned: Planned, now_s: float) -> None:
        """Note a write that was read back as it was meant."""
        if (trouble := self._troubles.pop(planned.setpoint, None)) is not None:
            log.warning("%s: written again, after %d failures", planned.setpoint, trouble.times)
        if planned.repeat:
            was = self._repeats.get(planned.setpoint) or Repeats(planned.value, planned.cause, 0, now_s)
            self._repeats[planned.setpoint] = was._replace(times=was.times + 1)
            if now_s - was.since_s >= REPEATS_S:
                self.flush(planned.setpoint)

    def failed(self, planned: Planned, error: str, detail: str, now_s: float, *, final: bool = False) -> int:
        """Note a write that was not confirmed; return how many there were of this setpoint, one after the other."""
        was = self._troubles.get(planned.setpoint)
        times, said_s = (1, -inf) if was is None or was.error != error else (was.times + 1, was.said_s)
        if now_s - said_s >= SAY_S:
            often = f", {times} times now" if times > 1 else ""
            log.warning(
                "%s: %r by %s: not confirmed: %s%s%s",
                planned.setpoint,
                planned.value,
                planned.cause,
                detail,
                often,
                "; not tried again until something changes" if final else "",
            )
            said_s = now_s
        self._troubles[planned.setpoint] = Trouble(error, times, said_s)
        return times

    def flush(self, setpoint: str) -> None:
        """Tell how often a setpoint was refreshed since that was told last, if it was."""
        if (repeats := self._repeats.pop(setpoint, None)) is not None:
            fields = {"tag": setpoint, "cause": repeats.cause, "new": repeats.value, "ok": True}
            self._tell(fields | {"repeats": repeats.times})

    def flush_all(self) -> None:
        """Tell it of every setpoint."""
        for setpoint in list(self._repeats):
            self.flush(setpoint)
