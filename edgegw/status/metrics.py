"""The status as Prometheus metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_JOURNAL = {
    "head": "last sequence number journaled",
    "acked": "sequence number up to which everything is acknowledged",
    "pending_batches": "batches not yet acknowledged",
    "pending_records": "records not yet acknowledged",
    "bytes": "bytes of the journal and its WAL",
}


def render(snapshot: dict[str, Any]) -> tuple[str, bytes]:
    """Return content type and text of the metrics of a status snapshot."""
    registry = CollectorRegistry()
    registry.register(_Collector(snapshot))
    return CONTENT_TYPE_LATEST, generate_latest(registry)


class _Collector:
    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def collect(self) -> list[Metric]:
        snapshot = self._snapshot
        made: list[Metric] = [
            GaugeMetricFamily(
                "edgegw_link_online", "1 if the link is online", value=snapshot["link"]["state"] == "online"
            ),
            CounterMetricFamily("edgegw_readings", "readings taken since start", value=snapshot["readings"]),
        ]
        for key, about in _JOURNAL.items():
            made.append(GaugeMetricFamily(f"edgegw_journal_{key}", about, value=snapshot["journal"][key]))
        up = GaugeMetricFamily("edgegw_device_up", "1 if the device answers", labels=["device"])
        scans = CounterMetricFamily("edgegw_device_scans", "scans", labels=["device"])
        errors = CounterMetricFamily("edgegw_device_errors", "scans that failed", labels=["device"])
        skipped = CounterMetricFamily(
            "edgegw_device_skipped", "scans passed over because the last took too long", labels=["device"]
        )
        for name, device in snapshot["devices"].items():
            up.add_metric([name], device["state"] == "good")
            scans.add_metric([name], device["scans"])
            errors.add_metric([name], device["errors"])
            skipped.add_metric([name], device["skipped"])
        return [*made, up, scans, errors, skipped]
