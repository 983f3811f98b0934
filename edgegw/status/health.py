"""Health: what is wrong with the gateway, judged from facts, and since when. Pure.

`failing` is what makes the gateway useless until somebody acts; `degraded` is what costs a part of it.
"""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Literal, NamedTuple

import msgspec

NO_ACKNOWLEDGEMENT_S = 60.0
"""How long a connected broker may confirm nothing while batches are on the way."""
OFFLINE_S = 30.0
"""A connection that is back within so long is the same one, where a broker's silence is counted."""
CONTROL_STOPPED_S = 15.0
"""How long control may complete no cycle."""
FULL = 0.9
"""The share of a disk or journal above which it counts as full."""
CERTIFICATE_S = 30 * 86_400.0
"""How long before its expiry a certificate counts as a problem."""

State = Literal["ok", "degraded", "failing"]


class DeviceFacts(NamedTuple):
    """A device: whether it answers (None: not yet known), its tags, how many are bad, whether it is overdue."""

    answers: bool | None
    tags: int
    bad_tags: int
    stale: bool


class Facts(NamedTuple):
    """What health is judged by; shares from 0 to 1, times in seconds."""

    devices: Mapping[str, DeviceFacts] = {}
    link_online: bool = True
    unacknowledged_s: float = 0.0
    journal_error: str | None = None
    journal_share: float = 0.0
    disk_share: float = 0.0
    control_idle_s: float = 0.0
    clock_synced: bool = True
    certificates: Mapping[str, float] = {}
    """How long each certificate is valid from now on."""


class Fault(NamedTuple):
    """One thing that is wrong: the contract's code, and what it is about."""

    code: str
    what: str
    failing: bool = False


class Problem(msgspec.Struct, frozen=True):
    """A fault and since when it has been there, in milliseconds since the Unix epoch."""

    code: str
    what: str
    since: int


class Health(msgspec.Struct, frozen=True):
    """The gateway's health: its state, and every problem, those that make it failing first."""

    state: State
    problems: list[Problem]


def judge(facts: Facts) -> list[Fault]:
    """Return all that is wrong, what makes the gateway failing first."""
    found = [*_failing(facts), *_degraded(facts)]
    return sorted(found, key=lambda fault: not fault.failing)


def _failing(facts: Facts) -> Iterable[Fault]:
    if facts.journal_error is not None:
        yield Fault("journal-error", facts.journal_error, failing=True)
    if facts.link_online and facts.unacknowledged_s >= NO_ACKNOWLEDGEMENT_S:
        what = f"the broker has confirmed nothing for {facts.unacknowledged_s:.0f} s"
        yield Fault("no-acknowledgement", what, failing=True)
    if facts.devices and all(device.answers is False for device in facts.devices.values()):
        yield Fault("no-device", f"none of {len(facts.devices)} devices answers", failing=True)
    if facts.control_idle_s >= CONTROL_STOPPED_S:
        what = f"control has completed no cycle for {facts.control_idle_s:.0f} s"
        yield Fault("control-stopped", what, failing=True)


def _degraded(facts: Facts) -> Iterable[Fault]:
    for name, device in facts.devices.items():
        if device.answers is False:
            yield Fault("device-down", name)
        elif device.answers and device.tags and device.bad_tags >= device.tags:
            yield Fault("tags-bad", name)
        elif device.answers and device.stale:
            yield Fault("device-stale", name)
    if not facts.link_online:
        yield Fault("link-lost", "uplink")
    if facts.disk_share > FULL:
        yield Fault("disk-full", f"{facts.disk_share:.0%} of the journal's disk are used")
    if facts.journal_share > FULL:
        yield Fault("journal-full", f"{facts.journal_share:.0%} of the journal hold what is not confirmed")
    if not facts.clock_synced:
        yield Fault("clock-unsynced", "the system clock is not synchronised")
    for name, valid_s in facts.certificates.items():
        if valid_s < CERTIFICATE_S:
            yield Fault("certificate-expires", name)


class History:
    """Since when each fault has been there; `device-down` of two devices are two."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], int] = {}

    def update(self, faults: Iterable[Fault], now_ms: int) -> Health:
        """Return the health that faults come to, at a time in milliseconds since the Unix epoch."""
        found = list(faults)
        keys = {(fault.code, _subject(fault)) for fault in found}
        self._since = {key: self._since.get(key, now_ms) for key in keys}
        problems = [Problem(f.code, f.what, self._since[f.code, _subject(f)]) for f in found]
        failing = any(fault.failing for fault in found)
        return Health("failing" if failing else "degraded" if found else "ok", problems)


_OF_ONE = frozenset({"device-down", "tags-bad", "device-stale", "certificate-expires"})


def _subject(fault: Fault) -> str:
    """Return what tells two faults of one code apart: a text with figures in it does not."""
    return fault.what if fault.code in _OF_ONE else ""


class Silence:
    """How long a connected broker has confirmed nothing though batches were on the way, over short losses as well."""

    def __init__(self) -> None:
        self._acknowledgements = -1
        self._since_s = inf
        self._offline_s: float | None = None

    def look(self, now_s: float, *, online: bool, in_flight: bool, acknowledgements: int) -> float:
        """Return that time in seconds; `acknowledgements` is how many there have been in all."""
        if not online and self._offline_s is None:
            self._offline_s = now_s
        away_s = 0.0 if self._offline_s is None else now_s - self._offline_s
        if acknowledgements != self._acknowledgements or away_s > OFFLINE_S:
            self._acknowledgements, self._since_s = acknowledgements, inf
        if online:
            self._offline_s = None
            if in_flight:
                self._since_s = min(self._since_s, now_s)
        return max(0.0, now_s - self._since_s) if self._since_s != inf else 0.0
