"""Connects to a PostgreSQL server, and tells one that is away from one that does not let us in."""

from typing import Any

from edgegw.errors import ConfigError
from edgegw.receiver.sink import SinkError, SinkUnusable

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
except ImportError as error:
    raise ConfigError(
        ["--to: postgresql:// needs psycopg, which is not installed; pip install 'edgegw[postgres]'"]
    ) from error

__all__ = ["as_line", "connect", "psycopg"]

_LINK = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""What the URL may say otherwise: within how many seconds (the last: ms) a server that is gone is noticed."""


def connect(url: str) -> "psycopg.Connection[Any]":
    """Connect; raise SinkError if no server is there, SinkUnusable if one is and does not let us in."""
    try:
        given = conninfo_to_dict(url)
        known = make_conninfo(url, **{key: value for key, value in _LINK.items() if key not in given})
    except psycopg.Error as error:
        raise SinkUnusable(as_line(error)) from error
    try:
        return psycopg.connect(known)
    except psycopg.OperationalError as error:
        if psycopg.pq.PGconn.ping(known.encode()) != psycopg.pq.Ping.OK:
            raise SinkError(as_line(error)) from error
    try:
        return psycopg.connect(known)  # it may have come up in between
    except psycopg.OperationalError as error:
        raise SinkUnusable(as_line(error)) from error


def as_line(error: Exception) -> str:
    """Return what the server or the library says of an error, on one line."""
    return f"postgresql: {' '.join(str(error).split())}"
