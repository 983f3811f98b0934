"""A journal's writer driven in the test's own thread, and the chain of what its listener was told."""

import asyncio
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apsw

from edgegw.config.schema import Journal as JournalConfig
from edgegw.config.units import Duration, Size
from edgegw.domain import batch as batches
from edgegw.domain.batch import Batch, ChainReport, Gap, Kind, Link
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record, Scan
from edgegw.journal.inbox import Inbox
from edgegw.journal.settled import Settled
from edgegw.journal.store import Reader, size_bytes, unpack, walk
from edgegw.journal.writer import Committed, Writer

GATEWAY = "site-7"
MIB = 1024**2
_numbers = random.Random(1)


def config(
    max_size: int = 64 * MIB, keep_ms: int = 86_400_000, commit_ms: int = 50,
    when_full: Literal["thin", "drop"] = "drop",
) -> JournalConfig:  # fmt: skip
    """Return a journal's configuration."""
    return JournalConfig(
        max_size=Size(max_size),
        keep=Duration(keep_ms),
        commit_interval=Duration(commit_ms),
        when_full=when_full,
    )


def scan(n: int, tags: int = 3, device: str = "meter1", width: int = 1) -> Scan:
    """Return a scan that holds `n` and numbers that do not pack well, `width` of them in each tag."""
    values: dict[str, Any] = {"n": n}
    for tag in range(1, tags):
        values[f"t{tag}"] = [_numbers.random() for _ in range(width)] if width > 1 else _numbers.random()
    return Scan(1_700_000_000_000 + n, device, values)


def event(n: int) -> Event:
    """Return an event that holds `n`."""
    return Event(1_700_000_000_000 + n, "config", {"n": n})


class Told(NamedTuple):
    """One batch as the listener was told of it."""

    stream: str
    batch: Batch
    body: bytes

    @property
    def records(self) -> list[dict[str, Any]]:
        """The batch's records."""
        return list(json.loads(self.body)["records"])


class Hand:
    """A writer whose turns are the test's, and what its listener was told."""

    def __init__(
        self, path: Path, journal: JournalConfig | None = None, max_message: int = 128 * 1024
    ) -> None:
        self.path = path
        self.mark = path.with_name(f"{path.name}.mark")
        self.told: list[Told] = []
        self.listener: Callable[[list[Told]], None] = lambda told: None
        self.flushed: list[asyncio.Future[None]] = []
        self.inbox = Inbox(max_message)
        self.settled = Settled()
        self.writer = Writer(path, GATEWAY, journal or config(), self.inbox, self.settled, self._tell)
        self.writer.open()

    def _tell(self, committed: Committed | None, flushed: list[asyncio.Future[None]]) -> None:
        if committed is not None:
            pairs = zip(committed.batches, committed.bodies, strict=True)
            told = [Told(committed.stream, batch, body) for batch, body in pairs]
            self.told += told
            self.listener(told)
            self.settled.hear(committed.batches[-1])
        self.flushed += flushed

    def turn(self, *records: Record) -> list[Told]:
        """Put records in, run one turn, and return what the listener was told at it."""
        before = len(self.told)
        for record in records:
            self.inbox.put(record)
        self.writer.turn()
        return self.told[before:]

    def thin(self) -> bool:
        """Thin the oldest that can be, as if there were no more room; tell whether there was any."""
        store, sealer = self.writer._ready()
        doom = self.writer._keeper._thin(store, sealer)
        if doom.ranges:
            self.writer._commit(store, sealer, [], doom)
        return bool(doom.ranges)

    def acknowledge(self, told: Iterable[Told]) -> None:
        """Acknowledge batches."""
        for one in told:
            self.settled.acknowledge(one.batch)

    def close(self) -> None:
        """Stop in order, as SIGTERM does."""
        self.writer.turn(last=True)
        self.writer.close()

    def copy_to(self, folder: Path) -> Path:
        """Copy the files as they are, as if the process had been killed here."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.path.parent.glob(f"{self.path.name}*"):
            if not file.name.endswith("-shm"):
                shutil.copyfile(file, folder / file.name)
        return folder / self.path.name

    @property
    def bytes(self) -> int:
        """What database and WAL take."""
        return size_bytes(self.path)


def spoil(path: Path, seq: int) -> None:
    """Damage the batch at `seq` where it stands, under whatever has the journal open."""
    db = apsw.Connection(str(path))
    try:
        db.set_busy_timeout(5_000)
        db.execute("UPDATE batch SET packed = zeroblob(length(packed)) WHERE seq = ?", (seq,))
    finally:
        db.close(True)


class Kept(NamedTuple):
    """What a journal's file holds."""

    stream: str
    batches: dict[int, Batch]
    bodies: dict[int, bytes]
    acked: Ranges
    head: int


def kept(path: Path) -> Kept:
    """Read a journal's file, every batch checked against its hash."""
    reader = Reader(path)
    try:
        held = {batch.seq: batch for batch in walk(reader)}
        bodies = {seq: unpack(batch) for seq, batch in held.items()}
        return Kept(reader.stream, held, bodies, reader.acked(), reader.tip().head)
    finally:
        reader.close()


def chain(bodies: Iterable[bytes]) -> ChainReport:
    """Verify one stream's chain from the messages alone."""
    links, gaps = [], []
    for body in bodies:
        message = batches.decode(body)
        last = message.seq + message.count - 1
        own = bytes.fromhex(message.last_prev) if message.last_prev else batches.digest(body)
        links.append(Link(message.seq, last, bytes.fromhex(message.prev), own, message.kind is Kind.SUMMARY))
        gaps += [
            Gap(g["from"], g["to"], bytes.fromhex(g["last_prev"])) for g in gaps_in(body, message.stream)
        ]
    return batches.verify(sorted(links), gaps)


def gaps_in(body: bytes, stream: str) -> list[dict[str, Any]]:
    """Return the gap events in a batch that name seqs of a stream."""
    message = json.loads(body)
    return [
        record
        for record in message["records"]
        if record.get("event") == "gap" and record.get("stream", message["stream"]) == stream
    ]


def named(bodies: Iterable[bytes], stream: str) -> Ranges:
    """Return the seqs of a stream that gap events name."""
    return Ranges((gap["from"], gap["to"]) for body in bodies for gap in gaps_in(body, stream))


def covered(bodies: Iterable[bytes]) -> Ranges:
    """Return the seqs that batches hold."""
    messages = [batches.decode(body) for body in bodies]
    return Ranges((message.seq, message.seq + message.count - 1) for message in messages)


def numbers(bodies: Iterable[bytes]) -> list[int]:
    """Return what `scan` and `event` were made with, in the order of the records."""
    records = (record for body in bodies for record in json.loads(body)["records"])
    return [held["n"] for held in (record.get("values", record) for record in records) if "n" in held]
