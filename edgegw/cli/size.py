"""`edgegw size`: what an outage takes, worked out from the configuration and a short measurement."""

import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from edgegw.cli.options import config_option, json_option, load_config, print_json

if TYPE_CHECKING:
    from edgegw.config.schema import Config, Device
    from edgegw.domain.record import Scan

COMMITS = 40
DAY_S = 86_400.0


class Measured(NamedTuple):
    """What one commit interval's records take, found by writing some."""

    readings: float
    json_bytes: float
    stored_bytes: float
    written_bytes: float
    fsyncs: float
    unpack_bytes_s: float


@click.command("size")
@click.option("--outage", default="72h", show_default=True, help="How long the link is gone.")
@click.option(
    "--mbit", default=2.0, show_default=True, type=click.FloatRange(min=0.001), help="Uplink rate, Mbit/s."
)
@config_option
@json_option
def command(outage: str, mbit: float, config_path: Path | None, as_json: bool) -> None:
    """Work out what an outage takes: bytes, days until full, drain time, and the wear of the card.

    It writes a few commits of made-up readings with the configuration's tags to a temporary journal and
    counts. Subscribed tags are counted as if each changed once in every publishing interval.
    """
    from edgegw.config.units import Duration

    config, _ = load_config(config_path)
    try:
        outage_s = Duration.parse(outage).s
    except ValueError as error:
        raise click.UsageError(f"--outage: {error}") from None
    if not config.device:
        raise click.UsageError("the configuration has no device to measure")
    figures = _figures(config, _measure(config), outage_s, mbit)
    if as_json:
        print_json(figures)
    else:
        _show(figures)


def _figures(config: "Config", measured: Measured, outage_s: float, mbit: float) -> dict[str, Any]:
    interval_s = config.journal.commit_interval.s
    rate = measured.readings / interval_s
    stored_s = measured.stored_bytes / interval_s
    sent = (
        measured.stored_bytes if config.uplink.compression == "zstd" else measured.json_bytes
    ) / interval_s
    link_s = mbit * 1e6 / 8
    drain_rate = min(link_s, measured.unpack_bytes_s) - sent
    return {
        "readings_per_s": round(rate, 1),
        "json_bytes_per_reading": round(measured.json_bytes / measured.readings, 1),
        "stored_bytes_per_reading": round(measured.stored_bytes / measured.readings, 1),
        "outage_s": outage_s,
        "outage_readings": round(rate * outage_s),
        "outage_bytes": round(stored_s * outage_s),
        "max_size": int(config.journal.max_size),
        "days_until_full": round(config.journal.max_size / stored_s / DAY_S, 2),
        "fits": stored_s * outage_s < config.journal.max_size,
        "uplink_mbit": mbit,
        "bytes_to_send": round(sent * outage_s),
        "drain_s": round(sent * outage_s / drain_rate, 1) if drain_rate > 0 else None,
        "bytes_written_per_day": round(measured.written_bytes / interval_s * DAY_S),
        "bytes_written_per_reading": round(measured.written_bytes / measured.readings, 2),
        "fsyncs_per_day": round(measured.fsyncs / interval_s * DAY_S),
    }


def _show(figures: dict[str, Any]) -> None:
    gib = 1024**3
    drain = figures["drain_s"]
    minutes = (
        f"{drain / 60:,.1f} minutes" if drain is not None else "never: the uplink is slower than the readings"
    )
    lines = {
        "readings": f"{figures['readings_per_s']:,} a second",
        "bytes a reading": f"{figures['json_bytes_per_reading']} as JSON, {figures['stored_bytes_per_reading']} stored",
        f"outage of {figures['outage_s'] / 3600:g} h": f"{figures['outage_readings']:,} readings, "
        f"{figures['outage_bytes'] / gib:.3f} GiB",
        "journal is full after": f"{figures['days_until_full']:,} days ({figures['max_size'] / gib:.2f} GiB)",
        f"drain at {figures['uplink_mbit']:g} Mbit/s": minutes,
        "written to the card": f"{figures['bytes_written_per_day'] / gib:.2f} GiB and "
        f"{figures['fsyncs_per_day']:,} fsyncs a day",
    }
    for name, value in lines.items():
        click.echo(f"{name:<24} {value}")
    if not figures["fits"]:
        click.echo("the outage does not fit: raise journal.max_size, or poll less often")


def _measure(config: "Config") -> Measured:
    """Write some commit intervals' worth of made-up scans as the journal would, and count."""
    from edgegw.journal.encode import Sealer, group
    from edgegw.journal.store import Reader, Row, Store, unpack
    from edgegw.journal.timekeeper import present
    from edgegw.journal.wear import written_bytes

    interval_ms, era = int(config.journal.commit_interval), present()
    readings = json_bytes = stored_bytes = 0
    with tempfile.TemporaryDirectory(prefix="edgegw-size-") as folder:
        path = Path(folder) / "size.db"
        store = Store(path, 1 << 30).open(0, check=False)
        sealer = Sealer(config.gateway.id, store.stream, 0, bytes(32))
        before = written_bytes()
        for commit in range(COMMITS):
            scans = [
                scan
                for name, device in config.device.items()
                for scan in _scans(name, device, commit, interval_ms)
            ]
            sealed = [sealer.seal(made) for made in group(scans, era, config.uplink.max_message)]
            if not sealed:
                continue
            store.append(
                [
                    Row(b.seq, b.count, b.kind.value, 0, 0, 0, b.digest, None, b.size, b.packed)
                    for b, _ in sealed
                ]
            )
            readings += sum(len(scan.values) for scan in scans)
            json_bytes += sum(batch.size for batch, _ in sealed)
            stored_bytes += sum(len(batch.packed) for batch, _ in sealed)
        store.checkpoint(force=True)
        written, fsyncs = written_bytes() - before, store.take_fsyncs()
        reader = Reader(path)
        batches = reader.batches(1, 1 << 62, limit=10_000)
        began = time.perf_counter()
        for batch in batches:
            unpack(batch)
        took = max(1e-9, time.perf_counter() - began)
        reader.close()
        store.close()
    return Measured(
        max(1, readings) / COMMITS, json_bytes / COMMITS, stored_bytes / COMMITS, written / COMMITS,
        fsyncs / COMMITS, json_bytes / took,
    )  # fmt: skip


def _scans(name: str, device: "Device", commit: int, interval_ms: int) -> "list[Scan]":
    """Make up the scans that a device gives in one commit interval: values that drift as measurements do."""
    from edgegw.domain.record import Scan

    first = -(-commit * interval_ms // device.every)
    last = -(-(commit + 1) * interval_ms // device.every)
    tags = list(getattr(device, "tags", ()))
    return [
        Scan(
            1_700_000_000_000 + i * device.every,
            name,
            {tag: round(random.gauss(230.0, 0.5), 3) for tag in tags},
        )
        for i in range(first, last)
    ]
