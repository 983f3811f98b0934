"""Valid, chained batches for tests, made the way a gateway makes them."""

import json
from collections.abc import Sequence
from typing import Any

from edgegw.domain.batch import GENESIS, TAIL, Kind, digest, head

STREAM = "0b0e6e5e-0000-4000-8000-000000000001"
Body = bytes


class Chain:
    """One stream's end: each call of `data`, `event` or `summary` returns the next batch's JSON bytes."""

    def __init__(self, gateway: str = "site-7", stream: str = STREAM) -> None:
        self.gateway = gateway
        self.stream = stream
        self.following = 1
        self.prev = GENESIS

    def _make(self, kind: Kind, count: int, records: Sequence[dict[str, Any]], tail: bytes = TAIL) -> Body:
        start = head(self.gateway, self.stream, self.following, count, kind, self.prev, b'"clock":"synced",')
        body = start + ",".join(json.dumps(record) for record in records).encode() + tail
        self.following += count
        self.prev = digest(body)
        return body

    def data(self, count: int = 2, tags: int = 3) -> Body:
        """Return a batch of `count` scans of `tags` tags."""
        return self.records(
            {
                "ts": 1_732_256_000_000 + self.following + i,
                "device": f"meter{i % 2}",
                "values": {f"tag{t}": (self.following + i) * 1.5 + t for t in range(tags)},
            }
            for i in range(count)
        )

    def records(self, records: Any) -> Body:
        """Return a data batch of these records."""
        records = list(records)
        return self._make(Kind.DATA, len(records), records)

    def event(self, *events: dict[str, Any]) -> Body:
        """Return an event batch of these records."""
        return self._make(Kind.EVENT, len(events), [{"ts": 1_732_256_000_000, **event} for event in events])

    def gap(self, first: int, last: int, last_prev: bytes, **more: Any) -> Body:
        """Return an event batch that names `first` to `last` gone for good."""
        gone = {"event": "gap", "from": first, "to": last, "reason": "full", "last_prev": last_prev.hex()}
        return self.event(gone | more)

    def summary(self, bodies: Sequence[Body], first: int, count: int, prev: bytes) -> Body:
        """Return the summary that takes the place of `bodies`, without moving the end of the chain."""
        start = head(self.gateway, self.stream, first, count, Kind.SUMMARY, prev, b'"clock":"synced",')
        figures = {"tag0": {"mean": 1.5, "min": 1.0, "max": 2.0, "last": 2.0, "count": count}}
        record = {"ts": 1_732_256_000_000, "device": "meter0", "values": figures}
        last_prev = digest(bodies[-1]).hex()
        return start + json.dumps(record).encode() + f'],"last_prev":"{last_prev}"}}'.encode()
