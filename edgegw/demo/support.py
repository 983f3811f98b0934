"""What the gateway did on its own while nobody could be asked, as the receiver's database tells it."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import msgspec

from edgegw.demo.site import LOW_HZ, SETPOINT, SUPPORT_KW
from edgegw.receiver.wire import Batch


class _Entry(msgspec.Struct, frozen=True):
    """An entry of the ledger."""

    ts: int
    event: str
    tag: str = ""
    new: float | bool | str | None = None
    ok: bool | None = None
    cause: str = ""
    state: str = ""


_entry = msgspec.json.Decoder(_Entry)


class Support(NamedTuple):
    """The dips of the frequency, how soon the battery answered each, and whether it was handed back."""

    lowest_hz: float | None
    dips: int
    answers_ms: list[int]
    written: int
    handed_back: bool


def support(batches: Iterable[Batch]) -> Support:
    """Read dips and answers out of the records, in order of their numbers."""
    lows: list[tuple[int, float]] = []
    entries: list[_Entry] = []
    for batch in batches:
        for record in batch.data:
            hz = (record.values or {}).get("frequency") if record.device == "meter1" else None
            if isinstance(hz, float):
                lows.append((record.ts, hz))
        entries += [
            _entry.decode(raw) for event, raw in zip(batch.events, batch.raw, strict=False) if event.ts
        ]
    begun = [ts for (_, before), (ts, hz) in pairwise(lows) if hz < LOW_HZ and before >= LOW_HZ]
    writes = [entry for entry in entries if entry.event == "write" and entry.tag == SETPOINT and entry.ok]
    answers = [
        next((write.ts - ts for write in writes if write.ts >= ts and write.new == SUPPORT_KW), None)
        for ts in begun
    ]
    return Support(
        min((hz for _, hz in lows), default=None),
        len(begun),
        [answer for answer in answers if answer is not None],
        len(writes),
        bool(writes) and writes[-1].new == 0.0,
    )
