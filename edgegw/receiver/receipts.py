"""What is owed in receipts: of which streams something came, and what is said to their gateways. Pure."""

from collections.abc import Callable

import msgspec

from edgegw.domain.ranges import Ranges
from edgegw.receiver.dedupe import Key

EVERY_S = 0.25
"""The least time between two rounds of receipts."""
MOST_RANGES = 500
"""Ranges in one receipt."""


class Receipts:
    """Collects what came, also what was kept already: the gateway may have missed the first receipt."""

    def __init__(self) -> None:
        self._topics: dict[Key, str] = {}
        self._owed: dict[Key, Ranges] = {}
        self._next_s = 0.0

    def came(self, key: Key, topic: str, first: int, last: int) -> None:
        """Note what a batch on a topic brought."""
        self._topics[key] = f"{topic.rpartition('/')[0]}/ack"
        self._owed.setdefault(key, Ranges()).add(first, last)

    def reconnected(self) -> None:
        """Owe every stream's receipt once more: the last ones may not have arrived."""
        for key in self._topics:
            self._owed.setdefault(key, Ranges())

    def due(
        self, held: Callable[[Key], Ranges], now_s: float, *, at_once: bool = False
    ) -> list[tuple[str, bytes]]:
        """Return the receipts to send now, with their topics; `held` says what is kept of a stream for good."""
        if not self._owed or (now_s < self._next_s and not at_once):
            return []
        self._next_s = now_s + EVERY_S
        owed, self._owed = self._owed, {}
        return [
            (self._topics[key], msgspec.json.encode({"stream": key.stream, "ranges": ranges}))
            for key, came in owed.items()
            for ranges in _parts(held(key), came)
        ]


def _parts(held: Ranges, came: Ranges) -> list[list[tuple[int, int]]]:
    """Return all that is held or, where that is in too many pieces, those pieces that what came belongs to."""
    ranges = list(held)
    if len(ranges) > MOST_RANGES:
        ranges = [pair for pair in ranges if came.overlaps(*pair)]
    return [ranges[at : at + MOST_RANGES] for at in range(0, len(ranges), MOST_RANGES)]
