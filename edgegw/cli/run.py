"""`edgegw run`: the daemon."""

import asyncio
import ctypes
import gc
import logging
import sys
from pathlib import Path

import click

from edgegw.cli.options import config_option

SWITCH_S = 0.0005
"""How long one thread may keep the interpreter from another; Python's own 5 ms costs scans their place."""

GARBAGE = 20_000
"""Objects between two looks for garbage that hangs together: there is little of it, and looking costs 2 %."""

_M_ARENA_MAX = -8
"""mallopt(3): into how many heaps glibc parts what threads allocate."""


@click.command("run")
@config_option
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def command(config_path: Path | None, log_level: str) -> None:
    """Run the gateway in the foreground.

    SIGTERM stops it with nothing that was read lost; SIGHUP takes the configuration's devices anew and keeps the
    unchanged ones running.
    """
    import uvloop

    from edgegw.cli.log import DAEMON, log_to_stderr
    from edgegw.config.load import find, journal_path
    from edgegw.config.surroundings import journal_obstacle, secret_advice
    from edgegw.control.build import load_with_rules
    from edgegw.errors import ConfigError
    from edgegw.gateway import Gateway

    log_to_stderr(log_level.upper(), DAEMON)
    path = find(config_path)
    config, plant = load_with_rules(path)
    if (obstacle := journal_obstacle(journal_path(config, path))) is not None:
        raise ConfigError([f"{path}: journal.path: {obstacle}"])
    for line in secret_advice(config, path):
        logging.getLogger("edgegw").warning("%s", line)

    async def main() -> None:
        await Gateway(config, plant, path).run()

    _one_heap()
    # the journal's thread needs some milliseconds at a time: do not let the event loop wait for all of it
    sys.setswitchinterval(SWITCH_S)
    gc.freeze()  # what is there now stays
    gc.set_threshold(GARBAGE)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _one_heap() -> None:
    """Have all threads allocate from one heap: with glibc's eight a core, 7 MB of a drain's buffers would stay."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries know no such thing
        mallopt(_M_ARENA_MAX, 1)
