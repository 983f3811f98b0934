"""What the journal does when the disk, the file or the reader of its mark does not do its part."""

import asyncio
import gc
import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import apsw
import powercut
import pytest
from journal_rig import (
    MIB,
    Hand,
    Told,
    chain,
    config,
    covered,
    event,
    gaps_in,
    kept,
    named,
    numbers,
    scan,
    spoil,
)
from powercut import Disk, disk

from edgegw.domain.batch import Kind
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Scan
from edgegw.errors import JournalDamaged, JournalError
from edgegw.journal import inbox
from edgegw.journal.journal import Found, Journal
from edgegw.journal.mark import Mark, MarkFile
from edgegw.journal.store import FRAME, PAGE, Reader, Store, delete_set_aside, set_aside, unpack, walk

DEADLINE_S = 60.0


def filled(path: Path, turns: int = 40, **more: Any) -> Hand:
    """Return an open journal of a few dozen batches."""
    hand = Hand(path, config(), **more)
    for n in range(turns):
        hand.turn(scan(n, 30))
    return hand


def events(told: list[Told], name: str) -> list[dict[str, Any]]:
    """Return the events of a name, in order."""
    return [record for one in told for record in one.records if record.get("event") == name]


# -- power cut -----------------------------------------------------------------------------------------------


def live(at: Path, left: Path, seed: int, first: int) -> tuple[dict[int, bytes], int]:
    """Run the journal in `at` until the power goes; return what had been told by then, and the turns it took."""
    dice = random.Random(seed)
    countdown = dice.randrange(1, 100)
    told: list[Told] = []
    marks: list[bytes] = []
    known: dict[int, bytes] | None = None

    def moment() -> None:
        nonlocal countdown, known
        countdown -= 1
        if countdown == 0:
            known = {one.batch.seq: one.body for one in told}
            under.left(left)
            if marks:  # what is synced of it is older than what the page cache has
                (left / "journal.db.mark").write_bytes(dice.choice(marks))

    with disk(seed) as under:
        under.moment = moment
        hand = Hand(at / "journal.db", config(4 * MIB))
        hand.told = told
        turns = 0
        while known is None:
            if hand.mark.exists():
                marks.append(hand.mark.read_bytes())
            records = [scan(first + turns * 4 + i, 1 + dice.randrange(400)) for i in range(dice.randrange(4))]
            hand.acknowledge(one for one in hand.turn(*records) if dice.random() < 0.5)
            turns += 1
        under.moment = lambda: None
        del hand
        gc.collect()  # its files are closed while they are still this disk's
    return known, turns


def test_p1_after_a_power_cut_at_any_write_all_that_was_told_is_there_and_no_seq_is_used_twice(
    tmp_path: Path,
) -> None:
    """Sixty lives of one journal, each ended by a cut at a random write or sync of the one before."""
    (tmp_path / "0").mkdir()
    bodies: dict[int, bytes] = {}  # all that anyone was ever told of
    streams = set()
    turns = 0
    for cut in range(60):
        left = tmp_path / str(cut + 1)
        known, took = live(tmp_path / str(cut), left, cut, turns * 4)
        turns += took
        look = Hand(Path(shutil.copytree(left, tmp_path / "look", dirs_exist_ok=True)) / "journal.db")
        found = kept(look.path)
        assert look.writer.error is None
        assert look.writer.stream == found.stream
        if known or bodies:
            streams.add(found.stream)
        for seq, body in known.items():
            assert bodies.setdefault(seq, body) == body, f"seq {seq} is used twice"
        for seq, body in bodies.items():
            assert found.bodies[seq] == body, f"seq {seq} was told of"
        bodies |= found.bodies  # durable, though nobody heard of it yet: a drain may send it from now on
        assert chain(found.bodies.values()).intact
        shutil.rmtree(tmp_path / "look")
    assert turns > 100, turns
    assert len(streams) == 1, "a power cut makes no new stream"
    assert numbers(bodies[seq] for seq in sorted(bodies)) == sorted(numbers(bodies.values()))


def test_the_disk_of_the_power_cut_tests_does_lose_what_is_not_synced(tmp_path: Path) -> None:
    """With synchronous=OFF the same cuts lose what was committed: the test above can fail."""
    lost = 0
    for seed in range(20):
        with disk(seed) as under:
            db = apsw.Connection(str(tmp_path / f"{seed}.db"))
            db.pragma("journal_mode", "wal")
            db.pragma("synchronous", "OFF")
            db.execute("CREATE TABLE t(x)")
            for x in range(20):
                db.execute("INSERT INTO t VALUES (?)", (x,))
            under.left(tmp_path / f"left{seed}")
            db.close()
        file = tmp_path / f"left{seed}" / f"{seed}.db"
        try:
            lost += apsw.Connection(str(file)).execute("SELECT count(*) FROM t").get != 20
        except apsw.Error:
            lost += 1
    assert lost >= 18


def test_p1_what_a_failed_sync_left_behind_is_told_only_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed sync the kernel forgets what it did not write; whoever opens the file still reads it."""
    real, failing = powercut._File.xSync, 0

    def sync(self: Any, flags: int) -> None:
        nonlocal failing
        if failing:
            failing -= 1
            self._image.since.clear()
            raise apsw.IOError("for the test")
        real(self, flags)

    monkeypatch.setattr(powercut._File, "xSync", sync)
    (tmp_path / "a").mkdir()
    with disk(1) as under:
        hand = Hand(tmp_path / "a" / "journal.db", config(4 * MIB))
        hand.turn(scan(1))
        failing = 4  # of the commit, and of the checkpoints as the file is closed
        hand.turn(scan(2))
        assert hand.writer.error
        failing = 0
        hand.turn()
        assert numbers(one.body for one in hand.told) == [1, 2]
        under.left(tmp_path / "left")
        hand.writer.close()
    found = kept(tmp_path / "left" / "journal.db")
    assert list(found.bodies.values()) == [one.body for one in hand.told]


# -- flipped bytes -------------------------------------------------------------------------------------------


class Drained:
    """What a drain gets that reads a journal from the first pending seq to the head, through its own file."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand
        self.bodies: dict[tuple[str, int], bytes] = {}
        journal = self.journal = Journal.__new__(Journal)  # its reading half, without a thread or a loop
        journal.path, journal._inbox, journal._settled = hand.path, hand.inbox, hand.settled
        journal._writer, journal._reader = hand.writer, None

    def drain(self) -> None:
        """Read all that is pending, as often as it takes for nothing new to be found."""
        for _ in range(4):
            self.hand.turn()
            tried = self.hand.settled.copy()
            while (gap := next(tried.gaps(1, self.hand.writer.head), None)) is not None:
                try:
                    found: Found = self.journal._read(*gap, 16)
                except JournalError:
                    break  # the writer has been told
                for batch, body in found.batches:
                    if body is not None:
                        assert self.bodies.setdefault((batch.stream, batch.seq), body) == body
                tried.add(gap[0], found.through)

    def close(self) -> None:
        """Close reader and writer."""
        self.journal._close_reader()
        self.hand.close()


def flip(file: Path, dice: random.Random, bits: int = 1, within: range | None = None) -> int:
    """Turn over one bit of a byte somewhere in a file; return where."""
    content = bytearray(file.read_bytes())
    at = dice.choice(within or range(len(content)))
    for _ in range(bits):
        content[at] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return at


def judge(told: list[Told], drained: Drained) -> str:
    """Check that nothing wrong was delivered and that all that was not is named; tell how bad it was."""
    truth = {(one.stream, one.batch.seq): one.body for one in told}
    stream = told[0].stream
    for key, body in drained.bodies.items():
        assert truth.setdefault(key, body) == body, f"other bytes were delivered for {key}"
    mine = [body for (of, _), body in drained.bodies.items() if of == stream]
    everything = list(drained.bodies.values())
    gone = named(everything, stream)
    whole = covered(mine)
    for first, last in gone:
        whole.add(first, last)
    head = told[-1].batch.last
    assert whole.covers(1, head), f"neither there nor named: {list(whole.gaps(1, head))}"
    for of in {of for of, _ in drained.bodies}:
        report = chain([body for (this, _), body in drained.bodies.items() if this == of])
        assert not report.breaks, report
    if drained.hand.writer.stream != stream:
        began = [
            r for body in everything for r in Told(stream, ANY, body).records if r.get("event") == "stream"
        ]
        assert began[-1]["previous"] == stream
        return "new stream"
    if sum(last - first + 1 for first, last in gone) > 2 * 3:
        return "stretch"  # a page that leads to others was hit
    return "batch" if gone else "nothing"


def test_a_flipped_bit_in_the_database_costs_its_batch_alone_or_is_named(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 60)
    hand.close()
    outcomes = {"nothing": 0, "batch": 0, "stretch": 0, "new stream": 0}
    for seed in range(150):
        dice = random.Random(seed)
        path = hand.copy_to(tmp_path / "hit")
        flip(path, dice)
        drained = Drained(Hand(path, config()))
        drained.hand.turn(scan(1000))  # life goes on
        drained.drain()
        assert numbers(one.body for one in drained.hand.told) == [1000]
        drained.close()
        outcomes[judge(hand.told, drained)] += 1
        shutil.rmtree(path.parent)
    assert outcomes["batch"] > 75, outcomes
    assert outcomes["new stream"] < 25, outcomes
    assert outcomes["stretch"] <= 3, outcomes


def pages(path: Path, *tables: str) -> list[int]:
    """Return where the pages of some tables and indexes begin in a file."""
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows: Any = db.execute("SELECT name, pgoffset FROM dbstat").fetchall()
    finally:
        db.close(True)
    return [offset for name, offset in rows if name in tables]


def test_a_flipped_bit_beside_the_readings_hides_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In spans, wear, what is settled, summaries and their indexes: what is delivered and found stays true."""
    monkeypatch.setattr("edgegw.journal.spanner.BATCHES", 4)
    monkeypatch.setattr("edgegw.journal.keeper.THIN_BATCHES", 40)
    hand = Hand(tmp_path / "journal.db", config(when_full="thin"))
    for n in range(100):
        hand.turn(*(scan(10 * n + i) for i in range(10)))
    assert hand.thin()
    acked = [one for one in hand.told[60:] if one.batch.seq % 3]
    hand.acknowledge(acked)
    hand.close()
    whole = kept(hand.path)
    told = [Told(whole.stream, batch, whole.bodies[seq]) for seq, batch in sorted(whole.batches.items())]
    assert any(one.batch.kind is Kind.SUMMARY for one in told)
    wanted = [one.batch.seq for one in told if one.batch.kind is Kind.DATA and one.batch.seq > 600][:3]
    times = [record["ts"] for seq in wanted for record in json.loads(whole.bodies[seq])["records"]]
    aims = pages(hand.path, "span", "wear", "acked", "summary_bytes", "summary_seq")
    aims += [offset for offset in pages(hand.path, "batch") if offset not in aims][:4]
    assert len(aims) > 6
    outcomes: Counter[str] = Counter()
    for seed in range(200):
        dice = random.Random(seed)
        path = hand.copy_to(tmp_path / "hit")
        page = dice.choice(aims)
        flip(path, dice, within=range(page, page + PAGE))
        with suppress(JournalError):  # it is said
            reader = Reader(path)
            try:
                found = Ranges(reader.spans_between(min(times), max(times)))
            finally:
                reader.close()
            assert all(found.covers(seq, seq) for seq in wanted)
        drained = Drained(Hand(path, config(when_full="thin")))
        drained.bodies = {(one.stream, one.batch.seq): one.body for one in acked}
        drained.hand.turn(scan(100_000))
        assert drained.hand.writer.error is None
        drained.drain()
        drained.close()
        outcomes[judge(told, drained)] += 1
        shutil.rmtree(path.parent)
    assert outcomes["new stream"] < 40, outcomes


def test_a_flipped_bit_under_a_running_journal_never_delivers_a_wrong_batch(tmp_path: Path) -> None:
    """The writer is open and knows its pages; the reader sees what the disk has now."""
    for seed in range(60):
        dice = random.Random(seed)
        path = tmp_path / str(seed) / "journal.db"
        path.parent.mkdir()
        hand = filled(path, 12)
        store = hand.writer._store
        assert store is not None
        store.checkpoint(force=True)
        before = list(hand.told)
        with path.open("r+b") as file:  # in place: the open connections see it
            at = dice.randrange(4096, path.stat().st_size)
            file.seek(at)
            byte = file.read(1)[0] ^ (1 << dice.randrange(8))
            file.seek(at)
            file.write(bytes((byte,)))
        drained = Drained(hand)
        hand.turn(scan(1000))
        drained.drain()
        assert hand.writer.error is None
        drained.close()
        judge(before, drained)


def test_a_flipped_bit_in_the_wal_of_a_killed_journal_is_found_and_named(tmp_path: Path) -> None:
    """SQLite silently drops all commits from the flip on; the mark beside the journal knows better."""
    hand = filled(tmp_path / "journal.db", 40)
    outcomes = {"nothing": 0, "batch": 0, "new stream": 0}
    for seed in range(60):
        path = hand.copy_to(tmp_path / "hit")
        flip(path.with_name("journal.db-wal"), random.Random(seed))
        drained = Drained(Hand(path, config()))
        drained.hand.turn(scan(1000))
        drained.drain()
        drained.close()
        outcomes[judge(hand.told, drained)] += 1
        shutil.rmtree(path.parent)
    assert outcomes["new stream"] > 40, outcomes
    hand.close()


def frames(wal: Path) -> list[tuple[int, bool]]:
    """Return where the frames of a WAL begin that are of its present life, and whether each ends a commit."""
    content = wal.read_bytes()
    return [
        (at, content[at + 4 : at + 8] != bytes(4))
        for at in range(32, len(content) - FRAME + 1, FRAME)
        if content[at + 8 : at + 16] == content[16:24]
    ]


def test_p1_a_flipped_bit_in_the_wal_after_a_power_cut_makes_no_seq_be_used_twice(tmp_path: Path) -> None:
    """The mark has gone back with the power: only the frames behind the damage tell how far the journal had come."""
    hand = Hand(tmp_path / "journal.db", config())
    hand.turn(scan(0))
    early = hand.mark.read_bytes()
    marked = len(frames(hand.path.with_name("journal.db-wal")))
    dice = random.Random(1)
    for n in range(1, 40):
        hand.turn(*(scan(100 * n + i, 1 + dice.randrange(60)) for i in range(1 + dice.randrange(5))))
    hit = [at for at, _ in frames(hand.path.with_name("journal.db-wal"))]
    outcomes: Counter[str] = Counter()
    for seed in range(150):
        dice = random.Random(seed)
        path = hand.copy_to(tmp_path / "hit")
        path.with_name("journal.db.mark").write_bytes(early)
        at = dice.choice(hit[marked:])
        begin = at + 24 if at == hit[-1] else at  # the last commit's own header alone says that it was one
        flip(path.with_name("journal.db-wal"), dice, within=range(begin, at + FRAME))
        drained = Drained(Hand(path, config()))
        drained.hand.turn(scan(10_000))
        drained.drain()
        drained.close()
        outcomes[judge(hand.told, drained)] += 1
        shutil.rmtree(path.parent)
    assert outcomes["new stream"] == 0, "what is before the damage is kept, and sent"
    assert outcomes["stretch"] > 100, outcomes
    hand.close()


def test_a_commit_that_a_kill_cut_short_is_no_reason_to_skip_seqs(tmp_path: Path) -> None:
    """Its frames are there and no commit: nobody was told of it, and its seqs are free."""
    hand = filled(tmp_path / "journal.db", 20)
    *_, (_, before_commits), (last, commits) = frames(hand.path.with_name("journal.db-wal"))
    assert commits
    assert not before_commits, "a transaction of several frames"
    path = hand.copy_to(tmp_path / "cut")
    os.truncate(path.with_name("journal.db-wal"), last)
    path.with_name("journal.db.mark").write_bytes(b"")
    again = Hand(path, config())
    (told,) = again.turn(scan(1000))
    assert told.batch.seq == hand.told[-1].batch.seq
    again.close()
    hand.close()


def test_a_wal_cut_short_is_an_older_copy(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 30)
    for part in (0.9, 0.5, 0.1, 0.0):
        path = hand.copy_to(tmp_path / "cut")
        wal = path.with_name("journal.db-wal")
        os.truncate(wal, int(wal.stat().st_size * part))
        drained = Drained(Hand(path, config()))
        drained.drain()
        drained.close()
        assert judge(hand.told, drained) == "new stream"
        shutil.rmtree(path.parent)
    hand.close()


def test_the_newest_batch_damaged_costs_itself_alone_when_the_mark_vouches_for_it(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 20)
    hand.close()
    newest = hand.told[-1].batch
    content = bytearray(hand.path.read_bytes())
    at = content.find(newest.packed[-60:])
    assert at > 0
    content[at + 30] ^= 4
    hand.path.write_bytes(content)
    drained = Drained(Hand(hand.path, config()))
    after = drained.hand.turn(scan(1000))
    drained.drain()
    drained.close()
    assert judge(hand.told, drained) == "batch"
    (gap,) = events(after, "gap")
    assert gap == {
        "ts": ANY, "event": "gap", "from": newest.seq, "to": newest.last, "reason": "damaged",
        "last_prev": newest.digest.hex(),
    }  # fmt: skip


def test_an_acknowledged_batch_that_is_damaged_goes_without_a_gap(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 20)
    hand.acknowledge(hand.told[:10])
    spoil(hand.path, 5)
    hand.inbox.tell(inbox.Damage(hand.writer.stream, "for the test", 5, 5))
    assert hand.turn(event(1))[0].batch.count == 1
    assert 5 not in kept(hand.path).bodies
    assert hand.settled.pending_batches == 12
    hand.close()


def test_the_newest_batch_damaged_leaves_a_tip_though_it_was_acknowledged(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 3)
    hand.acknowledge(hand.told)
    spoil(hand.path, 4)
    hand.inbox.tell(inbox.Damage(hand.writer.stream, "for the test", 4, 4))
    (gap,) = events(hand.turn(), "gap")
    assert (gap["from"], gap["to"]) == (4, 4)
    hand.close()
    assert kept(hand.path).head == 5


def test_a_single_misread_costs_neither_a_batch_nor_the_file(tmp_path: Path) -> None:
    """What a reader found damaged, missing, or no journal at all, the writer reads once more by itself."""
    hand = filled(tmp_path / "journal.db", 10)
    stream = hand.writer.stream
    hand.inbox.tell(inbox.Damage(stream, "batch 5: its bytes do not give its hash", 5, 5))
    hand.inbox.tell(inbox.Damage(stream, "records 7 to 9 are not there", 7, 9))
    hand.inbox.tell(inbox.Damage(stream, "a page is not a page"))
    told = hand.turn(scan(1000))
    assert hand.writer.error is None
    assert hand.writer.stream == stream
    assert not events(told, "gap")
    assert covered(kept(hand.path).bodies.values()).covers(1, 12)
    assert hand.settled.pending_batches == 12
    hand.close()


async def test_a_batch_that_is_misread_once_is_sent_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.close()
    journal = Journal(hand.path, "site-7", config(), 128 * 1024)
    journal.start()
    await journal.opened.wait()
    misread = iter([True])

    def once(batch: Any) -> bytes:
        if batch.seq == 5 and next(misread, False):
            raise JournalDamaged(f"batch {batch.seq}: its bytes do not give its hash")
        return unpack(batch)

    monkeypatch.setattr("edgegw.journal.journal.unpack", once)
    found = await journal.read(1, 11, 100)
    assert [batch.seq for batch, body in found.batches if body is None] == [5]
    await journal.flush()
    found = await journal.read(1, 11, 100)
    assert [body for _, body in found.batches] == [one.body for one in hand.told]
    assert await journal.close()


def test_damage_of_a_stream_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 5)
    hand.inbox.tell(inbox.Damage("another", "for the test", 2, 2))
    hand.inbox.tell(inbox.Damage("another", "for the test"))
    assert not events(hand.turn(scan(1000)), "gap")
    assert len(kept(hand.path).bodies) == 7
    hand.close()


# -- files that are not what they should be ------------------------------------------------------------------


def test_a_broken_header_sets_the_file_aside_and_begins_a_new_stream(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.acknowledge(hand.told[:4])
    hand.close()
    with hand.path.open("r+b") as file:
        file.write(b"not a database at all")
    broken = hand.path.read_bytes()
    again = Hand(hand.path, config())
    told = again.turn(scan(1000))
    assert again.writer.error is None
    (aside,) = tmp_path.glob("journal.db.2*Z")
    assert aside.read_bytes() == broken
    assert again.writer.stream != hand.writer.stream
    assert told[0].batch.seq == 1
    assert events(told, "stream") == [
        {
            "ts": ANY, "event": "stream", "reason": "damaged", "set_aside": aside.name,
            "previous": hand.writer.stream, "previous_head": 11,
        }
    ]  # fmt: skip
    assert named((one.body for one in told), hand.writer.stream).covers(5, 11)
    assert numbers(one.body for one in told) == [1000]
    again.close()


def test_no_log_of_a_file_set_aside_stays_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for suffix in ("", "-wal", "-journal", "-shm"):
        path.with_name(f"journal.db{suffix}").write_text(suffix)
    assert set_aside(path, "today") == tmp_path / "journal.db.today"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "journal.db.today": "", "journal.db.today-wal": "-wal", "journal.db.today-journal": "-journal",
    }  # fmt: skip


def test_a_damage_found_while_running_is_named_from_what_memory_knows(tmp_path: Path) -> None:
    """The file can no longer say what was acknowledged; the process can."""
    hand = filled(tmp_path / "journal.db", 10)
    hand.acknowledge(hand.told[:4])
    stream = hand.writer.stream
    assert hand.writer._store is not None
    hand.writer._store.checkpoint(force=True)
    with hand.path.open("r+b") as file:
        file.seek(PAGE)
        while file.write(b"\xff" * 16) and file.seek(PAGE - 16, os.SEEK_CUR) < hand.path.stat().st_size:
            pass  # every page but the first begins with what begins no page
    hand.inbox.tell(inbox.Damage(stream, "for the test: a page is not a page"))
    told = hand.turn(scan(1000))
    assert hand.writer.error is None
    assert hand.writer.stream != stream
    assert list(named((one.body for one in told), stream)) == [(5, 11)]
    assert numbers(one.body for one in told) == [1000]
    assert hand.settled.pending_batches == 2
    hand.close()


def test_after_a_file_was_set_aside_the_new_one_has_a_wal_of_its_own(tmp_path: Path) -> None:
    """SQLite unlinks a WAL by its name when a connection closes; that of the file set aside takes no other's."""
    hand = filled(tmp_path / "journal.db", 60)
    hand.close()
    content = bytearray(hand.path.read_bytes())
    content[4096 * 3 : 4096 * 3 + 16] = b"\xff" * 16  # a page that only the check at the start finds
    hand.path.write_bytes(content)
    hand.mark.unlink()
    again = Hand(hand.path, config())
    again.turn(scan(1000))
    assert again.writer.stream != hand.writer.stream
    gc.collect()
    again.turn(scan(1001))
    assert numbers(kept(again.copy_to(tmp_path / "killed")).bodies.values()) == [1000, 1001]
    again.close()


def test_an_older_copy_put_back_begins_a_new_stream_and_names_what_it_lacks(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.acknowledge(hand.told[:3])
    hand.close()
    old = hand.path.read_bytes()
    again = Hand(hand.path, config())
    for n in range(10, 20):
        again.turn(scan(n))
    again.close()
    hand.path.write_bytes(old)
    third = Hand(hand.path, config())
    told = third.turn(scan(1000))
    (aside,) = tmp_path.glob("journal.db.2*Z")
    assert aside.read_bytes() == old
    (began,) = events(told, "stream")
    assert (began["reason"], began["previous"], began["previous_head"]) == (
        "older-copy", hand.writer.stream, 21,
    )  # fmt: skip
    assert list(named((one.body for one in told), hand.writer.stream)) == [(4, 21)]
    assert third.writer.stream != hand.writer.stream
    third.close()


def test_a_journal_put_beside_another_ones_mark_is_not_continued_and_both_are_named(tmp_path: Path) -> None:
    hand, other = filled(tmp_path / "journal.db", 10), filled(tmp_path / "other.db", 5)
    other.acknowledge(other.told[:2])
    hand.close()
    other.close()
    shutil.copyfile(other.path, hand.path)
    again = Hand(hand.path, config())
    told = again.turn()
    bodies = [one.body for one in told]
    assert events(told, "stream")[0]["reason"] == "older-copy"
    assert list(named(bodies, hand.writer.stream)) == [(1, 11)]
    assert list(named(bodies, other.writer.stream)) == [(3, 6)]
    assert again.writer.stream not in (hand.writer.stream, other.writer.stream)
    again.close()


def test_a_lost_file_is_named_by_its_mark(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.close()
    hand.path.unlink()
    again = Hand(hand.path, config())
    killed = Hand(again.copy_to(tmp_path / "killed"), config())  # before it could say so
    for one in (again, killed):
        told = one.turn(scan(1000))
        (began,) = events(told, "stream")
        assert (began["reason"], began["previous"], began["previous_head"]) == (
            "lost", hand.writer.stream, 11,
        )  # fmt: skip
        assert list(named((made.body for made in told), hand.writer.stream)) == [(1, 11)]
        one.close()
    mark = MarkFile(hand.path).read()
    assert mark
    assert mark.stream == again.writer.stream


def test_an_empty_file_is_a_lost_one(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.close()
    os.truncate(hand.path, 0)
    again = Hand(hand.path, config())
    assert events(again.turn(), "stream")[0]["reason"] == "lost"
    again.close()


def test_a_journal_without_its_mark_begins_a_new_stream_and_uses_no_seq_twice(tmp_path: Path) -> None:
    """As when only the database is restored: how far it had come nobody can say."""
    hand = filled(tmp_path / "journal.db", 10)
    hand.acknowledge(hand.told[:4])
    hand.close()
    hand.mark.unlink()
    again = Hand(hand.path, config())
    told = again.turn(scan(1000))
    (began,) = events(told, "stream")
    assert (began["reason"], began["previous"], began["previous_head"]) == (
        "older-copy", hand.writer.stream, 11,
    )  # fmt: skip
    assert list(named((one.body for one in told), hand.writer.stream)) == [(5, 11)]
    assert again.writer.stream != hand.writer.stream
    again.close()


def test_a_streams_first_commit_is_marked_on_the_disk_before_anyone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    for name in ("fdatasync", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, real=real: (synced.append(os.fstat(fd).st_ino), real(fd)))
    hand = Hand(tmp_path / "journal.db", config())
    heard: list[tuple[Mark | None, set[int]]] = []
    hand.listener = lambda told: heard.append((MarkFile(hand.path).read(), set(synced)))
    hand.turn(scan(1))
    mark, done = heard[0]
    assert mark == Mark(hand.writer.stream, 2, hand.told[-1].batch.digest.hex(), clean=False)
    assert {hand.mark.stat().st_ino, tmp_path.stat().st_ino} <= done
    hand.close()


@pytest.mark.parametrize("spoil", ["empty", "torn", "flipped", "nonsense"])
def test_a_mark_that_cannot_be_read_costs_nothing(tmp_path: Path, spoil: str) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.close()
    line = hand.mark.read_bytes()
    match spoil:
        case "empty":
            hand.mark.write_bytes(b"")
        case "torn":
            hand.mark.write_bytes(line[:60])
        case "flipped":
            hand.mark.write_bytes(line.replace(b'"head":11', b'"head":91'))
        case "nonsense":
            hand.mark.write_bytes(b"\xff" * len(line))
    again = Hand(hand.path, config())
    assert again.writer.stream == hand.writer.stream
    assert again.turn(scan(1000))[0].batch.seq == 12
    again.close()
    mark = MarkFile(hand.path).read()
    assert mark
    assert mark.head == 12


def test_any_bit_flipped_in_the_mark_costs_nothing(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 3)
    hand.close()
    line = hand.mark.read_bytes()
    for at in range(len(line)):
        hand.mark.write_bytes(line[:at] + bytes((line[at] ^ (1 << at % 8),)) + line[at + 1 :])
        assert hand.writer._mark.read() in (None, MarkFile(hand.path).read())
        assert hand.writer._mark.read() is None


@pytest.mark.parametrize("found", ["sqlite", "text", "later"])
def test_a_file_that_is_no_journal_is_set_aside_unharmed(tmp_path: Path, found: str) -> None:
    path = tmp_path / "journal.db"
    if found == "text":
        path.write_text("a note to myself" * 1000)
    else:
        db = apsw.Connection(str(path))
        db.execute("CREATE TABLE precious(x); INSERT INTO precious VALUES (42)")
        if found == "later":
            db.pragma("application_id", 0x65646777)
            db.pragma("user_version", 99)
        db.close()
    hand = Hand(path, config())
    told = hand.turn(scan(1))
    (aside,) = tmp_path.glob("journal.db.2*Z")
    assert events(told, "stream") == [
        {"ts": ANY, "event": "stream", "reason": "damaged", "set_aside": aside.name}
    ]
    if found == "text":
        assert aside.read_text() == "a note to myself" * 1000
    else:
        assert apsw.Connection(str(aside)).execute("SELECT x FROM precious").get == 42
    hand.close()


def test_a_damaged_file_that_cannot_be_set_aside_waits_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = filled(tmp_path / "journal.db", 5)
    hand.close()
    hand.path.write_bytes(b"broken" * 1000)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)  # root may rename in any folder
    again = Hand(hand.path, config())
    assert again.turn(scan(1000)) == []
    assert again.turn(scan(1001)) == []
    assert "cannot be set aside" in (again.writer.error or "")
    monkeypatch.setattr(Path, "rename", rename)
    told = again.turn(scan(1002))
    assert again.writer.error is None
    assert numbers(one.body for one in told) == [1000, 1001, 1002]
    assert events(told, "stream")[0]["previous"] == hand.writer.stream
    again.close()


# -- the disk ------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Have the kernel refuse writes beyond a size, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))  # Python ignores SIGXFSZ: writes fail instead
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("limit", [0, 4096, 30_000])
def test_p5_on_a_full_disk_records_wait_and_come_when_there_is_room(tmp_path: Path, limit: int) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    stream = hand.writer.stream
    with no_file_larger_than(limit):
        for n in range(1000, 1010):
            hand.turn(scan(n))
        assert hand.writer.error
        assert hand.writer.behind
    told = hand.turn(scan(1010))
    assert hand.writer.error is None
    assert numbers(one.body for one in hand.told) == [*range(10), *range(1000, 1011)]
    assert told
    assert hand.writer.stream == stream
    assert chain(one.body for one in hand.told).intact
    assert list(kept(hand.path).bodies.values()) == [one.body for one in hand.told]
    assert hand.settled.pending_batches == len(hand.told)
    hand.close()


def test_p5_a_full_disk_for_long_loses_what_memory_cannot_hold_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "BYTES", 15_000)
    monkeypatch.setattr("edgegw.journal.writer.WAITING_BYTES", 2000)
    hand = filled(tmp_path / "journal.db", 3)
    with no_file_larger_than(0):
        for n in range(1000, 2000):
            hand.turn(scan(n, 10))
        assert sum(made.size for made in hand.writer._waiting) < 10_000, "memory is bounded"
    hand.turn()
    hand.turn(scan(2000, 10))
    came = numbers(one.body for one in hand.told)
    (gap,) = events(hand.told, "gap")
    assert gap["reason"] == "full"
    assert gap["to"] - gap["from"] + 1 == 1001 - (len(came) - 3), "every lost record has a number"
    assert came == sorted(came)
    assert came[-1] == 2000
    assert chain(one.body for one in hand.told).intact
    hand.close()
    again = Hand(hand.path, config())
    assert again.settled.copy().covers(gap["from"], gap["to"])
    again.close()


def test_p4_events_wait_for_a_disk_that_hangs_within_bounds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused commands cost no more than scans; what control did has room of its own."""
    monkeypatch.setattr(inbox, "BYTES", 50_000)
    monkeypatch.setattr(inbox, "EVENT_BYTES", 30_000)
    hand = filled(tmp_path / "journal.db", 1)
    refused = Event(1, "command", {"id": "x" * 100, "ok": False, "error": "expired 3.0 s ago"})
    acted = Event(2, "write", {"tag": "battery.setpoint_kw", "new": 1.0})
    for _ in range(5_000):
        hand.inbox.put(refused)
    assert hand.inbox._load.bytes < 51_000
    hand.inbox.put(acted)
    for _ in range(5_000):
        hand.inbox.put(Event(3, "authority", {"tag": "battery.setpoint_kw", "owner": "rule:a"}))
    assert hand.inbox._load.bytes < 81_000
    told = hand.turn()
    assert len(events(told, "write")) == 1
    lost = named((one.body for one in told), hand.writer.stream)
    assert hand.writer.head - lost.total() < 10_001 - 5_000, "what found no room is numbered and named"
    assert chain(one.body for one in hand.told).intact
    hand.close()


async def test_flushes_that_nobody_waits_for_are_forgotten_while_a_disk_hangs() -> None:
    waiting = inbox.Inbox(1024)
    loop = asyncio.get_running_loop()
    for _ in range(10 * inbox.WAITING_FLUSHES):
        done: asyncio.Future[None] = loop.create_future()
        waiting.tell(done)
        done.cancel()
    mine: asyncio.Future[None] = loop.create_future()
    waiting.tell(mine)
    flushes = waiting.take().flushes
    assert mine in flushes
    assert len(flushes) <= inbox.WAITING_FLUSHES + 1


def test_files_set_aside_are_bounded_and_what_is_deleted_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for n in range(5):
        hand = filled(path, 20)
        hand.close()
        content = path.read_bytes()
        path.write_bytes(b"no database" + content[11:])
        before = sorted(file.name for file in tmp_path.glob("journal.db.2*Z"))
        again = Hand(path, config())
        told = again.turn()
        again.close()
        aside = sorted(file.name for file in tmp_path.glob("journal.db.2*Z"))
        (began,) = events(told, "stream")
        assert began["set_aside"] == aside[-1]
        assert began.get("deleted", []) == sorted(set(before) - set(aside), reverse=True)
        assert len(aside) == min(n + 1, 2)
    size = path.with_name(aside[0]).stat().st_size
    (tmp_path / "journal.db.note").write_text("not ours")
    assert delete_set_aside(path, 2, size) == aside[:1], "more than they may take in all"
    assert delete_set_aside(path, 2, 0) == [], "the newest stays"
    assert (tmp_path / "journal.db.note").exists()


def test_a_commit_that_fails_after_it_reached_the_disk_is_told_once(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 3)
    store = hand.writer._store
    assert store is not None
    append = store.append

    def append_and_fail(*args: Any, **more: Any) -> None:
        append(*args, **more)
        raise JournalError("for the test: the answer of the disk got lost")

    store.append = append_and_fail  # type: ignore[method-assign]
    hand.acknowledge(hand.told[:1])
    assert hand.turn(scan(1000), scan(1001)) == []
    assert hand.writer.error
    hand.turn(scan(1002))
    assert numbers(one.body for one in hand.told) == [0, 1, 2, 1000, 1001, 1002]
    assert chain(one.body for one in hand.told).intact
    assert hand.settled.pending_batches == len(hand.told) - 1
    hand.close()
    assert kept(hand.path).acked.covers(1, 1)


@pytest.mark.parametrize("call", ["free_bytes", "append", "checkpoint", "oldest"])
def test_whatever_call_fails_nothing_that_waits_is_dropped_or_doubled(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgegw.journal.keeper.PRUNE_EVERY_S", -1.0)
    hand = filled(tmp_path / "journal.db", 3)
    real: Callable[..., Any] = getattr(Store, call)
    fails = iter([False, True, False, True, True, False, True])

    def fail(self: Store, *args: Any, **more: Any) -> Any:
        if next(fails, False):
            raise JournalError("for the test")
        return real(self, *args, **more)

    monkeypatch.setattr(Store, call, fail)
    for n in range(100, 120):
        hand.turn(scan(n), scan(n + 1000))
    hand.turn()
    came = [n for n in numbers(one.body for one in hand.told) if 100 <= n < 1000]
    assert came == list(range(100, 120))
    assert hand.writer.error is None
    assert chain(one.body for one in hand.told).intact
    hand.acknowledge(hand.told[:2])
    hand.close()
    assert list(kept(hand.path).bodies.values()) == [one.body for one in hand.told]
    assert kept(hand.path).acked.covers(1, 2)


def test_what_is_settled_is_written_down_though_the_first_try_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgegw.journal.writer.ACKED_EVERY_S", -1.0)
    hand = filled(tmp_path / "journal.db", 3)
    hand.acknowledge(hand.told)
    with no_file_larger_than(0):
        hand.turn()
        assert hand.writer.error
    hand.close()
    assert kept(hand.path).acked.covers(1, 4)


def test_a_bug_in_the_writer_is_survived_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = filled(tmp_path / "journal.db", 3)
    with monkeypatch.context() as broken:
        broken.setattr(Store, "append", lambda *_, **__: 1 / 0)
        hand.turn(scan(1000))
        assert "ZeroDivisionError" in (hand.writer.error or "")
    hand.turn()
    assert hand.writer.error is None
    assert numbers(one.body for one in hand.told) == [0, 1, 2, 1000]
    hand.close()


def test_a_reader_in_the_way_delays_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB))
    hand.turn(scan(0))
    db = apsw.Connection(str(hand.path), flags=apsw.SQLITE_OPEN_READONLY)
    db.execute("BEGIN")
    db.execute("SELECT count(*) FROM batch").fetchall()
    for n in range(1, 12):
        hand.turn(*(scan(n, 400) for _ in range(20)))
    assert hand.writer.error is None
    assert len(set(numbers(one.body for one in hand.told))) == 12
    wal = hand.path.with_name("journal.db-wal")
    grown = wal.stat().st_size
    assert grown > MIB // 4
    db.execute("ROLLBACK")
    hand.turn(scan(40))
    assert wal.stat().st_size == 0
    db.execute("BEGIN")
    db.execute("SELECT count(*) FROM batch").fetchall()
    hand.close()
    mark = MarkFile(hand.path).read()
    assert mark
    assert mark.clean
    db.close()
    again = Hand(hand.path, config(4 * MIB))
    assert again.writer.stream == hand.writer.stream
    again.close()


# -- too much at once ----------------------------------------------------------------------------------------


def test_p4_a_full_inbox_counts_what_it_loses_and_the_chain_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "BYTES", 10_000)
    hand = Hand(tmp_path / "journal.db", config())
    hand.turn()
    for round_ in range(3):
        for n in range(60):
            hand.inbox.put(scan(round_ * 100 + n))
            if n == 50:
                hand.inbox.put(event(round_ * 100 + 99))
        hand.turn()
    bodies = [one.body for one in hand.told]
    gaps = events(hand.told, "gap")
    lost = sum(gap["to"] - gap["from"] + 1 for gap in gaps)
    assert len(numbers(bodies)) + lost == 3 * 61
    assert lost > 50
    assert all(gap["reason"] == "full" for gap in gaps)
    assert {99, 199, 299} <= set(numbers(bodies)), "events always have a place"
    assert chain(bodies).intact
    assert hand.settled.pending_batches == len(hand.told)
    for gap in gaps:
        assert hand.settled.copy().covers(gap["from"], gap["to"])
    crashed = Hand(hand.copy_to(tmp_path / "copy"), config())
    for gap in gaps:
        assert crashed.settled.copy().covers(gap["from"], gap["to"])
    hand.close()


async def test_append_never_raises_and_never_waits_whatever_the_disk_does(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "nowhere" / "journal.db", "site-7", config(), 16 * 1024)
    journal.start()
    await asyncio.wait_for(journal.opened.wait(), DEADLINE_S)
    for n in range(1000):
        journal.append(scan(n))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(journal.flush(), 0.05)
    assert not await journal.close(), "it says that not everything is on the disk"


def test_values_of_any_size_and_kind_go_through(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(), max_message=1024)
    hand.turn(Scan(1, "meter1", {}), Scan(2, "meter1", {"a": [], "b": [True, 1, "x"], "c": "ä" * 500}))
    values = [record["values"] for one in hand.told for record in one.records if "values" in record]
    assert {tag: value for part in values for tag, value in part.items()} == {
        "a": [], "b": [True, 1, "x"], "c": None,
    }  # fmt: skip
    hand.close()


def test_what_nests_too_deeply_is_left_out_and_the_rest_is_kept(tmp_path: Path) -> None:
    """`append` encodes on the event loop: nothing may come out of it there."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    hand = Hand(tmp_path / "journal.db", config())
    hand.turn(Scan(1, "meter1", {"a": 1, "deep": deep}))
    records = [record for one in hand.told for record in one.records if "values" in record]
    assert {tag: value for record in records for tag, value in record["values"].items()} == {
        "a": 1,
        "deep": None,
    }
    hand.close()
    while deep:
        deep = deep[0]


def test_a_walk_goes_on_behind_a_row_whose_count_is_wrong(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 5)
    hand.close()
    db = apsw.Connection(str(hand.path))
    db.execute("UPDATE batch SET count = 1000000 WHERE seq = 3")
    db.close()
    reader = Reader(hand.path)
    seen = list(walk(reader, step=2))
    assert [batch.seq for batch in seen] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(JournalError, match="batch 3"):
        unpack(seen[2])
    reader.close()


@pytest.mark.parametrize(
    "change",
    [
        "count = 100", "count = 0", "count = -3", "kind = 'event'", "kind = 'dbta'", "kind = CAST(x'ff' AS TEXT)",
        "size = 7", "size = 1 << 40", "digest = x'00'", "packed = x''", "packed = zeroblob(100)",
        "packed = CAST('(\xb5/\xfd' AS BLOB)", "seq = 4000000",
    ],
)  # fmt: skip
def test_a_row_with_a_wrong_column_costs_its_batch_alone_and_the_chain_verifies(
    tmp_path: Path, change: str
) -> None:
    hand = Hand(tmp_path / "journal.db", config())
    for n in range(0, 40, 2):
        hand.turn(scan(n), scan(n + 1))
    hand.close()
    db = apsw.Connection(str(hand.path))
    db.execute(f"UPDATE batch SET {change} WHERE seq = 8")
    db.close()
    drained = Drained(Hand(hand.path, config()))
    drained.hand.turn(scan(1000))
    drained.drain()
    outcome = judge(hand.told, drained)
    if "seq" not in change:
        assert outcome == "batch"
        assert list(named((one.body for one in drained.hand.told), hand.writer.stream)) == [(8, 9)]
        assert drained.hand.settled.pending_batches == 22
    # and whoever has heard of it while it was sound has an unbroken chain, too
    if outcome == "batch":
        heard = {one.batch.seq: one.body for one in [*hand.told, *drained.hand.told]}
        assert not chain(heard.values()).breaks
    drained.close()


@pytest.mark.parametrize("others_acknowledged", [False, True])
def test_a_row_that_has_vanished_is_found_and_named(tmp_path: Path, others_acknowledged: bool) -> None:
    hand = Hand(tmp_path / "journal.db", config())
    for n in range(0, 20, 2):
        hand.turn(scan(n), scan(n + 1))
    if others_acknowledged:
        hand.acknowledge(one for one in hand.told if one.batch.seq != 8)
    hand.close()
    db = apsw.Connection(str(hand.path))
    db.execute("DELETE FROM batch WHERE seq = 8")
    db.close()
    drained = Drained(Hand(hand.path, config()))
    drained.drain()
    told = drained.hand.told
    (gap,) = events(told, "gap")
    assert (gap["from"], gap["to"], gap["reason"]) == (8, 9, "damaged")
    assert gap["last_prev"] == next(one for one in hand.told if one.batch.seq == 8).batch.digest.hex()
    assert len(told) == 1, "it is named once"
    drained.close()


def test_a_settled_range_with_a_flipped_bit_is_sent_again_and_hides_nothing(tmp_path: Path) -> None:
    hand = filled(tmp_path / "journal.db", 10)
    hand.acknowledge(one for one in hand.told if one.batch.seq in (1, 2, 5))
    hand.close()
    db = apsw.Connection(str(hand.path))
    assert db.execute("SELECT first, last FROM acked").fetchall() == [(1, 2), (5, 5)]
    db.execute("UPDATE acked SET last = 1026 WHERE first = 1")
    db.close()
    again = Hand(hand.path, config())
    assert list(again.settled.copy()) == [(5, 5)]
    again.close()


def test_gap_events_of_the_fault_tests_are_seen() -> None:
    body = b'{"stream":"a","records":[{"event":"gap","from":1},{"event":"gap","stream":"b","from":2}]}'
    assert [gap["from"] for gap in gaps_in(body, "a")] == [1]
    assert [gap["from"] for gap in gaps_in(body, "b")] == [2]


def test_a_disk_is_the_default_only_while_it_is_wanted() -> None:
    before = apsw.vfs_names()
    with disk(1) as under:
        assert isinstance(under, Disk)
        assert apsw.vfs_names()[0] != before[0]
    assert apsw.vfs_names() == before
