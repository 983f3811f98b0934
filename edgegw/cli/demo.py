"""`edgegw demo`: the whole story in a minute."""

import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import click

from edgegw.cli.options import json_option, print_json


@click.command("demo")
@click.option("--fast", is_flag=True, help="In seconds instead of a minute, without OPC UA.")
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False),
    help="An empty or new folder for everything it makes; by default all of that is gone at the end.",
)  # fmt: skip
@json_option
def command(fast: bool, keep: Path | None, as_json: bool) -> None:
    """Show the whole story in a minute, on this machine alone, and prove that nothing was lost.

    Simulated devices, an MQTT broker, the gateway and a receiver run as separate processes on free ports of
    the loopback. The broker is stopped, the gateway goes on, is killed with SIGKILL and started again; the
    broker comes back and the backlog drains. The verdict is counted from the receiver's database and compared
    with the journal's file; the gateway is not asked.

    The demo's broker keeps nothing on disk and acknowledges a message once the receiver has it. A broker
    without persistence that acknowledges earlier can lose what it acknowledged when it stops: that is between
    broker and receiver, and the broker's acknowledgement cannot show it.

    Exit code 1 if the verdict is not ok.
    """
    from rich.console import Console

    from edgegw.demo.screen import Screen
    from edgegw.demo.story import FAST, MINUTE, Story

    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"--keep: {keep} is not empty; name a new folder")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    console = Console(stderr=as_json, highlight=False)
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgegw-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        screen = Screen(console)
        with screen:
            verdict = Story(folder.resolve(), FAST if fast else MINUTE, screen).run()
    screen.verdict(verdict)
    if as_json:
        print_json(verdict.as_json())
    if not verdict.ok:
        raise click.exceptions.Exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C: on the way out every process is ended."""
    sys.exit(128 + number)
