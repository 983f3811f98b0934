"""Windows on the real process: what is journaled of them is what the journaled readings come to, killed or not."""

import asyncio
import json
import random
import signal
import urllib.request
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from control_field import SETPOINT, Site, configuration, kill, running, site
from gateway_rig import config, gateway, toml, until
from journal_rig import kept
from rig import free_port
from test_opcua_driver import Field

from edgegw.errors import JournalError

AGG = ["mean", "min", "max", "sum", "count", "first", "last", "integral"]
WINDOW = {"of": ["meter.kw"], "size": "1s", "every": "500ms", "agg": AGG}
HOLD_MS = 150
"""Three periods of the meter."""


@asynccontextmanager
async def restless(plant: Site) -> AsyncIterator[Callable[[float], None]]:
    """Have the meter show something else every now and then, from 10 on or from what is said."""
    numbers = random.Random(1)
    bases = [10.0]

    async def vary() -> None:
        while True:
            plant.set(bases[-1] + numbers.randrange(10))
            await plant.scanned(3)

    task = asyncio.create_task(vary())
    try:
        yield bases.append
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def journaled(folder: Path) -> list[dict[str, Any]]:
    """Return all records in the order of the journal."""
    try:
        held = kept(folder / "journal.db")
    except JournalError:
        return []  # it is just being made
    return [record for _, body in sorted(held.bodies.items()) for record in json.loads(body)["records"]]


def told(folder: Path, name: str = "load") -> list[dict[str, Any]]:
    """Return what was journaled of a window."""
    return [record for record in journaled(folder) if record.get("device") == name]


class Meter:
    """The meter's signal as the journal's records have it: held for three periods, not over losses and restarts."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        points: list[tuple[int, int, float | None]] = []
        seen = 0
        for record in records:
            if record.get("device") == "meter" and "values" in record:
                points.append((record["ts"], 0, record["values"]["kw"]))
            elif (record.get("device"), record.get("status")) == ("meter", "bad") or record.get(
                "event"
            ) == "stop":
                points.append((record["ts"], 1, None))
            elif record.get("event") == "start":
                points.append((seen, 1, None))
            if record.get("device") in ("meter", "load") or record.get("event") == "stop":
                seen = max(seen, record["ts"])
        self._points = sorted(points, key=lambda point: point[:2])
        self._times = [point[0] for point in self._points]

    def at(self, ts: int) -> float | None:
        """Return what is known of a millisecond."""
        place = bisect_right(self._times, ts) - 1
        since, _, value = self._points[place] if place >= 0 else (0, 0, None)
        return value if ts < since + HOLD_MS else None

    def result(self, begin: int, end: int) -> tuple[float, dict[str, Any]]:
        """Return coverage and aggregates of a stretch."""
        known = [value for ts in range(begin, end) if (value := self.at(ts)) is not None]
        read = [value for ts, _, value in self._points if begin <= ts < end and value is not None]
        values = {"mean": None, "min": None, "max": None, "integral": None, "first": None, "last": None}
        if known:
            values |= {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}
            values["integral"] = sum(known) / 3_600_000
        if read:
            values |= {"first": read[0], "last": read[-1]}
        return len(known) / (end - begin), values | {"sum": sum(read), "count": len(read)}


def check(folder: Path, name: str = "load") -> list[int]:
    """Compare everything journaled of a window with what the readings come to; return the ends."""
    meter = Meter(journaled(folder))
    results = told(folder, name)
    for result in results:
        coverage, values = meter.result(result["from"], result["ts"])
        assert result["coverage"] == pytest.approx(coverage, abs=1e-5), result
        assert result["values"] == pytest.approx(values), result
        assert result["rev"] == 0
    ends = [result["ts"] for result in results]
    assert ends == sorted(set(ends)), "each once, in order"
    return ends


async def test_p1_a_killed_gateway_tells_of_every_window_once_and_rightly(tmp_path: Path) -> None:
    rule = {"when": "load.mean > 50.0 && load.coverage > 0.9", "do": {"battery.setpoint": 7.0}}
    port = free_port()
    async with site() as plant:
        made = configuration(
            plant, {"r": rule}, window={"load": WINDOW}, status={"http": f"127.0.0.1:{port}"}
        )
        async with restless(plant) as show:
            with running(tmp_path, made) as run:
                await until(lambda: len(told(tmp_path)) >= 4, "results")
                await kill(run)
            before = len(told(tmp_path))
            with running(tmp_path, made) as run:
                await until(lambda: len(told(tmp_path)) >= before + 4, "results after the kill")
                assert plant.values() == []
                show(100.0)
                await until(lambda: plant.get(address=SETPOINT) == 7.0, "the rule's write")
                body = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/api/status")
                shown = json.loads(body)["windows"]["load"]
                run.send(signal.SIGTERM)
                assert (await asyncio.to_thread(run.end))[0] == 0
        # what was over by the time of the end is told by the next start
        last = max(record["ts"] for record in journaled(tmp_path) if record.get("device") == "meter")
        with running(tmp_path, made) as run:
            await until(lambda: told(tmp_path)[-1]["ts"] >= last, "the last results")
            await kill(run)
    ends = check(tmp_path)
    assert (shown["late"], shown["early"], shown["reading_back"]) == (0, 0, False)
    assert shown["end"] in ends
    meter = Meter(journaled(tmp_path))
    due = [end for end in range(ends[0], last, 500) if meter.result(end - 1000, end)[0]]
    assert [end for end in due if end not in ends] == [], "none is missing"
    assert sum(result["coverage"] == 1.0 for result in told(tmp_path)) >= 4
    assert any(0 < result["coverage"] < 1 for result in told(tmp_path)), "the kill is a hole"


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


async def test_a_reload_reads_new_windows_back_and_lets_the_others_go_on(tmp_path: Path) -> None:
    async with site() as plant, restless(plant):
        made = configuration(plant, {}, window={"load": WINDOW})
        with running(tmp_path, made) as run:
            await until(lambda: len(told(tmp_path)) >= 3, "results")
            both = {"load": WINDOW, "long": WINDOW | {"size": "2s", "every": "1s"}}
            (tmp_path / "config.toml").write_text(toml(made | {"window": both}))
            run.send(signal.SIGHUP)
            await until(lambda: len(told(tmp_path, "long")) >= 2, "results of the new one")
            (tmp_path / "config.toml").write_text(toml(made | {"window": {"load": WINDOW}}))
            run.send(signal.SIGHUP)
            seen = len(told(tmp_path))
            await until(lambda: len(told(tmp_path)) >= seen + 3, "results of the old one")
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
    ends = check(tmp_path)
    assert ends == list(range(ends[0], ends[-1] + 1, 500)), "it never paused"
    new, meter = told(tmp_path, "long")[0], Meter(journaled(tmp_path))
    assert new["coverage"] > meter.result(new["from"], new["ts"])[0] - 0.2, (
        "it began with what the journal held"
    )


async def test_a_subscribed_value_that_last_changed_long_ago_is_held_and_held_again_after_a_loss(
    tmp_path: Path,
) -> None:
    server = Field(free_port())
    try:
        await server.start()
        tags = {"on": {"address": "ns=2;s=On", "type": "bool"}}
        plant = {"driver": "opcua", "url": server.url, "every": "100ms", "timeout": "500ms", "tags": tags}
        window = {"of": ["plant.on"], "size": "500ms", "agg": ["mean", "count"]}
        made = config(free_port(), {"plant": plant}, window={"load": window})
        with gateway(tmp_path, made) as run:
            await until(lambda: _whole(tmp_path), "a stretch that is known as a whole")
            server.kill()
            await until(lambda: run.said("trying again"), "the loss")
            await server.start()
            await until(lambda: run.said("back after"), "the recovery")
            seen = told(tmp_path)[-1]["ts"]
            await until(lambda: _whole(tmp_path) and _whole(tmp_path)[-1] > seen + 500, "what is held again")
            await kill(run)
    finally:
        server.kill()
    for result in told(tmp_path):
        assert result["values"] == {"mean": 1.0, "count": 0}, (
            "held by the gateway's time, read at the source's"
        )
    lost = next(record["ts"] for record in journaled(tmp_path) if record.get("status") == "bad")
    back = next(record["ts"] for record in journaled(tmp_path) if record.get("status") == "good")
    known = sum(r["coverage"] * 500 for r in told(tmp_path) if lost < r["ts"] <= back)
    assert known < 500, "nothing is known while it is away"


def _whole(folder: Path) -> list[int]:
    """Return the ends of the stretches of which everything is known."""
    return [result["ts"] for result in told(folder) if result["coverage"] == 1.0]
