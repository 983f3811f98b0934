"""The verdict on what was received: complete, once, and in one chain, or where not."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from edgegw.domain.batch import ChainReport, Gap, Link, verify
from edgegw.domain.ranges import Ranges
from edgegw.receiver.announce import spell
from edgegw.receiver.apart import Rejected
from edgegw.receiver.dedupe import Key, NamedGap
from edgegw.receiver.sink import Figures
from edgegw.runtime.text import printable

MAX_REASONS = 20
"""How many topics and reasons of rejected messages a report names."""


class StreamReport(NamedTuple):
    """One stream's part; `duplicates` are those of this run, all else is of everything kept.

    Nothing before `begins` was expected; `elsewhere` names other gateway ids under which records of the stream came.
    """

    key: Key
    records: int
    kept: Figures
    head: int
    duplicates: int
    missing: list[tuple[int, int]]
    gaps: list[NamedGap]
    chain: ChainReport
    begins: int
    elsewhere: dict[str, list[tuple[int, int]]]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, in conflict or broken."""
        return not (self.missing or self.kept.conflicts or self.chain.breaks)

    def as_json(self) -> dict[str, Any]:
        """Return it for a script."""
        return {
            "gateway": self.key.gateway,
            "stream": self.key.stream,
            "head": self.head,
            "begins": self.begins,
            "batches": self.kept.batches,
            "records": self.records,
            "readings": self.kept.readings,
            "events": self.kept.events,
            "duplicates": self.duplicates,
            "conflicts": self.kept.conflicts,
            "missing": self.missing,
            "elsewhere": self.elsewhere,
            "gaps": [_json(gap) for gap in self.gaps if not gap.thinned],
            "thinned": [_json(gap) for gap in self.gaps if gap.thinned],
            "chain": {"verified": not self.chain.breaks, "broken_at": self.chain.breaks},
            "ok": self.ok,
        }

    def lines(self) -> list[str]:
        """Return it for a reader."""
        kept = self.kept
        gaps = "; ".join(f"{spell([gap[:2]])} ({gap.reason})" for gap in self.gaps if not gap.thinned)
        thinned = spell(list(Ranges(gap[:2] for gap in self.gaps if gap.thinned)))
        broken = spell([(seq, seq) for seq in self.chain.breaks])
        return [
            f"{self.key}: {self.records} records up to {self.head} in {kept.batches} batches",
            f"  {kept.readings} readings, {kept.events} events",
            f"  duplicates dropped: {self.duplicates}; conflicts: {kept.conflicts}",
            *([f"  begins with {self.begins} (--from-here)"] if self.begins > 1 else []),
            f"  missing: {spell(self.missing) or 'nothing'}",
            *(
                f"  received from gateway {name}, of the same stream: {spell(ranges)}"
                for name, ranges in self.elsewhere.items()
            ),
            f"  gone for good, and named: {gaps or 'nothing'}",
            *([f"  thinned to summaries: {thinned}"] if thinned else []),
            f"  chain: {f'BROKEN at {broken}' if broken else 'verified'}",
        ]


class Report(NamedTuple):
    """The verdict on all streams; `malformed` are this run's, `rejected` all that are kept."""

    streams: list[StreamReport]
    malformed: int
    rejected: list[Rejected]

    @property
    def ok(self) -> bool:
        """Whether every stream is complete, without conflict and in one chain."""
        return all(stream.ok for stream in self.streams)

    def as_json(self) -> dict[str, Any]:
        """Return it for a script."""
        return {
            "ok": self.ok,
            "malformed": self.malformed,
            "rejected": [
                {"topic": topic, "reason": reason, "messages": count}
                for (topic, reason), count in self._rejections()
            ],
            "streams": [stream.as_json() for stream in self.streams],
        }

    def lines(self) -> list[str]:
        """Return it for a reader."""
        lines = [line for stream in self.streams for line in stream.lines()]
        if self.malformed:
            lines.append(f"malformed messages passed over: {self.malformed}")
        for (topic, reason), count in self._rejections():
            lines.append(f"rejected and set apart: {count} on {topic}: {reason}")
        if not self.streams:
            lines.append("nothing received")
        elif self.ok:
            lines.append("ok: nothing missing, nothing in conflict, every chain verified")
        else:
            bad = sum(not stream.ok for stream in self.streams)
            lines.append(f"NOT OK: {bad} of {len(self.streams)} streams")
        return [printable(line) for line in lines]

    def _rejections(self) -> list[tuple[tuple[str, str], int]]:
        """Return the most frequent topics and reasons with their numbers."""
        return Counter((one.topic, one.reason) for one in self.rejected).most_common(MAX_REASONS)


def _json(gap: NamedGap) -> dict[str, Any]:
    return {"from": gap.first, "to": gap.last, "reason": gap.reason}


def chain_of(links: Iterable[Link], gaps: Iterable[NamedGap], unverified: Iterable[Gap] = ()) -> ChainReport:
    """Verify one stream's chain across the gaps that are named, and across what is not to be verified."""
    return verify(links, [*unverified, *(gap.link() for gap in gaps)])
