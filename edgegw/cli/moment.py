"""Moments and periods as they are typed: `2026-11-22T10:00`, `-2h`."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from edgegw import clock
from edgegw.config.units import Duration

if TYPE_CHECKING:
    from edgegw.journal.period import Period


def _moment(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return milliseconds since the epoch; a time is UTC unless it says."""
    if value is None:
        return None
    try:
        if value.startswith("-"):
            return clock.wall_ms() - Duration.parse(value[1:])
        when = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"found {value!r}; expected a time as in 2026-11-22T10:00 (UTC) or 2026-11-22T11:00+01:00, "
            "or how long ago, as in -2h"
        ) from None
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def age(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return a duration in milliseconds; as a callback of an option."""
    try:
        return None if value is None else int(Duration.parse(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return a duration in milliseconds that is not nothing; as a callback of an option."""
    found = age(ctx, param, value)
    if found == 0:
        raise click.BadParameter("found no time at all; expected some, as in 1m")
    return found


from_option: Callable[..., Any] = click.option(
    "--from", "from_ms", callback=_moment, help="Begin there: 2026-11-22T10:00 (UTC unless it says), or -2h."
)
to_option: Callable[..., Any] = click.option(
    "--to", "to_ms", callback=_moment, help="End there, that moment excluded."
)


def period(from_ms: int | None, to_ms: int | None) -> "Period":
    """Return the period between two moments, either of which may be open; raise UsageError."""
    from edgegw.journal.period import Period

    if from_ms is not None and to_ms is not None and from_ms >= to_ms:
        raise click.UsageError("--from is not before --to; nothing lies between")
    whole = Period()
    return Period(whole.from_ms if from_ms is None else from_ms, whole.to_ms if to_ms is None else to_ms)
