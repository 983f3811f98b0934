"""Readings and events found in a journal by name and time, and put out in every form."""

import asyncio
import csv
import io
import json
import signal
import sqlite3
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_rig import Run, journal, run
from field import field
from gateway_rig import config, device, gateway, toml, until
from hypothesis import given
from hypothesis import strategies as st
from rig import Process, free_port

from edgegw.cli import chart
from edgegw.cli.chart import Extent
from edgegw.domain.quality import is_bad
from edgegw.domain.record import DeviceStatus, Event, Record, Scan
from edgegw.journal.period import Period
from edgegw.journal.query import Looked, Reading, Wanted, readings
from edgegw.journal.resample import resample
from edgegw.journal.store import Reader

__all__ = ["run"]  # a fixture
T0 = 1_795_000_020_000
"""The beginning of a minute."""
TAGS = {
    "kw": {"address": "holding:0", "type": "float32", "unit": "kW"},
    "on": {"address": "coil:0", "type": "bool"},
}


def at(second: float) -> str:
    """Return a moment as it is typed."""
    return datetime.fromtimestamp(T0 / 1000 + second, UTC).isoformat()


def moments(seconds: int) -> Iterator[list[Record]]:
    """Yield what two meters and a pump bring, second by second."""
    for n in range(seconds):
        ts = T0 + 1000 * n
        bad = {"kw": "bad:not-a-number"} if n % 7 == 3 else None
        made: list[Record] = [
            Scan(ts, "meter1", {"kw": None if bad else n / 4, "on": n % 2 == 0}, bad),
            Scan(
                ts + 1, "meter2", {"kw": -n, "mode": "eco"}, {"kw": "uncertain:stale"} if n % 5 == 4 else None
            ),
            Scan(ts + 2, "pump", {"cells": [3.1, n, True]}),
        ]
        if n % 10 == 9:
            made += [Event(ts, "link", {"state": "online", "n": n}), Event(ts, "rule-on", {"rule": "peak"})]
            made += [DeviceStatus(ts, "meter1", "bad", "timeout")]
        yield made


class Site:
    """A folder with a configuration and a journal of two minutes."""

    def __init__(self, folder: Path, seconds: int = 120, thinned: range = range(0)) -> None:
        self.folder = folder
        self.config = folder / "config.toml"
        meters = {"meter1": device(1, tags=TAGS), "meter2": device(1, unit=2, tags={"kw": TAGS["kw"]})}
        self.config.write_text(toml(config(1, meters)))
        self.journal = folder / "journal.db"
        self.made = journal(self.journal, moments(seconds), thinned=thinned)
        scans = [record for some in moments(seconds) for record in some if isinstance(record, Scan)]
        self.readings = [
            Reading(scan.ts, scan.device, tag, value, (scan.quality or {}).get(tag))
            for scan in scans
            for tag, value in scan.values.items()
        ]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site of two minutes."""
    return Site(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site that no test changes."""
    return Site(tmp_path_factory.mktemp("shared"))


def found(file: Path, *patterns: str, period: Period = Period()) -> list[Reading]:  # noqa: B008  frozen
    """Return the readings of a journal."""
    reader = Reader(file)
    try:
        return list(readings(reader, period, Wanted(patterns), Looked(pytest.fail)))
    finally:
        reader.close()


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], {"meter1.kw", "meter1.on", "meter2.kw", "meter2.mode", "pump.cells"}),
        (["meter1.kw"], {"meter1.kw"}),
        (["meter1"], {"meter1.kw", "meter1.on"}),
        (["*.kw"], {"meter1.kw", "meter2.kw"}),
        (["meter*"], {"meter1.kw", "meter1.on", "meter2.kw", "meter2.mode"}),
        (["meter2.m*"], {"meter2.mode"}),
        (["pump", "meter1.on"], {"pump.cells", "meter1.on"}),
        (["meter1.kw", "meter1"], {"meter1.kw", "meter1.on"}),
        (["*"], {"meter1.kw", "meter1.on", "meter2.kw", "meter2.mode", "pump.cells"}),
        (["meter3", "meter", "kw", "meter1."], {"meter1.kw", "meter1.on"}),
        (["meter3.kw"], set()),
    ],
    ids=lambda given: str(sorted(given)),
)
def test_tags_are_found_by_name_device_and_pattern(site: Site, patterns: list[str], names: set[str]) -> None:
    assert found(site.journal, *patterns) == [one for one in site.readings if one.name in names]


@given(st.integers(-5_000, 125_000), st.integers(-5_000, 125_000))
def test_a_period_holds_its_beginning_and_not_its_end(shared: Site, begin: int, length: int) -> None:
    period = Period(T0 + begin, T0 + begin + max(1, length))
    expected = [one for one in shared.readings if period.from_ms <= one.ts < period.to_ms]
    assert found(shared.journal, period=period) == expected


def test_only_what_can_hold_the_period_is_looked_at_and_only_a_batch_is_held(tmp_path: Path) -> None:
    """An hour among ten, two batches a second: the index by time leaves most of it alone."""
    step_ms = 10_000
    scans: list[list[Record]] = [[Scan(T0 + n * step_ms, "meter1", {"kw": float(n)})] for n in range(6_000)]
    journal(tmp_path / "j.db", scans)
    reader = Reader(tmp_path / "j.db")
    looked = Looked(pytest.fail)
    period = Period(T0 + 30_000_000, T0 + 31_000_000)
    rows = readings(reader, period, Wanted(["meter1.kw"]), looked)
    assert next(rows).value == 3000.0
    before = looked.batches
    assert [row.value for row in rows] == [float(n) for n in range(3001, 3100)]
    assert (before < 600, looked.batches < 900, looked.found) == (True, True, 100)
    reader.close()


def test_summaries_are_rows_too_and_weigh_as_what_they_stand_for(tmp_path: Path) -> None:
    thin = Site(tmp_path, thinned=range(60))
    rows = found(thin.journal, "meter*")
    first = {row.name: row for row in rows if row.ts == T0}
    assert first["meter2.kw"] == Reading(T0, "meter2", "kw", -29.5, "uncertain:stale", -59, 0, -59, 60)
    assert (first["meter2.mode"].value, first["meter2.mode"].samples) == ("eco", 60)
    assert [row for row in rows if row.samples is None] == [
        one for one in thin.readings if one.ts >= T0 + 60_000 and one.device != "pump"
    ]
    (whole,) = resample(found(thin.journal, "meter2.kw"), 120_000, origin_ms=T0)
    (plain,) = resample([one for one in thin.readings if one.name == "meter2.kw"], 120_000, origin_ms=T0)
    assert whole == plain
    middle = found(thin.journal, "meter2.kw", period=Period(T0 + 30_000, T0 + 40_000))
    assert [row.samples for row in middle] == [60], "the minute that the period is a part of"


# -- in stretches of time ----------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(-5, 5), st.sampled_from(["a", "b"]), st.just([1])
)
QUALITIES = st.sampled_from([None, None, None, "bad:timeout", "uncertain:old"])
READINGS = st.lists(
    st.tuples(st.integers(-50, 50), st.sampled_from("de"), st.sampled_from("tu"), VALUES, QUALITIES)
).map(lambda rows: [Reading(*row) for row in rows])


@given(READINGS, st.integers(1, 40), st.integers(-10, 10))
def test_stretches_hold_what_a_plain_computation_gives(some: list[Reading], step: int, origin: int) -> None:
    rows = list(resample(some, step, origin_ms=origin))
    assert [row[:3] for row in rows] == sorted(
        {((r.ts - origin) // step * step + origin, r.device, r.tag) for r in some}
    )
    for row in rows:
        mine = [r for r in some if (r.device, r.tag) == row[1:3] and row.ts <= r.ts < row.ts + step]
        good = [r.value for r in mine if r.value is not None and not is_bad(r.quality)]
        numbers = [float(value) for value in good if isinstance(value, bool | int | float)]
        assert row.samples == len(good)
        assert row.last == (good[-1] if good else None)
        assert (row.low, row.high) == ((min(numbers), max(numbers)) if numbers else (None, None))
        assert row.value == (pytest.approx(sum(numbers) / len(numbers)) if numbers else row.last)
        qualities = [r.quality for r in mine if r.quality]
        assert row.quality == (qualities[-1] if qualities else None)


@given(READINGS, st.integers(2, 6))
def test_what_is_held_is_bounded_and_nothing_is_lost_by_it(some: list[Reading], most: int) -> None:
    rows = list(resample(some, 5, most_open=most))
    whole = list(resample(some, 5))
    assert sum(row.samples or 0 for row in rows) == sum(row.samples or 0 for row in whole)
    assert {row[:3] for row in rows} == {row[:3] for row in whole}


# -- the command -------------------------------------------------------------------------------------------------------


def test_every_form_holds_the_same_readings(site: Site, run: Run, tmp_path: Path) -> None:
    wanted = ("journal", "query", "meter*", "pump", "--from", at(10), "--to", at(14), "-c", site.config)
    expected = [one for one in site.readings if T0 + 10_000 <= one.ts < T0 + 14_000]
    code, out, said = run(*wanted, "--json")
    assert code == 0
    assert said.startswith(f"{len(expected)} readings in 0.")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {
        "ts": T0 + 10_000,
        "device": "meter1",
        "tag": "kw",
        "value": None,
        "quality": "bad:not-a-number",
    }
    assert [(one["ts"], one["device"], one["tag"], one["value"], one.get("quality")) for one in lines] == [
        one[:5] for one in expected
    ]
    code, out, _ = run(*wanted, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0]["ts"] == at(10).replace("+00:00", ".000Z")
    assert [(row["tag"], row["value"], row["quality"]) for row in rows[:5]] == [
        ("kw", "", "bad:not-a-number"), ("on", "true", ""), ("kw", "-10", ""), ("mode", "eco", ""),
        ("cells", "[3.1,10,true]", ""),
    ]  # fmt: skip
    assert len(rows) == len(expected)
    file = tmp_path / "out.db"
    assert run(*wanted, "--out", file)[0] == 0
    connection = sqlite3.connect(file)
    stored = connection.execute("SELECT ts, device, tag, value, quality FROM readings").fetchall()
    connection.close()
    assert [row[:3] for row in stored] == [one[:3] for one in expected]
    assert [row[3] for row in stored[:5]] == [None, 1, -10, "eco", "[3.1,10,true]"]
    code, out, _ = run(*wanted)
    table = out.splitlines()
    assert table[0].split() == ["time", "tag", "value", "unit", "quality"]
    assert table[1].split() == [rows[0]["ts"], "meter1.kw", "-", "kW", "bad:not-a-number"]
    assert table[6].split() == [at(11).replace("+00:00", ".000Z"), "meter1.kw", "2.75", "kW"]
    assert len(table) == 1 + len(expected)


def test_parquet_holds_typed_columns_or_says_how_to_get_it(site: Site, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.parquet"
    code, _, said = run("journal", "query", "--to", at(2), "--out", file, "-c", site.config)
    try:
        from pyarrow import parquet
    except ImportError:
        assert code == 2
        assert "pip install 'edgegw[parquet]'" in said
        assert not file.exists()
        return
    table = parquet.read_table(file)
    assert [str(field.type) for field in table.schema] == [
        "timestamp[ms, tz=UTC]", "string", "string", "double", "string", "string",
        "double", "double", "double", "int64",
    ]  # fmt: skip
    columns = table.to_pydict()
    assert columns["ts"][0] == datetime.fromtimestamp(T0 / 1000, UTC)
    assert columns["value"] == [0.0, 1.0, 0.0, None, None, 0.25, 0.0, -1.0, None, None]
    assert columns["value_text"][3:5] == ["eco", "[3.1,0,true]"]


def test_rows_of_stretches_and_of_summaries_show_their_figures(tmp_path: Path, run: Run) -> None:
    thin = Site(tmp_path, thinned=range(60))
    wanted = ("journal", "query", "meter2.kw", "-c", thin.config)
    code, out, _ = run(*wanted, "--every", "1m")
    assert code == 0
    assert [line.split()[1:] for line in out.splitlines()] == [
        ["tag", "value", "unit", "min", "max", "count", "quality"],
        ["meter2.kw", "-29.5", "kW", "-59", "0", "60", "uncertain:stale"],
        ["meter2.kw", "-89.5", "kW", "-119", "-60", "60", "uncertain:stale"],
    ]
    first = run(*wanted)[1].splitlines()[1]
    assert first.endswith("-29.5  kW     uncertain:stale (mean of 60, -59 to 0)")
    made = json.loads(run(*wanted, "--json")[1].splitlines()[0])
    assert (made["min"], made["max"], made["last"], made["count"]) == (-59, 0, -59, 60)


def test_events_are_found_by_name(site: Site, run: Run, tmp_path: Path) -> None:
    code, out, said = run("journal", "query", "--events", "rule-*", "--json", "-c", site.config)
    assert (code, said.startswith("12 events in")) == (0, True)
    first = json.loads(out.splitlines()[0])
    assert first == {"ts": T0 + 9_000, "seq": first["seq"], "event": "rule-on", "body": {"rule": "peak"}}
    out = run("journal", "query", "--events", "--from", at(100), "-c", site.config)[1]
    assert [line.split()[2] for line in out.splitlines()] == ["event", *["link", "rule-on"] * 2]
    seqs = [int(line.split()[1]) for line in out.splitlines()[1:]]
    assert [after - before for before, after in pairwise(seqs)][::2] == [1, 1]
    assert run("journal", "query", "--events", "--out", tmp_path / "e.db", "-c", site.config)[0] == 0
    connection = sqlite3.connect(tmp_path / "e.db")
    assert connection.execute("SELECT count(*), json_extract(body, '$.n') FROM events").fetchone() == (24, 9)
    connection.close()


def test_a_damaged_batch_is_left_out_with_a_warning(site: Site, run: Run) -> None:
    batch, _ = next((b, body) for b, body in site.made if b.count == 3)
    content = site.journal.read_bytes()
    site.journal.write_bytes(content.replace(batch.packed[10:], b"\xa5" + batch.packed[11:]))
    code, out, said = run("journal", "query", "meter2.kw", "--json", "-c", site.config)
    assert (code, len(out.splitlines())) == (0, 119)
    assert f"warning: batch {batch.seq}: " in said
    assert "it is left out" in said


def test_a_file_is_there_whole_or_not_at_all_and_never_in_the_place_of_another(
    site: Site, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "out.csv"
    wanted = ("journal", "query", "-c", site.config, "--out")
    assert run(*wanted, file)[0] == 0
    assert len(file.read_text().splitlines()) == 1 + len(site.readings)
    code, _, said = run(*wanted, file)
    assert (code, "it is there already" in said) == (1, True)
    code, _, said = run(*wanted, site.journal, "--format", "sqlite")
    assert (code, "it is there already" in said) == (1, True)
    content = bytearray(site.journal.read_bytes())
    content[4096 * 5 : 4096 * 20] = bytes(4096 * 15)  # pages that are none, met under way
    site.journal.write_bytes(content)
    for name in ("broken.csv", "broken.db"):
        assert run(*wanted, tmp_path / name)[0] == 1
        assert not [left for left in tmp_path.iterdir() if "broken" in left.name]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--from", "yesterday"], ["--from", "-2x"], ["--last", "1"], ["--last", "0s"], ["--every", "0s"],
        ["--from", "2026-11-22", "--to", "2026-11-21"], ["--from", "-1h", "--last", "1h"], ["--format", "sqlite"],
        ["--format", "pdf"], ["--out", "x.pdf"], ["--json", "--format", "csv"], ["--events", "--every", "1m"],
        ["--events", "--format", "chart"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(site: Site, run: Run, wrong: list[str]) -> None:
    assert run("journal", "query", "-c", site.config, *wrong)[0] == 2


async def test_it_reads_beside_a_gateway_that_runs(tmp_path: Path) -> None:
    async def count() -> int:
        words = ("journal", "query", "m.n", "--last", "1h", "--json", "-c", str(tmp_path / "config.toml"))
        with Process(sys.executable, "-m", "edgegw", *words) as process:
            code, out = await asyncio.to_thread(process.end)
        assert code == 0, process.lines
        values = [json.loads(line)["value"] for line in out.splitlines()]
        assert values == list(range(1, len(values) + 1))
        return len(values)

    async with field() as meter:
        with gateway(tmp_path, config(free_port(), {"m": device(meter.port)})) as running:
            await until(lambda: meter.counts[1] > 10, "scans")
            first = await count()
            await until(lambda: meter.counts[1] > first + 30, "more scans")
            assert await count() > first
            running.send(signal.SIGTERM)
            assert (await asyncio.to_thread(running.end))[0] == 0


# -- charts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({0: 5.0, 7: 5.0}, ["         5 ┤", "         5 ┤⠉⠉⠉⠉"]),
        (dict(enumerate([0, 1, 2, 3, 4, 5, 6, 7])), ["         7 ┤  ⡠⠊", "         0 ┤⡠⠊"]),
        ({0: 0.0, 1: 7.0, 2: 0.0, 3: 7.0}, ["         7 ┤⠈⠈", "         0 ┤⡀⡀"]),
        ({0: 0.0, 1: 0.0, 6: 7.0, 7: 7.0}, ["         7 ┤   ⠉", "         0 ┤⣀"]),
        ({0: 0.0, 2: 7.0, 4: 7.0, 6: 7.0}, ["         7 ┤ ⠉⠉⠁", "         0 ┤⣀"]),
    ],
    ids=["flat", "rising", "jumping", "a hole stays one", "what is held is filled"],
)
def test_a_chart_is_drawn_in_dots(values: dict[int, float], lines: list[str]) -> None:
    assert chart.plot({at: Extent(v, v, v) for at, v in values.items()}, 4, rows=2) == lines


def test_a_column_shows_its_least_and_greatest() -> None:
    columns = {0: Extent(0, 7, 3), 1: Extent(2, 5, 3)}
    assert chart.plot(columns, 1, rows=2) == ["         7 ┤⣧", "         0 ┤⡟"]


@given(
    st.dictionaries(st.integers(0, 79), st.tuples(*[st.floats(-1e9, 1e9)] * 3).map(sorted), min_size=1),
    st.integers(2, 8),
)
def test_a_chart_keeps_to_its_size_whatever_it_shows(columns: dict[int, Any], rows: int) -> None:
    lines = chart.plot(
        {at: Extent(low, high, last) for at, (low, last, high) in columns.items()}, 40, rows=rows
    )
    assert len(lines) == rows
    assert max(map(len, lines)) <= chart.LEFT + 2 + 40
    drawn = [line[chart.LEFT + 2 :].ljust(40) for line in lines]
    for at in columns:
        bits = [ord(line[at // 2]) - chart.BLANK for line in drawn if line[at // 2] != " "]
        assert any(bit & sum(chart.DOTS[at % 2]) for bit in bits), (
            "each column that holds something has a dot"
        )


def test_the_axis_has_times_at_its_ticks() -> None:
    assert chart.axis(T0, T0 + 3_600_000, 40) == (
        "           └┬───────────────────┬───────────────────",
        "            11:07:00            11:37:00",
    )
    assert "11-18 11:07" in chart.axis(T0, T0 + 40 * 86_400_000, 40)[1]


def test_the_command_draws_what_holds_numbers_as_wide_as_the_terminal(
    site: Site, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    code, out, said = run("journal", "query", "--format", "chart", "-c", site.config)
    lines = out.splitlines()
    assert code == 0
    assert [line for line in lines if "┤" not in line and "└" not in line][:3] == [
        "meter1.kw  29.75 kW", "meter1.on  0", "meter2.kw  -119 kW",
    ]  # fmt: skip
    assert len(lines) == 3 * (1 + chart.ROWS) + 2
    assert 60 < max(map(len, lines)) < 70
    assert "600 readings" in said
