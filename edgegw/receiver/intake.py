"""Takes messages in, one after the other, and keeps each batch once."""

import logging
from collections import Counter
from collections.abc import Callable

from edgegw.clock import mono_s, wall_ms
from edgegw.domain.batch import Kind
from edgegw.receiver.announce import HoleWatch, Throttle
from edgegw.receiver.corrector import Corrector
from edgegw.receiver.dedupe import Key, Stream, Verdict
from edgegw.receiver.receipts import Receipts
from edgegw.receiver.report import Report, StreamReport, chain_of
from edgegw.receiver.sink import Figures, Sink
from edgegw.receiver.wire import Batch, MalformedError, read, read_gap

BATCH_TOPICS = frozenset({"data", "event", "backfill", "summary"})
"""The last level of the topics that carry batches; all others are passed over."""

_log = logging.getLogger(__name__)


class Intake:
    """Everything between a payload and the sink; it knows nothing of MQTT.

    A message may be confirmed to its sender once `commit` has returned after `take`. With `receipts` it
    collects what to confirm to the gateways, with a `corrector` it has the times corrected.
    """

    def __init__(
        self,
        sink: Sink,
        now_s: Callable[[], float] = mono_s,
        *,
        receipts: Receipts | None = None,
        corrector: Corrector | None = None,
    ) -> None:
        self._sink = sink
        self._now_s = now_s
        self._receipts = receipts
        self._corrector = corrector
        self._streams: dict[Key, Stream] = {}
        self._holes: dict[Key, HoleWatch] = {}
        self._duplicates: Counter[Key] = Counter()
        self._touched: set[Key] = set()
        self._watch_s = 0.0
        self._malformed = 0
        self._throttles: dict[str, Throttle] = {}
        for span in sink.spans():
            self._stream(span.key).keep(span.seq, span.count)
        for key, gap in sink.gaps():
            self._stream(key).name(gap)

    def _stream(self, key: Key) -> Stream:
        return self._streams.setdefault(key, Stream())

    def take(self, topic: str, payload: bytes) -> bool:
        """Take one message in; tell whether it brought anything new."""
        if topic.rpartition("/")[2] not in BATCH_TOPICS:
            return False
        try:
            batch = read(payload)
        except MalformedError as error:
            self._malformed += 1
            self._complain("malformed", f"malformed message on {topic}: {error}")
            return False
        return self._judge(topic, batch)

    def _judge(self, topic: str, batch: Batch) -> bool:
        key, stream = batch.key, self._stream(batch.key)
        if self._receipts is not None:
            self._receipts.came(key, topic, batch.seq, batch.last)
        verdict = stream.judge(batch.outline, lambda: self._sink.kept(key, batch.seq, batch.last))
        if verdict is Verdict.DUPLICATE:
            self._duplicates[key] += 1
            return False
        if verdict is Verdict.CONFLICT:
            self._sink.add_conflict(batch, wall_ms())
            self._complain(
                "conflict",
                f"CONFLICT {key}: {batch.seq}-{batch.last} came on {topic} with other bytes or bounds than "
                "those kept; the first stay, these are set apart",
            )
            return False
        self._sink.add(batch, wall_ms(), beside=verdict is Verdict.BESIDE)
        if self._corrector is not None:
            self._corrector.take(batch)
        stream.keep(batch.seq, batch.count, recorded=not batch.period_s)
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
        return self._receipts.due(lambda key: self._streams[key].received, self._now_s(), at_once=at_once)

    def watch(self) -> None:
        """Say, at most once a second, which streams have had holes for a while, and which no longer have."""
        now_s = self._now_s()
        if now_s < self._watch_s:
            return
        self._watch_s = now_s + 1.0
        for key in list(self._touched):
            watch = self._holes.setdefault(key, HoleWatch())
            line = watch.line(self._streams[key], now_s)
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
                    missing=stream.missing(),
                    gaps=stream.gaps,
                    chain=chain_of(self._sink.links(key), stream.gaps),
                )
            )
        return Report(streams, self._malformed)
