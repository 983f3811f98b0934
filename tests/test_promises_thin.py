"""An outage that the journal is too small for, from end to end: it thins, and what it then sends is whole."""

import asyncio
import json
import random
import signal
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

from field import Field, field, frame
from gateway_rig import Subscriber, chain, config, device, gateway, until
from journal_rig import covered, kept
from rig import free_port, mosquitto, needs_mosquitto, receive, run

from edgegw.domain.batch import Kind, decode
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
    port, kept_file = free_port(), tmp_path / "kept.db"
    to = f"sqlite:///{kept_file}"
    async with field() as plant:
        noisy(plant)
        devices = {
            f"m{unit}": device(plant.port, unit, every="15ms", tags=TAGS) for unit in range(1, UNITS + 1)
        }
        made = config(
            port,
            devices,
            journal={"max_size": "4MiB"},
            uplink={"acknowledge": "receiver", "max_message": "64KiB"},
        )
        with gateway(tmp_path, made) as daemon:
            await until(lambda: daemon.said("have become summaries"), "thinning", deadline_s=60.0)
            plant.behave |= dict.fromkeys(plant.behave, plant.silent)  # from here on nothing is thinned
            journal = await asyncio.to_thread(kept, tmp_path / "journal.db")
            with mosquitto(tmp_path, port), Subscriber(port) as seen, receive(port, to) as receiver:
                receiver.wait_said("ready")
                await until(lambda: confirmed(tmp_path) >= journal.head, "the backlog", deadline_s=60.0)
                daemon.send(signal.SIGTERM)
                assert (await asyncio.to_thread(daemon.end))[0] == 0
                left = kept(tmp_path / "journal.db")
                await until(lambda: held(kept_file).keys() >= left.bodies.keys(), "the last batches")
                receiver.send(signal.SIGINT)
                receiver.end()
    code, out, _ = run("--to", to, "--report", "--json")
    (report,) = json.loads(out)["streams"]
    assert (code, report["missing"], report["gaps"], report["conflicts"]) == (0, [], [], 0), out
    assert report["thinned"]
    assert (report["head"], report["records"]) == (left.head, left.head)
    bodies = held(kept_file)
    assert all(bodies[seq] == body for seq, body in left.bodies.items()), "equal seqs are equal bytes"
    assert list(covered(bodies.values())) == [(1, left.head)]
    assert chain(bodies).intact
    short = {seq: body for seq, body in bodies.items() if decode(body).kind is Kind.SUMMARY}
    by_topic = {message.batch.seq: message.body for message in seen.batches("summary")}
    assert by_topic == short, "and they came on their own topic"
    with closing(sqlite3.connect(kept_file)) as db:
        rows = db.execute("SELECT seq, device, tag, period, body FROM summaries").fetchall()
    assert {row[0] for row in rows} == {seq for seq, body in short.items() if json.loads(body)["records"]}
    assert {(device, tag, period) for _, device, tag, period, _ in rows} == {
        (device, tag, 60) for device in devices for tag in TAGS
    }
    for *_, body in rows:
        figures = json.loads(body)
        assert 0.0 <= figures["min"] <= figures["mean"] <= figures["max"] <= 1.0
        assert figures["count"] > 0


def held(file: Path) -> dict[int, bytes]:
    """Return the batches that a receiver's database holds."""
    with closing(sqlite3.connect(file)) as db:
        return {seq: body.encode() for seq, body in db.execute("SELECT seq, body FROM batches")}
