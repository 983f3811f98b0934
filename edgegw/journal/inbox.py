"""The inbox: where records wait for the writer, never long and never without bound."""

import asyncio
import threading
from collections import deque
from typing import NamedTuple

from edgegw.domain.era import Era
from edgegw.domain.record import Event, Record, Scan

READINGS = 500_000
"""Readings that may wait before new ones are lost: about 40 MB."""


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

    items: list[Record | Lost | Era]
    flushes: list[asyncio.Future[None]]
    damages: list[Damage]
    prunes: list[Prune]
    readings: int


class Inbox:
    """Filled on the event loop's thread, emptied by the writer's."""

    def __init__(self) -> None:
        self._items: deque[Record | Lost | Era | Damage | Prune | asyncio.Future[None]] = deque()
        self._put = self._got = 0
        self._losing: Lost | None = None
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, record: Record) -> None:
        """Take a record. Events are always taken; scans are counted as lost while the inbox is full."""
        weight = len(record.values) if isinstance(record, Scan) else 1
        if self._put - self._got > READINGS and not isinstance(record, Event):
            with self._lock:
                if self._losing is None:
                    self._losing = Lost()
                    self._items.append(self._losing)
                self._losing.count += 1
            return
        self._losing = None
        self._put += weight
        self._items.append(record)

    def tell(self, what: Era | Damage | Prune | asyncio.Future[None]) -> None:
        """Say that an era begins here, ask for a flush (a future, resolved when all before it is durable), tell of
        damage, or wish for room."""
        self._items.append(what)

    def take(self) -> Taken:
        """Empty the inbox."""
        items: list[Record | Lost | Era] = []
        flushes: list[asyncio.Future[None]] = []
        damages: list[Damage] = []
        prunes: list[Prune] = []
        weight = 0
        while self._items:
            item = self._items.popleft()
            if isinstance(item, Damage):
                damages.append(item)
            elif isinstance(item, Prune):
                prunes.append(item)
            elif isinstance(item, asyncio.Future):
                flushes.append(item)
            elif isinstance(item, Era):
                items.append(item)
            else:
                if isinstance(item, Lost):
                    with self._lock:  # from here on its count stands
                        if self._losing is item:
                            self._losing = None
                else:
                    weight += len(item.values) if isinstance(item, Scan) else 1
                items.append(item)
        self._got += weight
        return Taken(items, flushes, damages, prunes, weight)
