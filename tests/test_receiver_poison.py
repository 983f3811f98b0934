"""Promise 10 at the receiver: no payload ends it, comes again for ever, costs memory, or stands raw in a log."""

import json
import re
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from chains import Chain
from rig import Process, free_port, mosquitto, needs_mosquitto, publish, receive, run
from test_bundle import packed
from test_receiver_sinks import Open, open_sink, postgres  # noqa: F401  the fixtures

from edgegw.receiver import admission
from edgegw.receiver.intake import Intake
from edgegw.receiver.ndjson import NdjsonSink
from edgegw.runtime.text import MAX_LINE, printable

ONCE = ("--once", "--idle", "700ms", "--json")
DATA, EVENT = "edgegw/site-7/data", "edgegw/site-7/event"
HIGH_KIB = 200 * 1024
"""The most memory that a receiver may ever have needed; without a bound it was 2.8 GiB."""


def changed(body: bytes, **keys: object) -> bytes:
    return json.dumps(json.loads(body) | keys).encode()


def records(*found: object, **keys: object) -> bytes:
    return changed(Chain().data(1), records=found, count=len(found), **keys)


def values(value: str) -> bytes:
    """Return a batch of one reading whose value is this JSON."""
    return records({"ts": 1, "device": "a", "values": {"b": 0}}).replace(
        b'{"b": 0}', b'{"b": %s}' % value.encode()
    )


def bomb(mib: int) -> bytes:
    """Return a few kB that unpack to so many MiB of JSON: a list of numbers as records."""
    packer = zstandard.ZstdCompressor(level=19, write_content_size=False).compressobj()
    head, tail = Chain().data(1).split(b'"records":[')[0], b"1]}"
    parts = [packer.compress(head + b'"records":[')]
    parts += [packer.compress(b"1," * 512 * 1024) for _ in range(mib)]
    return b"".join([*parts, packer.compress(tail), packer.flush()])


GOOD = Chain().data(2)
POISON: dict[str, bytes] = {
    "an integer beyond every float": values("9" * 400),
    "an integer beyond 64 bits in a list": values(f"[1, {2**64}]"),
    "an integer beyond 64 bits in an event": records({"ts": 1, "event": "x", "seq": 2**70}, kind="event"),
    "an integer of 5000 digits": values("9" * 5000),
    "a lone surrogate": values('"\\ud800"'),
    "nested without end": values("[" * 50_000),
    "66 MB of a few kB": bomb(64),
    "1.6 GB of a few kB": bomb(1600),
    "2 MiB of zeros": bytes(2 * 1024**2),
    "a gateway id with a NUL": changed(GOOD, gateway="site\0"),
    "a gateway id with a line feed": changed(GOOD, gateway="site-7\nFORGED"),
    "a gateway id of 65": changed(GOOD, gateway="g" * 65),
    "a stream that is no UUID": changed(GOOD, stream="s\0"),
    "a device with a NUL": records({"ts": 1, "device": "a\0", "values": {}}),
    "a tag with an escape": records({"ts": 1, "device": "a", "values": {"\x1b[2J": 1}}),
    "a tag that turns the line round": records({"ts": 1, "device": "a", "values": {"\u202e": 1}}),
    "a tag of a megabyte": records({"ts": 1, "device": "a", "values": {"t" * 1_000_000: 1}}),
    "an event of a megabyte": records({"ts": 1, "event": "e" * 1_000_000}, kind="event"),
    "an event with a NUL": records({"ts": 1, "event": "a\0"}, kind="event"),
    "a reason with a line feed": records({"ts": 1, "device": "a", "status": "bad", "reason": "x\nFORGED"}),
    "a time before all calendars": records({"ts": -(2**63), "device": "a", "values": {}}),
    "a time after all calendars": records({"ts": 2**62, "device": "a", "values": {}}),
    "a summary of 2^62 records": changed(GOOD, kind="summary", count=2**62, records=[], last_prev="0" * 64),
    "a period of an age": changed(GOOD, kind="summary", records=[], last_prev="0" * 64, period=2**62),
    "seq and count at the very end": changed(GOOD, seq=2**63 - 2),
    "no batch at all": b"\x1b]0;FORGED\x07\nFORGED",
}  # fmt: skip


@pytest.mark.parametrize("payload", POISON.values(), ids=POISON.keys())
def test_p10_what_no_gateway_sends_is_set_apart_and_the_next_batch_is_kept(
    open_sink: Open,  # noqa: F811
    payload: bytes,
) -> None:
    intake = Intake(open_sink(), max_message=1024**2)
    assert not intake.take(DATA, payload)
    intake.commit()
    assert intake.take(DATA, GOOD)
    intake.commit()
    assert intake.report().malformed == 1
    assert not intake.take(DATA, payload), "and again"
    intake.close()


LEGITIMATE = {
    "the greatest uint64": str(2**64 - 1),
    "the least int64": str(-(2**63)),
    "any text": r'"a\u0000\n\u001b[2J\u202e\"\\"',
    "a long fraction": "0.12345678901234567890123",
    "a list of lists' places": "[1, 2.5, true, null]".replace(", null", ""),
}


@pytest.mark.parametrize("value", LEGITIMATE.values(), ids=LEGITIMATE.keys())
def test_what_a_gateway_can_send_is_kept_byte_for_byte(open_sink: Open, value: str) -> None:  # noqa: F811
    sink, body = open_sink(), values(value)
    intake = Intake(sink)
    assert intake.take(DATA, body)
    intake.commit()
    assert not intake.take(DATA, body)
    assert intake.report().streams[0].duplicates == 1
    if not isinstance(sink, NdjsonSink):
        ((kept,),) = sink.apart._execute("SELECT body FROM batches", ()).fetchall()  # type: ignore[attr-defined]
        assert kept.encode() == body
    intake.close()


def test_an_int64_stays_exact_in_its_column(tmp_path: Path) -> None:
    assert kept_values(tmp_path, values(str(2**63 - 1))) == [(2**63 - 1,)]


def kept_values(folder: Path, body: bytes) -> list[Any]:
    from edgegw.receiver.sqlite import SqliteSink

    intake = Intake(SqliteSink(folder / "kept.db"))
    assert intake.take(DATA, body)
    intake.commit()
    intake.close()
    return rows(folder / "kept.db", "SELECT value FROM readings")


def test_what_is_set_apart_is_bounded(open_sink: Open, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    sink = open_sink()
    if isinstance(sink, NdjsonSink):
        return  # it keeps none
    monkeypatch.setattr(admission, "MAX_REJECTED", 10)
    monkeypatch.setattr(admission, "MAX_REJECTED_BYTES", 1000)
    intake = Intake(sink)
    for n in range(50):
        intake.take(DATA, b"x%d" % n)
    assert len(sink.apart.rejected()) == 10
    intake.close()
    sink = open_sink()
    intake = Intake(sink)
    for n in range(5):
        intake.take(f"t/{n}/data", bytes(400))
    intake.take(f"{'t' * 60_000}/data", b"x")
    assert sum(one.size for one in sink.apart.rejected()) <= 1000
    assert intake.take(DATA, GOOD), "a full table stops nothing"
    intake.close()


def test_a_batch_that_was_too_large_is_kept_when_the_option_allows_it(open_sink: Open) -> None:  # noqa: F811
    body = Chain().data(40)
    intake = Intake(open_sink(), max_message=1024)
    assert not intake.take(DATA, body)
    intake.commit()
    intake.close()
    intake = Intake(open_sink())
    for topic, payload in intake.rejected():
        assert intake.take(topic, payload)
    assert intake.report().rejected == []
    intake.close()


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\u202e", "\x7f", "\u2028", "\ud800", "a" * 10_000])
def test_a_line_is_one_line(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    assert len(line) <= MAX_LINE + 3


# -- on the real parts -------------------------------------------------------------------------------------


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    number = free_port()
    with mosquitto(tmp_path, number):
        yield number


def rows(file: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def highest_kib(process: Process) -> int:
    """Return the most memory that a process has had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(found)


@needs_mosquitto
@pytest.mark.parametrize("kind", ["sqlite", "postgres", "ndjson"])
def test_p10_a_receiver_survives_every_poison_keeps_what_follows_and_needs_no_memory(
    kind: str, tmp_path: Path, port: int, request: pytest.FixtureRequest
) -> None:
    to = {"sqlite": f"sqlite:///{tmp_path}/kept.db", "ndjson": "-"}.get(kind)
    to = to or request.getfixturevalue("postgres")
    chain = Chain(gateway=f"site-{kind}")
    topic = f"edgegw/site-{kind}/data"
    with receive(port, to, "--json") as process:
        process.wait_said("ready")
        publish(port, [*((DATA, payload) for payload in POISON.values()), (topic, chain.data(2))])
        publish(
            port, [(topic, chain.data(2)), (topic, chain.gap(9, 9, bytes(32), reason="x\n\x1b[2JFORGED"))]
        )
        process.wait_said("(x\\n\\x1b[2JFORGED)")
        high_kib = highest_kib(process)
        process.send(signal.SIGTERM)
        out = process.end()[1]
    report = json.loads(
        out if kind != "ndjson" else "\n".join(line for line in process.lines if line[:1] in "{} }")
    )
    mine = next(one for one in report["streams"] if one["gateway"] == chain.gateway)
    assert (mine["batches"], report["malformed"]) == (3, len(POISON))
    assert not any(line.startswith("FORGED") or "\x1b" in line for line in process.lines)
    assert high_kib < HIGH_KIB
    if kind != "ndjson":
        _, text, _ = run("--to", to, "--report")
        assert "\x1b" not in text
        assert not any(line.startswith("FORGED") for line in text.splitlines())


UNLUCKY = """
from edgegw.receiver import sqlite
add = sqlite.SqliteSink._add_others
def unlucky(self, batch):
    add(self, batch)
    if batch.seq == 5:
        raise KeyError("what nobody expected")
sqlite.SqliteSink._add_others = unlucky
from edgegw.cli import main
main()
"""
"""A receiver with a fault that one batch brings out, when half of it has been written."""


@needs_mosquitto
def test_p10_what_nobody_expected_costs_one_batch_and_neither_the_run_nor_the_next_one(
    tmp_path: Path, port: int
) -> None:
    kept, chain = tmp_path / "kept.db", Chain()
    bodies = [chain.data(2) for _ in range(10)]
    command = (
        "receive",
        "--url",
        f"mqtt://127.0.0.1:{port}",
        "--to",
        f"sqlite:///{kept}",
        *ONCE,
        "--no-replay",
    )
    for start in range(2):
        with Process(sys.executable, "-c", UNLUCKY, *command) as process:
            process.wait_said("ready")
            if start == 0:
                publish(port, [(DATA, body) for body in bodies])
            code, out = process.end()
        (stream,) = json.loads(out)["streams"]
        assert (code, stream["missing"], stream["batches"]) == (1, [[5, 6]], 9)
        assert sum("KeyError: 'what nobody expected'" in line for line in process.lines) >= 1
    assert rows(kept, "SELECT count(*) FROM readings WHERE seq IN (5, 6)") == [(0,)]
    (rejected,) = rows(kept, "SELECT topic, payload FROM rejected")
    assert rejected == (DATA, bodies[2])
    with receive(port, f"sqlite:///{kept}", *ONCE) as process:  # the fault is mended
        code, out = process.end()
    assert (code, json.loads(out)["ok"], rows(kept, "SELECT count(*) FROM rejected")) == (0, True, [(0,)])


IMPORT = """
import sys
from edgegw.cli import cli
try:
    cli.main(standalone_mode=False)
except BaseException as error:
    print(type(error).__name__, str(error)[:200], file=sys.stderr)
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("KiB", high.split()[1], file=sys.stderr)
"""
"""The command line, saying at its end how much memory it needed."""


@pytest.mark.parametrize("mib", [15, 64])
def test_p10_a_bundle_with_a_batch_of_millions_of_numbers_is_refused_and_needs_no_memory(
    mib: int, tmp_path: Path
) -> None:
    head = Chain().data(1).split(b'"records":[')[0]
    body = head + b'"records":[' + b"1," * (mib * 512 * 1024) + b"1]}"
    file = tmp_path / "bomb.edgegw"
    file.write_bytes(packed([body]))
    command = ("receive", "--import", str(file), "--to", f"sqlite:///{tmp_path}/kept.db")
    with Process(sys.executable, "-c", IMPORT, *command) as process:
        process.end()
    (needed,) = (int(line.split()[1]) for line in process.lines if line.startswith("KiB"))
    assert "Error" in process.lines[0], process.lines
    assert needed < HIGH_KIB
    assert not (tmp_path / "kept.db").exists()
