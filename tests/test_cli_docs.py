"""Every command, option and key that there is stands in the docs."""

import importlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import click
from pydantic import BaseModel
from rig import ROOT

from edgegw.cli import _COMMANDS
from edgegw.config.schema import Config

DOCS = "\n".join(
    path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()
)
DOCUMENTED = {*re.findall(r"`([^`\n]+)`", DOCS), *re.findall(r"^#+ \[(\w+)", DOCS, re.M)}
"""What stands in backticks, and the sections of the configuration that have a heading."""


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a type is made of, and those within."""
    if get_origin(kind) is not None or get_origin(kind) is Annotated:
        for part in get_args(kind):
            yield from models(part)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)


def keys() -> set[str]:
    """Return every key that a configuration may hold."""
    return {field.alias or name for model in models(Config) for name, field in model.model_fields.items()}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its name as it is typed."""
    for name, (module, _) in _COMMANDS.items():
        command = importlib.import_module(module).command
        yield name, command
        for sub, nested in getattr(command, "commands", {}).items():
            yield f"{name} {sub}", nested


def test_the_schemas_keys_are_found_at_all() -> None:
    assert {"commit_interval", "inflight", "max_per_hour", "timestamp", "http", "for", "finally"} <= keys()


def test_every_key_of_the_configuration_is_documented() -> None:
    missing = sorted(key for key in keys() if key not in DOCUMENTED)
    assert not missing, missing


def test_every_command_is_documented() -> None:
    missing = [
        name
        for name, _ in commands()
        for top, _, sub in [name.partition(" ")]
        if not any(
            f"`edgegw {top}`" in line and (not sub or f"`{sub}`" in line) for line in DOCS.splitlines()
        )
    ]
    assert not missing, missing


def test_every_commands_help_says_what_each_option_is_for() -> None:
    silent = [
        f"{name} {option.opts[0]}"
        for name, command in commands()
        for option in command.params
        if isinstance(option, click.Option) and not option.help and option.opts[0] != "--log-level"
    ]
    assert not silent, silent
    assert all(command.help for _, command in commands())
