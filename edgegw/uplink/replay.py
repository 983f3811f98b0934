"""Replays under way: what of each is still to be sent, and when the next batch may go. Pure."""

import math

from edgegw.domain.command import Replay, ReplayCommand
from edgegw.domain.ranges import Ranges

MOST = 8
"""Replays that may be under way at once."""
BYTES_S = 1024**2
"""What replays send in a second at the most, in bytes of payload."""


def planned(asked: ReplayCommand, kept: Ranges, head: int) -> Replay | str:
    """Return what a replay comes to, up to the head, or why it cannot be; `kept` are whole batches that overlap it."""
    if asked.first > head:
        return f"replay.from: found {asked.first}; this stream ends at {head}"
    last = min(asked.last, head)
    if not kept:
        return f"replay: records {asked.first} to {last} are no longer kept"
    return Replay(asked.id, asked.stream, asked.first, last, tuple(kept))


class Replays:
    """The replays that were asked for and are not over, oldest first; they live over any number of connections."""

    def __init__(self) -> None:
        self._pending: list[tuple[Replay, Ranges]] = []
        self._next_s = -math.inf

    @property
    def full(self) -> bool:
        """Whether no more can be taken on."""
        return len(self._pending) >= MOST

    def add(self, replay: Replay) -> None:
        """Take one on."""
        self._pending.append((replay, Ranges(replay.kept)))

    def following(self, stream: str, under_way: Ranges) -> tuple[int, int] | None:
        """Return what to read next; replays of a stream that has ended are over."""
        self._pending = [(replay, left) for replay, left in self._pending if replay.stream == stream and left]
        for _, left in self._pending:
            for seqs in left:
                if (gap := next(under_way.gaps(*seqs), None)) is not None:
                    return gap
        return None

    def sent(self, stream: str, first: int, last: int) -> None:
        """Note that `first` to `last` were sent, or are not there to be sent; nothing if `last` lies below."""
        for replay, left in self._pending:
            if replay.stream == stream and first <= last:
                left.remove(first, last)

    def wait_s(self, now_s: float) -> float:
        """Return how long the next batch must still wait, 0 if it may go."""
        return max(0.0, self._next_s - now_s)

    def goes(self, size: int, now_s: float) -> None:
        """Note that a batch of so many bytes goes out now."""
        self._next_s = max(self._next_s, now_s) + size / BYTES_S
