"""Chooses the batches that an export carries, and says which it must leave behind."""

from collections.abc import Callable, Iterator

import msgspec

from edgegw.domain.batch import Batch, Message, decode
from edgegw.domain.ranges import Ranges
from edgegw.errors import JournalDamaged
from edgegw.journal.period import Period, walk
from edgegw.journal.store import Reader, unpack


class _Time(msgspec.Struct, gc=False):
    ts: int


_times = msgspec.json.Decoder(list[_Time])


def chosen(
    reader: Reader, gateway: str, period: Period, *, unsent: bool, left_out: Callable[[str], None]
) -> Iterator[tuple[Batch, bytes]]:
    """Yield the batches with a record in the period, and their JSON bytes, in order.

    With `unsent` only those that nobody upstream is known to have. What cannot be carried is told to `left_out`.
    """
    settled = reader.acked() if unsent else Ranges()
    for batch in walk(reader, period):
        if settled.covers(batch.seq, batch.last):
            continue
        try:
            body = unpack(batch)
            message = decode(body)
            if message.gateway != gateway:
                left_out(f"batch {batch.seq}: it is of gateway {message.gateway}, which this once was")
            elif not period.bounded or _within(period, message):
                yield batch, body
        except (JournalDamaged, msgspec.MsgspecError) as error:
            left_out(str(error))


def _within(period: Period, message: Message) -> bool:
    """Tell whether any record is of the period; a summary's is of all the time that it stands for."""
    length_ms = max(0, 1000 * (message.period or 0) - 1)
    return any(
        period.from_ms <= record.ts + length_ms and record.ts < period.to_ms
        for record in _times.decode(message.records)
    )
