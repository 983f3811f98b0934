"""Batches carried by hand: exported, taken in elsewhere, released; with real gateways, brokers and receivers."""

import asyncio
import json
import random
import signal
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chains import Chain
from command_rig import Run, run
from field import field
from gateway_rig import Subscriber, config, device, gateway, journal_head, toml, until
from journal_rig import MIB, Hand, Told, covered, event, kept, scan
from journal_rig import config as journal_config
from rig import MOSQUITTO, Process, free_port, mosquitto, receive
from test_bundle import PRIVATE, PUBLIC, row

from edgegw.cli.daemon import converse
from edgegw.domain.batch import Kind
from edgegw.domain.ranges import Ranges
from edgegw.journal import bundle
from edgegw.journal import receipt as receipts
from edgegw.journal.bundle import Bundle
from edgegw.journal.store import Reader
from edgegw.runtime.lock import held

__all__ = ["run"]  # a fixture


class Site:
    """A gateway's folder with a journal that a test fills, and an exported file."""

    def __init__(self, folder: Path, batches: int = 9, gateway_id: str = "site-7") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.config = folder / "config.toml"
        self.config.write_text(toml(config(1, {"m": device(1)}, gateway={"id": gateway_id})))
        self.journal = folder / "journal.db"
        self.file = folder / "out.edgegw"
        self.receipt = folder / "out.edgegw.receipt"
        hand = Hand(self.journal)
        self.told: list[Told] = hand.turn()  # the event that a stream begins with
        for n in range(batches):
            self.told += hand.turn(*(scan(10 * n + i) for i in range(3)), *([event(n)] if n % 4 == 3 else []))
        hand.acknowledge(self.told[:2])
        hand.close()

    @property
    def bodies(self) -> list[bytes]:
        """All batches."""
        return [told.body for told in self.told]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site of nine turns, of whose batches the first two have been acknowledged."""
    return Site(tmp_path / "site")


def stored(file: Path) -> list[bytes]:
    """Return the batches that a receiver keeps, in order."""
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return [
            body.encode() for (body,) in connection.execute("SELECT body FROM batches ORDER BY stream, seq")
        ]
    finally:
        connection.close()


def exported(file: Path) -> list[bytes]:
    """Return the batches of an exported file."""
    with file.open("rb") as source:
        return list(Bundle(source).bodies())


def complete(file: Path, head: int) -> bool:
    """Tell whether a receiver keeps all from 1 on up to `head` or beyond."""
    return covered(stored(file)).prefix() >= head


def at(ts: int) -> str:
    """Return a moment as it is typed."""
    return datetime.fromtimestamp(ts / 1000, UTC).isoformat()


def to(folder: Path) -> tuple[str, str]:
    """Return the option that names a receiver's file."""
    return "--to", f"sqlite:///{folder / 'kept.db'}"


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MOSQUITTO, reason="mosquitto is not here")
async def test_p2_what_was_carried_and_what_came_by_mqtt_is_each_record_once(tmp_path: Path) -> None:
    """A gateway without a link is exported while it runs, and acknowledged; then the link comes back."""
    port, kept_file, file = free_port(), tmp_path / "kept.db", tmp_path / "stick.edgegw"

    async def command(*arguments: str | Path) -> Any:
        with Process(sys.executable, "-m", "edgegw", *map(str, arguments), "--json") as process:
            code, out = await asyncio.to_thread(process.end)
        assert code == 0, process.lines
        return json.loads(out)

    async with field() as meter:
        made = config(port, {"m": device(meter.port)}, uplink={"acknowledge": "subscriber"})
        configuration = ("-c", tmp_path / "config.toml")
        with gateway(tmp_path, made) as running:
            await until(lambda: meter.counts[1] > 20, "scans")
            first = await command("journal", "export", file, *configuration)
            assert first["batches"] > 3
            taken = await command("receive", "--import", file, *to(tmp_path), "--gateway", "site-7")
            assert (taken["new_batches"], taken["held_records"]) == (first["batches"], first["records"])
            done = await command("journal", "ack", taken["receipt"], *configuration)
            assert (done["batches"], done["records"]) == (first["batches"], first["records"])
            assert running.said(f"{first['records']} records need no sending any more")
            again = await command("journal", "ack", taken["receipt"], *configuration)
            assert again["batches"] == 0
            await until(lambda: meter.counts[1] > 40, "more scans")
            second = await command("journal", "export", tmp_path / "two", *configuration)
            assert second["batches"] > first["batches"]
            with mosquitto(tmp_path, port), receive(port, to(tmp_path)[1]) as receiver:
                receiver.wait_said("ready")
                await until(lambda: complete(kept_file, second["records"] + 10), "the rest, by MQTT")
                running.send(signal.SIGTERM)
                assert (await asyncio.to_thread(running.end))[0] == 0
                head = journal_head(tmp_path)
                await until(lambda: complete(kept_file, head), "the last batch")
                receiver.send(signal.SIGTERM)
                assert (await asyncio.to_thread(receiver.end))[0] == 0
            assert stored(kept_file) == list(kept(tmp_path / "journal.db").bodies.values())
            taken = await command("receive", "--import", tmp_path / "two", *to(tmp_path))
            assert (taken["new_batches"], taken["held_records"]) == (0, second["records"])
    report = await command("receive", "--report", *to(tmp_path))
    assert report["ok"]
    assert stored(kept_file) == list(kept(tmp_path / "journal.db").bodies.values())


def test_p2_files_in_any_order_and_any_number_of_times_are_each_record_once(
    site: Site, run: Run, tmp_path: Path
) -> None:
    middle = site.told[5]
    moment = at(middle.records[-1]["ts"])
    parts = [("a", "--to", moment), ("b", "--from", moment), ("c",), ("d", "--unsent")]
    for name, *options in parts:
        assert run("journal", "export", tmp_path / name, *options, "-c", site.config)[0] == 0
    assert exported(tmp_path / "c") == site.bodies
    assert exported(tmp_path / "d") == site.bodies[2:]
    assert set(exported(tmp_path / "a")) | set(exported(tmp_path / "b")) == set(site.bodies)
    assert set(exported(tmp_path / "a")) & set(exported(tmp_path / "b")) <= {middle.body}
    names = [name for name, *_ in parts] * 2
    random.Random(3).shuffle(names)
    for name in names:
        code, out, _ = run("journal", "import", tmp_path / name, *to(tmp_path), "--json")
        done = json.loads(out)
        assert (code, done["held_records"]) == (0, done["records"])
    assert stored(tmp_path / "kept.db") == site.bodies


def test_a_receipt_releases_without_a_daemon_what_it_names_and_nothing_else(
    site: Site, run: Run, tmp_path: Path
) -> None:
    moment = at(site.told[7].records[0]["ts"])
    assert run("journal", "export", site.file, "--to", moment, "-c", site.config)[0] == 0
    carried = exported(site.file)
    before = site.told[7].records[0]["ts"]
    assert carried == [told.body for told in site.told if told.records[0]["ts"] < before]
    assert 2 < len(carried) < len(site.bodies)
    assert run("receive", "--import", site.file, *to(tmp_path))[0] == 0
    new = [json.loads(body) for body in carried[1:]]
    code, out, _ = run("journal", "ack", site.receipt, "-c", site.config)
    assert (code, out) == (0, f"released {len(new)} batches, {sum(body['count'] for body in new)} records\n")
    released = [(body["seq"], body["seq"] + body["count"] - 1) for body in new]
    assert acked(site) == Ranges([(1, site.told[1].batch.last), *released])
    assert run("journal", "ack", site.receipt, "-c", site.config)[1] == "released 0 batches, 0 records\n"
    assert list(kept(site.journal).bodies.values()) == site.bodies, "no batch has gone or come"
    with held(site.folder / "journal.db.lock", "journal"):
        code, _, said = run("journal", "ack", site.receipt, "-c", site.config)
        assert (code, "in use by another process" in said) == (1, True)


def test_a_receipt_that_is_not_this_journals_releases_nothing(site: Site, run: Run, tmp_path: Path) -> None:
    run("journal", "export", site.file, "-c", site.config)
    assert run("receive", "--import", site.file, *to(tmp_path))[0] == 0
    content = site.receipt.read_bytes()
    sound = receipts.decode(content)
    (end,) = sound.ranges
    another = Site(tmp_path / "other", gateway_id="site-8")
    replace = msgspec.structs.replace
    wrong = {
        "cut or changed": content[:-9],
        "does not give its SHA-256": content.replace(b'"from":1,', b'"from":2,'),
        "expected site-7": receipts.encode(replace(sound, gateway="site-8")),
        "stream 0b0e6e5e": receipts.encode(replace(sound, stream="0b0e6e5e-0000-4000-8000-000000000001")),
        f"the batch that ends at {end.last}": receipts.encode(
            replace(sound, ranges=[replace(end, digest="00" * 32)])
        ),
        "for the batch that ends at 1": receipts.encode(replace(sound, ranges=[replace(end, last=1)])),
    }
    for said, content in wrong.items():
        site.receipt.write_bytes(content)
        code, out, errors = run("journal", "ack", site.receipt, "-c", site.config)
        assert (code, out, said in errors) == (1, "", True), (said, errors)
        assert str(site.receipt) in errors
    site.receipt.write_bytes(receipts.encode(sound))
    code, _, errors = run("journal", "ack", site.receipt, "-c", another.config)
    assert (code, "expected site-8" in errors) == (1, True)
    assert list(kept(site.journal).acked) == [(1, site.told[1].batch.last)]
    unknown = replace(sound, ranges=[replace(end, last=end.last + 1000)])
    site.receipt.write_bytes(receipts.encode(unknown))
    code, out, errors = run("journal", "ack", site.receipt, "-c", site.config)
    assert (code, out) == (0, "released 0 batches, 0 records\n")
    assert "the batch that ends them is no longer here; not released" in errors


# -- beside what the gateway does of itself --------------------------------------------------------------------------


def test_what_was_exported_is_thinned_apart_from_what_was_not_and_released_as_summaries(
    tmp_path: Path, run: Run
) -> None:
    """Whoever has the readings of a part could make nothing of a summary of more."""
    site = Site(tmp_path / "site", batches=0)
    hand = Hand(site.journal, journal_config(max_size=4 * MIB, when_full="thin"))
    carried = [told for n in range(150) for told in hand.turn(scan(1000 * n, tags=1000))]
    assert run("journal", "export", site.file, "-c", site.config)[0] == 0
    first, last = carried[0].batch.seq, carried[-1].batch.last
    hand.settled.carry(carried[0].stream, [(1, last)])
    for n in range(150, 700):
        hand.turn(scan(1000 * n, tags=1000))
    spans = {(b.seq, b.last) for b in kept(site.journal).batches.values() if b.kind is Kind.SUMMARY}
    hand.close()
    assert Ranges(spans).covers(first, last)
    assert all(end <= last or begin > last for begin, end in spans)
    assert run("receive", "--import", site.file, *to(tmp_path))[0] == 0
    code, out, errors = run("journal", "ack", site.receipt, "-c", site.config)
    assert (code, errors) == (0, "")
    assert acked(site).covers(first, last)
    run("journal", "export", tmp_path / "rest", "-c", site.config)
    code, out, _ = run("receive", "--import", tmp_path / "rest", *to(tmp_path), "--json")
    done = json.loads(out)
    assert (code, done["held_records"]) == (0, done["records"])
    assert run("receive", "--report", *to(tmp_path))[0] == 0


def test_prune_deletes_what_is_acknowledged_and_nothing_else(site: Site, run: Run) -> None:
    code, out, _ = run("journal", "prune", "--older-than", "1h", "-c", site.config)
    assert (code, out) == (0, "deleted 0 batches, 0 records\n")
    code, out, _ = run("journal", "prune", "-c", site.config)
    assert (code, out) == (0, f"deleted 2 batches, {site.told[1].batch.last} records\n")
    assert list(kept(site.journal).bodies.values()) == site.bodies[2:]
    assert run("journal", "prune", "-c", site.config)[1] == "deleted 0 batches, 0 records\n"
    assert run("journal", "verify", "-c", site.config)[0] == 0
    run("journal", "export", site.file, "-c", site.config)
    run("receive", "--import", site.file, "--to", f"sqlite:///{site.folder / 'kept.db'}")
    run("journal", "ack", site.receipt, "-c", site.config)
    batches = len(site.bodies) - 3
    assert json.loads(run("journal", "prune", "--json", "-c", site.config)[1])["batches"] == batches
    assert list(kept(site.journal).bodies.values()) == site.bodies[-1:], "the tip stays"
    assert run("journal", "prune", "--older-than", "soon", "-c", site.config)[0] == 2
    site.journal.unlink()
    code, _, errors = run("journal", "prune", "-c", site.config)
    assert (code, "not there" in errors, site.journal.exists()) == (1, True, False)


@pytest.mark.skipif(not MOSQUITTO, reason="mosquitto is not here")
async def test_a_running_gateway_prunes_and_knows_what_was_exported(tmp_path: Path, run: Run) -> None:
    port = free_port()
    async with field() as meter:
        made = config(port, {"m": device(meter.port)})
        with gateway(tmp_path, made) as running:
            await until(lambda: meter.counts[1] > 20, "scans")
            configuration = ("-c", tmp_path / "config.toml")
            code, _, errors = await asyncio.to_thread(
                run, "journal", "export", tmp_path / "x", *configuration
            )
            assert (code, errors) == (0, "")
            with mosquitto(tmp_path, port), Subscriber(port):
                await until(lambda: meter.counts[1] > 60, "scans while the backlog goes")
                for _ in range(100):  # live batches are acknowledged first
                    code, _, _ = await asyncio.to_thread(run, "journal", "prune", "--json", *configuration)
                    assert code == 0
                    if min(kept(tmp_path / "journal.db").batches) > 1:
                        break
                else:
                    pytest.fail("the backlog was not pruned")
            assert running.said("journal: pruned by hand, ")
            running.send(signal.SIGTERM)
            assert (await asyncio.to_thread(running.end))[0] == 0


async def test_the_socket_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    async with field() as meter:
        with gateway(tmp_path, config(free_port(), {"m": device(meter.port)})) as running:
            await until((tmp_path / "journal.db.mark").exists, "a commit")
            await until((tmp_path / "journal.db.sock").exists, "the socket")
            stream = await asyncio.to_thread(running_stream, tmp_path)

            def ask(message: dict[str, Any]) -> dict[str, Any]:
                answer = converse(tmp_path / "journal.db", "test", lambda ask: ask(message))
                assert answer is not None
                return answer

            for message, said in (
                ({"acknowledge": {"stream": "x", "ranges": []}}, f"this journal's is {stream}"),
                ({"acknowledge": {"stream": stream, "ranges": [[1]]}}, "Expected"),
                ({"acknowledge": {"stream": stream}}, "missing required field `ranges`"),
                ({"acknowledge": {"stream": stream, "ranges": [], "more": 1}}, "unknown field"),
                ({"carried": {"stream": "x", "ranges": []}}, "this journal's is"),
                ({"prune": {"older_than_ms": -1}}, ">= 0"),
                ({"prune": {}}, "missing required field"),
                ({"prune": 5}, "Expected `object`"),
            ):
                answer = await asyncio.to_thread(ask, message)
                assert (answer["ok"], said in answer["error"]) == (False, True), (message, answer)
            absurd = {"stream": stream, "ranges": [[9, 3], [1 << 40, 1 << 41], [1 << 62, (1 << 63) - 1]]}
            assert await asyncio.to_thread(ask, {"acknowledge": absurd}) == {"ok": True, "ranges": []}
            running.send(signal.SIGTERM)
            assert (await asyncio.to_thread(running.end))[0] == 0


def running_stream(folder: Path) -> str:
    """Return the stream of the journal in a folder."""
    reader = Reader(folder / "journal.db")
    try:
        return reader.stream
    finally:
        reader.close()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_whole_not_sound_or_not_the_right_one_brings_nothing_in(
    site: Site, run: Run, tmp_path: Path
) -> None:
    run("journal", "export", site.file, "-c", site.config)
    content = site.file.read_bytes()
    numbers = random.Random(11)
    for _ in range(60):
        at = numbers.randrange(len(content))
        broken = numbers.choice(
            [content[:at], content[:at] + bytes((content[at] ^ numbers.randint(1, 255),)) + content[at + 1 :]]
        )
        site.file.write_bytes(broken)
        code, out, errors = run("receive", "--import", site.file, *to(tmp_path))
        assert (code, out, errors.startswith(f"error: {site.file}: ")) == (1, "", True), (at, errors)
    site.file.write_bytes(content)
    another = Site(tmp_path / "other", gateway_id="site-8")
    for arguments in (
        ("receive", "--import", site.file, "--gateway", "site-8"),
        ("journal", "import", site.file, "-c", another.config),
    ):
        code, _, errors = run(*arguments, *to(tmp_path))
        assert (code, "found batches of gateway site-7; expected site-8" in errors) == (1, True)
    assert not (tmp_path / "kept.db").exists()
    assert not site.receipt.exists()
    assert run("journal", "import", site.file, *to(tmp_path), "-c", site.config)[0] == 0


def test_only_a_file_signed_with_the_key_that_is_demanded_is_taken_in(
    site: Site, run: Run, tmp_path: Path
) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    key.write_bytes(PRIVATE)
    public.write_bytes(PUBLIC)
    unsigned = site.folder / "unsigned"
    run("journal", "export", unsigned, "-c", site.config)
    assert run("journal", "export", site.file, "--key", key, "-c", site.config)[0] == 0
    demanded = ("--public-key", public, *to(tmp_path))
    code, _, errors = run("receive", "--import", unsigned, *demanded)
    assert (code, "not signed; expected one signed with" in errors) == (1, True)
    assert not (tmp_path / "kept.db").exists()
    assert run("receive", "--import", site.file, *demanded)[0] == 0
    assert stored(tmp_path / "kept.db") == site.bodies
    assert run("journal", "export", tmp_path / "x", "--key", public, "-c", site.config)[0] == 2
    assert run("receive", "--import", site.file, "--public-key", key, *to(tmp_path))[0] == 2
    assert run("receive", "--url", "mqtt://x", "--gateway", "site-7", *to(tmp_path))[0] == 2
    assert not (tmp_path / "x").exists()


def test_a_batch_that_contradicts_what_is_kept_is_set_apart_and_not_confirmed(
    site: Site, run: Run, tmp_path: Path
) -> None:
    chain = Chain(stream=site.told[0].stream)
    body = chain.data(site.told[1].batch.last)  # the same seqs, told otherwise
    forged = tmp_path / "forged"
    with forged.open("w+b") as file:
        bundle.write(file, [(row(body), body)], gateway="site-7", stream=chain.stream, made_ms=0)
    assert run("receive", "--import", forged, *to(tmp_path))[0] == 0
    run("journal", "export", site.file, "-c", site.config)
    code, out, _ = run("receive", "--import", site.file, *to(tmp_path), "--json")
    done = json.loads(out)
    assert (code, done["new_batches"]) == (1, len(site.bodies) - 2)
    (confirmed,) = receipts.decode(site.receipt.read_bytes()).ranges
    assert (confirmed.first, confirmed.last) == (site.told[2].batch.seq, site.told[-1].batch.last)


def test_a_damaged_batch_is_left_out_and_said(site: Site, run: Run, tmp_path: Path) -> None:
    victim = site.told[3].batch
    content = site.journal.read_bytes()
    site.journal.write_bytes(content.replace(victim.packed[10:], b"\xa5" + victim.packed[11:]))
    code, _, errors = run("journal", "export", site.file, "-c", site.config)
    assert (code, f"left out: batch {victim.seq}: " in errors) == (0, True)
    assert exported(site.file) == site.bodies[:3] + site.bodies[4:]
    assert run("receive", "--import", site.file, *to(tmp_path))[0] == 0
    ranges = receipts.decode(site.receipt.read_bytes()).ranges
    assert [(held.first, held.last) for held in ranges] == [
        (1, victim.seq - 1),
        (victim.last + 1, site.told[-1].batch.last),
    ]
    assert run("journal", "ack", site.receipt, "-c", site.config)[0] == 0
    assert not acked(site).overlaps(victim.seq, victim.last)


def acked(site: Site) -> Ranges:
    """Return what the journal has written down as settled; its bytes need not be sound."""
    reader = Reader(site.journal)
    try:
        return reader.acked()
    finally:
        reader.close()


def test_batches_of_a_name_that_the_gateway_once_had_are_left_out_and_said(site: Site, run: Run) -> None:
    site.config.write_text(toml(config(1, {"m": device(1)}, gateway={"id": "renamed"})))
    code, out, errors = run("journal", "export", site.file, "-c", site.config)
    assert (code, "0 batches" in out) == (0, True)
    assert "it is of gateway site-7, which this once was" in errors


# -- what goes wrong on the way ----------------------------------------------------------------------------------------


def test_nothing_half_is_ever_found_under_the_name(tmp_path: Path, run: Run) -> None:
    site = Site(tmp_path / "site", batches=300)
    site.file.write_bytes(b"precious")
    code, _, errors = run("journal", "export", site.file, "-c", site.config)
    assert (code, "it is there already; name another file" in errors) == (1, True)
    assert site.file.read_bytes() == b"precious"
    code, _, errors = run("journal", "export", tmp_path / "none" / "x", "-c", site.config)
    assert (code, "no such file or directory" in errors) == (1, True)
    folder = tmp_path / "stick"
    folder.mkdir()
    with Process(
        sys.executable, "-c",
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (36864, 36864)); from edgegw.cli import main; main()",
        "journal", "export", str(folder / "x"), "-c", str(site.config),
    ) as process:  # fmt: skip
        assert process.end()[0] == 1
    assert process.said(f"error: {folder / 'x'}: file too large; it is as it was before")
    assert list(folder.iterdir()) == []


def test_an_import_killed_in_the_middle_leaves_no_receipt_and_goes_on_where_it_was(
    tmp_path: Path, run: Run
) -> None:
    site = Site(tmp_path / "site", batches=400)
    run("journal", "export", site.file, "-c", site.config)
    options = ("receive", "--import", str(site.file), *to(tmp_path))
    with Process(
        sys.executable, "-c",
        "from edgegw.cli import main; from edgegw.cli.journal import take_in; take_in.COMMIT_BYTES = 1; main()",
        *options,
    ) as process:  # fmt: skip
        database = tmp_path / "kept.db"

        def some() -> bool:
            try:
                return len(stored(database)) > 5
            except sqlite3.OperationalError:
                return False

        asyncio.run(until(some, "a first part"))
        process.send(signal.SIGKILL)
        process.end()
    assert not site.receipt.exists()
    assert len(stored(tmp_path / "kept.db")) < len(site.bodies)
    code, out, _ = run(*options, "--json")
    done = json.loads(out)
    assert (code, done["held_records"]) == (0, done["records"])
    assert 0 < done["new_batches"] < len(site.bodies)
    assert stored(tmp_path / "kept.db") == site.bodies


def test_standard_output_takes_the_records_and_no_receipt_is_given(site: Site, run: Run) -> None:
    run("journal", "export", site.file, "-c", site.config)
    with Process(
        sys.executable, "-m", "edgegw", "receive", "--import", str(site.file), "--to", "-"
    ) as process:
        code, out = process.end()
    assert (code, len(out.splitlines())) == (0, site.told[-1].batch.last)
    assert not site.receipt.exists()
    assert run("receive", "--import", site.file, "--to", "-", "--receipt", "x")[0] == 2
