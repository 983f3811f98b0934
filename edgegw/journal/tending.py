"""What a hand at the gateway may ask of the journal: to take note of what a receipt says is safe elsewhere."""

import logging
from typing import Any

import msgspec

from edgegw.errors import JournalError
from edgegw.journal.journal import Journal

log = logging.getLogger(__name__)


class _Acknowledge(msgspec.Struct, forbid_unknown_fields=True):
    stream: str
    ranges: list[tuple[int, int]]


async def acknowledge(journal: Journal, asked: Any) -> dict[str, Any]:
    """Settle the batches wholly within `{"stream":..., "ranges":[[first, last],...]}`; answer which these were."""
    try:
        wanted = msgspec.convert(asked, _Acknowledge)
        if wanted.stream != journal.stream:
            return _refused(
                f"found stream {wanted.stream}; this journal's is {journal.stream or 'not open yet'}"
            )
        released = await journal.acknowledge_ranges(wanted.stream, wanted.ranges)
    except (msgspec.ValidationError, JournalError) as error:
        return _refused(str(error))
    if released:
        log.info("journal: %d records need no sending any more, as a receipt says", released.total())
    return {"ok": True, "ranges": list(released)}


def _refused(reason: str) -> dict[str, Any]:
    return {"ok": False, "error": reason}
