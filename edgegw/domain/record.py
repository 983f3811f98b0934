"""Records: what the journal numbers.

They are msgspec structs because they are made once a scan and encoded to JSON as they stand.
"""

from typing import Any

import msgspec

from edgegw.domain.tag import Value


class Scan(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One reading of a device's tags at one moment.

    `values` holds each tag's value, None where there is none; `quality` only the tags that are not good.
    """

    ts: int
    device: str
    values: dict[str, Value]
    quality: dict[str, str] | None = None


class DeviceStatus(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A device stopped answering (`bad`, with the reason) or is back (`good`)."""

    ts: int
    device: str
    status: str
    reason: str | None = None


class WindowResult(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a window came to from `start` to just before `ts`; `rev` counts how often it was said anew.

    `values` holds each aggregate, None where there was nothing that it could be of. `coverage` is the share of the
    time, of 0 to 1, in which the signal was known.
    """

    ts: int
    device: str
    values: dict[str, Value]
    start: int = msgspec.field(name="from")
    coverage: float
    rev: int
    quality: dict[str, str] | None = None


class Event(msgspec.Struct, frozen=True, gc=False):
    """Something that happened, by name and with its particulars."""

    ts: int
    event: str
    fields: dict[str, Any]


Record = Scan | DeviceStatus | WindowResult | Event


def wire(record: Record) -> Any:
    """Return what stands for the record in a message's `records`, ready for JSON."""
    if isinstance(record, Event):
        return {"ts": record.ts, "event": record.event, **record.fields}
    return record
