"""What a new stream begins with: why it does, and what is gone of those before it."""

from pathlib import Path
from typing import NamedTuple

from edgegw import clock
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record
from edgegw.errors import JournalError
from edgegw.journal.mark import Mark
from edgegw.journal.store import Reader


class Left(NamedTuple):
    """What an earlier stream left: where it ended, and what of it needs no sending."""

    head: int
    settled: Ranges


def gather(mark: Mark | None, path: Path, memory: tuple[str, Left]) -> dict[str, Left]:
    """Put together what mark, file and memory know of the streams that end here, the mark's first."""
    left: dict[str, Left] = {}
    marked = [(mark.stream, Left(mark.head, Ranges()))] if mark else []
    for stream, (head, settled) in (*marked, *_last_words(path), memory):
        known = left.get(stream, Left(0, Ranges()))
        for first, last in settled:
            known.settled.add(first, last)
        left[stream] = Left(max(head, known.head), known.settled)
    left.pop("", None)  # memory, before a first file was open
    return left


def opening(left: dict[str, Left], reason: str, more: dict[str, object]) -> list[Record]:
    """Return the events that a stream begins with."""
    now_ms = clock.wall_ms()
    fields: dict[str, object] = {"reason": reason, **more}
    if left:
        previous, (head, _) = next(iter(left.items()))
        fields |= {"previous": previous, "previous_head": head}
    records: list[Record] = [Event(now_ms, "stream", fields)]
    for stream, (head, settled) in left.items():
        for first, last in settled.gaps(1, head):
            gap = {"stream": stream, "from": first, "to": last, "reason": "damaged"}
            records.append(Event(now_ms, "gap", gap))
    return records


def _last_words(path: Path) -> list[tuple[str, Left]]:
    """Return what a file says of its stream, head and what was settled, if it still can."""
    try:
        reader = Reader(path)
        try:
            return [(reader.stream, Left(reader.tip().head, reader.acked()))]
        finally:
            reader.close()
    except JournalError:
        return []
