"""The inbox: where records wait for the writer, never long and never without bound."""

import asyncio
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from edgegw.domain.era import Era
from edgegw.domain.record import Event, Record, Scan
from edgegw.journal.encode import Entry, encode

BYTES = 16 * 1024**2
"""Encoded records that may wait before new ones are lost."""
EVENT_BYTES = 8 * 1024**2
"""What events may take beyond that, but for those that say that a command or a write was refused."""
WAITING_FLUSHES = 256
"""Flushes after which those are forgotten that nobody waits for any more."""
OVERHEAD = 200
"""What each of them takes besides."""
MIN_MESSAGE = 1024
"""No limit makes batches smaller than that, bytes of JSON."""
TURN_BYTES = 2 * 1024**2
"""Encoded records that are worth a turn of the writer before its time: a transaction's worth."""


@dataclass
class Lost:
    """Stands for records that have seqs and are nowhere: they found the inbox full, or their commits are damaged.

    `link` is the hash that the batch after them carries, None if they never were in batches.
    """

    count: int
    reason: str = "full"
    link: bytes | None = None


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


@dataclass
class Load:
    """What came since the writer last looked: runs of records, losses and new eras in order, and what it was told."""

    items: list[list[Entry] | Lost | Era] = field(default_factory=list)
    flushes: list[asyncio.Future[None]] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    prunes: list[Prune] = field(default_factory=list)
    readings: int = 0
    bytes: int = 0

    def full(self, record: Record) -> bool:
        """Tell whether it holds as much as may wait before a record is lost."""
        reserved = isinstance(record, Event) and not _refusal(record)
        return self.bytes > BYTES + (EVENT_BYTES if reserved else 0)

    def add(self, entries: list[Entry], readings: int) -> None:
        """Take a record's entries."""
        if self.items and isinstance(run := self.items[-1], list):
            run += entries
        else:
            self.items.append(entries)
        self.readings += readings
        for entry in entries:
            self.bytes += len(entry.json) + OVERHEAD

    def lose(self) -> None:
        """Count a record that there was no room for."""
        if self.items and isinstance(lost := self.items[-1], Lost):
            lost.count += 1
        else:
            self.items.append(Lost(1))


def _refusal(event: Event) -> bool:
    """Tell whether it is an event of which anybody who may send commands can cause any number."""
    return event.event == "write-refused" or (event.event == "command" and not event.fields.get("ok"))


class Inbox:
    """Filled on the event loop's thread, emptied by the writer's.

    Records are encoded as they come, a few microseconds each. If the writer did it, a hundred milliseconds at a
    stretch, each byte from the field would have to wait for its turn at the interpreter: at 700,000 readings a second
    a tenth of the scans were skipped.
    """

    def __init__(self, max_message: int) -> None:
        self.max_message = max_message
        self._configured = max_message
        self._load = Load()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._load.items)

    @property
    def much(self) -> bool:
        """Whether a turn of the writer is worth while already."""
        return self._load.bytes > TURN_BYTES

    def limit_message(self, size_bytes: int | None) -> None:
        """Have records that come from now on grouped into batches of at most that, and of what is configured."""
        limit = self._configured if size_bytes is None else min(self._configured, size_bytes)
        self.max_message = max(MIN_MESSAGE, limit)

    def put(self, record: Record) -> None:
        """Take a record, or count it as lost while the inbox is full."""
        if self._load.full(record):
            with self._lock:
                self._load.lose()
            return
        entries = encode(record, self.max_message)
        readings = len(record.values) if isinstance(record, Scan) else 1
        with self._lock:
            self._load.add(entries, readings)

    def tell(self, what: Era | Damage | Prune | asyncio.Future[None]) -> None:
        """Say that an era begins here, ask for a flush (a future, resolved when all before it is durable), tell of
        damage, or wish for room."""
        with self._lock:
            if isinstance(what, Era):
                self._load.items.append(what)
            elif isinstance(what, Damage):
                if what not in self._load.damages:
                    self._load.damages.append(what)
            elif isinstance(what, Prune):
                self._load.prunes.append(what)
            else:
                if len(self._load.flushes) >= WAITING_FLUSHES:  # a disk that hangs: most gave up waiting
                    self._load.flushes = [done for done in self._load.flushes if not done.done()]
                self._load.flushes.append(what)

    def take(self) -> Load:
        """Empty the inbox."""
        with self._lock:
            load, self._load = self._load, Load()
        return load
