"""Paces the backlog so that it fills the link and still leaves it free for live batches."""


class Pacer:
    """How many backlog batches may be unacknowledged at once.

    It grows while acknowledgements come within `target_s` and shrinks when they take longer: then batches
    queue somewhere on the way, and a live batch would queue behind them. (Additive increase, multiplicative
    decrease, as in RFC 5681; delay as the signal, as in RFC 6817.)
    """

    def __init__(self, target_s: float, most: int) -> None:
        self._target_s = target_s
        self._most = max(1, most)
        self._window = 1.0
        self._starting = True
        self._shrunk_at = 0.0

    @property
    def window(self) -> int:
        """Batches that may be on the way, at least 1."""
        return int(self._window)

    def acknowledged(self, sent_s: float, now_s: float) -> None:
        """Learn from an acknowledgement of a batch sent at `sent_s`."""
        if now_s - sent_s <= self._target_s:
            self._window = min(self._most, self._window + (1.0 if self._starting else 1.0 / self._window))
        elif sent_s > self._shrunk_at:
            self._window = max(1.0, self._window / 2)
            self._starting = False
            self._shrunk_at = now_s

    def restart(self) -> None:
        """Begin again with one at a time."""
        self._window = 1.0
        self._starting = True
