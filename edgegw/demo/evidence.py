"""Gathers what the verdict is made from: the receiver's database, its reports, and the journal's file."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from edgegw.demo.judge import Evidence, Journaled, Received
from edgegw.demo.site import DemoError
from edgegw.journal.store import Reader, walk
from edgegw.receiver import wire


def gather(database: Path, reports: Sequence[str], journal: Path) -> Evidence:
    """Read everything, once nobody writes any more; raise DemoError if something is not there."""
    received, conflicts = read_database(database)
    return Evidence(received, conflicts, sum(map(_duplicates, reports)), read_journal(journal))


def read_database(file: Path) -> tuple[list[Received], int]:
    """Return the batches in a receiver's database, in order of their seq, and the number of conflicts."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute(
                "SELECT body, received_ts FROM batches ORDER BY gateway, stream, seq"
            ).fetchall()
            (conflicts,) = db.execute("SELECT count(*) FROM conflicts").fetchone()
    except sqlite3.Error as error:
        raise DemoError(f"demo: the receiver's database {file} cannot be read: {error}") from error
    return [Received(wire.read(body.encode()), received_ms) for body, received_ms in rows], conflicts


def read_journal(file: Path) -> Journaled:
    """Return what a journal's file holds; raise JournalError."""
    reader = Reader(file)
    with closing(reader):
        digests = {batch.seq: batch.digest for batch in walk(reader)}
        return Journaled(reader.stream, reader.tip().head, digests)


def _duplicates(report: str) -> int:
    """Return how many batches a run of the receiver had already."""
    try:
        return sum(stream["duplicates"] for stream in json.loads(report)["streams"])
    except (ValueError, KeyError, TypeError) as error:
        raise DemoError(f"demo: the receiver's report cannot be read: {error}") from error
