"""The inbox: where records wait for the writer, never long and never without bound."""

import asyncio
import threading
from collections import deque
from typing import NamedTuple

from edgegw.domain.era import Era
from edgegw.domain.record import Event, Record, Scan
from edgegw.journal.encode import Entry, encode

BYTES = 16 * 1024**2
"""Encoded records that may wait before new ones are lost."""
OVERHEAD = 200
"""What each of them takes besides."""


class Lost:
    """Stands for records that found the inbox full."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Damage(NamedTuple):
    """Records that a reader found damaged or missing; without bounds, it is the file that cannot be read."""

    stream: str
    detail: str
    first: int = 0
    last: int = 0


class Prune:
    """A wish that what is settled and old goes now; says how much has gone, and tells `done` when that is all."""

    __slots__ = ("batches", "done", "older_than_ms", "records")

    def __init__(self, older_than_ms: int, done: asyncio.Future[None]) -> None:
        self.older_than_ms = older_than_ms
        self.done = done
        self.batches = self.records = 0


class Taken(NamedTuple):
    """What the writer takes at one turn: records, losses and new eras in order, and what else it was told."""

    items: list[Entry | Lost | Era]
    flushes: list[asyncio.Future[None]]
    damages: list[Damage]
    prunes: list[Prune]
    readings: int


class Inbox:
    """Filled on the event loop's thread, emptied by the writer's.

    Records are encoded as they come, a few microseconds each. If the writer did it, a hundred milliseconds at a
    stretch, each byte from the field would have to wait for its turn at the interpreter: at 700,000 readings a second
    a tenth of the scans were skipped.
    """

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._items: deque[Entry | Lost | Era | Damage | Prune | asyncio.Future[None]] = deque()
        self._put = self._got = 0
        self._readings = self._told = 0
        self._losing: Lost | None = None
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, record: Record) -> None:
        """Take a record. Events are always taken; scans are counted as lost while the inbox is full."""
        if self._put - self._got > BYTES and not isinstance(record, Event):
            with self._lock:
                if self._losing is None:
                    self._losing = Lost()
                    self._items.append(self._losing)
                self._losing.count += 1
            return
        self._losing = None
        for entry in encode(record, self._max_message):
            self._put += len(entry.json) + OVERHEAD
            self._items.append(entry)
        self._readings += len(record.values) if isinstance(record, Scan) else 1

    def tell(self, what: Era | Damage | Prune | asyncio.Future[None]) -> None:
        """Say that an era begins here, ask for a flush (a future, resolved when all before it is durable), tell of
        damage, or wish for room."""
        self._items.append(what)

    def take(self) -> Taken:
        """Empty the inbox."""
        items: list[Entry | Lost | Era] = []
        flushes: list[asyncio.Future[None]] = []
        damages: list[Damage] = []
        prunes: list[Prune] = []
        weight = 0
        while self._items:
            item = self._items.popleft()
            if isinstance(item, Entry):
                weight += len(item.json) + OVERHEAD
                items.append(item)
            elif isinstance(item, Damage):
                damages.append(item)
            elif isinstance(item, Prune):
                prunes.append(item)
            elif isinstance(item, asyncio.Future):
                flushes.append(item)
            else:
                if isinstance(item, Lost):
                    with self._lock:  # from here on its count stands
                        if self._losing is item:
                            self._losing = None
                items.append(item)
        self._got += weight
        readings = self._readings
        readings, self._told = readings - self._told, readings
        return Taken(items, flushes, damages, prunes, readings)
