"""`edgegw journal stat`, `tail`, `verify`: what is in the journal, and whether it is sound."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from edgegw.cli.options import config_option, json_option, open_journal, print_json
from edgegw.domain import batch as batches
from edgegw.domain.batch import Gap, Kind, Link
from edgegw.errors import JournalDamaged
from edgegw.journal.wear import Wear


@click.command("stat")
@config_option
@json_option
def stat(config_path: Path | None, as_json: bool) -> None:
    """Show how much is there, how well it packs, and what waits for the upstream."""
    from edgegw.journal.store import size_bytes

    reader, config = open_journal(config_path)
    settled = reader.acked()
    head = reader.tip().head
    figures = reader.figures(settled)
    shown: dict[str, Any] = {
        "path": str(reader.path),
        "gateway": config.gateway.id,
        "stream": reader.stream,
        "head": head,
        "acked": settled.prefix(),
        "pending_records": sum(last - first + 1 for first, last in settled.gaps(1, head)),
        **figures._asdict(),
        "bytes": size_bytes(reader.path),
        "max_size": int(config.journal.max_size),
        "wear": _wear(reader.wear()),
    }
    if as_json:
        print_json(shown)
        return
    for name, value in (shown | shown.pop("wear")).items():
        numeric = isinstance(value, int | float)
        click.echo(f"{name:<24} {value:,}" if numeric else f"{name:<24} {value}")


def _wear(wear: Wear) -> dict[str, float]:
    """Return what keeping the readings has cost the card, as of the last minute in which something was written."""
    days = wear.run_ms / 86_400_000
    readings = max(1, wear.readings)
    return {
        "open_s": wear.run_ms // 1000,
        "readings": wear.readings,
        "written_bytes": wear.written_bytes,
        "fsyncs": wear.fsyncs,
        "written_bytes_per_reading": round(wear.written_bytes / readings, 2),
        "readings_per_fsync": round(wear.readings / max(1, wear.fsyncs), 1),
        "written_bytes_per_day": round(wear.written_bytes / days) if days else 0,
        "fsyncs_per_day": round(wear.fsyncs / days) if days else 0,
    }


@click.command("tail")
@click.option(
    "-n", "count", default=10, show_default=True, type=click.IntRange(1, 100_000), help="Records to show."
)
@config_option
@json_option
def tail(count: int, config_path: Path | None, as_json: bool) -> None:
    """Show the last records, oldest first."""
    from edgegw.journal.store import unpack, walk_back

    reader, _ = open_journal(config_path)
    newest_first: list[dict[str, Any]] = []
    for batch in walk_back(reader):
        try:
            records = msgspec.json.decode(unpack(batch))["records"]
        except JournalDamaged as error:
            click.echo(f"warning: {error}; it is left out", err=True)
            continue
        newest_first += ({"seq": batch.seq + i, **records[i]} for i in reversed(range(len(records))))
        if len(newest_first) >= count:
            break
    reader.close()
    shown = newest_first[:count][::-1]
    if as_json:
        print_json(shown)
        return
    for record in shown:
        when = datetime.fromtimestamp(record.pop("ts") / 1000, UTC).isoformat(timespec="milliseconds")
        seq, what = record.pop("seq"), record.pop("device", None) or record.pop("event", "")
        click.echo(f"{seq:>10}  {when}  {what}  {msgspec.json.encode(record.get('values', record)).decode()}")


@click.command("verify")
@config_option
@json_option
def verify(config_path: Path | None, as_json: bool) -> None:
    """Check every batch against its hash, and the chain from batch to batch; exit 1 if anything is wrong."""
    from edgegw.journal.store import unpack, walk

    reader, _ = open_journal(config_path)
    damaged: list[int] = []
    gaps: list[Gap] = []
    links: list[Link] = []
    for batch in walk(reader):
        try:
            body = unpack(batch)
            message = batches.decode(body)
        except (JournalDamaged, msgspec.DecodeError):
            damaged.append(batch.seq)
            links.append(Link(batch.seq, batch.last, b"", batch.digest))
            continue
        if batch.kind is Kind.EVENT:
            gaps += _gaps(body, reader.stream)
        links.append(Link(batch.seq, batch.last, bytes.fromhex(message.prev), batch.digest))
    settled = reader.acked()
    first = links[0].first if links else 1
    report = batches.verify(links, gaps, first=first)
    missing = [*settled.gaps(1, first - 1), *(hole for hole in report.missing if not settled.covers(*hole))]
    breaks = [seq for seq in report.breaks if seq not in damaged]
    ok = not (damaged or missing or breaks)
    if as_json:
        print_json({
            "ok": ok, "stream": reader.stream, "batches": report.links, "from": links[0].first if links else 0,
            "to": links[-1].last if links else 0, "damaged": damaged, "missing": missing, "breaks": breaks,
            "gaps": [[gap.first, gap.last] for gap in gaps],
        })  # fmt: skip
    else:
        span = f"records {links[0].first:,} to {links[-1].last:,}" if links else "no records yet"
        click.echo(f"stream {reader.stream}: {report.links:,} batches, {span}")
        for gap in gaps:
            click.echo(f"gap: records {gap.first} to {gap.last} are gone, as an event says")
        for seq in damaged:
            click.echo(f"damaged: the batch at {seq} does not give its hash")
        for first, last in missing:
            click.echo(f"missing: records {first} to {last}, and nothing says why")
        for seq in breaks:
            click.echo(f"broken: the batch at {seq} does not follow from the one before")
        click.echo("the chain holds" if ok else "the journal is not sound")
    reader.close()
    if not ok:
        raise click.exceptions.Exit(1)


def _gaps(body: bytes, stream: str) -> Iterator[Gap]:
    """Yield the gaps of this stream that an event batch names."""
    for record in msgspec.json.decode(body)["records"]:
        if record.get("event") == "gap" and record.get("stream", stream) == stream and "last_prev" in record:
            yield Gap(record["from"], record["to"], bytes.fromhex(record["last_prev"]))
