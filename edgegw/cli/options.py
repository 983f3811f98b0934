"""Options that commands share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgegw.config.schema import Config
    from edgegw.journal.store import Reader

config_option: Callable[..., Any] = click.option(
    "-c", "--config", "config_path", type=click.Path(path_type=Path),
    help="The configuration; default $EDGEGW_CONFIG, else /etc/edgegw/config.toml, else ./config.toml.",
)  # fmt: skip
json_option: Callable[..., Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_config(path: Path | None) -> "tuple[Config, Path]":
    """Load the configuration a command was pointed to and say where it was; raise ConfigError."""
    from edgegw.config.load import find
    from edgegw.control.build import load_with_rules

    found = find(path)
    config, _ = load_with_rules(found)
    return config, found


def open_journal(path: Path | None) -> "tuple[Reader, Config]":
    """Open the gateway's journal for reading; raise EdgegwError."""
    from edgegw.cli.daemon import locate, there
    from edgegw.journal.store import Reader

    config, found = load_config(path)
    return Reader(there(locate(config, found))), config


def print_json(value: Any) -> None:
    """Print a value as one JSON document."""
    click.echo(json.dumps(value, indent=2, default=str))
