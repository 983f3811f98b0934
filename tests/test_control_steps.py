"""Rules, arbitration, guard and commands as step tables that include the plant's reaction."""

import tomllib
from math import inf
from pathlib import Path
from typing import Any

import pytest
from control_rig import Site, plant

from edgegw.config.units import Duration

FILE = tomllib.loads((Path(__file__).parent / "cases" / "control_steps.toml").read_text())
ROW = {"at", "see", "mute", "lost", "link", "broken", "denied", "command", "restart", "expect", "holds"}
CASE = {"name", "tags", "every", "held", "hand_back", "rule", "rows"}


@pytest.mark.parametrize("case", FILE["case"], ids=lambda case: case["name"])
def test_steps(case: dict[str, Any]) -> None:
    assert set(case) <= CASE, set(case) - CASE
    made, problems = plant(
        FILE["tags"] | case.get("tags", {}), case.get("rule", {}),
        every=case.get("every"), hand_back=case.get("hand_back", "release"),
    )  # fmt: skip
    assert problems == []
    site = Site(made)
    site.seen_s = inf  # a device goes on answering until a row says otherwise
    site.held = set(case.get("held", ()))
    for row in case["rows"]:
        assert set(row) <= ROW, set(row) - ROW
        happened = play(site, row)
        assert happened == row.get("expect", []), f"at {row['at']}"
        for setpoint, value in row.get("holds", {}).items():
            assert site.values[setpoint] == pytest.approx(value), f"{setpoint} at {row['at']}"


def play(site: Site, row: dict[str, Any]) -> list[str]:
    """Let time pass to a row, do what it says, and return all that happened."""
    before_s = site.now_s
    for device in row.get("mute", ()):
        if (latest := site.image.devices.get(device)) is not None:
            site.image.devices[device] = latest._replace(seen_s=latest.at_s)
    if "restart" in row:
        site.due_s = None  # it was not running
    happened = site.until(row["at"])
    site.link = row.get("link", site.link)
    site.broken = set(row.get("broken", site.broken))
    site.denied = set(row.get("denied", site.denied))
    if "restart" in row:
        site.restart(before_s, reboot=row["restart"] == "reboot")
    for name, value in row.get("see", {}).items():
        site.quality.pop(name, None)
        if value == "bad" or str(value).startswith("~"):
            site.quality[name] = "bad:timeout" if value == "bad" else "uncertain:old"
            site.values[name] = None if value == "bad" else float(value[1:])
        else:
            site.values[name] = value
    lost = row.get("lost", ())
    for device in sorted({name.partition(".")[0] for name in site.values}):
        if device in lost:
            site.lose(device)
        elif device not in row.get("mute", ()) and (device not in site.held or "see" in row):
            site.scan(device)
    if (command := row.get("command")) is not None:
        lease = command.get("lease")
        happened += site.command(command["id"], command["write"], Duration.parse(lease).s if lease else None)
    return happened + site.cycles()
