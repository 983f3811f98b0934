"""From evidence to verdict: counts, holes and latencies, all of it pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from edgegw.demo.support import support
from edgegw.demo.verdict import Verdict
from edgegw.domain.batch import Kind, verify
from edgegw.domain.ranges import Ranges
from edgegw.receiver.wire import Batch

HOLE_MARGIN_MS = 1000
"""What a hole in the polling may have beyond two periods: the demo shares its machine."""


class _LinkRecord(msgspec.Struct, frozen=True):
    """What a link event says beyond its name and time."""

    state: str


_link = msgspec.json.Decoder(_LinkRecord)


class Received(NamedTuple):
    """A batch as the receiver has it, and when it came."""

    batch: Batch
    received_ms: int


class Journaled(NamedTuple):
    """What the journal's file holds at the end: its stream, its head, and each batch's hash by seq."""

    stream: str
    head: int
    digests: Mapping[int, bytes]


class Evidence(NamedTuple):
    """What was found when all was over; batches in order of their seq."""

    received: Sequence[Received]
    conflicts: int
    duplicates: int
    journaled: Journaled


class Span(NamedTuple):
    """Time from `first` to `last`, milliseconds."""

    first: int
    last: int


class Course(NamedTuple):
    """What was done, and when: wall clock, milliseconds."""

    commit_interval_ms: int
    periods_ms: Mapping[str, int]
    broker_gone_ms: int
    killed_ms: int
    broker_back_ms: int


def judge(evidence: Evidence, course: Course) -> Verdict:
    """Decide from what was received, and from what the journal's file holds, how it went."""
    journaled = evidence.journaled
    own = [item for item in evidence.received if item.batch.key.stream == journaled.stream]
    seqs = Ranges((item.batch.seq, item.batch.last) for item in own)
    returned = _returned(own, course)
    late = [item for item in own if returned and _newest(item.batch) < returned <= item.received_ms]
    stamps = _stamps(own)
    outage = Span(course.broker_gone_ms, returned or course.broker_back_ms)
    crash = _crash(own, course)
    return Verdict(
        streams=len({item.batch.key for item in evidence.received}),
        made=journaled.head,
        received=seqs.total(),
        lost=list(seqs.gaps(1, journaled.head)),
        readings=sum(item.batch.readings for item in own),
        duplicates=evidence.duplicates,
        conflicts=evidence.conflicts,
        altered=sum(journaled.digests.get(item.batch.seq) != item.batch.digest for item in own),
        chain=verify(item.batch.link for item in own),
        starts=sum(event.event == "start" for item in own for event in item.batch.events),
        returned_ms=returned,
        backlog=sum(item.batch.count for item in late),
        drain_ms=max((item.received_ms for item in late), default=returned or 0) - (returned or 0),
        outage_ms=outage.last - outage.first,
        latencies_ms=[] if returned is None else _latencies(own, returned),
        latency_limit_ms=2 * course.commit_interval_ms,
        holes_ms={device: longest_hole(stamps[device], outage, crash) for device in course.periods_ms},
        hole_limits_ms={name: 2 * period + HOLE_MARGIN_MS for name, period in course.periods_ms.items()},
        blind_ms=_blind(stamps.values(), course.killed_ms),
        support=support(item.batch for item in own),
    )


def longest_hole(stamps: Sequence[int], outage: Span, crash: Span) -> int:
    """Return the longest time without a record of one device while the broker was away, less the crash."""
    times = sorted({min([outage.first, *stamps]), *stamps, max([outage.last, *stamps])})
    pieces: list[int] = []
    for earlier, later in pairwise(times):
        if later <= outage.first or earlier >= outage.last:
            continue
        if earlier < crash.last and later > crash.first:
            pieces += [crash.first - earlier, later - crash.last]
        else:
            pieces.append(later - earlier)
    return max(pieces, default=0)


def _crash(received: Iterable[Received], course: Course) -> Span:
    """Return the time that the kill may have cost: from a commit interval before it to the next start."""
    starts = [event.ts for item in received for event in item.batch.events if event.event == "start"]
    restarted = min((ts for ts in starts if ts > course.killed_ms), default=course.killed_ms)
    return Span(course.killed_ms - course.commit_interval_ms, restarted)


def _returned(received: Iterable[Received], course: Course) -> int | None:
    """Return when broker, receiver and link were all there again, None if that is not told."""
    online = [
        event.ts
        for item in received
        for event, raw in zip(item.batch.events, item.batch.raw, strict=False)
        if event.event == "link" and event.ts > course.broker_gone_ms and _link.decode(raw).state == "online"
    ]
    # the broker holds a message back until the receiver is there, so the link may be online before that
    return max(online[-1], course.broker_back_ms) if online else None


def _newest(batch: Batch) -> int:
    return max([record.ts for record in batch.data] + [event.ts for event in batch.events])


def _latencies(received: Iterable[Received], since_ms: int) -> list[int]:
    """Return how old each record was when it was received, of the data batches made since."""
    return [
        item.received_ms - record.ts
        for item in received
        if item.batch.kind is Kind.DATA and all(record.ts >= since_ms for record in item.batch.data)
        for record in item.batch.data
    ]


def _stamps(received: Iterable[Received]) -> dict[str, list[int]]:
    """Return the times of each device's scans, in order."""
    stamps: dict[str, list[int]] = defaultdict(list)
    for item in received:
        for record in item.batch.data:
            if record.values is not None:
                stamps[record.device].append(record.ts)
    for times in stamps.values():
        times.sort()
    return stamps


def _blind(stamps: Iterable[Sequence[int]], killed_ms: int) -> int:
    """Return the time between the last record before the kill and the first after it, of whatever device."""
    times = [ts for device in stamps for ts in device]
    before = max((ts for ts in times if ts <= killed_ms), default=killed_ms)
    return min((ts for ts in times if ts > killed_ms), default=killed_ms) - before
