"""`edgegw journal ack` and `prune`: what a hand may have the journal do, with or without the daemon."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegw.cli.daemon import Ask, converse, expect_alone, locate, own, there
from edgegw.cli.moment import age
from edgegw.cli.options import config_option, json_option, load_config, open_journal, print_json
from edgegw.errors import JournalError

if TYPE_CHECKING:
    from edgegw.config.schema import Config
    from edgegw.domain.ranges import Ranges
    from edgegw.journal.journal import Journal
    from edgegw.journal.store import Reader

OPEN_S = 30.0
MOST_RANGES = 500
"""Ranges in one request: the socket takes no longer lines."""


@click.command("ack")
@click.argument("receipt", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@config_option
@json_option
def ack(receipt: Path, config_path: Path | None, as_json: bool) -> None:
    """Release the exported batches that RECEIPT says are safe at the other end: they are not sent any more.

    Exit 1 with the reason if it is not as it was written, or not a receipt of this journal.
    """
    from edgegw.domain.ranges import Ranges
    from edgegw.journal import receipt as receipts
    from edgegw.journal.receipt import ReceiptError
    from edgegw.journal.release import releasable

    reader, config = open_journal(config_path)
    try:
        try:
            found = receipts.decode(receipt.read_bytes())
            ranges, unknown = releasable(reader, config.gateway.id, found)
        except ReceiptError as error:
            raise ReceiptError(f"{receipt}: {error}") from None
        settled = reader.acked()
        released = Ranges()
        for request in requests(found.stream, ranges):
            for first, last in _ask(config_path, "journal ack", "acknowledge", request)["ranges"]:
                released.add(first, last)
        batches = _count(reader, released)
    finally:
        reader.close()
    for held in unknown:
        if not settled.covers(held.first, held.last):
            click.echo(
                f"records {held.first} to {held.last}: the batch that ends them is no longer here; not released",
                err=True,
            )
    if as_json:
        print_json(
            {
                "stream": found.stream,
                "batches": batches,
                "records": released.total(),
                "ranges": list(released),
            }
        )
    else:
        click.echo(f"released {batches:,} batches, {released.total():,} records")


@click.command("prune")
@click.option(
    "--older-than", "older_ms", default="0s", show_default=True, callback=age,
    help="Only what was journaled longer ago than that, the time when the gateway did not run left out.",
)  # fmt: skip
@config_option
@json_option
def prune(older_ms: int, config_path: Path | None, as_json: bool) -> None:
    """Delete acknowledged batches now, instead of when they are older than `journal.keep`.

    The newest batch stays, and so does all that is unsent. The file keeps its size: there is room in it.
    """
    done = _ask(config_path, "journal prune", "prune", {"older_than_ms": older_ms})
    if as_json:
        print_json({"batches": done["batches"], "records": done["records"]})
    else:
        click.echo(f"deleted {done['batches']:,} batches, {done['records']:,} records")


def requests(stream: str, ranges: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield requests for ranges of a stream, each short enough for the daemon's socket."""
    for at in range(0, len(ranges), MOST_RANGES):
        yield {"stream": stream, "ranges": ranges[at : at + MOST_RANGES]}


def _count(reader: "Reader", released: "Ranges") -> int:
    from edgegw.journal.period import STEP

    count = 0
    for first, last in released:
        while batches := reader.batches(first, last, limit=STEP):
            count += len(batches)
            first = batches[-1].seq + 1
    return count


def _ask(config_path: Path | None, command: str, name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Have the running gateway do it, or the journal itself where none runs; raise JournalError."""
    from edgegw.journal import tending

    config, path = load_config(config_path)
    place = locate(config, path)
    file = there(place)

    def talk(ask: Ask) -> dict[str, Any]:
        return ask({name: request})

    done = converse(file, command, talk)
    if done is None:
        expect_alone(place, config, command)
        done = asyncio.run(
            _alone(config, file, command, lambda journal: tending.requests(journal)[name](request))
        )
    if not done.get("ok"):
        raise JournalError(f"journal {file}: {done.get('error')}")
    return done


async def _alone(
    config: "Config", file: Path, command: str, do: "Callable[[Journal], Awaitable[dict[str, Any]]]"
) -> dict[str, Any]:
    """Open the journal under its lock, have it done, and close it; raise HeldError if a gateway is starting."""
    from edgegw.journal.journal import Journal
    from edgegw.runtime.lock import held

    own(file, command)
    with held(file.with_name(file.name + ".lock"), f"journal {file}"):
        journal = Journal(file, config.gateway.id, config.journal, config.uplink.max_message)
        journal.start()
        try:
            async with asyncio.timeout(OPEN_S):
                await journal.opened.wait()
            done = await do(journal)
        except TimeoutError:
            raise JournalError(f"journal {file}: cannot be opened in {OPEN_S:.0f} s") from None
        finally:
            safe = await journal.close()
    if not safe:
        raise JournalError(f"journal {file}: it could not be written down")
    return done
