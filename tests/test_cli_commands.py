"""The commands as an operator has them: real processes, their exit codes and what they print."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import apsw
import pytest
from field import field
from gateway_rig import TAGS, config, device, gateway, toml, until
from journal_rig import MIB, Hand, event, kept, scan
from journal_rig import config as journal_config
from rig import ROOT, Process, free_port, mosquitto
from test_journal_thin import fill

from edgegw import __version__
from edgegw.domain.batch import Kind
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Scan

COMMANDS = ("run", "check", "demo", "sim", "status", "read", "browse", "journal", "size", "receive")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Run a command to its end; no command ever shows a traceback."""
    with Process(sys.executable, "-m", "edgegw", *map(str, arguments)) as process:
        code, out = process.end()
        said = "\n".join(process.lines)
    assert "Traceback" not in out + said
    return code, out, said


async def arun(*arguments: str | Path) -> tuple[int, str, str]:
    """Run a command beside the test's own servers."""
    return await asyncio.to_thread(run, *arguments)


def written(folder: Path, made: dict[str, Any]) -> Path:
    """Write a configuration."""
    path = folder / "config.toml"
    path.write_text(toml(made))
    return path


# -- usage ---------------------------------------------------------------------------------------------------


def test_help_lists_every_command_without_loading_any() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out, command
    began = time.monotonic()
    with Process(sys.executable, "-X", "importtime", "-m", "edgegw", "--help") as process:
        assert process.end()[0] == 0
        loaded = {line.rpartition("|")[2].strip() for line in process.lines}
    assert time.monotonic() - began < 3.0
    heavy = {
        "apsw",
        "asyncua",
        "pymodbus",
        "paho",
        "pydantic",
        "msgspec",
        "rich",
        "cel_expr_python",
        "uvloop",
    }
    assert not heavy & {name.partition(".")[0] for name in loaded}


def test_every_command_helps_itself() -> None:
    for command in COMMANDS:
        code, out, _ = run(command, "-h")
        assert code == 0, command
        assert "Usage:" in out
    for command in ("stat", "tail", "verify"):
        code, out, _ = run("journal", command, "--help")
        assert code == 0, command
        assert "--config" in out
        assert "--json" in out


def test_the_version_is_told() -> None:
    assert run("--version") == (0, f"edgegw, version {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"], ["--nothing"], ["run", "--nothing"], ["run", "extra"], ["journal"], ["journal", "nothing"],
        ["journal", "tail", "-n", "0"], ["size", "--outage", "long"], ["read"], ["run", "--log-level", "loud"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEGW_CONFIG", str(written(tmp_path, config(1, {"m": device(1)}))))
    code, out, said = run(*arguments)
    assert code == 2
    assert said or "Usage" in out


def test_a_configuration_that_is_not_there_is_exit_code_2(tmp_path: Path) -> None:
    for command in (["run"], ["check"], ["status"], ["read", "m"], ["journal", "stat"], ["size"]):
        code, out, said = run(*command, "-c", tmp_path / "none.toml")
        assert (code, out) == (2, ""), command
        assert said == f"error: {tmp_path}/none.toml: no such file or directory; name the file with --config"


def test_a_reader_that_hangs_up_is_no_reason_for_a_traceback(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", journal_config())
    for n in range(400):
        hand.turn(scan(n, 30))
    hand.close()
    path = written(tmp_path, config(1, {}))
    command = f'"{sys.executable}" -m edgegw journal tail -n 400 -c "{path}" | head -n 1'
    with Process("sh", "-c", command) as process:
        _, out = process.end()
        assert out.split()[0] == "2"
        assert not any("Traceback" in line or "rror" in line for line in process.lines), process.lines


# -- check, read ---------------------------------------------------------------------------------------------


async def test_check_tries_devices_and_brokers(tmp_path: Path) -> None:
    port = free_port()
    async with field() as meter:
        path = written(tmp_path, config(port, {"m": device(meter.port)}))
        assert await arun("check", "-c", path) == (
            0, f"{path}: 1 devices, 2 tags: the configuration is right\n", "",
        )  # fmt: skip
        with mosquitto(tmp_path, port):
            code, out, _ = await arun("check", "--connect", "-c", path)
            assert code == 0
            assert out.count("ok ") == 2
        code, out, _ = await arun("check", "--connect", "-c", path)
        assert code == 1
        assert out.count("ok ") == 1
        assert out.count("FAILED") == 1
        assert f"uplink mqtt://127.0.0.1:{port}" in out
    with mosquitto(tmp_path, port):
        code, out, _ = await arun("check", "--connect", "--json", "-c", path)
        found = json.loads(out)
    assert code == 1
    assert found["ok"] is False
    assert "device.m" in found["tried"]["device.m"]
    assert found["tried"][f"uplink mqtt://127.0.0.1:{port}"] is None
    assert not (tmp_path / "journal.db").exists()


async def test_read_shows_a_device_once(tmp_path: Path) -> None:
    async with field() as meter:
        made = config(1, {"m": device(meter.port), "other": device(meter.port, 2)})
        made["device"]["m"]["tags"] = made["device"]["m"]["tags"] | {
            "on": {"address": "coil:3", "type": "bool"},
            "kw": {"address": "holding:2", "type": "float32", "unit": "kW", "scale": 0.5},
        }
        path = written(tmp_path, made)
        code, out, _ = await arun("read", "m", "-c", path)
        assert code == 0
        assert sorted(line.split() for line in out.splitlines()) == [
            ["m.f", "1"], ["m.kw", "0.5", "kW"], ["m.n", "1"], ["m.on", "True"],
        ]  # fmt: skip
        code, out, _ = await arun("read", "m.kw", "n", "--json", "-c", path)
        assert code == 0
        found = json.loads(out)
        assert (found["device"], found["values"], found["quality"]) == ("m", {"n": 2, "kw": 1.0}, {})
        assert abs(found["ts"] / 1000 - time.time()) < 60
        code, _, said = await arun("read", "boiler", "-c", path)
        assert code == 2
        assert "no device 'boiler' in the configuration; there are: m, other" in said
        code, _, said = await arun("read", "m", "flow", "-c", path)
        assert code == 2
        assert "device m has no tag 'flow'; it has: n, f, on, kw" in said
        meter.behave[1] = meter.exception(2)
        code, out, said = await arun("read", "m", "--json", "-c", path)
        found = json.loads(out)
        assert code == 1, said
        assert set(found["values"].values()) == {None}
        assert set(found["quality"].values()) == {"bad:illegal-address"}
        code, out, _ = await arun("read", "m", "-c", path)
        assert [line.split()[1:] for line in out.splitlines() if "m.on" in line] == [
            ["-", "[bad:illegal-address]"]
        ]
    code, out, said = await arun("read", "m", "-c", path)
    assert (code, out) == (1, "")
    assert said.startswith("error: device.m")


# -- status, journal -----------------------------------------------------------------------------------------


async def test_status_is_the_daemons_or_else_the_journals(tmp_path: Path) -> None:
    port, http = free_port(), free_port()
    async with field() as meter:
        made = config(port, {"m": device(meter.port)}, status={"http": f"127.0.0.1:{http}"})
        path = written(tmp_path, made)
        code, out, _ = await arun("status", "--json", "-c", path)
        before = json.loads(out)
        assert (code, before["running"], before["journal"]["head"]) == (0, False, 0)
        assert not (tmp_path / "journal.db").exists()
        with gateway(tmp_path, made) as daemon:
            await until(lambda: meter.counts[1] > 5 and daemon.said("gateway site-7"), "scans")
            code, out, _ = await arun("status", "--json", "-c", path)
            running = json.loads(out)
            assert (code, running["running"]) == (0, True)
            assert running["devices"]["m"]["state"] == "good"
            assert running["readings"] > 0
            code, out, _ = await arun("status", "-c", path)
            assert code == 0
            assert "site-7" in out
            assert "running" in out
            daemon.send(signal.SIGTERM)
            assert (await asyncio.to_thread(daemon.end))[0] == 0
        code, out, _ = await arun("status", "--json", "-c", path)
        stopped = json.loads(out)
    assert (code, stopped["running"]) == (0, False)
    assert stopped["stream"] == running["stream"]
    found = kept(tmp_path / "journal.db")
    assert stopped["journal"]["head"] == found.head == stopped["journal"]["pending_records"]
    assert stopped["journal"]["pending_batches"] == len(found.bodies)
    assert stopped["journal"]["bytes"] == (tmp_path / "journal.db").stat().st_size
    for shown in (before, running, stopped):
        assert {"gateway", "stream", "version", "link", "journal", "devices", "rules", "readings"} <= set(
            shown
        )
        assert {"state", "since"} <= set(shown["link"])
        assert {"head", "acked", "pending_batches", "pending_records", "bytes", "oldest_pending_ts"} <= set(
            shown["journal"]
        )
        assert {"state", "last_ts", "scans", "errors"} <= set(shown["devices"]["m"])


def test_status_does_not_take_another_gateways_word(tmp_path: Path) -> None:
    """Two gateways on one machine, one status port: whoever answers must be the one asked for."""
    path = written(
        tmp_path, config(1, {}, gateway={"id": "site-8"}, status={"http": f"127.0.0.1:{free_port()}"})
    )
    code, out, _ = run("status", "-c", path)
    assert code == 0
    assert "not running" in out


async def test_status_shows_windows_from_the_daemon_or_without(tmp_path: Path) -> None:
    window = {"of": ["m.n"], "size": "200ms", "agg": ["mean"]}
    async with field() as meter:
        http = {"http": f"127.0.0.1:{free_port()}"}
        rule = {"when": "load.mean > 1e9", "do": {"m.out": "1.0"}}
        tags = TAGS | {"out": {"address": "holding:4", "type": "float32", "writable": True}}
        meters = {"m": device(meter.port, tags=tags)}
        made = config(free_port(), meters, window={"load": window}, rule={"heavy": rule}, status=http)
        path = written(tmp_path, made)
        _, out, _ = await arun("status", "-c", path)
        assert ["load", "-", "-", "0"] in [line.split() for line in out.splitlines()]
        with gateway(tmp_path, made) as daemon:
            await until(lambda: daemon.said("gateway site-7"), "the start")
            ends = []
            while not ends:
                _, out, _ = await arun("status", "--json", "-c", path)
                ends = [end for end in [json.loads(out)["windows"]["load"]["end"]] if end]
                assert meter.counts[1] < 1000, out
            _, out, _ = await arun("status", "-c", path)
            (line,) = [line.split() for line in out.splitlines() if "load " in line]
            assert len(line) == 5
            assert ["heavy", "off"] in [line.split()[:2] for line in out.splitlines()]
            assert line[3].endswith("%")
            daemon.send(signal.SIGTERM)
            assert (await asyncio.to_thread(daemon.end))[0] == 0
    _, out, _ = run("status", "--json", "-c", path)
    assert json.loads(out)["windows"]["load"]["end"] is None


@pytest.fixture
def journaled(tmp_path: Path) -> tuple[Path, Hand]:
    """A configuration and its journal, closed."""
    hand = Hand(tmp_path / "journal.db", journal_config())
    for n in range(20):
        hand.turn(scan(n, 20))
    hand.turn(event(20))
    hand.acknowledge(hand.told[:5])
    hand.close()
    return written(tmp_path, config(1, {})), hand


def test_journal_stat_counts(journaled: tuple[Path, Hand]) -> None:
    path, hand = journaled
    code, out, _ = run("journal", "stat", "--json", "-c", path)
    found = json.loads(out)
    assert code == 0
    wear = found.pop("wear")
    assert wear["readings"] == 20 * 20 + 1
    assert wear["fsyncs"] > 20
    assert wear["written_bytes_per_reading"] == pytest.approx(wear["written_bytes"] / 401, abs=0.01)
    assert wear["written_bytes"] > found["stored_bytes"]
    assert found == {
        "path": str(hand.path), "gateway": "site-7", "stream": hand.writer.stream, "head": 22, "acked": 5,
        "pending_records": 17, "batches": 22, "records": 22, "pending_batches": 17,
        "json_bytes": sum(len(told.body) for told in hand.told),
        "stored_bytes": sum(len(told.batch.packed) for told in hand.told),
        "oldest_pending_ts": hand.told[5].records[0]["ts"], "bytes": hand.bytes, "max_size": 1024**3,
    }  # fmt: skip
    code, out, _ = run("journal", "stat", "-c", path)
    assert code == 0
    assert all(name in out for name in found)


def test_journal_tail_shows_the_last_records_oldest_first(journaled: tuple[Path, Hand]) -> None:
    path, hand = journaled
    code, out, _ = run("journal", "tail", "-n", "3", "--json", "-c", path)
    found = json.loads(out)
    assert code == 0
    assert [record.pop("seq") for record in found] == [20, 21, 22]
    assert found == [record for told in hand.told[-3:] for record in told.records]
    code, out, _ = run("journal", "tail", "-c", path)
    assert code == 0
    assert len(out.splitlines()) == 10
    assert "meter1" in out
    assert "config" in out.splitlines()[-1]
    code, out, _ = run("journal", "tail", "-n", "1000", "--json", "-c", path)
    assert [record["seq"] for record in json.loads(out)] == list(range(1, 23))


def test_journal_tail_goes_on_over_a_damaged_batch(journaled: tuple[Path, Hand]) -> None:
    path, hand = journaled
    damage(hand, 18)
    code, out, said = run("journal", "tail", "--json", "-c", path)
    assert code == 0
    assert [record["seq"] for record in json.loads(out)] == [12, 13, 14, 15, 16, 17, 19, 20, 21, 22]
    assert "batch 18" in said


def test_journal_commands_without_a_journal_say_so(tmp_path: Path) -> None:
    path = written(tmp_path, config(1, {}))
    for command in ("stat", "tail", "verify"):
        code, out, said = run("journal", command, "-c", path)
        assert (code, out) == (1, "")
        assert (
            said == f"error: journal {tmp_path}/journal.db: not there; it is made when the gateway first runs"
        )
    assert not (tmp_path / "journal.db").exists()


def test_journal_commands_on_something_else_say_so(tmp_path: Path) -> None:
    path = written(tmp_path, config(1, {}))
    for content in (b"", b"something else " * 1000):
        (tmp_path / "journal.db").write_bytes(content)
        for command in ("stat", "tail", "verify"):
            code, _, said = run("journal", command, "-c", path)
            assert code == 1, command
            assert said.startswith(f"error: journal {tmp_path}/journal.db")


def damage(hand: Hand, seq: int) -> None:
    """Change one byte of a batch's body in the file."""
    packed = next(told for told in hand.told if told.batch.seq == seq).batch.packed
    content = bytearray(hand.path.read_bytes())
    places = [at for at in range(len(content)) if content.startswith(packed, at)]
    assert places, "pages that were given back may hold a copy"
    for at in places:
        content[at + len(packed) // 2] ^= 0x10
    hand.path.write_bytes(content)


def test_journal_verify_holds_or_says_what_is_wrong(journaled: tuple[Path, Hand]) -> None:
    path, hand = journaled
    code, out, _ = run("journal", "verify", "-c", path)
    assert code == 0
    assert out.splitlines() == [
        f"stream {hand.writer.stream}: 22 batches, records 1 to 22", "the chain holds",
    ]  # fmt: skip
    damage(hand, 7)
    code, out, _ = run("journal", "verify", "-c", path)
    assert code == 1
    assert out.splitlines()[1:] == [
        "damaged: the batch at 7 does not give its hash", "the journal is not sound",
    ]  # fmt: skip
    code, out, _ = run("journal", "verify", "--json", "-c", path)
    found = json.loads(out)
    assert code == 1
    assert (found["ok"], found["damaged"], found["missing"], found["breaks"]) == (False, [7], [], [])


def test_journal_verify_finds_rows_that_vanished(journaled: tuple[Path, Hand]) -> None:
    path, hand = journaled
    db = apsw.Connection(str(hand.path))
    db.execute("DELETE FROM batch WHERE seq IN (1, 6, 10, 11)")
    db.close()
    code, out, _ = run("journal", "verify", "--json", "-c", path)
    found = json.loads(out)
    assert code == 1
    assert found["missing"] == [[6, 6], [10, 11]], "what was acknowledged may go"
    db = apsw.Connection(str(hand.path))
    db.execute("DELETE FROM batch WHERE seq < 8")
    db.close()
    code, out, _ = run("journal", "verify", "--json", "-c", path)
    assert json.loads(out)["missing"] == [[6, 7], [10, 11]], "also before the first that is there"


def test_journal_verify_knows_of_gaps(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", journal_config(4 * 1024**2), max_message=16 * 1024)
    n = 0
    while not any(b'"gap"' in told.body for told in hand.told):
        hand.turn(*(scan(n + i, 100) for i in range(60)))
        n += 60
    hand.close()
    code, out, _ = run("journal", "verify", "-c", written(tmp_path, config(1, {})))
    assert code == 0, out
    assert "gap: records 1 to " in out


@pytest.fixture
def thinned(tmp_path: Path) -> tuple[Path, Hand]:
    """A configuration and its journal, which has been full."""
    hand = Hand(tmp_path / "journal.db", journal_config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    fill(hand, 4.5 * MIB)
    hand.close()
    return written(tmp_path, config(1, {})), hand


def test_journal_verify_knows_of_summaries_and_finds_what_is_wrong_with_them(
    thinned: tuple[Path, Hand],
) -> None:
    path, hand = thinned
    held = kept(hand.path)
    short = [batch for batch in held.batches.values() if batch.kind is Kind.SUMMARY]
    code, out, _ = run("journal", "verify", "-c", path)
    assert (code, out.splitlines()[-1]) == (0, "the chain holds"), out
    code, out, _ = run("journal", "verify", "--json", "-c", path)
    found = json.loads(out)
    assert (found["ok"], found["from"], found["to"], found["gaps"]) == (True, 1, held.head, [])
    assert found["thinned"] == list(map(list, Ranges((batch.seq, batch.last) for batch in short)))
    gone, flipped = short[3], short[8]
    db = apsw.Connection(str(hand.path))
    db.execute("DELETE FROM batch WHERE seq = ?", (gone.seq,))
    db.execute("UPDATE batch SET packed = zeroblob(length(packed)) WHERE seq = ?", (flipped.seq,))
    db.close()
    code, out, _ = run("journal", "verify", "--json", "-c", path)
    found = json.loads(out)
    assert (code, found["ok"], found["breaks"]) == (1, False, [])
    assert (found["damaged"], found["missing"]) == ([flipped.seq], [[gone.seq, gone.last]])


def test_journal_tail_shows_what_summaries_come_to(thinned: tuple[Path, Hand]) -> None:
    path, hand = thinned
    held = kept(hand.path)
    batch = next(batch for batch in held.batches.values() if batch.kind is Kind.SUMMARY)
    first = json.loads(held.bodies[batch.seq])["records"][0]
    _, out, _ = run("journal", "tail", "-n", "100000", "--json", "-c", path)
    found = next(record for record in json.loads(out) if record["seq"] == batch.seq)
    assert found == {"seq": batch.seq, "last": batch.last, "period": 60, **first}
    _, out, _ = run("journal", "tail", "-n", "100000", "-c", path)
    line = next(line for line in out.splitlines() if line.lstrip().startswith(f"{batch.seq}-{batch.last} "))
    of = first["values"]["t0"]
    assert f"  {first['device']}, 60 s  t0 {of['mean']:g} ({of['min']:g} to {of['max']:g}, last " in line


async def test_journal_commands_work_while_the_gateway_runs(tmp_path: Path) -> None:
    async with field() as meter:
        made = config(free_port(), {"m": device(meter.port, every="20ms")})
        path = written(tmp_path, made)
        with gateway(tmp_path, made) as daemon:
            await until(lambda: meter.counts[1] > 20, "scans")
            heads = []
            for _ in range(3):
                code, out, _ = await arun("journal", "stat", "--json", "-c", path)
                assert code == 0
                heads.append(json.loads(out)["head"])
                code, out, _ = await arun("journal", "verify", "-c", path)
                assert code == 0, out
                code, out, _ = await arun("journal", "tail", "-c", path)
                assert code == 0
            assert heads == sorted(set(heads)), "it goes on"
            daemon.send(signal.SIGTERM)
            assert (await asyncio.to_thread(daemon.end))[0] == 0
            assert not daemon.said("ERROR"), daemon.lines


# -- size ----------------------------------------------------------------------------------------------------


def test_size_says_what_an_outage_takes(tmp_path: Path) -> None:
    made = config(1, {"m": device(1, every="1s")}, journal={"commit_interval": "1s", "max_size": "1GiB"})
    path = written(tmp_path, made)
    code, out, _ = run("size", "--outage", "72h", "--json", "-c", path)
    assert code == 0
    found = json.loads(out)
    assert found["outage_s"] == 72 * 3600
    assert found["readings_per_s"] == pytest.approx(2.0)
    assert found["outage_readings"] == pytest.approx(2 * 72 * 3600, rel=0.01)
    assert found["outage_bytes"] == pytest.approx(
        found["outage_readings"] * found["stored_bytes_per_reading"], rel=0.1
    )
    assert found["days_until_full"] == pytest.approx(
        found["max_size"] / (found["outage_bytes"] / 3), rel=0.05
    )
    assert found["fits"] is True
    assert found["fsyncs_per_day"] >= 86_400
    assert found["bytes_written_per_day"] > found["outage_bytes"] / 3
    assert 0 < found["drain_s"] < found["outage_s"]
    code, out, _ = run("size", "-c", path)
    assert code == 0
    assert "outage of 72 h" in out
    tight = config(1, {"m": device(1, every="10ms")}, journal={"max_size": "4MiB"})
    code, out, _ = run("size", "--outage", "30d", "-c", written(tmp_path, tight))
    assert code == 0
    assert "does not fit" in out
    code, out, said = run("size", "-c", written(tmp_path, config(1, {})))
    assert code == 2
    assert "no device" in said


def test_size_is_within_a_factor_of_two_of_what_a_journal_really_takes(tmp_path: Path) -> None:
    """The same shape of scans through the journal's own writer, a commit a second for a while."""
    tags = {f"t{i}": {"address": f"holding:{2 * i}", "type": "float32"} for i in range(40)}
    made = config(1, {"m": device(1, every="250ms", tags=tags)}, journal={"commit_interval": "1s"})
    _, out, _ = run("size", "--json", "-c", written(tmp_path, made))
    said = json.loads(out)
    hand = Hand(tmp_path / "journal.db", journal_config())
    readings = 0
    for commit in range(300):
        scans = [
            Scan(
                1_700_000_000_000 + commit * 1000 + i * 250,
                "m",
                {f"t{t}": round(230 + ((commit * 7 + i * 3 + t * 11) % 97) / 31, 3) for t in range(40)},
            )
            for i in range(4)
        ]
        hand.turn(*scans)
        readings += 160
    hand.close()
    really = hand.path.stat().st_size / readings
    assert really / 2 < said["stored_bytes_per_reading"] < really * 2, (said, really)


def test_size_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = ROOT / "config.example.toml"
    assert run("size", "-c", path)[0] == 0
    assert os.listdir(tmp_path) == []
