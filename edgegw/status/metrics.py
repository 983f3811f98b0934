"""The status as Prometheus metrics."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from edgegw import clock
from edgegw.status.snapshot import Snapshot

_JOURNAL = {
    "head": "last sequence number journaled",
    "acked": "sequence number up to which everything is acknowledged",
    "pending_batches": "batches not yet acknowledged",
    "pending_records": "records not yet acknowledged",
    "bytes": "bytes of the journal and its WAL",
}


def render(snapshot: Snapshot, acknowledged_s: float | None) -> tuple[str, bytes]:
    """Return content type and text of the metrics of a status snapshot."""
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot, acknowledged_s))
    return CONTENT_TYPE_LATEST, generate_latest(registry)


class _Collector:
    def __init__(self, snapshot: Snapshot, acknowledged_s: float | None) -> None:
        self._snapshot = snapshot
        self._acknowledged_s = acknowledged_s

    def collect(self) -> list[Metric]:
        return [*self._gateway(), *self._journal(), *self._devices(), *self._rules()]

    def _gateway(self) -> Iterable[Metric]:
        snapshot = self._snapshot
        info = GaugeMetricFamily(
            "edgegw_info", "1, with the version and the configuration's SHA-256", labels=["version", "config"]
        )
        info.add_metric([snapshot.version, snapshot.config], 1)
        yield info
        yield _gauge("link_online", "1 if the link is online", snapshot.link.state == "online")
        yield _gauge(
            "clock_synced", "1 unless the system clock is not synchronised", snapshot.clock == "synced"
        )
        if self._acknowledged_s is not None:
            about = "seconds since a broker has confirmed anything"
            yield _gauge("last_acknowledgement_seconds", about, self._acknowledged_s)
        yield CounterMetricFamily("edgegw_readings", "readings taken since start", value=snapshot.readings)
        problems = GaugeMetricFamily("edgegw_health_problem", "problems of this code", labels=["code"])
        codes = [problem.code for problem in snapshot.health.problems] if snapshot.health else []
        for code in dict.fromkeys(codes):
            problems.add_metric([code], codes.count(code))
        yield problems

    def _journal(self) -> Iterable[Metric]:
        journal = self._snapshot.journal
        for key, about in _JOURNAL.items():
            yield _gauge(f"journal_{key}", about, getattr(journal, key))
        yield _gauge("journal_max_bytes", "bytes that the journal and its WAL may take", journal.max_size)
        yield _gauge("journal_error", "1 if the journal takes nothing", journal.error is not None)
        oldest = journal.oldest_pending_ts
        age_s = 0.0 if oldest is None else max(0.0, (clock.wall_ms() - oldest) / 1000)
        yield _gauge("journal_oldest_pending_seconds", "age of the oldest record not yet acknowledged", age_s)

    def _devices(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("edgegw_device_up", "1 if the device answers", labels=["device"])
        age = GaugeMetricFamily(
            "edgegw_device_age_seconds", "age of the device's newest reading", labels=["device"]
        )
        bad = GaugeMetricFamily(
            "edgegw_tag_bad", "tags that are bad while the device answers", labels=["device"]
        )
        scans = CounterMetricFamily("edgegw_device_scans", "scans", labels=["device"])
        errors = CounterMetricFamily("edgegw_device_errors", "scans that failed", labels=["device"])
        skipped = CounterMetricFamily(
            "edgegw_device_skipped", "scans passed over because the last took too long", labels=["device"]
        )
        now_ms = clock.wall_ms()
        for name, device in self._snapshot.devices.items():
            up.add_metric([name], device.state == "good")
            if device.last_ts is not None:
                age.add_metric([name], max(0.0, (now_ms - device.last_ts) / 1000))
            bad.add_metric([name], device.bad_tags)
            scans.add_metric([name], device.scans)
            errors.add_metric([name], device.errors)
            skipped.add_metric([name], device.skipped)
        return up, age, bad, scans, errors, skipped

    def _rules(self) -> Iterable[Metric]:
        active = GaugeMetricFamily("edgegw_rule_active", "1 if the rule is on", labels=["rule"])
        undecided = GaugeMetricFamily(
            "edgegw_rule_undecided", "1 if an active rule cannot say what it wants", labels=["rule"]
        )
        for name, rule in self._snapshot.rules.items():
            active.add_metric([name], rule["active"])
            undecided.add_metric([name], rule["undecided"])
        return active, undecided


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"edgegw_{name}", about, value=value)
