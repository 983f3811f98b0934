"""The arbiter: of all who want something of a setpoint, one has it."""

from collections.abc import Iterable
from typing import NamedTuple

from edgegw.domain.tag import Scalar

REMOTE_PRIORITY = 100
"""What a command counts for while the link is not islanded; then any rule outranks it."""
REMOTE_ISLANDED = -1


class Demand(NamedTuple):
    """What an owner wants of a setpoint. A value of None keeps what it holds."""

    setpoint: str
    owner: str
    priority: int
    value: Scalar | None
    cause: str


def arbitrate(demands: Iterable[Demand]) -> dict[str, Demand]:
    """Return the one demand that wins each setpoint: the highest priority, of equal ones the first by name."""
    winners: dict[str, Demand] = {}
    for demand in demands:
        holder = winners.get(demand.setpoint)
        if holder is None or (-demand.priority, demand.owner) < (-holder.priority, holder.owner):
            winners[demand.setpoint] = demand
    return winners
