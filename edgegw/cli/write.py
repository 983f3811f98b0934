"""`edgegw write`: one tag by hand, through its guard and the ledger."""

import asyncio
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegw.cli.daemon import Ask, converse, expect_alone, locate, own
from edgegw.cli.options import config_option, json_option, load_config, print_json
from edgegw.errors import JournalError, NoAnswer

if TYPE_CHECKING:
    from edgegw.config.schema import AnyDevice, Config
    from edgegw.control.guard import Limits
    from edgegw.control.hand import Alone
    from edgegw.control.plant import Plant
    from edgegw.domain.tag import Scalar

EXPIRES_MS = 30_000
READ_S = 15.0
OPEN_S = 5.0

Confirm = Callable[[Any, str], bool]


@click.command("write", context_settings={"ignore_unknown_options": True})
@click.argument("tag", metavar="DEVICE.TAG")
@click.argument("value")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--lease", help="Hold the value for so long, as in 10m; without it until the next command.")
@config_option
@json_option
def command(
    tag: str, value: str, yes: bool, lease: str | None, config_path: Path | None, as_json: bool
) -> None:
    """Write VALUE to DEVICE.TAG; exit 1 with the reason if that is refused or fails.

    A running gateway does it, as for a command from upstream: it holds the value, moves it there by its ramp, and
    refuses it where a rule has more authority. Without one, a single step is written from here.
    """
    from edgegw.control.build import build
    from edgegw.control.expression import did_you_mean

    config, path = load_config(config_path)
    plant, _ = build(config)
    if tag not in plant.limits:
        raise click.UsageError(f"no tag {tag!r} in the configuration{did_you_mean(tag, plant.limits)}")
    limits = plant.limits[tag]
    wanted = _parsed(value, limits.kind)
    if lease is not None:
        _check_lease(lease)
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nobody to ask: standard input is no terminal; expected --yes")
    unit = str(getattr(config.device[tag.partition(".")[0]].tags[tag.partition(".")[2]], "unit", ""))

    def confirm(now: Any, owner: str) -> bool:
        if yes:
            return True
        click.echo(f"{tag}  now {_shown(now)} {unit}".rstrip() + owner, err=True)
        click.echo(f"limits: {_limits(limits)}", err=True)
        return click.confirm(f"Write {_shown(wanted)} {unit}".rstrip() + "?", err=True)

    name = f"hand-{uuid.uuid4()}"
    place = locate(config, path)
    done = _by_daemon(place.journal, tag, wanted, lease, name, confirm)
    if done is None:
        expect_alone(place, config, "write")
        if lease is not None:
            raise click.UsageError(
                "the gateway is not running, and only it can hold a lease; take --lease out"
            )
        done = asyncio.run(_alone(config, place.journal, plant, tag, wanted, name, confirm))
    if as_json:
        print_json(done)
    elif done["ok"]:
        click.echo(f"{tag}  {_shown(done['value'])} {unit}".rstrip() + f"  ({done['note']})")
    else:
        click.echo(f"error: {done['error']}", err=True)
    if not done["ok"]:
        raise click.exceptions.Exit(1)


def _parsed(text: str, kind: str) -> "Scalar":
    """Return the value in the tag's kind; raise UsageError."""
    if kind == "string":
        return text
    if kind == "bool":
        if text.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise click.UsageError(f"found {text!r}; expected true or false")
        return text.lower() in ("true", "on", "1")
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number - number != 0.0:  # neither a number nor finite
        raise click.UsageError(f"found {text!r}; expected a number")
    with suppress(ValueError):
        if (whole := int(text)) != number:  # an integer that no double holds
            return whole
    return number


def _check_lease(text: str) -> None:
    from edgegw.config.units import Duration

    try:
        Duration.parse(text)
    except ValueError as error:
        raise click.UsageError(f"--lease: {error}") from None


def _limits(limits: "Limits") -> str:
    said = {
        "min": limits.min, "max": limits.max, "max_step": limits.max_step,
        "ramp": None if limits.ramp_per_s is None else f"{limits.ramp_per_s:g}/s",
        "min_interval": f"{limits.min_interval_s:g} s" if limits.min_interval_s else None,
        "max_per_hour": limits.max_per_hour, "safe": limits.safe,
    }  # fmt: skip
    known = [f"{name} {_shown(value)}" for name, value in said.items() if value is not None]
    return ", ".join(known if limits.writable else ["not writable"]) or "none"


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:.7g}"
        if isinstance(value, float)
        else str(value)
    )


# -- with the daemon -------------------------------------------------------------------------------------------------


def _by_daemon(
    journal: Path, tag: str, wanted: "Scalar", lease: str | None, name: str, confirm: Confirm
) -> dict[str, Any] | None:
    """Have the running gateway do it; return None if none runs."""

    def talk(ask: Ask) -> dict[str, Any]:
        known = ask({"show": tag})
        owner = f", {known['owner']} has authority" if known.get("owner") else ""
        if not confirm(known.get("value"), owner):
            return _declined(name)
        message = {"id": name, "write": {tag: wanted}, "expires": _now_ms() + EXPIRES_MS}
        reply = ask(message | ({"lease": lease} if lease else {}))
        now = ask({"show": tag})["value"] if reply["ok"] else None
        held = f"for {lease}" if lease else "until another command, or another's authority"
        return {**reply, "tag": tag, "wanted": wanted, "value": now, "note": f"held by the gateway {held}"}

    return converse(journal, "write", talk)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _declined(name: str) -> dict[str, Any]:
    return {"id": name, "ok": False, "error": "nothing was written"}


# -- without it ------------------------------------------------------------------------------------------------------


async def _alone(
    config: "Config", file: Path, plant: "Plant", tag: str, wanted: "Scalar", name: str, confirm: Confirm
) -> dict[str, Any]:
    """Write one step from here, holding the journal's lock; raise HeldError if a gateway is starting."""
    from edgegw.control.hand import write_alone
    from edgegw.control.memory import MemoryFile
    from edgegw.drivers.registry import Drivers
    from edgegw.journal.journal import Journal
    from edgegw.runtime.lock import held

    own(file, "write")
    device = tag.partition(".")[0]
    with held(file.with_name(file.name + ".lock"), f"journal {file}"):
        journal = Journal(file, config.gateway.id, config.journal, config.uplink.max_message)
        memory = MemoryFile(file.with_name(file.name + ".control"))
        journal.start()
        try:
            async with asyncio.timeout(OPEN_S):
                await journal.opened.wait()
            async with Drivers().make(device, _polled(config.device[device])) as driver:
                async with asyncio.timeout(READ_S):
                    now = (await driver.scan())[-1].values.get(tag.partition(".")[2])
                if not await asyncio.to_thread(confirm, now, ", the gateway is not running"):
                    return _declined(name)
                done = await write_alone(
                    plant, tag, wanted, name, driver=driver, ledger=journal, memory=memory
                )
        except TimeoutError:
            if not journal.opened.is_set():
                raise JournalError(f"journal {file}: cannot be opened in {OPEN_S:.0f} s") from None
            raise NoAnswer("timeout", f"device.{device}: nothing in {READ_S:.0f} s") from None
        finally:
            memory.close()
            await journal.close()
    return _told(done, tag, wanted)


def _polled(device: "AnyDevice") -> "AnyDevice":
    """Return the device as one that is read whenever it is asked, not when something has changed."""
    from edgegw.config.schema import OpcUaDevice

    return device.model_copy(update={"mode": "poll"}) if isinstance(device, OpcUaDevice) else device


def _told(done: "Alone", tag: str, wanted: "Scalar") -> dict[str, Any]:
    note = "the gateway is not running: nobody holds it"
    if not done.final:
        note = (
            f"one step towards {_shown(wanted)}, no further: the gateway, which would go on, is not running"
        )
    return {**done.reply.wire(), "tag": tag, "wanted": wanted, "value": done.new, "note": note}
