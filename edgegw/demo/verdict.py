"""The verdict: the figures, what each must be, and how that reads."""

from statistics import median
from typing import Any, NamedTuple

from edgegw.demo.support import Support
from edgegw.domain.batch import ChainReport

LATENCY_MARGIN_MS = 1000
"""What the slowest reading may take beyond two commit intervals: the demo shares its machine."""


class Finding(NamedTuple):
    """One line of the verdict; `good` is None where it is only told."""

    about: str
    found: str
    good: bool | None


class Verdict(NamedTuple):
    """The figures, and what follows from them."""

    streams: int
    made: int
    received: int
    lost: list[tuple[int, int]]
    readings: int
    duplicates: int
    conflicts: int
    altered: int
    chain: ChainReport
    starts: int
    returned_ms: int | None
    backlog: int
    drain_ms: int
    outage_ms: int
    latencies_ms: list[int]
    latency_limit_ms: int
    holes_ms: dict[str, int]
    hole_limits_ms: dict[str, int]
    blind_ms: int
    support: Support

    @property
    def ok(self) -> bool:
        """Whether everything that was promised was found."""
        return all(finding.good is not False for finding in self.findings())

    @property
    def records_lost(self) -> int:
        """How many records the receiver lacks."""
        return sum(last - first + 1 for first, last in self.lost)

    def findings(self) -> list[Finding]:
        """Return the verdict line by line."""
        lost = ", ".join(f"{first}-{last}" for first, last in self.lost[:5])
        broken = self.chain.breaks or self.chain.missing
        chain = f"BROKEN at {broken}" if broken else f"verified over {self.chain.links} batches"
        return [
            Finding("records made", f"{self.made}, as the journal's file ends", self.made > 0),
            Finding("records received", f"{self.received}, with {self.readings} readings", None),
            Finding("records lost", f"{self.records_lost}{f' ({lost})' if lost else ''}", not self.lost),
            Finding("duplicates dropped", f"{self.duplicates} batches", None),
            Finding("in conflict", f"{self.conflicts} batches", not self.conflicts),
            Finding("not as journaled", f"{self.altered} batches", not self.altered),
            Finding("hash chain", chain, self.chain.intact and self.chain.links > 0),
            Finding("streams begun", f"{self.streams}", self.streams == 1),
            Finding("starts of the gateway", f"{self.starts}", self.starts == 2),
            Finding("not polled for the crash", f"{self.blind_ms / 1000:.1f} s", None),
            *self._polling(),
            *self._return(),
            *self._control(),
        ]

    def _control(self) -> list[Finding]:
        support = self.support
        answers = ", ".join(f"{answer} ms" for answer in support.answers_ms) or "never"
        back = "given back to zero" if support.handed_back else "NOT given back"
        return [
            Finding(
                "frequency dips seen",
                f"{support.dips}, down to {support.lowest_hz or 0:.2f} Hz",
                support.dips > 0,
            ),
            Finding("battery answered after", answers, len(support.answers_ms) == support.dips),
            Finding(
                "setpoint on the return",
                f"{back}, {support.written} writes in the ledger",
                support.handed_back,
            ),
        ]

    def _polling(self) -> list[Finding]:
        return [
            Finding(
                f"longest hole, {device}",
                f"{hole} ms (limit {self.hole_limits_ms[device]} ms)",
                hole <= self.hole_limits_ms[device],
            )
            for device, hole in self.holes_ms.items()
        ]

    def _return(self) -> list[Finding]:
        if self.returned_ms is None:
            return [Finding("link", "it never came back", False)]
        drained = f"{self.backlog} records in {self.drain_ms / 1000:.1f} s"
        found = [
            Finding("without broker", f"{self.outage_ms / 1000:.1f} s", None),
            Finding("drained on the return", drained, self.backlog > 0),
        ]
        if not self.latencies_ms:
            return [*found, Finding("live latency after it", "no reading was made", False)]
        middle, most = median(self.latencies_ms), max(self.latencies_ms)
        limit, limit_of_most = self.latency_limit_ms, self.latency_limit_ms + LATENCY_MARGIN_MS
        return [
            *found,
            Finding("live latency after it", f"median {middle:.0f} ms (limit {limit} ms)", middle <= limit),
            Finding("slowest of them", f"{most} ms (limit {limit_of_most} ms)", most <= limit_of_most),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return it for a script."""
        live = self.latencies_ms
        return {
            "ok": self.ok,
            "failed": [finding.about for finding in self.findings() if finding.good is False],
            "records": {"made": self.made, "received": self.received, "lost": self.records_lost},
            "lost": self.lost,
            "readings": self.readings,
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "altered": self.altered,
            "streams": self.streams,
            "starts": self.starts,
            "chain": {"verified": self.chain.intact, "batches": self.chain.links},
            "outage_ms": self.outage_ms,
            "holes_ms": self.holes_ms,
            "not_polled_for_crash_ms": self.blind_ms,
            "backlog_records": self.backlog,
            "drain_ms": self.drain_ms,
            "control": self.support._asdict(),
            "latency_ms": {
                "median": median(live) if live else None,
                "max": max(live, default=None),
                "records": len(live),
                "limit": self.latency_limit_ms,
            },
        }
