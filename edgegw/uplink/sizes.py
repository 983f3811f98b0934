"""The sizes of messages that a broker accepts, as it tells in its CONNACK or as its connections show. Pure.

Some brokers hang up on a message that is too large, without a word, or even acknowledge it first (mosquitto 2.0 with
MQTT 3.1.1 and `message_size_limit`). Where connections end again and again with a
message in flight that is larger than any that got through, messages of such sizes are sent alone: nothing else is in
flight then, so that a connection that ends shows which one it was.
"""

from enum import Enum

RETRY_S = 600.0
MAX_RETRY_S = 7200.0
"""How long a size that ended connections is not tried again."""
STRIKES = 2
"""Connections that must end before a size is doubted, and trials before it counts as refused."""
PROMPT_S = 5.0
"""A connection that ends within that after a message was sent alone ended because of it."""
SETTLE_S = 1.0
"""How long a connection must last after it acknowledged a message for that to prove its size."""
PACKET_OVERHEAD = 64
"""What a PUBLISH takes beside topic and payload, at the most."""
MIN_LIMIT = 1024
"""What every broker accepts: a connection that ends with no more than that in flight has another reason."""
PACKS = 2
"""How many times smaller than its JSON a batch is at least, as a rule, with zstd."""


class Fate(Enum):
    """What to do with a message of some size: send it, wait until it can go alone, or hold it aside."""

    SEND = "send"
    ALONE = "alone"
    ASIDE = "aside"


class Sizes:
    """What one broker accepts, learnt over any number of connections; sizes are those of payloads, in bytes."""

    def __init__(self) -> None:
        self.told: int | None = None
        self.refused: int | None = None
        self.trial: int | None = None
        self.reported: int | None = None
        self._trial_s = 0.0
        self._proven = 0
        self._acknowledged: list[tuple[float, int]] = []  # when and what, each larger than the one before
        self._strikes = 0
        self._doubted = False
        self._retry_at_s = 0.0
        self._retry_s = RETRY_S

    def connected(self, maximum_packet_size: int | None, longest_topic: int) -> None:
        """Begin with a new connection."""
        if maximum_packet_size is not None:
            self.told = maximum_packet_size - longest_topic - PACKET_OVERHEAD
        else:
            self.told = None

    @property
    def limit(self) -> int | None:
        """The largest payload that new batches should come to; None: any. Halving finds what is not told."""
        limits = [] if self.told is None else [self.told]
        if self.refused is not None:
            limits.append(self.refused // 2)
        return max(MIN_LIMIT, min(limits)) if limits else None

    def too_large(self, size: int) -> bool:
        """Tell whether a message is larger than the broker told that it accepts."""
        return self.told is not None and size > self.told

    def describe(self, size: int) -> str:
        """Return why a message of some size is not accepted."""
        if self.too_large(size):
            return f"accepts messages of {self.told} bytes at most"
        return f"ends the connection at messages of {self.refused} bytes"

    def retry_due(self, now_s: float) -> bool:
        """Tell whether a size that was refused is to be tried again."""
        return self.refused is not None and now_s >= self._retry_at_s

    def fate(self, size: int, now_s: float) -> Fate:
        """Say what to do with a message."""
        self.settle(now_s)
        if self.too_large(size):
            return Fate.ASIDE
        if self.refused is not None and size >= self.refused:
            return Fate.ALONE if self.retry_due(now_s) else Fate.ASIDE
        return Fate.ALONE if self._doubted and size > max(MIN_LIMIT, self._proven) else Fate.SEND

    def try_alone(self, size: int, now_s: float) -> None:
        """Note that a message is sent with nothing else in flight."""
        self.trial, self._trial_s = size, now_s

    def answered(self, size: int, now_s: float, *, accepted: bool) -> None:
        """Note that a message was acknowledged or, if not `accepted`, that it shows nothing."""
        if not accepted:
            self.trial = None if size == self.trial else self.trial
        elif size > max([self._proven, *(larger for _, larger in self._acknowledged[-1:])]):
            self._acknowledged.append((now_s, size))

    def settle(self, now_s: float) -> None:
        """Take for proven what was acknowledged a while ago."""
        while self._acknowledged and now_s - self._acknowledged[0][0] >= SETTLE_S:
            _, self._proven = self._acknowledged.pop(0)
        if self.refused is not None and self._proven >= self.refused:
            self.refused, self._retry_s = None, RETRY_S
        if self.trial is not None and self._proven >= self.trial:
            self.trial, self._strikes, self._doubted = None, 0, self.refused is not None

    def lost(self, in_flight: list[int], now_s: float, *, stable: bool) -> None:
        """Note that the connection ended with messages of these sizes in flight, after it had been `stable` or not."""
        self.settle(now_s)
        trial, self.trial = self.trial, None
        largest = max([*in_flight, *(size for _, size in self._acknowledged)], default=0)
        doubtful = largest > max(MIN_LIMIT, self._proven)
        self._acknowledged.clear()
        if stable:
            self._retry_at_s = now_s  # the broker may have been restarted, and accept more
        else:
            self._proven = 0  # or less
        if not doubtful:
            return
        self._strikes += 1
        if trial is not None and (self._strikes >= STRIKES or now_s - self._trial_s <= PROMPT_S):
            self._refuse(trial, now_s)
        elif trial is None and self._strikes >= STRIKES:
            self._doubted, self._strikes = True, 0

    def _refuse(self, size: int, now_s: float) -> None:
        retried = self.retry_due(now_s)
        self._retry_s = min(MAX_RETRY_S, 2 * self._retry_s) if retried else RETRY_S
        self._retry_at_s = now_s + self._retry_s
        self._strikes = 0
        self.refused = size if self.refused is None else min(self.refused, size)


def largest_json(limit: int | None, *, packed: bool) -> int | None:
    """Return how much JSON a new batch may hold for its payload to keep a limit; some that packs badly may not."""
    return limit if limit is None or not packed else PACKS * limit
