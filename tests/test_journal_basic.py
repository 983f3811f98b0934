"""The journal from outside: append, listen, read, acknowledge, keep, let go."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import ANY

import pytest
from journal_rig import MIB, Hand, Told, chain, config, covered, event, kept, named, numbers, scan

from edgegw.config.schema import Journal as JournalConfig
from edgegw.domain import batch as batches
from edgegw.domain.batch import GENESIS, Kind
from edgegw.domain.record import DeviceStatus, Event, Scan
from edgegw.journal import keeper, writer
from edgegw.journal.journal import Journal
from edgegw.journal.store import Reader

DEADLINE_S = 60.0


class Listener:
    """Keeps what a journal tells, and lets a test wait for it."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self._came = asyncio.Event()

    def __call__(self, committed: writer.Committed) -> None:
        pairs = zip(committed.batches, committed.bodies, strict=True)
        self.told += [Told(committed.stream, batch, body) for batch, body in pairs]
        self._came.set()

    async def until(self, seq: int) -> None:
        """Wait until `seq` was told of."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.told or self.told[-1].batch.last < seq:
                self._came.clear()
                await self._came.wait()


@asynccontextmanager
async def opened(path: Path, journal: JournalConfig | None = None) -> AsyncIterator[tuple[Journal, Listener]]:
    """Run a journal with its thread, and close it in order."""
    made, listener = Journal(path, "site-7", journal or config(), 16 * 1024), Listener()
    made.listen(listener)
    made.start()
    try:
        yield made, listener
    finally:
        assert await made.close()


async def test_what_is_appended_is_told_read_back_and_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with opened(path) as (journal, listener):
        for n in range(50):
            journal.append(scan(n))
        journal.append(event(50))
        await asyncio.wait_for(journal.flush(), DEADLINE_S)
        await listener.until(52)
        head, stream = journal.head, journal.stream
        assert head == 52  # the stream event, 50 scans, one event
        found = await journal.read(1, head, 100)
        assert [body for _, body in found.batches] == [told.body for told in listener.told]
        assert found.through == head
        assert sorted(numbers(told.body for told in listener.told)) == list(range(51))
    async with opened(path) as (journal, listener):
        journal.append(scan(51))
        await listener.until(53)
        assert journal.stream == stream
        assert listener.told[0].batch.seq == 53
        again = await journal.read(1, head, 100)
        assert again == found


async def test_a_listener_hears_only_of_what_is_durable(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with opened(path) as (journal, listener):

        def look(committed: writer.Committed) -> None:
            assert [body for seq, body in kept(path).bodies.items() if seq >= committed.batches[0].seq] == (
                committed.bodies
            )
            listener(committed)

        journal.listen(look)
        for n in range(5):
            journal.append(scan(n))
            await asyncio.wait_for(journal.flush(), DEADLINE_S)
        assert numbers(told.body for told in listener.told) == list(range(5))


async def test_reading_is_bounded_and_says_how_far_it_looked(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal.db") as (journal, listener):
        for n in range(10):
            journal.append(scan(n))
            await asyncio.wait_for(journal.flush(), DEADLINE_S)
        await listener.until(11)
        found = await journal.read(3, 11, 4)
        assert [batch.seq for batch, _ in found.batches] == [3, 4, 5, 6]
        assert found.through == 6
        assert (await journal.read(12, 20, 4))[:2] == ([], 20)


async def test_acknowledged_batches_are_settled_and_stay_so(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with opened(path) as (journal, listener):
        for n in range(4):
            journal.append(scan(n))
            await asyncio.wait_for(journal.flush(), DEADLINE_S)
        await listener.until(5)
        for told in (listener.told[0], listener.told[1], listener.told[3]):
            journal.acknowledge(told.batch)
        assert list(journal.settled()) == [(1, 2), (4, 4)]
        condition = await journal.condition()
        assert condition == (
            journal.stream,
            5,
            2,
            2,
            2,
            ANY,
            listener.told[2].records[0]["ts"],
            None,
            ANY,
            ANY,
        )
    async with opened(path) as (journal, _):
        await asyncio.wait_for(journal.opened.wait(), DEADLINE_S)
        assert list(journal.settled()) == [(1, 2), (4, 4)]
        assert (await journal.condition())[1:5] == (5, 2, 2, 2)


async def test_reading_before_the_first_record_damages_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal.db") as (journal, _):
        journal.append(scan(1))
        await journal.flush()
        stream = journal.stream
        assert (await journal.read(0, 0, 1)).batches == []
        journal.append(scan(2))
        await journal.flush()
        assert journal.stream == stream


async def test_an_acknowledgement_of_another_stream_settles_nothing_here(tmp_path: Path) -> None:
    async with opened(tmp_path / "old.db") as (journal, listener):
        await listener.until(1)
        foreign = listener.told[0].batch
    async with opened(tmp_path / "journal.db") as (journal, listener):
        await listener.until(1)
        journal.acknowledge(foreign)
        assert not journal.settled()
        assert (await journal.condition()).pending_batches == 1


async def test_closing_a_journal_that_was_never_started_is_nothing_special(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", "site-7", config(), 16 * 1024)
    assert await journal.close()
    assert not journal.path.exists()


async def test_the_condition_can_be_asked_before_there_is_a_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", "site-7", config(), 16 * 1024)
    assert (await journal.condition())[:9] == ("", 0, 0, 0, 0, 0, None, None, 0.0)
    assert await journal.close()


async def test_a_folder_that_is_not_there_is_waited_for_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "later" / "journal.db"
    journal, listener = Journal(path, "site-7", config(), 16 * 1024), Listener()
    journal.listen(listener)
    journal.start()
    await asyncio.wait_for(journal.opened.wait(), DEADLINE_S)
    journal.append(scan(1))
    error = (await journal.condition()).error
    assert error
    assert str(path) in error
    path.parent.mkdir()
    await listener.until(2)
    assert numbers(told.body for told in listener.told) == [1]
    assert await journal.close()


async def test_a_transactions_worth_is_committed_before_the_interval_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgegw.journal.inbox.TURN_BYTES", 50_000)
    async with opened(tmp_path / "journal.db", config(commit_ms=60_000)) as (journal, listener):
        await asyncio.wait_for(journal.flush(), DEADLINE_S)
        journal.append(scan(0))
        await asyncio.sleep(0.3)
        assert listener.told[-1].batch.last == 1, "a little waits for the interval"
        for n in range(1, 400):
            journal.append(scan(n))
        await listener.until(100)


async def test_a_journal_that_fails_is_not_tried_more_often_because_much_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgegw.journal.inbox.TURN_BYTES", 1_000)
    journal = Journal(tmp_path / "nowhere" / "journal.db", "site-7", config(), 16 * 1024)
    tries: list[float] = []
    ready = journal._writer._ready

    def counted() -> object:
        tries.append(0.0)
        return ready()

    monkeypatch.setattr(journal._writer, "_ready", counted)
    journal.start()
    await asyncio.wait_for(journal.opened.wait(), DEADLINE_S)
    for n in range(100):
        journal.append(scan(n))
        await asyncio.sleep(0.01)
    assert 1 <= len(tries) <= 3, "once a second"
    assert not await journal.close()


# -- numbering and chain -------------------------------------------------------------------------------------


def test_a_new_journal_begins_with_a_stream_event_as_seq_1(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db")
    first, *_ = hand.turn(scan(1))
    assert first.records == [{"ts": ANY, "event": "stream", "reason": "new"}]
    assert (first.batch.seq, batches.decode(first.body).prev) == (1, GENESIS.hex())
    hand.close()


def test_a_journal_killed_before_its_first_commit_begins_with_a_stream_event_all_the_same(
    tmp_path: Path,
) -> None:
    hand = Hand(tmp_path / "journal.db")
    again = Hand(hand.copy_to(tmp_path / "copy"))
    assert again.turn()[0].records == [{"ts": ANY, "event": "stream", "reason": "new"}]
    again.close()
    hand.close()


def test_events_and_data_share_one_numbering_and_one_chain(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db")
    for n in range(0, 40, 4):
        told = hand.turn(scan(n), event(n + 1), DeviceStatus(5, "meter1", "bad", "timeout"), event(n + 2))
        assert [one.batch.kind for one in told[-2:]] == [Kind.EVENT, Kind.DATA]
    following = 1
    for one in hand.told:
        message = batches.decode(one.body)
        assert (message.seq, message.count, message.kind) == (following, len(one.records), one.batch.kind)
        assert (message.v, message.gateway, message.stream) == (1, "site-7", one.stream)
        following += message.count
    report = chain(one.body for one in hand.told)
    assert report.intact
    assert report.links == 21
    hand.close()
    assert list(kept(hand.path).bodies.values()) == [one.body for one in hand.told]


def test_records_keep_their_order_through_many_turns(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", max_message=2048)
    for n in range(0, 300, 7):
        hand.turn(*(scan(i) for i in range(n, n + 7)))
    assert numbers(one.body for one in hand.told) == list(range(301))
    assert max(len(one.body) for one in hand.told) <= 2048
    hand.close()


# -- sizes of messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_message", [1024, 4096, 20_000])
def test_no_batch_is_larger_than_a_message(tmp_path: Path, max_message: int) -> None:
    hand = Hand(tmp_path / "journal.db", max_message=max_message)
    records = [scan(n, tags=1 + n % 90) for n in range(200)]
    hand.turn(*records, *(event(n) for n in range(100)))
    assert max(len(one.body) for one in hand.told) <= max_message
    values: dict[int, dict] = {}
    for one in hand.told:
        for record in one.records:
            if "values" in record:
                values.setdefault(record["ts"], {}).update(record["values"])
    assert values == {record.ts: record.values for record in records}
    assert chain(one.body for one in hand.told).intact
    hand.close()


def test_a_scan_that_is_split_keeps_each_quality_with_its_tag(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", max_message=1024)
    values = {f"t{n}": "x" * 50 for n in range(40)}
    hand.turn(Scan(7, "meter1", values | {"t3": None, "t30": None}, {"t3": "bad:a", "t30": "uncertain:b"}))
    parts = [record for one in hand.told for record in one.records if "values" in record]
    assert len(parts) > 2
    qualities = {tag: (part["ts"], why) for part in parts for tag, why in part.get("quality", {}).items()}
    assert qualities == {"t3": (7, "bad:a"), "t30": (7, "uncertain:b")}
    assert all(set(part.get("quality", {})) <= set(part["values"]) for part in parts)
    hand.close()


def test_one_value_too_large_for_a_message_is_left_out_and_marked(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", max_message=1024)
    hand.turn(Scan(7, "meter1", {"a": 1, "big": "x" * 2000, "c": 3}))
    parts = [record for one in hand.told for record in one.records if "values" in record]
    merged = {tag: value for part in parts for tag, value in part["values"].items()}
    assert merged == {"a": 1, "big": None, "c": 3}
    assert [part["quality"] for part in parts if "quality" in part] == [{"big": "bad:too-large"}]
    hand.close()


def test_an_event_too_large_for_a_message_leaves_its_name(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", max_message=1024)
    hand.turn(Event(7, "write", {"value": "x" * 2000}), Event(8, "stop", {}))
    records = [record for one in hand.told for record in one.records]
    assert [record["event"] for record in records] == ["stream", "write", "stop"]
    assert "too large" in records[1]["error"]
    hand.close()


def test_what_json_cannot_hold_costs_that_value_alone(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db")
    hand.turn(
        scan(1),
        Scan(7, "meter1", {"a": 1, "text": "half a pair \ud800", "nan": float("nan"), "big": 1 << 70}),
        Event(8, "config", {"path": tmp_path}),
        scan(2),
    )
    parts = [r for one in hand.told for r in one.records if r.get("ts") == 7]
    assert {tag: value for part in parts for tag, value in part["values"].items()} == {
        "a": 1, "text": None, "nan": None, "big": 1 << 70,
    }  # fmt: skip
    assert [part["quality"] for part in parts if "quality" in part] == [{"text": "bad:not-text"}]
    assert [r["event"] for one in hand.told for r in one.records if "event" in r] == ["stream", "config"]
    assert numbers(one.body for one in hand.told) == [1, 2]
    assert hand.writer.error is None
    hand.close()


# -- what goes -----------------------------------------------------------------------------------------------


@pytest.fixture
def prune_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every turn look for what is old."""
    monkeypatch.setattr(keeper, "PRUNE_EVERY_S", -1.0)


@pytest.mark.usefixtures("prune_always")
def test_keep_lets_go_of_acknowledged_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(tmp_path / "journal.db", config(keep_ms=1000))
    for n in range(10):
        hand.turn(scan(n))
    later_s = writer.clock.mono_s() + 5.0
    monkeypatch.setattr(writer.clock, "mono_s", lambda: later_s)
    hand.acknowledge(told for told in hand.told if told.batch.seq in (1, 2, 3, 4, 6))
    hand.turn()
    assert list(kept(hand.path).bodies) == [5, 6, 7, 8, 9, 10, 11], "6 waits for 5, which nobody has"
    hand.acknowledge(hand.told)
    hand.turn()
    assert list(kept(hand.path).bodies) == [11], "the newest is never deleted"
    hand.turn(scan(10))
    assert chain(one.body for one in hand.told).intact
    hand.close()
    again = Hand(hand.path)
    assert again.turn(scan(11))[0].batch.seq == 13
    assert list(again.settled.copy()) == [(1, 11)]
    assert again.settled.pending_batches == 2
    again.close()


@pytest.mark.usefixtures("prune_always")
def test_keep_spares_what_is_younger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(tmp_path / "journal.db", config(keep_ms=60_000))
    now_s, wall_ms = writer.clock.mono_s(), writer.clock.wall_ms()
    steps_ms = itertools.cycle((-86_400_000, 0, 86_400_000))
    monkeypatch.setattr(writer.clock, "wall_ms", lambda: wall_ms + next(steps_ms))  # it is not asked
    hand.turn()
    for n, later_s in enumerate((1.0, 2.0, 50.0, 61.0)):
        monkeypatch.setattr(writer.clock, "mono_s", lambda at_s=now_s + later_s: at_s)
        hand.turn(Scan(wall_ms - 1_000_000 * n, "meter1", {"n": n}))
    hand.acknowledge(hand.told[1:])
    hand.turn()
    assert len(kept(hand.path).bodies) == 5, "the first is not settled"
    hand.acknowledge(hand.told)
    hand.turn()
    assert numbers(kept(hand.path).bodies.values()) == [0, 1, 2, 3], "the stream event alone is old enough"
    hand.close()
    hand = Hand(tmp_path / "journal.db", config(keep_ms=60_000))  # what it was closed for does not count
    monkeypatch.setattr(writer.clock, "mono_s", lambda: now_s + 61.0 + 40.0)
    hand.turn()
    assert numbers(kept(hand.path).bodies.values()) == [2, 3]
    monkeypatch.setattr(writer.clock, "mono_s", lambda: now_s + 61.0 + 130.0)
    hand.turn()
    assert numbers(kept(hand.path).bodies.values()) == [3]
    hand.close()


@pytest.mark.parametrize(
    ("max_size", "tags", "width"), [(4 * MIB, 40, 12), (4 * MIB, 4, 1), (6 * MIB, 100, 3)]
)
def test_p5_database_and_wal_stay_within_max_size_at_every_commit(
    tmp_path: Path, max_size: int, tags: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several times `max_size` is written; nothing is ever acknowledged."""
    hand = Hand(tmp_path / "journal.db", config(max_size), max_message=16 * 1024)
    sizes = []
    monkeypatch.setattr(hand.writer, "_tell", lambda *told: (sizes.append(hand.bytes), hand._tell(*told)))
    n = packed = 0
    while packed < 3 * max_size:
        told = hand.turn(*(scan(n + i, tags, width=width) for i in range(4000 // tags)))
        packed += sum(len(one.batch.packed) for one in told)
        n += 4000 // tags
        assert hand.writer.error is None
    assert max(sizes) <= max_size
    assert hand.bytes <= max_size
    assert max(sizes) > max_size * 0.55, "it is not used"
    hand.close()
    left = kept(hand.path)
    assert min(left.bodies) > 1, "the oldest go"
    assert max(left.bodies) == hand.told[-1].batch.seq
    # whoever hears only what is left learns of all that went, also of what earlier gap events had named
    bodies = list(left.bodies.values())
    assert list(named(bodies, left.stream)) == [(1, min(left.bodies) - 1)]
    assert covered(bodies).covers(min(left.bodies), left.head)
    assert chain(bodies).intact
    # and so does whoever heard some of it as it was made
    some = {told.batch.seq: told.body for at, told in enumerate(hand.told) if at % 3}
    assert chain((some | left.bodies).values()).breaks == []


def gaps_held(told: Told) -> bool:
    return told.batch.kind is Kind.EVENT and b'"gap"' in told.body


def test_p5_what_went_unsent_is_named_from_to_with_the_hash_of_the_last(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB), max_message=16 * 1024)
    n = 0
    while not any(gaps_held(told) for told in hand.told):
        hand.turn(*(scan(n + i, 100) for i in range(40)))
        n += 40
    (gap,) = [r for told in hand.told if gaps_held(told) for r in told.records if r["event"] == "gap"][:1]
    by_seq = {told.batch.seq: told for told in hand.told}
    last = next(told for told in hand.told if told.batch.last == gap["to"])
    assert gap == {
        "ts": ANY, "event": "gap", "from": 1, "to": last.batch.last, "reason": "full",
        "last_prev": last.batch.digest.hex(),
    }  # fmt: skip
    assert batches.decode(by_seq[gap["to"] + 1].body).prev == gap["last_prev"]
    assert hand.settled.copy().covers(1, gap["to"])
    assert hand.settled.pending_batches == sum(told.batch.seq > gap["to"] for told in hand.told)
    crashed = Hand(hand.copy_to(tmp_path / "copy"), config(4 * MIB))
    assert crashed.settled.copy().covers(1, gap["to"]), "the gap and what it settles are one transaction"
    assert crashed.settled.pending_batches == hand.settled.pending_batches
    hand.close()


def test_p5_acknowledged_batches_go_before_unsent_ones(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB), max_message=16 * 1024)
    n = 0
    while hand.bytes < 2 * MIB:
        hand.turn(*(scan(n + i, 100) for i in range(40)))
        n += 40
    old = list(hand.told)
    hand.acknowledge(old[len(old) // 2 :])  # the newer half went out live; the backlog is older
    packed = 0
    while packed < 1.2 * MIB:
        told = hand.turn(*(scan(n + i, 100) for i in range(40)))
        packed += sum(len(one.batch.packed) for one in told)
        n += 40
    left = kept(hand.path)
    assert not any(gaps_held(told) for told in hand.told)
    assert all(told.batch.seq in left.bodies for told in old[: len(old) // 2]), "unsent ones are still there"
    assert not all(told.batch.seq in left.bodies for told in old), "some acknowledged ones went"
    hand.close()
    again = Hand(hand.path, config(4 * MIB))
    assert again.settled.pending_batches == sum(
        not again.settled.copy().covers(told.batch.seq, told.batch.last) for told in hand.told
    )
    again.close()


def test_what_a_broker_confirmed_goes_before_what_was_never_sent_and_is_named(tmp_path: Path) -> None:
    """With end-to-end acknowledgement: a receiver that is gone for good must not fill the journal."""
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    n = 0
    while hand.bytes < 2 * MIB:
        hand.turn(*(scan(n + i, 100) for i in range(40)))
        n += 40
    old = list(hand.told)
    for one in old[len(old) // 2 :]:
        hand.settled.note_delivered(one.batch)
    pending = hand.settled.pending_batches
    assert pending == len(old), "the broker's word settles nothing here"
    packed = 0
    while packed < 1.2 * MIB:
        packed += sum(len(one.batch.packed) for one in hand.turn(*(scan(n + i, 100) for i in range(40))))
        n += 40
    left, stream = kept(hand.path), hand.told[0].stream
    gone = named((one.body for one in hand.told), stream)
    delivered = [one.batch for one in old[len(old) // 2 :]]
    assert all(one.batch.seq in left.bodies for one in old[: len(old) // 2]), (
        "nothing unsent went or was thinned"
    )
    assert not all(batch.seq in left.bodies for batch in delivered), "some that the broker has went"
    assert all(gone.covers(b.seq, b.last) for b in delivered if b.seq not in left.bodies)
    assert chain([*(one.body for one in hand.told)]).breaks == []
    hand.close()


def test_that_a_receiver_confirms_is_known_after_a_restart_and_unknown_of_a_new_stream(
    tmp_path: Path,
) -> None:
    hand = Hand(tmp_path / "journal.db")
    hand.turn(scan(1))
    assert not hand.settled.end_to_end
    hand.settled.note_end_to_end()
    hand.close()
    again = Hand(hand.path)
    assert again.settled.end_to_end
    again.close()
    hand.path.unlink()
    new = Hand(hand.path)
    assert not new.settled.end_to_end
    new.close()


def test_a_limit_of_the_broker_bounds_new_batches_until_it_is_lifted(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", max_message=64 * 1024)
    records = [scan(n, tags=60) for n in range(40)]
    hand.inbox.limit_message(4096)
    small = hand.turn(*records)
    hand.inbox.limit_message(None)
    large = hand.turn(*records)
    hand.inbox.limit_message(1024**2)
    assert max(len(one.body) for one in small) <= 4096 < max(len(one.body) for one in large)
    assert max(len(one.body) for one in hand.turn(*records)) <= 64 * 1024
    assert chain(one.body for one in hand.told).intact
    hand.close()


def test_a_smaller_max_size_is_obeyed_as_far_as_the_file_can(tmp_path: Path) -> None:
    """A file does not shrink, but what it holds does."""
    hand = Hand(tmp_path / "journal.db", config(16 * MIB))
    n = 0
    while hand.bytes < 8 * MIB:
        hand.turn(*(scan(n + i, 200, width=2) for i in range(40)))
        n += 40
    hand.close()
    before = hand.bytes
    again = Hand(hand.path, config(4 * MIB))
    again.turn(scan(n))
    assert again.writer.error is None
    assert numbers(told.body for told in again.told) == [n]
    again.close()
    assert again.bytes <= before
    reader = Reader(hand.path)
    assert reader.figures(reader.acked()).stored_bytes < 3.5 * MIB
    reader.close()


def test_files_are_not_for_everyone(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db")
    hand.turn(scan(1))
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes) == {
        "journal.db",
        "journal.db-wal",
        "journal.db-shm",
        "journal.db.mark",
        "journal.db.ballast",
    }
    assert all(mode & 0o027 == 0 for mode in modes.values()), modes
    hand.close()
    assert {file.name for file in tmp_path.iterdir()} == {
        "journal.db",
        "journal.db.mark",
        "journal.db.ballast",
    }


def test_flushes_are_answered_after_the_commit_that_holds_what_came_before(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    hand = Hand(tmp_path / "journal.db")
    done = loop.create_future()
    hand.inbox.put(scan(1))
    hand.inbox.tell(done)
    hand.inbox.put(scan(2))
    hand.turn()
    assert hand.flushed == [done]
    assert json.loads(hand.told[-1].body)["count"] == 2
    hand.close()
    loop.close()
