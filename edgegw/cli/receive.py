"""`edgegw receive`: subscribe, keep each record once, report gaps."""

import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import click

from edgegw.cli.log import log_to_stderr
from edgegw.cli.options import json_option, print_json
from edgegw.config.units import Duration, Size
from edgegw.errors import ConfigError
from edgegw.receiver import target
from edgegw.receiver.corrector import Correctable, Corrector
from edgegw.receiver.intake import Intake
from edgegw.receiver.receipts import Receipts
from edgegw.receiver.report import Report
from edgegw.receiver.requests import Requests
from edgegw.receiver.senders import DEFAULT_TEMPLATE, check_rebind, check_template
from edgegw.receiver.sink import Sink, SinkError
from edgegw.receiver.wire import MAX_MESSAGE
from edgegw.runtime.stop import Stop
from edgegw.runtime.text import printable

if TYPE_CHECKING:
    from edgegw.receiver.subscriber import Broker, Protocol


def _read_by(read: Callable[[str], Any]) -> Callable[..., Any]:
    """Return what has an option's text, or each of several, read by a function that raises ValueError."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | tuple[str, ...]) -> Any:
        try:
            return read(value) if isinstance(value, str) else [read(text) for text in value]
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def _max_message(text: str) -> Size:
    size = Size.parse(text)
    if not 1024 <= size <= MAX_MESSAGE:
        raise ValueError(f"found {text}; expected 1KiB to 16MiB")
    return size


class _File(click.Path):
    """A file that is there; `%d/` stands for systemd's credentials, as in the configuration."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        folder = os.environ.get("CREDENTIALS_DIRECTORY", "%d")
        return super().convert(str(value).replace("%d", folder, 1), param, ctx)


@click.command()
@click.option("--url", help="The broker: mqtt://HOST:PORT or mqtts://HOST:PORT.")
@click.option("--topic", default="edgegw/#", show_default=True, help="What to subscribe to.")
@click.option(
    "--to", required=True, help="Where to keep it: sqlite:///FILE, postgresql://..., or - for NDJSON."
)
@click.option("--once", is_flag=True, help="End when nothing new came for --idle, and print the report.")
@click.option(
    "--idle",
    default="5s",
    show_default=True,
    callback=_read_by(Duration.parse),
    help="How long --once waits.",
)
@click.option("--report", is_flag=True, help="Only print the report of what --to holds; connect to nothing.")
@click.option(
    "--import", "import_file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take in an exported file instead.",
)  # fmt: skip
@click.option(
    "--public-key", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --import: only what was signed with this Ed25519 key's other half (PEM).",
)  # fmt: skip
@click.option("--gateway", help="With --import: only what is of the gateway with this id.")
@click.option(
    "--receipt",
    type=click.Path(path_type=Path),
    help="With --import: where to write the receipt; default FILE.receipt.",
)
@click.option(
    "--protocol",
    type=click.Choice(["auto", "5", "3.1.1"]),
    default="auto",
    show_default=True,
    help="The version of MQTT; auto: 5, else 3.1.1.",
)
@click.option(
    "--client-id", help="Default: made from this host, --url, --topic and --to, so that it is stable."
)
@click.option("--username", help="The user at the broker.")
@click.option(
    "--password-file",
    type=_File(),
    help="A file whose first line is the password; %d/NAME: a systemd credential.",
)
@click.option("--ca-file", type=_File(), help="The authority that signed the broker's certificate (PEM).")
@click.option("--cert-file", type=_File(), help="Our certificate, for a broker that asks for one (PEM).")
@click.option("--key-file", type=_File(), help="The private key of --cert-file (PEM).")
@click.option(
    "--topic-template", default=DEFAULT_TEMPLATE, show_default=True, callback=_read_by(check_template),
    help="The gateways' uplink.topic: a gateway is believed on its own topic alone.",
)  # fmt: skip
@click.option(
    "--rebind", multiple=True, metavar="GATEWAY=TOPIC", callback=_read_by(check_rebind),
    help="Believe a gateway on this topic as well from now on: it was renamed, or its topic was changed.",
)  # fmt: skip
@click.option(
    "--max-message", default="1MiB", show_default=True, callback=_read_by(_max_message),
    help="The largest batch (bytes of JSON): the gateways' largest uplink.max_message.",
)  # fmt: skip
@click.option(
    "--no-ack", is_flag=True, help="Send no receipts on TOPIC/ack: for a receiver that only watches."
)
@click.option(
    "--no-replay",
    is_flag=True,
    help="Do not ask gateways, on TOPIC/cmd, to send again what is missing.",
)
@click.option(
    "--from-here", is_flag=True,
    help="Streams that --to does not hold yet count from the first batch that comes: nothing before it is missing.",
)  # fmt: skip
@click.option(
    "--correct-time", is_flag=True,
    help="Correct the times of records of an unsynchronised clock, once the right time is known; without --url "
    "only what --to holds.",
)  # fmt: skip
@json_option
def command(
    url: str | None,
    topic: str,
    to: str,
    once: bool,
    idle: Duration,
    report: bool,
    import_file: Path | None,
    public_key: Path | None,
    gateway: str | None,
    receipt: Path | None,
    protocol: str,
    client_id: str | None,
    username: str | None,
    password_file: Path | None,
    ca_file: Path | None,
    cert_file: Path | None,
    key_file: Path | None,
    topic_template: str,
    rebind: list[tuple[str, str]],
    max_message: Size,
    no_ack: bool,
    no_replay: bool,
    from_here: bool,
    correct_time: bool,
    as_json: bool,
) -> None:
    """Subscribe, keep each record once, and report what is missing.

    Batches may come in any order, on any topic and any number of times; a message is confirmed to the broker
    only when what it holds is on disk, so this may be stopped or killed at any moment and started again.
    Without --once it runs until it is interrupted. It confirms on TOPIC/ack what is stored, and from the first such
    receipt on gateways keep each batch until it is (`acknowledge = "auto"`).

    What is missing, also from before its first start, is requested from the gateways on TOPIC/cmd once nothing of it
    has come for a while (with --once: before the end); they send what they still keep. Where the broker does not allow
    that, it says so and goes on. With --to - nothing is known of earlier runs: nothing is requested, and each stream
    counts from the first batch that comes.

    With --correct-time the tables' times are moved where a gateway's clock was not synchronised and what it should have
    said is known; what was done stands in the table corrections.

    A report is printed with --once, --report or --json (to standard error if the records go to standard
    output). The exit code is then 1 if a record is missing and named by no gap event, if two batches are in
    conflict, or if a chain is broken.
    """
    if correct_time and (report or import_file or to == target.STDOUT):
        raise click.UsageError(
            "--correct-time is for a database, and neither --report nor --import changes its times"
        )
    if import_file is not None:
        from edgegw.cli.journal.take_in import take_in

        take_in(import_file, to, public_key=public_key, gateway=gateway, receipt=receipt, as_json=as_json)
        return
    if public_key or gateway or receipt:
        raise click.UsageError("--public-key, --gateway and --receipt need --import")
    target.check(to)
    if report:
        _only_report(to, as_json)
        return
    if correct_time and not url:
        _only_correct(to, as_json)
        return
    if not url:
        raise click.UsageError("--url is needed: the broker, mqtt://HOST:PORT")
    from edgegw.receiver.subscriber import Broker, Protocol, parse_url

    host, port, tls = parse_url(url)
    files = ca_file, cert_file, key_file
    _check_files(*files, tls=tls)
    broker = Broker(
        host, port, tls, topic, client_id or _stable_id(url, topic, to),
        username, _password(username, password_file), *files,
    )  # fmt: skip
    lasts = to != target.STDOUT
    opened = _opener(
        to,
        ack=lasts and not no_ack,
        replay=lasts and not no_replay,
        correct_time=correct_time,
        from_here=from_here or not lasts,
        template=topic_template,
        rebind=dict(rebind),
        max_message=max_message,
    )
    protocols = list(Protocol) if protocol == "auto" else [Protocol(protocol)]
    report_made = _receive(broker, opened, idle.s if once else None, protocols, report=once or as_json)
    if report_made is not None:
        _print(report_made, as_json, to)


def _check_files(ca_file: Path | None, cert_file: Path | None, key_file: Path | None, *, tls: bool) -> None:
    """Raise UsageError where files of TLS would not be used."""
    if (ca_file or cert_file or key_file) and not tls:
        raise click.UsageError(
            "--ca-file, --cert-file and --key-file are for mqtts://; this URL would not use them"
        )
    if bool(cert_file) != bool(key_file):
        raise click.UsageError("--cert-file and --key-file come together; found only one of them")


def _receive(
    broker: "Broker",
    opened: Callable[[], Intake],
    idle_s: float | None,
    protocols: "list[Protocol]",
    *,
    report: bool,
) -> Report | None:
    """Receive until that is over; return the report if one is wanted."""
    from edgegw.receiver.loop import Receiver

    log_to_stderr()
    receiver = Receiver(broker, opened, Stop(signal.SIGINT, signal.SIGTERM), idle_s, protocols)
    try:
        receiver.run()
        if not report:
            return None
        if receiver.intake is None:
            raise SinkError("--to: the database is away; there is nothing to make a report of")
        return receiver.intake.report()
    finally:
        receiver.close()


def _opener(
    to: str, *, ack: bool, replay: bool, correct_time: bool, **options: Any
) -> Callable[[], Intake]:  # fmt: skip
    """Return what opens an intake, as often as its sink fails."""

    def opened() -> Intake:
        sink = target.open_sink(to)
        try:
            return Intake(
                sink,
                receipts=Receipts() if ack else None,
                requests=Requests(lambda: f"receive-{uuid4().hex}") if replay else None,
                corrector=_corrector(sink) if correct_time else None,
                **options,
            )
        except BaseException:
            sink.close()
            raise

    return opened if to != target.STDOUT else cache(opened)  # standard output knows of nothing but this run


def _corrector(sink: Sink) -> Corrector:
    """Correct what a sink holds; return what corrects all that comes."""
    assert isinstance(sink, Correctable)
    corrector = Corrector(sink)
    corrector.settle()
    return corrector


def _only_correct(to: str, as_json: bool) -> None:
    sink = _open_earlier(to, "--correct-time without --url")
    try:
        applied = _corrector(sink).applied()
    finally:
        sink.close()
    if as_json:
        print_json(
            [
                {"gateway": of.key.gateway, "stream": of.key.stream, "batches": of.batches,
                 "records": of.records, "delta_ms": of.delta_ms}
                for of in applied
            ]
        )  # fmt: skip
        return
    for of in applied:
        click.echo(
            f"{printable(str(of.key))}: {of.records:,} records of {of.batches:,} batches moved by {of.delta_ms:+,} ms"
        )
    if not applied:
        click.echo("nothing to correct")


def _open_earlier(to: str, option: str) -> Sink:
    """Open the database of an earlier run."""
    file = target.sqlite_file(to)
    if to == target.STDOUT or (file and not file.is_file()):
        raise ConfigError([f"{option}: {to} holds nothing; expected the database of an earlier run"])
    return target.open_sink(to)


def _only_report(to: str, as_json: bool) -> None:
    sink = _open_earlier(to, "--report")
    try:
        _print(Intake(sink).report(), as_json, to)
    finally:
        sink.close()


def _print(report: Report, as_json: bool, to: str) -> None:
    text = json.dumps(report.as_json(), indent=2) if as_json else "\n".join(report.lines())
    click.echo(text, err=to == target.STDOUT)
    if not report.ok:
        sys.exit(1)


def _stable_id(url: str, topic: str, to: str) -> str:
    """Return the same client id, one that every broker takes, whenever the same is asked for on this host."""
    what = "\0".join((socket.gethostname(), url, topic, target.identity(to)))
    return "receive" + hashlib.sha256(what.encode()).hexdigest()[:16]


def _password(username: str | None, file: Path | None) -> str | None:
    if file is None:
        return None
    if username is None:
        raise click.UsageError("--password-file needs --username")
    try:
        return file.read_text().partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--password-file: {file}: {error}"]) from error
