"""`edgegw journal stat`, `tail`, `verify`: what is in the journal, and whether it is sound."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from edgegw.cli.options import config_option, json_option, open_journal, print_json
from edgegw.domain import batch as batches
from edgegw.domain.batch import Batch, Gap, Kind, Link
from edgegw.domain.ranges import Ranges
from edgegw.errors import JournalDamaged
from edgegw.journal.wear import Wear
from edgegw.receiver.dedupe import Key, NamedGap
from edgegw.receiver.wire import PERIOD_S, link, read_gap


class _Events(msgspec.Struct):
    records: list[msgspec.Raw]


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
    wear = shown.pop("wear")
    if (oldest := shown["oldest_pending_ts"]) is not None:
        shown["oldest_pending_ts"] = _when(oldest)
    for name, value in (shown | (wear if wear["open_s"] else {})).items():
        numeric = isinstance(value, int | float)
        click.echo(f"{name:<26} {value:,}" if numeric else f"{name:<26} {value}")
    if not wear["open_s"]:
        click.echo("what was written is noted once a minute: not yet")


def _when(ts: int) -> str:
    return datetime.fromtimestamp(ts / 1000, UTC).isoformat(timespec="milliseconds")


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
            content = msgspec.json.decode(unpack(batch))
        except JournalDamaged as error:
            click.echo(f"warning: {error}; it is left out", err=True)
            continue
        newest_first += reversed(list(_numbered(batch, content)))
        if len(newest_first) >= count:
            break
    reader.close()
    shown = newest_first[:count][::-1]
    if as_json:
        print_json(shown)
        return
    for record in shown:
        when = _when(record.pop("ts"))
        seq, what = record.pop("seq"), record.pop("device", None) or record.pop("event", "")
        said = msgspec.json.encode(record.get("values", record)).decode()
        if "period" in record and "values" in record:
            seq, what = f"{seq}-{record['last']}", f"{what}, {record['period']} s"
            said = ", ".join(_figures(tag, of) for tag, of in record["values"].items())
        click.echo(f"{seq:>10}  {when}  {what}  {said}")


def _numbered(batch: Batch, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the records of a batch with their seqs; those of a summary stand for all of its seqs together."""
    if batch.kind is Kind.SUMMARY:
        of = {"seq": batch.seq, "last": batch.last, "period": content.get("period", PERIOD_S)}
        yield from (of | record for record in content["records"])
    else:
        yield from ({"seq": seq} | record for seq, record in enumerate(content["records"], batch.seq))


def _figures(tag: str, of: dict[str, Any]) -> str:
    """Return a tag's figures of a period, as in `kw 1.5 (1 to 2, last 2, of 60)`."""
    mean, low, high, last = (_short(of.get(name)) for name in ("mean", "min", "max", "last"))
    if of.get("mean") is None:
        return f"{tag} {last} (last of {of.get('count')})"
    return f"{tag} {mean} ({low} to {high}, last {last}, of {of.get('count')})"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else msgspec.json.encode(value).decode()


@click.command("verify")
@config_option
@json_option
def verify(config_path: Path | None, as_json: bool) -> None:
    """Check every batch against its hash, and the chain from batch to batch; exit 1 if anything is wrong."""
    from edgegw.journal.store import unpack, walk

    reader, _ = open_journal(config_path)
    seen: list[tuple[int, int]] = []
    damaged: list[Gap] = []
    gaps: list[Gap] = []
    thinned = Ranges()
    links: list[Link] = []
    for batch in walk(reader):
        seen.append((batch.seq, batch.last))
        try:
            body = unpack(batch)
            found = link(batches.decode(body), batch.digest)
        except (JournalDamaged, ValueError):
            damaged.append(Gap(batch.seq, batch.last, None))
            continue
        links.append(found._replace(summary=False))  # in a journal nothing stands beside a summary
        for gap in _gaps(body, reader.stream) if batch.kind is Kind.EVENT else ():
            if gap.thinned:
                thinned.add(gap.first, gap.last)
            else:
                gaps.append(gap.link())
    settled = reader.acked()
    reader.close()
    first = seen[0][0] if seen else 1
    report = batches.verify(links, [*damaged, *gaps], first=first)
    missing = [*settled.gaps(1, first - 1), *(hole for hole in report.missing if not settled.covers(*hole))]
    ok = not (damaged or missing or report.breaks)
    if as_json:
        print_json({
            "ok": ok, "stream": reader.stream, "batches": len(seen), "from": seen[0][0] if seen else 0,
            "to": seen[-1][1] if seen else 0, "damaged": [gap.first for gap in damaged], "missing": missing,
            "breaks": report.breaks, "gaps": [gap[:2] for gap in gaps], "thinned": list(thinned),
        })  # fmt: skip
    else:
        span = f"records {seen[0][0]:,} to {seen[-1][1]:,}" if seen else "no records yet"
        click.echo(f"stream {reader.stream}: {len(seen):,} batches, {span}")
        for lost in gaps:
            click.echo(f"gap: records {lost.first} to {lost.last} are gone, as an event says")
        if thinned:
            within = f"{min(thinned)[0]:,} to {max(thinned)[1]:,}"
            click.echo(
                f"thinned: {thinned.total():,} records within {within} became summaries, as events say"
            )
        for gone in damaged:
            click.echo(f"damaged: the batch at {gone.first} does not give its hash")
        for begin, end in missing:
            click.echo(f"missing: records {begin} to {end}, and nothing says why")
        for seq in report.breaks:
            click.echo(f"broken: the batch at {seq} does not follow from the one before")
        click.echo("the chain holds" if ok else "the journal is not sound")
    if not ok:
        raise click.exceptions.Exit(1)


def _gaps(body: bytes, stream: str) -> Iterator[NamedGap]:
    """Yield the gaps of this stream that an event batch names."""
    for raw in msgspec.json.decode(body, type=_Events).records:
        if msgspec.json.decode(raw)["event"] == "gap":
            of, gap = read_gap(Key("", stream), bytes(raw))
            if of.stream == stream:
                yield gap
