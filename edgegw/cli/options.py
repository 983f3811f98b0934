"""Options that commands share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgegw.config.schema import Config

config_option: Callable[..., Any] = click.option(
    "-c", "--config", "config_path", type=click.Path(path_type=Path),
    help="The configuration; default $EDGEGW_CONFIG, else /etc/edgegw/config.toml, else ./config.toml.",
)  # fmt: skip
json_option: Callable[..., Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_config(path: Path | None) -> Config:
    """Load the configuration a command was pointed to; raise ConfigError."""
    from edgegw.config.load import find, load

    return load(find(path))


def print_json(value: Any) -> None:
    """Print a value as one JSON document."""
    click.echo(json.dumps(value, indent=2, default=str))
