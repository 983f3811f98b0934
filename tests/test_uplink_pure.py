"""The link's states and the backlog's pace: functions of their arguments."""

import pytest

from edgegw.uplink.link import Link, advance
from edgegw.uplink.pacer import Pacer

STEPS = [  # from, connected, seconds in the state, to
    ("offline", True, 0.0, "online"),
    ("offline", False, 29.9, "offline"),
    ("offline", False, 30.0, "islanded"),
    ("online", True, 1e9, "online"),
    ("online", False, 0.0, "offline"),
    ("online", False, 1e9, "offline"),
    ("islanded", False, 1e9, "islanded"),
    ("islanded", True, 0.0, "online"),
]


@pytest.mark.parametrize(("was", "connected", "lasted_s", "now"), STEPS)
def test_the_links_states(was, connected: bool, lasted_s: float, now: str) -> None:
    link = Link(was, since_ms=0, since_s=100.0)
    got = advance(link, connected=connected, now_ms=5, now_s=100.0 + lasted_s, island_after_s=30.0)
    assert got.state == now
    assert (got is link) == (was == now), "a state that goes on keeps its beginning"


def test_a_wall_clock_that_jumps_changes_no_state() -> None:
    link = Link("offline", since_ms=10**12, since_s=100.0)
    assert advance(link, connected=False, now_ms=0, now_s=101.0, island_after_s=30.0) is link


def paced(pacer: Pacer, delays_s: list[float]) -> list[int]:
    """Return the window after each acknowledgement, one batch at a time."""
    now_s, windows = 0.0, []
    for delay_s in delays_s:
        pacer.acknowledged(now_s, now_s + delay_s)
        now_s += delay_s
        windows.append(pacer.window)
    return windows


def test_the_window_opens_while_acknowledgements_are_quick() -> None:
    windows = paced(Pacer(0.25, most=24), [0.01] * 40)
    assert windows[-1] == 24
    assert windows == sorted(windows)


def test_the_window_closes_when_acknowledgements_take_long() -> None:
    pacer = Pacer(0.25, most=24)
    paced(pacer, [0.01] * 40)
    assert paced(pacer, [2.0] * 10)[-1] == 1


def test_the_window_is_never_below_one() -> None:
    assert min(paced(Pacer(0.05, most=1), [9.0, 9.0, 0.01, 9.0])) == 1


def test_one_slow_moment_halves_the_window_once() -> None:
    pacer = Pacer(0.25, most=24)
    paced(pacer, [0.01] * 40)
    for _ in range(10):  # all were sent before the first of them came back late
        pacer.acknowledged(sent_s=10.0, now_s=11.0)
    assert pacer.window == 12
