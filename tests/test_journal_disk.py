"""The journal on disks that are full, break or are slow: real file systems under real gateways."""

import asyncio
import fcntl
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from field import Field, field
from gateway_rig import Message, Subscriber, config, device, gateway, until
from journal_rig import MIB, Hand, Told, chain, covered, gaps_in, kept, named, numbers, scan
from journal_rig import config as journal_config
from rig import Process, free_port, mosquitto, needs_mosquitto, needs_strace

from edgegw.domain.ranges import Ranges
from edgegw.journal.store import FRAME, Reader, size_bytes

KINDS = ("data", "event", "backfill", "summary")
MAX_SIZE = 4 * MIB


def tool(*command: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run a system tool."""
    return subprocess.run(command, check=check, capture_output=True)


class Disk:
    """A small ext4 file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.image, self.path = folder / "disk.img", folder / "disk"
        self.journal = self.path / "journal.db"
        self.ballast = self.path / "journal.db.ballast"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(12 * MIB)
        tool("mkfs.ext4", "-q", "-m", "0", str(self.image))
        self.mount()

    def mount(self) -> None:
        """Mount it; the kernel turns it read-only at the first error."""
        tool("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.path))

    def unmount(self) -> None:
        """Unmount it, however it is."""
        tool("umount", "-l", str(self.path), check=False)

    def fill(self) -> None:
        """Have others take it to the last byte."""
        with (self.path / f"others{len(list(self.path.iterdir()))}").open("wb", buffering=0) as file:
            for size in (MIB, 1024):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            os.fsync(file.fileno())

    def free(self) -> None:
        """Have the others go."""
        for file in self.path.glob("others*"):
            file.unlink()

    def cut_power(self) -> None:
        """Have nothing reach the disk any more, and start from what is on it (ext4's shutdown, without its log)."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
        finally:
            os.close(fd)

    def break_down(self) -> None:
        """Have the kernel find an error in the file system."""
        source = tool("findmnt", "-n", "-o", "SOURCE", str(self.path)).stdout.decode().strip()
        Path("/sys/fs/ext4", Path(source).name, "trigger_fs_error").write_text("1")

    @property
    def bytes(self) -> int:
        """What the journal takes of it."""
        ballast = self.ballast.stat().st_size if self.ballast.exists() else 0
        return size_bytes(self.journal) + ballast


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk, where one can be mounted."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4 for a disk of its own")
    try:
        made = Disk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a disk of its own cannot be mounted here: {error.stderr!r}")
    yield made
    made.unmount()


def backlog(path: Path, packed: int = MIB) -> list[Told]:
    """Make a journal that holds so much that nobody has."""
    hand = Hand(path, journal_config(MAX_SIZE, when_full="thin"))
    size = n = 0
    while size < packed:
        size += sum(
            len(one.batch.packed) for one in hand.turn(*(scan(10_000_000 + n + i, 60) for i in range(8)))
        )
        n += 8
    hand.close()
    return hand.told


def site(disk: Disk, port: int, meter: Field) -> dict[str, object]:
    """Return the configuration of a gateway whose journal is on the disk."""
    journal = {"path": str(disk.journal), "max_size": "4MiB", "commit_interval": "50ms"}
    return config(port, {"m": device(meter.port, every="20ms")}, journal=journal)


def head(disk: Disk) -> int:
    """Return the journal's head."""
    reader = Reader(disk.journal)
    try:
        return reader.tip().head
    finally:
        reader.close()


def whole(messages: list[Message]) -> Ranges:
    """Return what has arrived or is named upstream."""
    bodies = {message.body for message in messages}
    stream = messages[0].batch.stream if messages else ""
    return Ranges([*covered(bodies), *named(bodies, stream)])


def is_sound(messages: list[Message]) -> None:
    """Check what came upstream: one stream, one chain."""
    assert len({message.batch.stream for message in messages}) == 1
    assert chain({message.body for message in messages}).breaks == []


async def scans_go_on(meter: Field, count: int = 30) -> None:
    """Wait for some more scans: at twenty milliseconds each."""
    before = meter.counts[1]
    await until(lambda: meter.counts[1] > before + count, "polling goes on", 5.0 + count / 10)


async def stop(run: Process) -> None:
    """Stop a gateway in order."""
    run.send(signal.SIGTERM)
    code, _ = await asyncio.to_thread(run.end)
    assert code == 0, run.lines


@needs_mosquitto
async def test_p5_others_fill_the_disk_and_nothing_stops_or_goes_unnamed(tmp_path: Path, disk: Disk) -> None:
    """With the broker there, without it, and with room again."""
    port = free_port()
    backlog(disk.journal, 96 * 1024)
    sizes = []
    async with field() as meter:
        with gateway(tmp_path, site(disk, port, meter)) as run:
            with mosquitto(tmp_path, port), Subscriber(port) as first:
                await until(lambda: len(first.batches("data")) > 5 and disk.ballast.exists(), "batches")
                disk.fill()
                await until(lambda: run.said("the ballast is given back"), "the ballast to be given back")
                assert not disk.ballast.exists()
                await scans_go_on(meter)
                before = len(first.batches("data"))
                await until(lambda: len(first.batches("data")) > before + 20, "live batches all the same")
                sizes.append(disk.bytes)
            await until(lambda: run.said("have become summaries"), "the oldest to go, or to be thinned", 90.0)
            await scans_go_on(meter)
            sizes.append(disk.bytes)
            disk.free()
            await until(lambda: run.said("there is room on the disk again"), "it to be said")
            assert disk.ballast.exists()
            sizes.append(disk.bytes)
            with mosquitto(tmp_path, port), Subscriber(port) as second:
                await until(lambda: len(second.batches("data")) > 5, "live batches again")
                messages = lambda: first.batches(*KINDS) + second.batches(*KINDS)  # noqa: E731
                await until(lambda: whole(messages()).covers(1, head(disk) - 50), "all of it or its gap")
                await stop(run)
                await until(lambda: whole(messages()).covers(1, head(disk)), "all of it or its gap")
    is_sound(messages())
    assert max(sizes) <= MAX_SIZE
    assert named({m.body for m in messages()}, messages()[0].batch.stream), "the oldest went, or were thinned"
    assert run.said("back after")
    assert not run.said("Traceback")


@needs_mosquitto
async def test_p5_a_disk_that_is_full_before_the_start_is_no_reason_not_to_start(
    tmp_path: Path, disk: Disk
) -> None:
    port = free_port()
    told = backlog(disk.journal)
    assert disk.ballast.exists()
    disk.fill()
    async with field() as meter:
        with (
            mosquitto(tmp_path, port),
            Subscriber(port) as seen,
            gateway(tmp_path, site(disk, port, meter)) as run,
        ):
            await until(lambda: len(seen.batches("data")) > 5, "live batches")
            await scans_go_on(meter)
            await until(lambda: whole(seen.batches(*KINDS)).covers(1, told[-1].batch.last), "the backlog")
            await stop(run)
    is_sound(seen.batches(*KINDS))
    assert {message.batch.stream for message in seen.batches(*KINDS)} == {told[0].stream}


@needs_mosquitto
async def test_p5_where_others_take_even_the_freed_room_records_wait_in_memory(
    tmp_path: Path, disk: Disk
) -> None:
    port = free_port()
    backlog(disk.journal)
    async with field() as meter:
        with (
            mosquitto(tmp_path, port),
            Subscriber(port) as seen,
            gateway(tmp_path, site(disk, port, meter)) as run,
        ):
            await until(lambda: len(seen.batches("data")) > 5 and disk.ballast.exists(), "batches")
            disk.ballast.unlink()  # it is theirs before it is ours
            disk.fill()
            await until(lambda: run.said("the disk is full"), "the failure")
            await scans_go_on(meter, 100)
            assert disk.bytes <= MAX_SIZE
            disk.free()
            await until(lambda: run.said("back after"), "the recovery")
            await until(lambda: whole(seen.batches(*KINDS)).covers(1, head(disk) - 50), "all or its gap")
            await stop(run)
            await until(lambda: whole(seen.batches(*KINDS)).covers(1, head(disk)), "all or its gap")
    is_sound(seen.batches(*KINDS))
    counts = [n for n in numbers({m.body for m in seen.batches(*KINDS)}) if n < 10_000_000]
    assert len(counts) == max(counts), "what waited for half a minute was not too much"


@needs_mosquitto
async def test_p5_a_disk_that_turns_read_only_stops_neither_polling_nor_the_daemon(
    tmp_path: Path, disk: Disk
) -> None:
    port = free_port()
    backlog(disk.journal, MIB // 4)
    async with field() as meter:
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, site(disk, port, meter)) as run:
                await until(lambda: len(seen.batches("data")) > 5, "batches")
                disk.break_down()
                await until(lambda: run.said("records wait in memory"), "the failure")
                told = len(seen.batches(*KINDS))
                await scans_go_on(meter, 100)
                assert len(seen.batches(*KINDS)) <= told + 20, "nothing is sent that is not on the disk"
                run.send(signal.SIGTERM)
                await asyncio.to_thread(run.end)
                assert not run.said("Traceback")
            disk.unmount()
            tool("fsck.ext4", "-y", str(disk.image), check=False)
            disk.mount()
            with gateway(tmp_path, site(disk, port, meter)) as run:
                before = len(seen.batches("data"))
                await until(lambda: len(seen.batches("data")) > before + 5, "batches again")
                await until(lambda: whole(seen.batches(*KINDS)).covers(1, head(disk) - 50), "all of it")
                await stop(run)
                await until(lambda: whole(seen.batches(*KINDS)).covers(1, head(disk)), "all of it")
    is_sound(seen.batches(*KINDS))


@needs_mosquitto
async def test_p1_a_power_cut_that_damages_the_wal_makes_no_seq_be_used_twice(
    tmp_path: Path, disk: Disk
) -> None:
    port = free_port()
    async with field() as meter:
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, site(disk, port, meter)) as run:
                await until(lambda: len(seen.batches("data")) > 60, "batches")
                disk.cut_power()
                run.send(signal.SIGKILL)
                await asyncio.to_thread(run.end)
            disk.unmount()
            disk.mount()
            wal = bytearray((disk.path / "journal.db-wal").read_bytes())
            salts = wal[16:24]
            ends = [at for at in range(32, len(wal) - FRAME + 1, FRAME) if wal[at + 8 : at + 16] == salts]
            wal[ends[-12] + 500] ^= 1
            (disk.path / "journal.db-wal").write_bytes(wal)
            before = len(seen.batches("data"))
            with gateway(tmp_path, site(disk, port, meter)) as run:
                await until(lambda: len(seen.batches("data")) > before + 20, "batches again")
                await stop(run)
            await until(lambda: whole(seen.batches(*KINDS)).covers(1, head(disk)), "all of it, or its gap")
    bodies: dict[tuple[str, int], bytes] = {}
    for message in seen.batches(*KINDS):
        key = (message.batch.stream, message.batch.seq)
        assert bodies.setdefault(key, message.body) == message.body, f"{key} came twice"
    is_sound(seen.batches(*KINDS))
    assert named(bodies.values(), seen.batches("data")[0].batch.stream), "what was behind the damage is named"


FAULTS = {
    "one fdatasync fails": "inject=fdatasync:error=EIO:when=30",
    "writes fail for a while": "inject=pwrite64:error=ENOSPC:when=300..312",
    "fdatasync stalls": "inject=fdatasync:delay_enter=200000:when=20+",
}


@needs_strace
@needs_mosquitto
@pytest.mark.parametrize("fault", list(FAULTS))
async def test_p5_a_call_that_fails_or_stalls_loses_nothing(tmp_path: Path, fault: str) -> None:
    port = free_port()
    strace = ("strace", "-D", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=fdatasync,pwrite64")
    async with field() as meter:
        made = config(port, {"m": device(meter.port, every="20ms")}, journal={"commit_interval": "50ms"})
        with mosquitto(tmp_path, port), Subscriber(port) as seen:
            with gateway(tmp_path, made, *strace, "-e", FAULTS[fault]) as run:
                await until(lambda: meter.counts[1] > 150, "scans")
                if "fail" in fault:
                    await until(lambda: run.said("back after"), "the failure, and its end")
                await scans_go_on(meter)
                await stop(run)
            reader = Reader(tmp_path / "journal.db")
            last = reader.tip().head
            reader.close()
            await until(lambda: whole(seen.batches(*KINDS)).covers(1, last), "all of it")
    is_sound(seen.batches(*KINDS))
    counts = sorted(numbers({message.body for message in seen.batches(*KINDS)}))
    assert counts == list(range(1, len(counts) + 1))
    assert "INJECTED" in (tmp_path / "trace").read_text() or "DELAYED" in (tmp_path / "trace").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB in memory, where one can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not tool("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder), check=False).returncode
    )
    if not mounted:
        pytest.skip("needs root for a disk of its own")
    yield folder
    tool("umount", "-l", str(folder), check=False)


def fill(folder: Path) -> Path:
    """Have others take all that is free."""
    hog = folder / f"others{len(list(folder.iterdir()))}"
    with suppress(OSError), hog.open("wb", buffering=0) as file:
        while file.write(bytes(64 * 1024)) == 64 * 1024:
            pass
    return hog


@pytest.mark.parametrize("records", [5, 2_000])
def test_p5_a_disk_that_others_fill_costs_no_record_while_there_is_room_and_names_do_not_breed(
    small_disk: Path, records: int
) -> None:
    """The defaults, no broker, and `dd`: what the ballast gave back is for what comes."""
    hand = Hand(small_disk / "journal.db", journal_config(1024 * MIB, when_full="thin"))
    hand.turn(*(scan(n) for n in range(records)))
    hog = fill(small_disk)
    for n in range(records, records + 60):
        hand.turn(scan(n))
    assert hand.writer._headroom.confined, "the disk was full"
    assert hand.writer.error is None
    assert hand.told[-1].batch.last == records + 61, "a record each, and the stream event"
    assert not named((one.body for one in hand.told), hand.told[0].stream)
    hog.unlink()
    hand.turn(scan(records + 60))
    hand.close()
    assert numbers(kept(hand.path).bodies.values()) == list(range(records + 61))


def test_p5_on_a_disk_without_room_the_oldest_go_as_room_demands_and_one_range_names_them(
    small_disk: Path,
) -> None:
    """For days: each record costs an old one, and what named a loss is named with it."""
    hand = Hand(small_disk / "journal.db", journal_config(1024 * MIB, when_full="drop"))
    hand.turn(*(scan(n) for n in range(2_000)))
    fill(small_disk)
    while not hand.writer._headroom.confined or hand.writer.error:
        hand.turn(scan(2_000))
    before = len(hand.told)
    fill(small_disk)
    while not any(gaps_in(one.body, one.stream) for one in hand.told[before:]):
        hand.turn(*(scan(hand.told[-1].batch.last + n, 60, width=3) for n in range(20)))
    sizes = []
    for turn in range(300):
        hand.turn(*(scan(hand.told[-1].batch.last + n, 60, width=3) for n in range(20)))
        if turn % 20 == 0:
            sizes.append(sum(batch.size for batch in kept(hand.path).batches.values()))
    gaps = [gap for one in hand.told for gap in gaps_in(one.body, one.stream)]
    held = kept(hand.path)
    last = max(gap["to"] for gap in gaps)
    assert gaps[-1]["from"] == 1, "one range from the first that went"
    assert Ranges((gap["from"], gap["to"]) for gap in gaps).covers(1, last)
    assert min(held.bodies) > last - 100, "what is named is gone, and nothing else"
    assert sum(len(gaps_in(body, held.stream)) for body in held.bodies.values()) < 250
    assert len(gaps) < 700, "events about what went are few: one a turn, or two"
    assert min(sizes) > max(sizes) / 2, "no more goes than room demands"
    hand.close()
