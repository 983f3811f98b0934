"""`edgegw journal export` and `import`: batches carried by hand over an air gap."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegw.cli.daemon import Ask, converse
from edgegw.cli.moment import from_option, period, to_option
from edgegw.cli.options import config_option, json_option, load_config, open_journal, print_json
from edgegw.errors import EdgegwError

if TYPE_CHECKING:
    from edgegw.journal.bundle import Manifest
    from edgegw.journal.signature import Signer


def _signer(ctx: click.Context, param: click.Parameter, file: Path | None) -> "Signer | None":
    from edgegw.journal.signature import KeyFileError, signer

    try:
        return signer(file.read_bytes()) if file else None
    except (KeyFileError, OSError) as error:
        raise click.BadParameter(f"{file}: {error}") from None


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@from_option
@to_option
@click.option("--unsent", is_flag=True, help="Only what nobody upstream is known to have.")
@click.option(
    "--key", "signer", type=click.Path(path_type=Path, exists=True, dir_okay=False), callback=_signer,
    help="Sign with this Ed25519 private key (PEM).",
)  # fmt: skip
@config_option
@json_option
def export(
    file: Path, from_ms: int | None, to_ms: int | None, unsent: bool, signer: "Signer | None",
    config_path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write batches to FILE, to be carried to where `edgegw receive --import` takes them in.

    Without options that is everything the journal holds. The gateway may run meanwhile.
    """
    from edgegw import clock
    from edgegw.journal import bundle
    from edgegw.journal.export import chosen
    from edgegw.runtime.whole import whole

    wanted = period(from_ms, to_ms)
    if file.exists():
        raise EdgegwError(f"{file}: it is there already; name another file, or remove it first")
    reader, config = open_journal(config_path)
    left_out: list[str] = []
    began_s = time.monotonic()
    try:
        with whole(file) as beside, beside.open("r+b") as out:
            batches = chosen(reader, config.gateway.id, wanted, unsent=unsent, left_out=left_out.append)
            made = bundle.write(
                out,
                batches,
                gateway=config.gateway.id,
                stream=reader.stream,
                made_ms=clock.wall_ms(),
                signer=signer,
            )
    finally:
        reader.close()
    _tell_gateway(reader.path, made)
    for reason in left_out:
        click.echo(f"left out: {reason}", err=True)
    done = {
        "file": str(file), "gateway": made.gateway, "stream": made.stream, "ranges": made.ranges,
        "batches": made.batches, "records": made.records, "json_bytes": made.json_bytes,
        "bytes": file.stat().st_size, "left_out": left_out, "signed": bool(signer),
    }  # fmt: skip
    if as_json:
        print_json(done)
    else:
        click.echo(
            f"{file}: {made.batches:,} batches, {made.records:,} records, {made.json_bytes:,} bytes of JSON in "
            f"{done['bytes']:,}{', signed' if signer else ''}, in {time.monotonic() - began_s:.1f} s"
        )


def _tell_gateway(journal: Path, made: "Manifest") -> None:
    """Let a running gateway know what has gone out: it thins that, if it must, apart from what has not."""
    from edgegw.cli.journal.tend import requests

    def talk(ask: Ask) -> bool:
        return all(ask({"carried": request}).get("ok") for request in requests(made.stream, made.ranges))

    try:
        told = converse(journal, "journal export", talk)
    except EdgegwError as error:
        click.echo(f"warning: {error}; the gateway does not know what was exported", err=True)
    else:
        if told is False:
            click.echo("warning: the gateway has begun a new stream meanwhile", err=True)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--to", required=True, help="Where to keep it: as for `edgegw receive`.")
@click.option(
    "--public-key", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take in only what was signed with this Ed25519 key's other half (PEM).",
)  # fmt: skip
@click.option("--receipt", type=click.Path(path_type=Path), help="Default: FILE.receipt.")
@config_option
@json_option
def import_file(
    file: Path,
    to: str,
    public_key: Path | None,
    receipt: Path | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Take an exported FILE in, as `edgegw receive --import` does; with --config only that gateway's."""
    from edgegw.cli.journal.take_in import take_in

    gateway: Any = load_config(config_path)[0].gateway.id if config_path else None
    take_in(file, to, public_key=public_key, gateway=gateway, receipt=receipt, as_json=as_json)
