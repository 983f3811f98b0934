"""Where `--to` points to, and the sink that belongs to it."""

import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from edgegw.errors import ConfigError
from edgegw.receiver.sink import Sink

STDOUT = "-"
_SQLITE = "sqlite:///"
_POSTGRES = ("postgresql://", "postgres://")


def sqlite_file(to: str) -> Path | None:
    """Return the file of a `sqlite:///FILE` target, None for another kind."""
    return Path(to.removeprefix(_SQLITE)) if to.startswith(_SQLITE) and to != _SQLITE else None


def check(to: str) -> None:
    """Raise ConfigError if a target is none."""
    if to == STDOUT or sqlite_file(to):
        return
    if to.startswith(_POSTGRES):
        parts = urlsplit(to)
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ConfigError(
                ["--to: found a password; expected none in the URL, where every user of this machine "
                 "could see it: use ~/.pgpass or PGPASSFILE"]
            )  # fmt: skip
        return
    raise ConfigError([f"--to: found {to!r}; expected sqlite:///FILE, postgresql://... or - for NDJSON"])


def identity(to: str) -> str:
    """Return what tells a target from another one on the same machine."""
    file = sqlite_file(to)
    return str(file.resolve()) if file else to


def open_sink(to: str) -> Sink:
    """Open a target; raise ConfigError if it is none, SinkError if it cannot be had."""
    check(to)
    if to == STDOUT:
        from edgegw.receiver.ndjson import NdjsonSink

        return NdjsonSink(sys.stdout.buffer)
    file = sqlite_file(to)
    if file:
        from edgegw.receiver.sqlite import SqliteSink

        return SqliteSink(file)
    from edgegw.receiver.postgres import PostgresSink

    return PostgresSink(to)
