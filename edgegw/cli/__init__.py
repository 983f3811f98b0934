"""The `edgegw` command: each subcommand is a module of this folder, imported when it is called."""

import importlib
import os
import sys

import click

from edgegw import __version__

_COMMANDS = {
    "run": ("edgegw.cli.run", "run the gateway in the foreground"),
    "check": (
        "edgegw.cli.check",
        "validate the configuration, and with --connect the devices and the broker",
    ),
    "demo": ("edgegw.cli.demo", "the whole story in a minute, on simulators and a broker of its own"),
    "sim": ("edgegw.cli.sim", "run the simulated field that config.example.toml expects"),
    "status": ("edgegw.cli.status", "show link, backlog and devices"),
    "read": ("edgegw.cli.read", "read a device once, by hand"),
    "write": ("edgegw.cli.write", "write one tag by hand, through its guard"),
    "browse": ("edgegw.cli.browse", "list the address space of an OPC UA device"),
    "rules": ("edgegw.cli.rules", "play a recording through the rules and show what they would have done"),
    "journal": ("edgegw.cli.journal", "the journal: figures, queries, integrity, and files to carry by hand"),
    "size": ("edgegw.cli.size", "work out what an outage takes: bytes, days, drain time, wear"),
    "receive": ("edgegw.cli.receive", "subscribe, keep each record once, report gaps"),
}


class _LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgegw")
def cli() -> None:
    """The edge gateway for energy sites.

    Polls Modbus and OPC UA devices, journals every reading, and drains the journal to an MQTT broker so that
    subscribers have every record exactly once.
    """


def main() -> None:
    """Run the command line: exit 0 done, 1 failed, 2 wrong usage or configuration; never a traceback."""
    from edgegw.errors import ConfigError, EdgegwError

    try:
        left = cli.main(standalone_mode=False)
        sys.exit(left if isinstance(left, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except EdgegwError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("EDGEGW_TRACEBACK"):
            raise
        click.echo(
            f"error: {type(error).__name__}: {error} (set EDGEGW_TRACEBACK=1 for the traceback)", err=True
        )
        sys.exit(1)
