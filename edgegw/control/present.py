"""What a setpoint is known to hold. Pure.

A device that was away may have come back with values of its own, and nobody has seen it change: so what was read or
written before says nothing any more. It is read before it is written.
"""

from collections.abc import Mapping
from math import inf

from edgegw.control.guard import History
from edgegw.control.plant import Plant
from edgegw.domain import quality
from edgegw.domain.image import Latest
from edgegw.domain.tag import Scalar


def present(
    plant: Plant, histories: Mapping[str, History], image: Mapping[str, Latest], setpoint: str, now_s: float
) -> Scalar | None:
    """Return what a setpoint holds: what was written last, or read since; None if that is not known.

    A device that is lost, or long overdue, is one of which nothing is known. A value that was written to it all the
    same, and confirmed, is known, but no ramp or max_step starts from it.
    """
    device, _, tag = setpoint.partition(".")
    history, latest = histories.get(setpoint, History()), image.get(device)
    written_s = -inf if history.since_s is None else history.since_s
    if latest is None:
        return history.value
    if not latest.answering(now_s, plant.overdue_after_s[device]):
        blind = latest.lost and written_s > latest.since_s and not plant.limits[setpoint].stepped
        return history.value if blind else None
    written = history.value if written_s >= latest.since_s else None
    value = latest.values.get(tag)
    if isinstance(value, bool | int | float | str) and not quality.is_bad(latest.quality.get(tag)):
        return value if latest.at_s > written_s else history.value
    return written


def unread_until(
    plant: Plant, state_began_s: float, image: Mapping[str, Latest], device: str, now_s: float
) -> float | None:
    """Return until when a write must wait for the device to be read; None if it need not.

    Three of its periods after the start, or after it was lost, it may be that it is never read again: what needs no
    present value is then written all the same.
    """
    stale_after_s, latest = plant.stale_after_s[device], image.get(device)
    if latest is None:
        ends_s = state_began_s + stale_after_s
    elif latest.lost:
        ends_s = latest.since_s + stale_after_s
    elif latest.answering(now_s, plant.overdue_after_s[device]):
        return None
    else:
        return inf  # a scan is under way: the device will be read, or lost
    return ends_s if now_s < ends_s else None
