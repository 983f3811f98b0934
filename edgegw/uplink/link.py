"""The state of the link: a pure state machine over connection and time."""

from typing import Literal, NamedTuple

State = Literal["online", "offline", "islanded"]


class Link(NamedTuple):
    """The link's state, and since when by both clocks."""

    state: State
    since_ms: int
    since_s: float


def advance(link: Link, *, connected: bool, now_ms: int, now_s: float, island_after_s: float) -> Link:
    """Return the link's state now.

    Connected is `online`. Not connected is `offline`, and after `island_after_s` of that, by the monotonic
    clock, `islanded`.
    """
    if connected:
        return link if link.state == "online" else Link("online", now_ms, now_s)
    if link.state == "online":
        return Link("offline", now_ms, now_s)
    if link.state == "offline" and now_s - link.since_s >= island_after_s:
        return Link("islanded", now_ms, now_s)
    return link
