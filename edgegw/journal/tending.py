"""What a hand at the gateway may ask of the journal, as requests of the daemon's socket."""

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec

from edgegw.errors import JournalError
from edgegw.journal.journal import Journal

log = logging.getLogger(__name__)

Answer = dict[str, Any]


_Seq = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class _Ranges(msgspec.Struct, forbid_unknown_fields=True):
    stream: str
    ranges: list[tuple[_Seq, _Seq]]


class _Age(msgspec.Struct, forbid_unknown_fields=True):
    older_than_ms: Annotated[int, msgspec.Meta(ge=0, le=2**53)]


def requests(journal: Journal) -> dict[str, Callable[[Any], Awaitable[Answer]]]:
    """Return what may be asked, by name: `acknowledge`, `carried` and `prune`."""
    return {
        "acknowledge": lambda asked: _answered(_acknowledge, journal, asked, _Ranges),
        "carried": lambda asked: _answered(_carried, journal, asked, _Ranges),
        "prune": lambda asked: _answered(_prune, journal, asked, _Age),
    }


async def _answered(
    do: Callable[[Journal, Any], Awaitable[Answer]], journal: Journal, asked: Any, kind: type[msgspec.Struct]
) -> Answer:
    try:
        return {"ok": True, **await do(journal, msgspec.convert(asked, kind))}
    except (msgspec.ValidationError, JournalError) as error:
        return {"ok": False, "error": str(error)}


async def _acknowledge(journal: Journal, asked: _Ranges) -> Answer:
    """Settle the batches wholly within the ranges; answer which these were."""
    _expect(journal, asked.stream)
    released = await journal.acknowledge_ranges(asked.stream, asked.ranges)
    if released:
        log.info("journal: %d records need no sending any more, as a receipt says", released.total())
    return {"ranges": list(released)}


async def _carried(journal: Journal, asked: _Ranges) -> Answer:
    """Note what has been exported: it is not thinned together with what has not."""
    _expect(journal, asked.stream)
    journal.carried(asked.stream, asked.ranges)
    return {}


async def _prune(journal: Journal, asked: _Age) -> Answer:
    """Delete what is acknowledged and older; answer how much that was."""
    batches, records = await journal.prune(asked.older_than_ms)
    log.info("journal: pruned by hand, %d batches of %d records", batches, records)
    return {"batches": batches, "records": records}


def _expect(journal: Journal, stream: str) -> None:
    if stream != journal.stream:
        raise JournalError(f"found stream {stream}; this journal's is {journal.stream or 'not open yet'}")
