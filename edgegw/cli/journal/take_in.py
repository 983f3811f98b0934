"""Takes an exported file into what a receiver keeps: all of it is checked first, and a receipt comes last."""

from array import array
from pathlib import Path
from typing import Any

import click

from edgegw import clock
from edgegw.cli.log import log_to_stderr
from edgegw.cli.options import print_json
from edgegw.errors import EdgegwError
from edgegw.journal import receipt as receipts
from edgegw.journal.bundle import Bundle, BundleError
from edgegw.journal.receipt import Held, Receipt
from edgegw.journal.signature import KeyFileError
from edgegw.journal.signature import public_key as read_public_key
from edgegw.receiver import target
from edgegw.receiver.dedupe import Stream, Verdict
from edgegw.receiver.intake import Intake
from edgegw.receiver.sink import Sink
from edgegw.receiver.wire import Batch, read
from edgegw.runtime.text import printable
from edgegw.runtime.whole import whole

COMMIT_BYTES = 16 * 1024**2
"""JSON taken in between two commits."""


def take_in(
    file: Path, to: str, *, public_key: Path | None, gateway: str | None, receipt: Path | None, as_json: bool
) -> None:
    """Take a file in and write the receipt; exit 1 if it is refused, or if a batch contradicts what is kept."""
    target.check(to)
    if to == target.STDOUT and receipt:
        raise click.UsageError(
            "--receipt: nothing is kept on standard output, so there is nothing to confirm"
        )
    key = _key(public_key) if public_key else None
    log_to_stderr()
    try:
        with file.open("rb") as source:
            bundle = Bundle(source, key)
            if gateway and bundle.manifest.gateway != gateway:
                raise BundleError(
                    f"found batches of gateway {printable(bundle.manifest.gateway)}; expected {gateway}"
                )
            sums = array("q", (_checked(body) for body in bundle.bodies()))
            sink = target.open_sink(to)
            try:
                new, held = _take(bundle, sums, Intake(sink), sink, str(file))
            finally:
                sink.close()
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None
    except OSError as error:
        raise EdgegwError(f"{file}: {(error.strerror or str(error)).lower()}") from error
    manifest = bundle.manifest
    records = sum(one.last - one.first + 1 for one in held)
    done: dict[str, Any] = {
        "file": str(file), "gateway": manifest.gateway, "stream": manifest.stream, "batches": manifest.batches,
        "records": manifest.records, "new_batches": new, "held_records": records, "receipt": None,
    }  # fmt: skip
    if to != target.STDOUT:
        path = receipt or file.with_name(file.name + ".receipt")
        with whole(path) as beside:
            made = Receipt(receipts.VERSION, manifest.gateway, manifest.stream, clock.wall_ms(), held)
            beside.write_bytes(receipts.encode(made))
        done["receipt"] = str(path)
    _say(done, as_json, to)
    if records != manifest.records:
        raise click.exceptions.Exit(1)


def _key(file: Path) -> bytes:
    try:
        return read_public_key(file.read_bytes())
    except (KeyFileError, OSError) as error:
        raise click.BadParameter(f"--public-key: {file}: {error}") from None


def _checked(body: bytes) -> int:
    """Return what tells a batch from any other that might be read in its place later; raise MalformedError."""
    return hash(read(body).body)


def _take(
    bundle: Bundle, sums: "array[int]", intake: Intake, sink: Sink, name: str
) -> tuple[int, list[Held]]:
    """Take in each batch, and return how many were new and what of all is kept, once it is safe.

    The medium is read a second time: what comes must be what was checked.
    """
    new = taken = 0
    held: list[Held] = []
    for body, checked in zip(bundle.bodies(), sums, strict=True):
        if hash(body) != checked:
            raise BundleError("it reads otherwise the second time; expected a medium that can be relied on")
        batch = read(body)
        new += intake.add(batch, name)
        if _is_held(sink, batch):
            _hold(held, batch)
        taken += len(body)
        if taken >= COMMIT_BYTES:
            intake.commit()
            taken = 0
    intake.commit()
    return new, held


def _is_held(sink: Sink, batch: Batch) -> bool:
    """Tell whether the sink has a batch: its bytes, or what stands for it."""
    there = sink.kept(batch.key, batch.seq, batch.last)
    stream = Stream()
    for one in there:
        stream.keep(one.seq, one.count)
    return stream.judge(batch.outline, lambda: there) is Verdict.DUPLICATE


def _hold(held: list[Held], batch: Batch) -> None:
    first = batch.seq
    if held and held[-1].last + 1 == first:
        first = held.pop().first
    held.append(Held(first, batch.last, batch.link.digest.hex()))


def _say(done: dict[str, Any], as_json: bool, to: str) -> None:
    on_stdout = to == target.STDOUT
    if as_json and not on_stdout:
        print_json(done)
        return
    there = done["batches"] - done["new_batches"]
    click.echo(
        f"{printable(done['gateway'])} {printable(done['stream'])}: "
        f"{done['new_batches']:,} of {done['batches']:,} batches taken in, "
        f"{there:,} not new; {done['held_records']:,} of {done['records']:,} records are kept",
        err=on_stdout,
    )
    if done["receipt"]:
        click.echo(
            f"receipt: {done['receipt']}; carry it back and give it to `edgegw journal ack`", err=on_stdout
        )
