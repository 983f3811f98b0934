"""Plays the journal back into windows, a few batches at a time."""

from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from edgegw.domain.batch import Batch, Kind
from edgegw.domain.batch import decode as decode_batch
from edgegw.domain.record import DeviceStatus, Event, Record, Scan, WindowResult
from edgegw.errors import JournalDamaged
from edgegw.journal.store import Reader, unpack
from edgegw.series.window import Window

STEP = 16
"""Batches that are read at a time."""
STEP_BYTES = 1024**2
RUN = 20_000
"""Records that are sorted at a time, at most."""
AHEAD_MS = 60_000
"""A reading from further ahead than this is from a clock that is wrong: no stretch is over for its sake."""


class _Row(msgspec.Struct, gc=False):
    """A record of a batch of data: a scan, a device's status, or what a window came to."""

    ts: int
    device: str
    values: msgspec.Raw = msgspec.Raw()
    quality: dict[str, str] | None = None
    status: str = ""
    start: int = msgspec.field(name="from", default=0)
    coverage: float = 0.0
    rev: int | None = None


_rows = msgspec.json.Decoder(list[_Row])
_values = msgspec.json.Decoder(dict[str, Any])
_events = msgspec.json.Decoder(list[dict[str, Any]])


class History:
    """What the journal up to `head` says of windows; nobody else may touch these until it is through."""

    def __init__(self, path: Path, head: int, windows: Sequence[Window], now_ms: int) -> None:
        self._told: dict[str, dict[int, WindowResult]] = {window.spec.name: {} for window in windows}
        self._made: dict[str, dict[int, WindowResult]] = {window.spec.name: {} for window in windows}
        self._path = path
        self._head = head
        self._windows = {window.spec.name: window for window in windows}
        self._now_ms = now_ms
        self._newest_ms = 0
        self._next: int | None = None
        self._run: list[tuple[int, int, Record]] = []
        self._device = ""
        self._keys: dict[str, int] = {}
        self._since_ms = 0
        devices = {at.device for window in windows for at in window.spec.inputs}
        self._reading = {
            device: [w for w in windows if any(at.device == device for at in w.spec.inputs)]
            for device in devices
        }

    def step(self) -> bool:
        """Play a few batches; tell whether there are more. Raises JournalError."""
        reader = Reader(self._path)
        try:
            if self._next is None:
                self._next = self._first(reader)
            batches = reader.batches(self._next, self._head, limit=STEP, max_bytes=STEP_BYTES)
        finally:
            reader.close()
        for batch in batches:
            if batch.seq != self._next:
                self._gap()
            self._play(batch)
            self._next = batch.last + 1
        if not batches:
            self._sort_out()
        return bool(batches)

    def finish(self, window: Window) -> list[WindowResult]:
        """Return what is to be told of a window now: what was over when the gateway went down, or went by since.

        Of what came before the last result that was told nothing is told: it was not worth one then. The window takes
        all of it for told.
        """
        spec, told, made = window.spec, self._told[window.spec.name], self._made[window.spec.name]
        since_ms = max(told, default=self._newest_ms - spec.lateness_ms - spec.every_ms)
        untold = [
            msgspec.structs.replace(made[end_ms], rev=0)
            for end_ms in sorted(made)
            if end_ms > since_ms and end_ms not in told
        ]
        for result in (*told.values(), *untold):
            window.recall(result)
        return untold

    def last(self, window: Window) -> WindowResult | None:
        """Return the newest result that the journal holds of a window."""
        told = self._told[window.spec.name]
        return told[max(told)] if told else None

    # -- reading -----------------------------------------------------------------------------------------

    def _first(self, reader: Reader) -> int:
        """Find where to begin: as far before the newest batch as the longest window needs."""
        newest = reader.before(self._head + 1, limit=1)
        if not newest:
            return self._head + 1
        self._newest_ms = min(reader.oldest_ts(newest[0].seq, self._head) or 0, self._now_ms)
        since_ms = self._newest_ms - max(_reach_ms(window) for window in self._windows.values())
        first, last = 1, self._head
        while first < last:
            middle = (first + last) // 2
            ts = reader.oldest_ts(middle, self._head)
            if ts is not None and ts < since_ms:
                first = middle + 1
            else:
                last = middle
        return first

    def _play(self, batch: Batch) -> None:
        if batch.kind is Kind.SUMMARY:
            self._gap()
            return
        try:
            records = decode_batch(unpack(batch)).records
        except JournalDamaged:
            self._gap()
            return
        if batch.kind is Kind.EVENT:
            for event in _events.decode(records):
                self._event(Event(event.pop("ts"), event.pop("event"), event))
            return
        for row in _rows.decode(records):
            if row.device < self._device or len(self._run) >= RUN:
                self._sort_out()
            self._device = row.device
            if row.rev is not None and row.device in self._windows:
                values = _values.decode(row.values)
                told = WindowResult(row.ts, row.device, values, row.start, row.coverage, row.rev, row.quality)
                self._told[row.device][row.ts] = told
                self._run.append((row.ts, len(self._run), told))
            elif row.device in self._reading and row.ts <= self._now_ms + AHEAD_MS:
                self._keys[row.device] = key = max(row.ts, self._keys.get(row.device, self._since_ms))
                self._run.append((key, len(self._run), _record(row)))

    def _event(self, event: Event) -> None:
        """Take an event. What stands behind a start or an end happened behind it; others may be ahead of readings."""
        if event.event == "config":
            self._run.append((event.ts, len(self._run), event))
        elif event.event in ("start", "stop"):
            self._sort_out()
            self._keys.clear()
            self._since_ms = event.ts
            self._take(event, self._windows.values())

    def _sort_out(self) -> None:
        """Take a commit's records in the order of their times: the journal has them device by device.

        Each device's own order stays as it is, for a source's own time may be long ago.
        """
        self._run.sort()
        run, self._run, self._device = self._run, [], ""
        for _, _, record in run:
            if isinstance(record, WindowResult):
                window = self._windows[record.device]
                window.advance(record.ts)
                self._collect(window)
            elif isinstance(record, Event):
                self._take(record, self._windows.values())
            else:
                self._take(record, self._reading[record.device])

    def _take(self, record: Record, windows: Iterable[Window]) -> None:
        for window in windows:
            window.take(record)
            self._collect(window)

    def _collect(self, window: Window) -> None:
        if window.due:
            self._made[window.spec.name].update((result.ts, result) for result in window.results())

    def _gap(self) -> None:
        """End all that is held: what came next is not there."""
        self._sort_out()
        for window in self._windows.values():
            window.lose(None, window.watermark_ms)


def _reach_ms(window: Window) -> float:
    """Return how far back a window looks: also for what was held when it began."""
    spec = window.spec
    holds = [at.hold_ms for at in spec.inputs if isfinite(at.hold_ms)]
    return spec.size_ms + spec.lateness_ms + spec.every_ms + max(holds, default=0)


def _record(row: _Row) -> Record:
    if row.status:
        return DeviceStatus(row.ts, row.device, row.status)
    return Scan(row.ts, row.device, _values.decode(row.values), row.quality)
