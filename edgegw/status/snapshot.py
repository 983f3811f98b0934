"""The status document: what a gateway says of itself, from the running daemon or from its journal."""

from typing import Any

import msgspec

from edgegw import __version__
from edgegw.config.schema import Config
from edgegw.status.health import Health


class LinkStatus(msgspec.Struct):
    """The way to the broker; `since` in milliseconds since the Unix epoch."""

    state: str = "offline"
    since: int | None = None
    broker: str | None = None


class JournalStatus(msgspec.Struct):
    """The journal: seqs, what the upstream has not confirmed, sizes in bytes, and what is wrong with it."""

    path: str
    max_size: int
    head: int = 0
    acked: int = 0
    pending_batches: int = 0
    pending_records: int = 0
    bytes: int = 0
    oldest_pending_ts: int | None = None
    error: str | None = None


class DeviceStatus(msgspec.Struct):
    """A device: `state` is good, bad or unknown, `last_ts` the time of its newest reading; counts since the start."""

    state: str = "unknown"
    reason: str | None = None
    last_ts: int | None = None
    scans: int = 0
    errors: int = 0
    skipped: int = 0
    bad_tags: int = 0


class Snapshot(msgspec.Struct):
    """A gateway's status as the contract has it; `running` tells whether the daemon itself gave it."""

    gateway: str
    config: str
    link: LinkStatus
    journal: JournalStatus
    devices: dict[str, DeviceStatus]
    stream: str = ""
    version: str = __version__
    started: int | None = None
    running: bool = False
    clock: str | None = None
    rules: dict[str, Any] = {}
    alarms: dict[str, Any] = {}
    windows: dict[str, Any] = {}
    readings: int = 0
    health: Health | None = None


def stopped(config: Config, digest: str, journal: JournalStatus, stream: str) -> Snapshot:
    """Return the status of a gateway that does not run, by its configuration and what its journal holds."""
    idle = {"end": None, "coverage": None, "late": 0, "early": 0, "reading_back": False}
    return Snapshot(
        config.gateway.id, digest, LinkStatus(), journal, {name: DeviceStatus() for name in config.device},
        stream=stream, windows=dict.fromkeys(config.window, idle),
    )  # fmt: skip
