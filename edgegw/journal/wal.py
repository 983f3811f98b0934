"""What a WAL holds behind its last sound commit: the batches of commits that SQLite does not show any more. Pure.

After a power cut SQLite takes the WAL's frames up to the first whose checksum is wrong, and says nothing of those
behind it. If a commit is there, its batches may have been published: their seqs must not be used again. A
transaction that was being written when the power failed ends in no commit, and nobody was told of it.

The file format is SQLite's, "Database File Format", 1.6 (b-tree pages), 2.1 (records) and 4.1 (the WAL).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from edgegw.domain.batch import Kind

WAL_HEADER = 32
_FRAME = struct.Struct(">I I 8s 8x")
"""Page number, size of the database after a commit or 0, salts of the WAL's present life, checksum."""
_TABLE_LEAF = 0x0D
_COLUMNS = 10
_DIGEST = 12 + 2 * 32
"""The serial type of a BLOB of 32 bytes."""
_INTEGERS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}
"""Bytes that an integer (or NULL) of each serial type takes."""
_KINDS = {kind.value.encode() for kind in Kind}


class Trace(NamedTuple):
    """A batch as a page shows it: its seqs, and the hash that the next batch carries."""

    first: int
    last: int
    link: bytes


def committed_beyond(wal: bytes, sound_frames: int, page: int, tip: int) -> Trace | None:
    """Return the last batch after record `tip` that was committed behind the WAL's sound frames, None if there is none.

    The frame that ends the sound part is damaged: what it shows counts only where it follows on what is known.
    """
    found: dict[int, Trace] = {}
    trusted: Trace | None = None
    open_traces: dict[bytes, list[tuple[int, Trace]]] = {}
    size = _FRAME.size + page
    for number, at in enumerate(range(WAL_HEADER + sound_frames * size, len(wal) - size + 1, size)):
        _, commit, salts = _FRAME.unpack_from(wal, at)
        here = open_traces.setdefault(salts, [])
        here += [(number, trace) for trace in _traces(wal[at + _FRAME.size : at + size]) if trace.first > tip]
        if commit:
            for of, trace in open_traces.pop(salts):
                found[trace.first] = trace
                if of and (trusted is None or trace.last > trusted.last):
                    trusted = trace
    chained: Trace | None = None
    while (following := found.get(tip + 1)) is not None:
        chained, tip = following, following.last
    return max(filter(None, (trusted, chained)), key=lambda trace: trace.last, default=None)


def _traces(page: bytes) -> Iterator[Trace]:
    """Yield the batches whose rows begin on a page; whatever else stands there is passed over."""
    if page[0] != _TABLE_LEAF:
        return
    cells = int.from_bytes(page[3:5], "big")
    for at in range(8, min(8 + 2 * cells, len(page) - 1), 2):
        try:
            if (trace := _trace(page, int.from_bytes(page[at : at + 2], "big"))) is not None:
                yield trace
        except IndexError:
            continue  # a page in pieces


def _trace(page: bytes, at: int) -> Trace | None:
    """Read one cell; None if it is no row of `batch`."""
    _, at = _varint(page, at)
    seq, at = _varint(page, at)
    header, types_at = _varint(page, at)
    body, types = at + header, []
    while types_at < body:
        kind, types_at = _varint(page, types_at)
        types.append(kind)
    if len(types) != _COLUMNS or types[0] != 0 or types[6] != _DIGEST or types[7] not in (0, _DIGEST):
        return None
    columns: list[bytes] = []
    for kind in types[:8]:
        length = _INTEGERS[kind] if kind in _INTEGERS else max(0, kind - 12) // 2
        columns.append(page[body : body + length])
        body += length
    count = 1 if types[1] == 9 else int.from_bytes(columns[1], "big")
    if columns[2] not in _KINDS or len(columns[6]) != 32 or not count or body > len(page):
        return None
    return Trace(seq, seq + count - 1, columns[7] or columns[6])


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length integer and where it ends; raise IndexError beyond the page."""
    value = 0
    for length in range(9):
        byte = page[at + length]
        if length == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + length + 1
    raise AssertionError("unreachable")
