"""The corrector: has a sink's tables say what unsynchronised clocks should have said, as soon as that is known.

What is right depends only on what is kept, not on the order it came in: whenever a new era is heard of, the
batches of its boot are looked at again, and those whose correction has changed are written anew from their bodies.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from edgegw.receiver.dedupe import Key
from edgegw.receiver.timing import NAMING, Eras, moved, read_era, unsynced_era
from edgegw.receiver.wire import Batch, read

PAGE = 100
"""Batches looked at between two commits."""


class Correction(NamedTuple):
    """What was done to the times of a batch: how many records were moved, and by how much."""

    records: int
    delta_ms: int


class Place(NamedTuple):
    """Where a batch stands among those of a gateway; `layer` tells apart those that begin with the same seq."""

    stream: str
    seq: int
    layer: int


START = Place("", 0, 0)


@runtime_checkable
class Correctable(Protocol):
    """What a sink can beside the rest for its times to be corrected; every method raises SinkError."""

    def prepare_corrections(self) -> None:
        """Make the table of corrections, and what it takes to find and rewrite a batch."""
        ...

    def naming_events(self) -> Iterable[tuple[str, bytes]]:
        """Yield the gateway and the JSON of each event that may name an era."""
        ...

    def unsynced(self, gateway: str, after: Place, limit: int) -> Sequence[tuple[Place, bytes]]:
        """Return the next unsynchronised batches behind a place, in their order."""
        ...

    def correction(self, batch: Batch) -> Correction | None:
        """Return what was done to a batch, None if nothing was."""
        ...

    def correct(self, batch: Batch, correction: Correction) -> None:
        """Write a batch's records anew, as they are given, and note why; its body is left alone."""
        ...

    def commit(self) -> None:
        """Make it safe."""
        ...


class Applied(NamedTuple):
    """What was corrected, as an operator wants to know it."""

    key: Key
    delta_ms: int
    batches: int
    records: int


class Corrector:
    """Corrects what is kept, and then what comes."""

    def __init__(self, sink: Correctable) -> None:
        self._sink = sink
        self._eras = Eras()
        self._changed: set[str] = set()
        self._batches: Counter[tuple[Key, int]] = Counter()
        self._records: Counter[tuple[Key, int]] = Counter()
        sink.prepare_corrections()
        for gateway, event in sink.naming_events():
            if (era := read_era(event)) is not None:
                self._eras.add(gateway, era)
        self._changed = self._eras.gateways

    def take(self, batch: Batch) -> None:
        """Take in a batch that was just added."""
        for event, raw in zip(batch.events, batch.raw, strict=False):
            era = read_era(bytes(raw)) if event.event in NAMING else None
            if era is not None and self._eras.add(batch.key.gateway, era):
                self._changed.add(batch.key.gateway)
        self._look(batch)

    def settle(self) -> None:
        """Correct anew what has changed by the eras heard of since; call it when all is committed."""
        for gateway in sorted(self._changed & self._eras.gateways):
            self._settle(gateway)
        self._changed.clear()

    def _settle(self, gateway: str) -> None:
        place = START
        while rows := self._sink.unsynced(gateway, place, PAGE):
            for place, body in rows:  # noqa: B007  the next page begins behind the last one
                self._look(read(body))
            self._sink.commit()

    def _look(self, batch: Batch) -> None:
        """Correct a batch, if that can and need be done."""
        era = unsynced_era(batch.body)
        move = self._eras.move(batch.key.gateway, era) if era is not None else None
        if era is None or move is None:
            return
        corrected, count = moved(batch, era, move)
        correction = Correction(count, move.delta_ms if count else 0)
        if correction == (self._sink.correction(batch) or Correction(0, 0)):
            return
        self._sink.correct(corrected, correction)
        self._batches[batch.key, correction.delta_ms] += 1
        self._records[batch.key, correction.delta_ms] += count

    def applied(self) -> list[Applied]:
        """Return what was corrected by this one."""
        return [
            Applied(key, delta_ms, batches, self._records[key, delta_ms])
            for (key, delta_ms), batches in sorted(self._batches.items())
        ]
