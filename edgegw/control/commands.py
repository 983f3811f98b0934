"""Commands, read and judged before anything is done about them. Pure."""

from collections.abc import Container, Mapping
from datetime import UTC, datetime
from math import isfinite
from typing import Any, NamedTuple

import msgspec

from edgegw.config.units import Duration
from edgegw.control.guard import Limits, check
from edgegw.control.ids import IDS
from edgegw.domain.command import HAND, ReplayCommand, Reply, WriteCommand
from edgegw.domain.tag import Scalar

COMMAND_BYTES = 64 * 1024
ID_LENGTH = 128
AHEAD_MS = 86_400_000
"""How far ahead a command may expire: its id is remembered for as long, and for a day more."""
HOUR_MS = 3_600_000
RELEASED_MS = 1_767_225_600_000
"""2026-01-01: no clock that is right says less."""
LAST = 2**63 - 1
ASKED = 16
"""Of a command that is refused, so many writes stand in the ledger."""
_WRITE = ("id", "write", "expires", "lease")
_REPLAY = ("id", "replay")
_REPLAYED = ("stream", "from", "to")


class Known(NamedTuple):
    """What is known when a command comes: the ids that were used, how many of them can still act, the clock's state.

    `clock` says why the clock must not be trusted; None if nothing speaks against it.
    """

    ids: Container[str] = ()
    can_act: int = 0
    clock: str | None = None


def read(
    payload: bytes, *, limits: Mapping[str, Limits], known: Known, now_ms: int,
    retained: bool = False, by_hand: bool = False,
) -> WriteCommand | ReplayCommand | Reply:  # fmt: skip
    """Return the command in a message, or the answer that says why nothing is done about it.

    All setpoints are checked before any is written; whether a replay's records are there is not looked at here.
    """
    if len(payload) > COMMAND_BYTES:
        return Reply(None, False, f"{len(payload)} bytes; expected {COMMAND_BYTES} at most")
    try:
        message = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Reply(None, False, f"not JSON: {error}")
    if not isinstance(message, dict):
        return Reply(None, False, "expected an object with id, write and expires")
    name, asked = message.get("id"), bounded(message.get("write"))
    if not isinstance(name, str) or not 0 < len(name) <= ID_LENGTH or not name.isprintable():
        wrong = f"id: expected a string of 1 to {ID_LENGTH} printable characters"
        return Reply(None, False, wrong, asked=asked)
    if name.startswith(HAND) != by_hand:
        wrong = f"id: {HAND}... is for writes by hand at the gateway, and only for these"
        return Reply(name, False, wrong, asked=asked)
    if refused := _wrong(message, retained, name, known, by_hand):
        return Reply(name, False, refused, asked=asked)
    if "replay" in message:
        return _replay(name, message["replay"], by_hand)
    unsure = None if by_hand else known.clock
    if refused := unsure or _wrong_write(message, now_ms) or _wrong_writes(message["write"], limits):
        return Reply(name, False, refused, asked=asked)
    lease = message.get("lease")
    return WriteCommand(
        name, message["write"], message["expires"], Duration.parse(lease).s if lease else None
    )


def _wrong(message: Mapping[str, Any], retained: bool, name: str, known: Known, by_hand: bool) -> str | None:
    if retained:
        return "retained: a command is for now, and a retained message is for whenever"
    if name in known.ids:
        return "this id was already acted on"
    if "write" in message and "replay" in message:
        return "found both write and replay; expected one of them"
    if wrong := _unknown(message, _REPLAY if "replay" in message else _WRITE):
        return wrong
    if known.can_act >= IDS and not by_hand:
        return (
            f"{IDS} commands have not expired yet, and no more ids are remembered; expected shorter expires"
        )
    return None


def wrong_clock(now_ms: int, latest_ms: int, synchronised: bool) -> str | None:
    """Say why the clock cannot tell whether a command has expired; None if nothing speaks against it.

    `latest_ms` is the time that has been for certain: the newest record's, and what has run since. A clock that is
    merely not known to be synchronised is believed: many sites have nothing to synchronise it with.
    """
    if now_ms < RELEASED_MS:
        return f"the gateway's clock says {_date(now_ms)}, before this version was made; set it; nothing was written"
    if not synchronised and now_ms < latest_ms - HOUR_MS:
        was = f"but it was {_date(latest_ms)} already"
        return f"the gateway's clock says {_date(now_ms)}, {was}; synchronise it; nothing was written"
    return None


def _date(ts: int) -> str:
    return datetime.fromtimestamp(ts / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def bounded(writes: object) -> dict[str, Scalar] | None:
    """Return what a message asked to write, whatever it is, in a size and form that the ledger can hold."""
    if not isinstance(writes, dict):
        return None
    asked: dict[str, Scalar] = {}
    for name, value in writes.items():
        if len(asked) == ASKED:
            asked["..."] = f"{len(writes) - ASKED} more"
            break
        asked[str(name)[:ID_LENGTH]] = _bounded(value)
    return asked


def _bounded(value: object) -> Scalar:
    if isinstance(value, str):
        return value[:ID_LENGTH]
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) <= LAST):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    return f"a {type(value).__name__}"


def _unknown(message: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    unknown = sorted(set(message) - set(keys))
    return f"unknown key {unknown[0][:60]}; expected {', '.join(keys)}" if unknown else None


def _wrong_write(message: Mapping[str, Any], now_ms: int) -> str | None:
    expires = message.get("expires")
    if not isinstance(expires, int) or isinstance(expires, bool) or expires < 0:
        return "expires: expected milliseconds since the Unix epoch"
    if expires <= now_ms:
        hint = (
            "; is that in seconds? expected milliseconds" if 0 < expires * 1000 - now_ms <= AHEAD_MS else ""
        )
        return f"expired {(now_ms - expires) / 1000:.1f} s ago{hint}"
    if expires - now_ms > AHEAD_MS:
        hint = "; is that in microseconds?" if 0 < expires // 1000 - now_ms <= AHEAD_MS else ""
        return f"expires: more than a day ahead; expected milliseconds since the Unix epoch{hint}"
    if "lease" in message:
        try:
            if Duration.parse(message["lease"]) <= 0:
                return "lease: expected more than nothing"
        except ValueError as error:
            return f"lease: {error}"
    write = message.get("write")
    if not isinstance(write, dict) or not write:
        return 'write: expected tags and their values, as in {"battery.setpoint_kw": 10.0}'
    return None


def _wrong_writes(writes: Mapping[str, object], limits: Mapping[str, Limits]) -> str | None:
    for setpoint, value in writes.items():
        if setpoint not in limits:
            return f"{setpoint[:130]}: no such tag"
        if (refusal := check(limits[setpoint], value)) is not None:
            return f"{setpoint}: {refusal.reason}"
    return None


def _replay(name: str, asked: object, by_hand: bool) -> ReplayCommand | Reply:
    if by_hand:
        return Reply(name, False, "replay: is for TOPIC/cmd; expected a write")
    if not isinstance(asked, dict):
        return Reply(name, False, "replay: expected an object with stream, from and to")
    if wrong := _unknown(asked, _REPLAYED):
        return Reply(name, False, f"replay: {wrong}")
    stream, first, last = (asked.get(key) for key in _REPLAYED)
    if not isinstance(stream, str) or not 0 < len(stream) <= ID_LENGTH:
        return Reply(name, False, f"replay.stream: expected a string of 1 to {ID_LENGTH} characters")
    for key, seq in (("from", first), ("to", last)):
        if not isinstance(seq, int) or isinstance(seq, bool) or not 1 <= seq <= LAST:
            return Reply(name, False, f"replay.{key}: expected a whole number from 1")
    assert isinstance(first, int)
    assert isinstance(last, int)
    if first > last:
        return Reply(name, False, f"replay: from {first} is beyond to {last}")
    return ReplayCommand(name, stream, first, last)


def as_number(value: Scalar, kind: str) -> Scalar:
    """Return a value as the engine holds it: numbers are doubles, but for integers that no double holds exactly."""
    if kind != "number" or isinstance(value, str):
        return value
    return value if float(value) != value else float(value)
