"""Readings to the figures of equal stretches of time, a row for each stretch and tag. Pure."""

from collections.abc import Iterable, Iterator

import msgspec

from edgegw.domain.quality import is_bad
from edgegw.domain.tag import Value
from edgegw.journal.query import Reading

MOST_OPEN = 100_000
"""Rows held before the older half of them is let go; what comes for those later makes rows of its own."""

_Key = tuple[int, str, str]


class _Row(msgspec.Struct):
    """What is known of one tag in one stretch so far; `numbers` of the `samples` readings can be averaged."""

    samples: int = 0
    numbers: int = 0
    sum: float = 0.0
    low: float | None = None
    high: float | None = None
    last: Value = None
    quality: str | None = None

    def add(self, reading: Reading) -> None:
        """Take a reading in; one that holds no value shows in the quality alone."""
        if reading.quality is not None:
            self.quality = reading.quality
        value, samples = reading.value, reading.samples
        if samples is None:
            low = high = last = value
            samples = 0 if value is None or is_bad(reading.quality) else 1
        else:
            low, high, last = reading.low, reading.high, reading.last
        if not samples:
            return
        self.samples += samples
        self.last = last
        if isinstance(value, bool | int | float):
            self.numbers += samples
            self.sum += value * samples
        if isinstance(low, bool | int | float) and (self.low is None or low < self.low):
            self.low = float(low)
        if isinstance(high, bool | int | float) and (self.high is None or high > self.high):
            self.high = float(high)

    def reading(self, key: _Key) -> Reading:
        """Return the row; `value` is the mean, or the last where there is none."""
        value = self.sum / self.numbers if self.numbers else self.last
        return Reading(*key, value, self.quality, self.low, self.high, self.last, self.samples)


def resample(
    readings: Iterable[Reading], step_ms: int, *, origin_ms: int = 0, most_open: int = MOST_OPEN
) -> Iterator[Reading]:
    """Yield a row for each tag and each `step_ms` from `origin_ms` in which it was read, by time and name.

    A row's time is where its stretch begins. Its quality is the last one that was not good.
    """
    open_: dict[_Key, _Row] = {}
    for reading in readings:
        key = (
            reading.ts - (reading.ts - origin_ms) % step_ms,
            reading.device,
            reading.tag,
        )
        row = open_.get(key)
        if row is None:
            if len(open_) >= most_open:
                for old in sorted(open_)[: most_open // 2]:
                    yield open_.pop(old).reading(old)
            row = open_[key] = _Row()
        row.add(reading)
    for key in sorted(open_):
        yield open_[key].reading(key)
