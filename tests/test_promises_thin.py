"""An outage that the journal is too small for, from end to end: it thins, and what it then sends is whole."""

import json
import random
import signal
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

from control_field import kill, stop
from field import Field, field, frame
from gateway_rig import Proxy, Subscriber, config, device, gateway, journal_head, until
from journal_rig import covered, kept
from rig import free_port, mosquitto, needs_mosquitto, receive, run

from edgegw.domain.batch import Kind
from edgegw.journal.store import Reader

UNITS = 4
TAGS = {f"t{i}": {"address": f"holding:{2 * i}", "type": "float32"} for i in range(240)}


def noisy(made: Field) -> None:
    """Have the field's units show what does not pack well."""
    numbers = random.Random(1)

    async def answer(tid: int, unit: int, pdu: bytes) -> bytes:
        _, _, count = struct.unpack(">BHH", pdu[:5])
        made.counts[unit] += 1
        registers = struct.pack(f">{count // 2}f", *(numbers.random() for _ in range(count // 2)))
        return frame(tid, unit, bytes((3, count * 2)) + registers)

    made.behave |= dict.fromkeys(range(1, UNITS + 1), answer)


def confirmed(folder: Path) -> int:
    """Return up to which seq all is confirmed, as the journal's file has it."""
    reader = Reader(folder / "journal.db")
    try:
        return reader.acked().prefix()
    finally:
        reader.close()


@needs_mosquitto
async def test_p5_what_an_outage_thinned_is_received_as_summaries_and_nothing_is_missing(
    tmp_path: Path,
) -> None:
    port, link, kept_file = free_port(), free_port(), tmp_path / "kept.db"
    to = f"sqlite:///{kept_file}"
    async with field() as plant:
        noisy(plant)
        devices = {
            f"m{unit}": device(plant.port, unit, every="15ms", tags=TAGS) for unit in range(1, UNITS + 1)
        }
        made = config(
            link,
            devices,
            journal={"max_size": "4MiB"},
            uplink={"max_message": "64KiB"},
        )
        with mosquitto(tmp_path, port):
            with receive(port, to) as receiver:
                receiver.wait_said("ready")
                async with Proxy(port, port=link) as way:
                    with gateway(tmp_path, made) as daemon:
                        await until(lambda: len(held(kept_file, "batches")) >= 7, "batches")
                        way.frozen = True
                        head = journal_head(tmp_path)
                        await until(lambda: journal_head(tmp_path) > head + 80, "more of the same")
                        await kill(daemon)  # and so forgets what was confirmed
                receiver.send(signal.SIGINT)
                assert receiver.end()[0] == 0
            before = held(kept_file, "batches")
            with gateway(tmp_path, made) as daemon:
                await until(lambda: daemon.said("have become summaries"), "thinning", deadline_s=60.0)
                plant.behave |= dict.fromkeys(plant.behave, plant.silent)  # from here on nothing is thinned
                with Subscriber(port) as seen, receive(port, to) as receiver:
                    receiver.wait_said("ready")
                    async with Proxy(port, port=link):
                        head = journal_head(tmp_path)
                        await until(lambda: confirmed(tmp_path) >= head, "the backlog", deadline_s=60.0)
                        await stop(daemon)
                    left = kept(tmp_path / "journal.db")
                    await until(lambda: left.head in ends(kept_file), "the last batch")
                    receiver.send(signal.SIGINT)
                    assert receiver.end()[0] == 0
    code, out, _ = run("--to", to, "--report", "--json")
    (report,) = json.loads(out)["streams"]
    assert (code, report["missing"], report["gaps"], report["conflicts"]) == (0, [], [], 0), out
    assert report["thinned"]
    assert (report["head"], report["records"], report["chain"]["verified"]) == (left.head, left.head, True)
    first, beside = held(kept_file, "batches"), held(kept_file, "beside")
    assert before.items() <= first.items(), "what came first stays"
    for seq, body in left.bodies.items():
        assert body in (first.get(seq), beside.get(seq)), "equal seqs are equal bytes"
    assert list(covered([*first.values(), *beside.values()])) == [(1, left.head)]
    came = covered(before.values())
    short = [batch for batch in left.batches.values() if batch.kind is Kind.SUMMARY]
    assert beside.keys() == {batch.seq for batch in short if came.overlaps(batch.seq, batch.last)} != set()
    by_topic = {message.batch.seq: message.body for message in seen.batches("summary")}
    assert by_topic == {batch.seq: left.bodies[batch.seq] for batch in short}
    with closing(sqlite3.connect(kept_file)) as db:
        rows = db.execute("SELECT device, tag, period, body FROM summaries").fetchall()
    assert {row[:3] for row in rows} == {(device, tag, 60) for device in devices for tag in TAGS}
    for *_, body in rows:
        figures = json.loads(body)
        assert 0.0 <= figures["min"] <= figures["mean"] <= figures["max"] <= 1.0
        assert figures["count"] > 0


def held(file: Path, table: str) -> dict[int, bytes]:
    """Return the batches in a table of a receiver's database."""
    with closing(sqlite3.connect(file)) as db:
        return {seq: body.encode() for seq, body in db.execute(f"SELECT seq, body FROM {table}")}


def ends(file: Path) -> set[int]:
    """Return the last seqs of the batches that a receiver has."""
    with closing(sqlite3.connect(file)) as db:
        return {last for (last,) in db.execute("SELECT seq + count - 1 FROM batches")}
