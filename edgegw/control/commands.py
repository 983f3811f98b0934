"""Commands, read and judged before anything is done about them. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from edgegw.config.units import Duration
from edgegw.control.expression import did_you_mean
from edgegw.control.guard import Limits, check
from edgegw.domain.command import HAND, ReplayCommand, Reply, WriteCommand
from edgegw.domain.tag import Scalar

COMMAND_BYTES = 64 * 1024
ID_LENGTH = 128
KEEP_IDS_MS = 86_400_000
"""How long an id is remembered after its command expired, in case the clock goes back."""
IDS = 4096
"""Ids remembered: of commands that can still act all, of expired ones as many as there is room for."""
LATEST_MS = 2**53
LAST = 2**63 - 1
_WRITE = ("id", "write", "expires", "lease")
_REPLAY = ("id", "replay")
_REPLAYED = ("stream", "from", "to")


def read(
    payload: bytes, *, limits: Mapping[str, Limits], done: Mapping[str, int], now_ms: int,
    retained: bool = False, by_hand: bool = False,
) -> WriteCommand | ReplayCommand | Reply:  # fmt: skip
    """Return the command in a message, or the answer that says why nothing is done about it.

    `done` holds the ids of earlier commands. All setpoints are checked before any is written; whether a replay's
    records are there is not looked at here.
    """
    if len(payload) > COMMAND_BYTES:
        return Reply(None, False, f"{len(payload)} bytes; expected {COMMAND_BYTES} at most")
    try:
        message = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Reply(None, False, f"not JSON: {error}")
    if not isinstance(message, dict):
        return Reply(None, False, "expected an object with id, write and expires")
    name = message.get("id")
    if not isinstance(name, str) or not 0 < len(name) <= ID_LENGTH:
        return Reply(None, False, f"id: expected a string of 1 to {ID_LENGTH} characters")
    if name.startswith(HAND) != by_hand:
        return Reply(name, False, f"id: {HAND}... is for writes by hand at the gateway, and only for these")
    if wrong := _wrong(message, retained, name, done, now_ms):
        return Reply(name, False, wrong)
    if "replay" in message:
        return _replay(name, message["replay"], by_hand)
    if wrong := _wrong_write(message, now_ms) or _wrong_writes(message["write"], limits):
        return Reply(name, False, wrong)
    lease = message.get("lease")
    return WriteCommand(
        name, message["write"], message["expires"], Duration.parse(lease).s if lease else None
    )


def _wrong(
    message: Mapping[str, Any], retained: bool, name: str, done: Mapping[str, int], now_ms: int
) -> str | None:
    if retained:
        return "retained: a command is for now, and a retained message is for whenever"
    if name in done:
        return "this id was already acted on"
    if "write" in message and "replay" in message:
        return "found both write and replay; expected one of them"
    if wrong := _unknown(message, _REPLAY if "replay" in message else _WRITE):
        return wrong
    if sum(until_ms > now_ms for until_ms in done.values()) >= IDS:
        return (
            f"{IDS} commands have not expired yet, and no more ids are remembered; expected shorter expires"
        )
    return None


def _unknown(message: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    unknown = sorted(set(message) - set(keys))
    return f"unknown key {unknown[0][:60]}; expected {', '.join(keys)}" if unknown else None


def _wrong_write(message: Mapping[str, Any], now_ms: int) -> str | None:
    expires = message.get("expires")
    if not isinstance(expires, int) or isinstance(expires, bool) or not 0 <= expires < LATEST_MS:
        return "expires: expected milliseconds since the Unix epoch"
    if expires <= now_ms:
        return f"expired {(now_ms - expires) / 1000:.1f} s ago"
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
            return f"{setpoint[:130]}: no such tag{did_you_mean(setpoint[:130], limits)}"
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


def remembered(done: Mapping[str, int], now_ms: int) -> dict[str, int]:
    """Return the ids that must still be known: id to the moment its command expires, a replay's at once."""
    kept = [(expires_ms, name) for name, expires_ms in done.items() if expires_ms + KEEP_IDS_MS > now_ms]
    return {name: expires_ms for expires_ms, name in sorted(kept)[-(IDS - 1) :]}


def as_number(value: Scalar, kind: str) -> Scalar:
    """Return a value as the engine holds it: numbers are doubles."""
    return float(value) if kind == "number" and not isinstance(value, str) else value
