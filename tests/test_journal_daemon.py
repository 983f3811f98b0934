"""Journal faults under the real process: polling goes on, and what arrives upstream is complete or named."""

import asyncio
import os
import resource
import signal
import time
from pathlib import Path

from field import field
from gateway_rig import Subscriber, config, device, gateway, until
from journal_rig import chain, covered, named, numbers
from rig import free_port, mosquitto

from edgegw.journal.store import Reader, walk


def no_room(pid: int, room: bool = False) -> None:
    """Have the kernel refuse a process every write to a file, as a full disk does, or allow them again."""
    limit = resource.RLIM_INFINITY if room else 0
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


async def test_p5_a_full_disk_stops_neither_polling_nor_the_daemon_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    port = free_port()
    async with field() as meter:
        made = config(port, {"m": device(meter.port)})
        with mosquitto(tmp_path, port), Subscriber(port) as seen, gateway(tmp_path, made) as run:
            await until(lambda: len(seen.batches("data")) > 2, "batches")
            no_room(run.pid)
            await until(lambda: run.said("records wait in memory"), "the failure to be said")
            scans, batches = meter.counts[1], len(seen.batches("data"))
            await until(lambda: meter.counts[1] > scans + 30, "scans all the same")
            assert len(seen.batches("data")) <= batches + 1, "nothing is sent that is not on the disk"
            no_room(run.pid, room=True)
            await until(lambda: run.said("journal: back after"), "the recovery")
            await until(lambda: len(seen.batches("data")) > batches + 2, "batches again")
            assert sum("records wait in memory" in line for line in run.lines) == 1
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
            await until(lambda: any(b'"stop"' in m.body for m in seen.batches()), "the last batch")
    bodies = {m.batch.seq: m.body for m in seen.batches()}
    assert covered(bodies.values()).covers(1, max(bodies))
    assert chain(bodies.values()).intact
    counts = [r["values"]["n"] for m in seen.batches() for r in m.records if "values" in r]
    assert sorted(counts) == list(range(1, len(counts) + 1))


async def test_p5_sigterm_on_a_full_disk_ends_in_bounded_time_and_says_what_it_means(tmp_path: Path) -> None:
    async with field() as meter:
        with gateway(tmp_path, config(free_port(), {"m": device(meter.port)})) as run:
            await until(lambda: meter.counts[1] > 5, "scans")
            no_room(run.pid)
            await until(lambda: run.said("records wait in memory"), "the failure to be said")
            began = time.monotonic()
            run.send(signal.SIGTERM)
            code, _ = await asyncio.to_thread(run.end)
            assert time.monotonic() - began < 15
            assert code in (0, 1)
            assert run.said("records that could not be written")
            assert not run.said("Traceback")


async def test_p2_a_batch_damaged_in_the_backlog_is_named_and_all_others_arrive(tmp_path: Path) -> None:
    port = free_port()
    async with field() as meter:
        with gateway(tmp_path, config(port, {"m": device(meter.port)})) as run:
            await until(lambda: meter.counts[1] > 60, "a backlog")
            path = tmp_path / "journal.db"
            reader = Reader(path)
            victim = [batch for batch in walk(reader) if batch.count > 1][1]
            reader.close()
            for file in (path, path.with_name("journal.db-wal")):
                content = file.read_bytes()
                with file.open("r+b") as disk:  # in place: whoever has it open sees it
                    for at in (at for at in range(len(content)) if content.startswith(victim.packed, at)):
                        disk.seek(at + len(victim.packed) // 2)
                        disk.write(b"\xa5\x5a\xa5")
            with mosquitto(tmp_path, port), Subscriber(port) as seen:

                def complete() -> bool:
                    bodies = {m.batch.seq: m.body for m in seen.batches()}
                    whole = covered(bodies.values())
                    for first, last in (
                        named(bodies.values(), seen.batches()[0].batch.stream) if bodies else ()
                    ):
                        whole.add(first, last)
                    return bool(bodies) and whole.covers(1, max(bodies)) and len(seen.batches("data")) > 5

                await until(complete, "everything, or a gap that names it")
                run.send(signal.SIGTERM)
                assert (await asyncio.to_thread(run.end))[0] == 0
    bodies = {m.batch.seq: m.body for m in seen.batches()}
    stream = seen.batches()[0].batch.stream
    assert victim.seq not in bodies
    assert list(named(bodies.values(), stream)) == [(victim.seq, victim.last)]
    assert not chain(bodies[seq] for seq in sorted(bodies)).breaks


async def test_p2_a_journal_set_aside_under_way_ends_in_a_new_stream_upstream(tmp_path: Path) -> None:
    """The newest file is broken while the gateway is down; polling starts at once, and upstream is told."""
    port = free_port()
    async with field() as meter:
        made = config(port, {"m": device(meter.port)})
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, made) as run:
                await until(lambda: len(seen.batches("data")) > 3, "batches")
                run.send(signal.SIGTERM)
                assert (await asyncio.to_thread(run.end))[0] == 0
            old = seen.batches()[0].batch.stream
            with (tmp_path / "journal.db").open("r+b") as file:
                file.write(os.urandom(4096))
            with gateway(tmp_path, made) as run:
                await until(lambda: len({m.batch.stream for m in seen.batches()}) == 2, "a new stream")
                await until(lambda: seen.batches("data")[-1].batch.stream != old, "live batches of it")
                run.send(signal.SIGTERM)
                assert (await asyncio.to_thread(run.end))[0] == 0
            assert run.said("set aside as journal.db.")
    new = {m.batch.seq: m.body for m in seen.batches() if m.batch.stream != old}
    assert covered(new.values()).covers(1, max(new))
    assert chain(new[seq] for seq in sorted(new)).intact
    head = max(m.batch.seq + m.batch.count - 1 for m in seen.batches() if m.batch.stream == old)
    assert named(new.values(), old).covers(1, head), (
        "the file cannot say what had arrived, so all of it is named"
    )
    assert numbers(new.values())
