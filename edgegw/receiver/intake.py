"""Takes messages in, one after the other, and keeps each batch once."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from edgegw.clock import mono_s, wall_ms
from edgegw.domain.batch import ChainReport, Gap, Kind
from edgegw.domain.ranges import Ranges
from edgegw.receiver.admission import Admissions
from edgegw.receiver.announce import HoleWatch, Throttle
from edgegw.receiver.corrector import Corrector
from edgegw.receiver.dedupe import Key, Stream, Verdict
from edgegw.receiver.receipts import Receipts
from edgegw.receiver.report import Report, StreamReport, chain_of
from edgegw.receiver.requests import Requests
from edgegw.receiver.senders import DEFAULT_TEMPLATE, Admission
from edgegw.receiver.sink import Figures, Sink
from edgegw.receiver.wire import MAX_MESSAGE, Batch, MalformedError, read, read_gap

BATCH_TOPICS = frozenset({"data", "event", "backfill", "summary"})
"""The last level of the topics that carry batches; all others are passed over."""

_log = logging.getLogger(__name__)


class Intake:
    """Everything between a payload and the sink; it knows nothing of MQTT.

    A message may be confirmed to its sender once `commit` has returned after `take`. With `receipts` it
    collects what to confirm to the gateways, with `requests` it asks them for what is missing, with a `corrector` it
    has the times corrected. With `from_here` a stream that is new counts from the first batch that comes.
    `template` and `rebind` say on which topics gateways are believed (see `senders`); batches are `max_message` bytes
    of JSON at most. After an error of the sink it is of no more use.
    """

    def __init__(
        self,
        sink: Sink,
        now_s: Callable[[], float] = mono_s,
        *,
        receipts: Receipts | None = None,
        requests: Requests | None = None,
        corrector: Corrector | None = None,
        from_here: bool = False,
        template: str = DEFAULT_TEMPLATE,
        rebind: Mapping[str, str] | None = None,
        max_message: int = MAX_MESSAGE,
    ) -> None:
        self._sink = sink
        self._now_s = now_s
        self._receipts = receipts
        self._requests = requests
        self._from_here = from_here
        self._corrector = corrector
        self._streams: dict[Key, Stream] = {}
        self._names: dict[str, list[Key]] = {}  # of each stream, all that its gateway was called
        self._first: dict[Key, tuple[int, int]] = {}  # when each came first; of one run also in which order
        self._holes: dict[Key, HoleWatch] = {}
        self._duplicates: Counter[Key] = Counter()
        self._touched: set[Key] = set()
        self._watch_s = 0.0
        self._throttles: dict[str, Throttle] = {}
        self._max_message = max_message
        self._confirmable: dict[Key, Ranges] = {}
        self._admissions = Admissions(sink.apart, now_s, template, rebind)
        self._load()
        sink.commit()

    def _load(self) -> None:
        """Read from the sink what is kept."""
        for span in self._sink.spans():
            self._stream(span.key, span.received_ms).keep(span.seq, span.count)
            if span.received_ms >= self._admissions.senders.since_ms(span.key.gateway):
                self._confirm(span.key, span.seq, span.count)
        for key, gap in self._sink.gaps():
            self._stream(key).name(gap)
        for key, seq in self._sink.beginnings():
            self._stream(key).begin(seq)
        if self._from_here:
            for key, stream in self._streams.items():
                if stream.received and stream.begins == 1:
                    self._begin(key, next(iter(stream.received))[0])

    def _confirm(self, key: Key, seq: int, count: int) -> None:
        """Note seqs as kept and as come from where their gateway is believed: a receipt may confirm them."""
        self._confirmable.setdefault(key, Ranges()).add(seq, seq + count - 1)

    def _stream(self, key: Key, received_ms: int | None = None) -> Stream:
        if key not in self._streams:
            self._streams[key] = Stream()
            self._names.setdefault(key.stream, []).append(key)
            self._first[key] = (wall_ms(), len(self._first)) if received_ms is None else (received_ms, 0)
        elif received_ms is not None:
            self._first[key] = min(self._first[key], (received_ms, 0))
        return self._streams[key]

    def _begin(self, key: Key, seq: int) -> None:
        if seq > 1:
            self._sink.begin(key, seq)
            self._streams[key].begin(seq)
            _log.info("%s: begins with %d; nothing before is expected", key, seq)

    def _elsewhere(self, key: Key) -> dict[str, Ranges]:
        """Return what came of a stream under other names of its gateway: earlier ones, or ones of the same topic.

        A later one on another topic may be anybody's who has heard of the stream.
        """
        return {
            name.gateway: self._streams[name].received
            for name in self._names[key.stream]
            if name != key and (self._first[name] <= self._first[key] or self._together(name, key))
        }

    def _together(self, one: Key, other: Key) -> bool:
        senders = self._admissions.senders
        return senders.topic(one.gateway) == senders.topic(other.gateway)

    def _missing(self, key: Key) -> list[tuple[int, int]]:
        """Return what is missing of a stream, under whatever name of its gateway."""
        missing = Ranges(self._streams[key].missing())
        for received in self._elsewhere(key).values():
            for seqs in received:
                missing.remove(*seqs)
        return list(missing)

    def take(self, topic: str, payload: bytes) -> bool:
        """Process one message; return whether it brought anything new."""
        level = topic.rpartition("/")[2]
        if level == "reply" and self._requests is not None:
            self._requests.reply(topic, payload, self._now_s())
        if level not in BATCH_TOPICS:
            return False
        try:
            batch = read(payload, self._max_message)
        except MalformedError as error:
            self.reject(topic, payload, f"malformed: {error}")
            return False
        gateway = batch.key.gateway
        admission = self._admissions.admit(topic, payload, gateway)
        if admission is Admission.REFUSED:
            return False
        if admission is Admission.MOVED:
            for key in [key for key in self._confirmable if key.gateway == gateway]:
                del self._confirmable[key]
        if self._receipts is not None:
            self._receipts.came(batch.key, topic, batch.seq, batch.last)
        if self._requests is not None:
            self._requests.came(batch.key, topic, self._now_s())
        return self.add(batch, topic)

    def reject(self, topic: str, payload: bytes, reason: str) -> None:
        """Set a message apart that cannot be processed."""
        self._admissions.reject(topic, payload, reason)

    def rejected(self) -> Iterator[tuple[str, bytes]]:
        """Yield the messages that were rejected, for another try: options or the version may have changed since."""
        return self._admissions.payloads()

    def add(self, batch: Batch, origin: str) -> bool:
        """Keep a batch whose sender is believed; return whether it is new. `origin` names where it came from."""
        key, stream = batch.key, self._stream(batch.key)
        if self._from_here and not stream.received:
            self._begin(key, batch.seq)
        verdict = stream.judge(batch.outline, lambda: self._sink.kept(key, batch.seq, batch.last))
        if verdict is Verdict.DUPLICATE:
            self._duplicates[key] += 1
            self._confirm(key, batch.seq, batch.count)
            return False
        if verdict is Verdict.CONFLICT:
            self._sink.add_conflict(batch, wall_ms())
            self._complain(
                "conflict",
                f"CONFLICT {key}: {batch.seq}-{batch.last} came on {origin} with other bytes or bounds than "
                "those kept; the first stay, these are set apart",
            )
            return False
        self._sink.add(batch, wall_ms(), beside=verdict is Verdict.BESIDE)
        if self._corrector is not None:
            self._corrector.take(batch)
        stream.keep(batch.seq, batch.count, recorded=not batch.period_s)
        self._confirm(key, batch.seq, batch.count)
        self._touched.add(key)
        if batch.kind is Kind.EVENT:
            self._name_gaps(batch)
        return True

    def _name_gaps(self, batch: Batch) -> None:
        for event, raw in zip(batch.events, batch.raw, strict=True):
            if event.event != "gap":
                continue
            try:
                key, gap = read_gap(batch.key, bytes(raw))
            except MalformedError as error:
                self._complain("malformed", f"{batch.key}: {error}")
                continue
            if self._stream(key).name(gap):
                gone = "are thinned to a summary" if gap.thinned else "are gone for good"
                _log.warning("%s: %d-%d %s (%s)", key, gap.first, gap.last, gone, gap.reason)

    def _complain(self, kind: str, text: str) -> None:
        line = self._throttles.setdefault(kind, Throttle()).line(text, self._now_s())
        if line:
            _log.warning("%s", line)

    def commit(self) -> None:
        """Make all that was taken in safe."""
        self._sink.commit()
        if self._corrector is not None:
            self._corrector.settle()
        self.watch()

    def reconnected(self) -> None:
        """Take note that receipts may have been lost with a connection."""
        if self._receipts is not None:
            self._receipts.reconnected()

    def receipts(self, *, at_once: bool = False) -> list[tuple[str, bytes]]:
        """Return the receipts that are due, each with its topic; call it when all that was taken is committed."""
        if self._receipts is None:
            return []
        nothing = Ranges()
        return self._receipts.due(
            lambda key: self._confirmable.get(key, nothing), self._now_s(), at_once=at_once
        )

    def requests(self, *, at_once: bool = False) -> list[tuple[str, bytes]]:
        """Return the commands that ask for what is missing, each with its topic; `at_once`: nothing more comes."""
        if self._requests is None:
            return []
        commands = self._requests.due(self._missing, self._now_s(), at_once=at_once)
        while self._requests.lines:
            _log.info("%s", self._requests.lines.pop(0))
        return commands

    def watch(self) -> None:
        """Say, at most once a second, which streams have had holes for a while, and which no longer have."""
        now_s = self._now_s()
        if now_s < self._watch_s:
            return
        self._watch_s = now_s + 1.0
        for key in list(self._touched):
            watch = self._holes.setdefault(key, HoleWatch())
            line = watch.line(self._missing(key), self._streams[key].head, now_s)
            if line:
                _log.warning("%s: %s", key, line)
            if not watch.open:
                self._touched.discard(key)

    def report(self) -> Report:
        """Return the verdict on everything that is kept, each chain verified."""
        figures = self._sink.figures()
        streams = []
        for key, stream in sorted(self._streams.items()):
            streams.append(
                StreamReport(
                    key=key,
                    records=stream.received.total(),
                    kept=figures.get(key, Figures(0, 0, 0, 0)),
                    head=stream.head,
                    duplicates=self._duplicates[key],
                    missing=self._missing(key),
                    gaps=list(stream.gaps),
                    chain=self._chain(key, stream),
                    begins=stream.begins,
                    elsewhere=self._filled_elsewhere(key, stream),
                )
            )
        return Report(streams, self._admissions.malformed, self._admissions.rejected())

    def _filled_elsewhere(self, key: Key, stream: Stream) -> dict[str, list[tuple[int, int]]]:
        """Return what is missing under this name and came under another one."""
        missing = Ranges(stream.missing())
        filled = {name: missing.common(received) for name, received in self._elsewhere(key).items()}
        return {name: list(ranges) for name, ranges in filled.items() if ranges}

    def _chain(self, key: Key, stream: Stream) -> ChainReport:
        """Verify a chain; across what is not expected, or came under another name, it is taken on trust."""
        unverified = [Gap(1, stream.begins - 1, None)] if stream.begins > 1 else []
        for ranges in self._filled_elsewhere(key, stream).values():
            unverified += [Gap(first, last, None) for first, last in ranges]
        return chain_of(self._sink.links(key), stream.gaps, unverified)

    def close(self) -> None:
        """Close the sink; what was not committed is gone."""
        self._sink.close()
