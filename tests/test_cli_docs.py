"""Every command, option and key that there is stands in the docs."""

import importlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from rig import ROOT

from edgegw.cli import _COMMANDS
from edgegw.config.schema import Config

DOCS = "\n".join(
    path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()
)
DOCUMENTED = {*re.findall(r"`([^`\n]+)`", DOCS), *re.findall(r"^#+ \[(\w+)", DOCS, re.M)}
"""What stands in backticks, and the sections of the configuration that have a heading."""


def sections(kind: Any) -> Iterator[dict[str, FieldInfo]]:
    """Yield the keys of the sections that a type is made of, and of those within."""
    if get_origin(kind) is not None or get_origin(kind) is Annotated:
        for part in get_args(kind):
            yield from sections(part)
    elif fields := getattr(kind, "__pydantic_fields__", None):
        yield fields
        for field in fields.values():
            yield from sections(field.annotation)


def keys() -> set[str]:
    """Return every key that a configuration may hold."""
    return {field.alias or name for section in sections(Config) for name, field in section.items()}


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
