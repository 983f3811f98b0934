"""Decides whether a receipt is of this journal, and so what it may release."""

from edgegw.domain.batch import GENESIS, Batch, Kind, decode
from edgegw.errors import JournalDamaged
from edgegw.journal.receipt import Held, Receipt, ReceiptError
from edgegw.journal.store import Reader, unpack


def releasable(reader: Reader, gateway: str, receipt: Receipt) -> tuple[list[tuple[int, int]], list[Held]]:
    """Return the ranges whose last batch has the hash that the receipt says, and those whose end is gone from here.

    Raises ReceiptError if it is of another gateway or stream, or if any hash is another.
    """
    if (receipt.gateway, receipt.stream) != (gateway, reader.stream):
        raise ReceiptError(
            f"found a receipt of gateway {receipt.gateway}, stream {receipt.stream}; "
            f"expected {gateway}, {reader.stream}"
        )
    ranges, unknown = [], []
    for held in receipt.ranges:
        known = _digest_at(reader, held.last)
        if known is None:
            unknown.append(held)
        elif known.hex() != held.digest:
            raise ReceiptError(
                f"found the hash {held.digest} for the batch that ends at {held.last}; here it is {known.hex()}"
            )
        else:
            ranges.append((held.first, held.last))
    return ranges, unknown


def _digest_at(reader: Reader, seq: int) -> bytes | None:
    """Return the hash of the batch that ends at `seq`, as itself or the one that follows says; None without these."""
    ending = reader.before(seq + 1, limit=1)
    if ending and ending[0].last == seq:
        return _stands_for(ending[0])
    following = reader.batches(seq + 1, seq + 1, limit=1)
    try:
        return bytes.fromhex(decode(unpack(following[0])).prev) if following else None
    except JournalDamaged:
        return None


def _stands_for(batch: Batch) -> bytes | None:
    """Return a batch's hash, for a summary that of the last one whose place it took."""
    if batch.kind is not Kind.SUMMARY:
        return batch.digest
    try:
        return bytes.fromhex(decode(unpack(batch)).last_prev or GENESIS.hex())
    except JournalDamaged:
        return None
