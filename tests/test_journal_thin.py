"""A journal that is full thins: what its summaries say, what they cover, and what is never thinned."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rig import MIB, Hand, Told, chain, config, covered, event, gaps_in, kept, named

from edgegw.domain import batch as batches
from edgegw.domain.batch import Kind, Message
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import DeviceStatus, Record, Scan
from edgegw.domain.tag import Value
from edgegw.journal import retention
from edgegw.journal.store import Stored
from edgegw.journal.thin import Source, SummaryRecord, summarise, thin

DAY_MS = 86_400_000
START_MS = 1_700_000_000_000 - 1_700_000_000_000 % 900_000


class Stretch(NamedTuple):
    """What is known of a tag within a period."""

    count: int
    mean: float | None
    least: Any
    greatest: Any
    last: Any


def site(second: int, devices: int = 3, tags: int = 20) -> list[Record]:
    """Return three seconds of a site whose readings do not pack well."""
    noise = random.Random(second)
    return [
        Scan(START_MS + second * 3000 + d, f"m{d}", {f"t{i}": noise.random() for i in range(tags)})
        for d in range(devices)
    ]


def fill(hand: Hand, packed: float, *, events_every: int = 100, start: int = 0) -> list[Told]:
    """Run a site until so many bytes have been told of; return all that was."""
    told: list[Told] = []
    second, size = start, 0
    while size < packed:
        events = [event(second)] if second % events_every == 0 else []
        told += (new := hand.turn(*site(second), *events))
        size += sum(len(one.batch.packed) for one in new)
        second += 1
        assert hand.writer.error is None
        assert hand.bytes <= 4 * MIB
    return told


def summaries(bodies: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the summaries among messages."""
    messages = [json.loads(body) for body in bodies]
    return [message for message in messages if message["kind"] == "summary"]


def joint(messages: Iterable[Mapping[str, Any]], period_ms: int) -> dict[tuple[int, str, str], Stretch]:
    """Put together what summaries say of each period, device and tag."""
    parts: dict[tuple[int, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for message in messages:
        for record in message["records"]:
            at = record["ts"] - record["ts"] % period_ms
            for tag, figures in record["values"].items():
                parts[at, record["device"], tag].append(figures)
    found = {}
    for key, some in parts.items():
        count = sum(one["count"] for one in some)
        mean = sum(one["mean"] * one["count"] for one in some) / count
        found[key] = Stretch(
            count, mean, min(o["min"] for o in some), max(o["max"] for o in some), some[-1]["last"]
        )
    return found


def recomputed(told: Iterable[Told], of: Ranges, period_ms: int) -> dict[tuple[int, str, str], Stretch]:
    """Work out the same from the readings of batches within `of`."""
    columns: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for one in told:
        if one.batch.kind is Kind.DATA and of.covers(one.batch.seq, one.batch.last):
            for record in one.records:
                at = record["ts"] - record["ts"] % period_ms
                for tag, value in record["values"].items():
                    columns[at, record["device"], tag].append(value)
    return {
        key: Stretch(len(all_), sum(all_) / len(all_), min(all_), max(all_), all_[-1])
        for key, all_ in columns.items()
    }


# -- on the real thing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("events_every", [100, 10])
def test_p5_a_full_journal_thins_what_is_oldest_and_still_covers_every_seq(
    tmp_path: Path, events_every: int
) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    told = fill(hand, 8 * MIB, events_every=events_every)
    while not any(b'"period":900' in body[:1000] for body in kept(hand.path).bodies.values()):
        told += fill(hand, 2 * MIB, events_every=events_every, start=1_000_000 + len(told))
    hand.close()
    left = kept(hand.path)
    bodies = list(left.bodies.values())
    assert list(covered(bodies)) == [(1, left.head)], "nothing is gone without a trace"
    assert chain(bodies).intact, "whoever hears only what is left can verify it"
    some = {one.batch.seq: one.body for one in told if one.batch.seq % 3 == 0}
    assert chain((some | left.bodies).values()).breaks == [], "and so can whoever heard some as it was made"
    short = summaries(bodies)
    of = Ranges((message["seq"], message["seq"] + message["count"] - 1) for message in short)
    found, expected = joint(short, 900_000), recomputed(told, of, 900_000)
    assert found.keys() == expected.keys()
    for key, stretch in expected.items():
        assert found[key] == (pytest.approx(stretch.count), pytest.approx(stretch.mean), *stretch[2:])
    coarse, fine = ([m["seq"] for m in short if m["period"] == period] for period in (900, 60))
    assert max(coarse) < min(fine, default=left.head), "the oldest are thinned further"


def test_p5_events_are_never_thinned_and_gap_events_name_what_was(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    told = fill(hand, 7 * MIB)
    hand.close()
    left = kept(hand.path)
    for one in told:
        if one.batch.kind is Kind.EVENT:
            assert left.bodies[one.batch.seq] == one.body
    digests = {one.batch.last: one.batch.digest.hex() for one in told}
    gaps = [gap for body in left.bodies.values() for gap in gaps_in(body, left.stream)]
    assert all(gap["reason"] == "full" and gap["summary"] for gap in gaps)
    assert all(gap["last_prev"] == digests[gap["to"]] for gap in gaps)
    named = Ranges((gap["from"], gap["to"]) for gap in gaps)
    short = summaries(left.bodies.values())
    assert named == Ranges((m["seq"], m["seq"] + m["count"] - 1) for m in short)
    assert sum(gap["to"] - gap["from"] + 1 for gap in gaps) == named.total(), "each once"
    assert not left.acked.overlaps(1, left.head), "what a summary stands for is still to be sent"


def test_p5_acknowledged_batches_go_before_any_is_thinned(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    fill(hand, 2 * MIB)
    hand.acknowledge(hand.told[len(hand.told) // 4 :])
    fill(hand, 1.2 * MIB, start=100_000)
    assert not summaries(kept(hand.path).bodies.values())
    fill(hand, 2 * MIB, start=200_000)
    assert summaries(kept(hand.path).bodies.values())
    hand.close()


def test_p5_when_all_is_as_thin_as_can_be_the_oldest_go(tmp_path: Path) -> None:
    """Scans of ever new devices, with an event after each, gain nothing from being thinned."""
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    for n in range(4000):
        values = {f"t{i}": random.Random(n).random() for i in range(60)}
        hand.turn(Scan(START_MS + 900_000 * n, f"d{n}", dict(values)), event(n))
        assert hand.bytes <= 4 * MIB
    hand.close()
    left = kept(hand.path)
    bodies = list(left.bodies.values())
    assert not summaries(bodies)
    assert min(left.bodies) > 1000
    assert list(named(bodies, left.stream)) == [(1, min(left.bodies) - 1)]
    assert chain(bodies).intact


def test_what_is_on_its_way_is_not_thinned_and_what_has_gone_out_only_by_itself(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    told = fill(hand, 1 * MIB)
    data = [one.batch for one in told if one.batch.kind is Kind.DATA]
    on_its_way, gone_out = data[10:60], data[80:120]
    assert hand.settled.hold(on_its_way)
    for batch in gone_out:
        hand.settled.publish(batch)
    fill(hand, 6 * MIB, start=100_000)
    left = kept(hand.path)
    for batch in on_its_way:
        assert left.batches[batch.seq].kind is Kind.DATA
    out = Ranges((batch.seq, batch.last) for batch in gone_out)
    for message in summaries(left.bodies.values()):
        first, last = message["seq"], message["seq"] + message["count"] - 1
        assert out.covers(first, last) or not out.overlaps(first, last)
    assert covered(left.bodies.values()).covers(1, left.head)
    hand.settled.release()
    fill(hand, 3 * MIB, start=200_000)
    still = kept(hand.path).batches
    assert [batch for batch in on_its_way if batch.seq in still and still[batch.seq].kind is Kind.DATA] == []
    hand.close()


def test_what_was_read_before_it_was_thinned_is_not_taken_to_be_sent(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    told = fill(hand, 2 * MIB)
    generation = hand.settled.generation
    fill(hand, 3 * MIB, start=100_000)
    assert summaries(kept(hand.path).bodies.values())
    assert not hand.settled.hold([told[1].batch], generation)
    assert hand.settled.hold([told[-1].batch], hand.settled.generation)
    assert not hand.settled.acknowledge_spans(hand.writer.stream, [(2, 4)], generation)
    hand.close()


def test_pending_batches_are_counted_through_thinning_and_dropping(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    fill(hand, 7 * MIB, events_every=5)
    left = kept(hand.path).bodies
    hand.acknowledge(one for one in hand.told[-10:] if left.get(one.batch.seq) == one.body)  # not thinned yet
    settled = hand.settled.copy()
    waiting = [b for b in kept(hand.path).batches.values() if not settled.covers(b.seq, b.last)]
    assert hand.settled.pending_batches == len(waiting)
    hand.close()


def test_a_damaged_batch_is_not_thinned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found when it is read to be sent, and named then; the summaries leave it alone."""
    from edgegw.errors import JournalDamaged
    from edgegw.journal import keeper

    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    bad = next(one.batch for one in fill(hand, 0.2 * MIB) if one.batch.kind is Kind.DATA)
    real = keeper.unpack

    def unpack(batch: batches.Batch) -> bytes:
        if batch.seq == bad.seq:
            raise JournalDamaged("for the test")
        return real(batch)

    monkeypatch.setattr(keeper, "unpack", unpack)
    fill(hand, 6 * MIB, start=100_000)
    left = kept(hand.path)
    assert left.batches[bad.seq].kind is Kind.DATA
    assert summaries(left.bodies.values())
    hand.close()


# -- pure ----------------------------------------------------------------------------------------------------


def message(records: list[Any], seq: int = 1, kind: Kind = Kind.DATA) -> Message:
    """Return a message with these records."""
    return Message(1, "g", "s", seq, len(records), kind, "00" * 32, msgspec.Raw(msgspec.json.encode(records)))


BIG = 2**64 - 1
CASES: list[tuple[str, list[Value], dict[str, Any]]] = [
    ("numbers", [1.0, 4.0, 2.5], {"mean": 2.5, "min": 1.0, "max": 4.0, "last": 2.5, "count": 3}),
    ("integers", [3, 4], {"mean": 3.5, "min": 3, "max": 4, "last": 4, "count": 2}),
    ("bools", [True, False, True, True], {"mean": 0.75, "min": False, "max": True, "last": True, "count": 4}),
    ("bad ones do not count", [None, 2.0, None], {"mean": 2.0, "min": 2.0, "max": 2.0, "last": 2.0, "count": 1}),
    ("only bad ones", [None, None], {"mean": None, "min": None, "max": None, "last": None, "count": 0}),
    ("texts", ["on", "off"], {"mean": None, "min": None, "max": None, "last": "off", "count": 2}),
    ("arrays", [[1.0], [2.0, 3.0]], {"mean": None, "min": None, "max": None, "last": [2.0, 3.0], "count": 2}),
    ("great ones", [1e308, 1e307], {"mean": 5.5e307, "min": 1e307, "max": 1e308, "last": 1e307, "count": 2}),
    ("uint64", [BIG, BIG], {"mean": 1.84467441e19, "min": BIG, "max": BIG, "last": BIG, "count": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("column", "figures"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_a_column_comes_to(column: list[Value], figures: dict[str, Any]) -> None:
    records = [Scan(60_000 + i, "m", {"t": value}) for i, value in enumerate(column)]
    (record,) = summarise([message(records)], 60_000)
    assert (record.ts, record.device) == (60_000, "m")
    assert msgspec.to_builtins(record.values["t"]) == figures


def test_minutes_devices_and_tags_are_kept_apart() -> None:
    records: list[Any] = [
        Scan(59_999, "m", {"a": 1.0}),
        Scan(60_000, "m", {"a": 2.0, "b": 5.0}, {"b": "uncertain:old"}),
        Scan(60_001, "n", {"a": 3.0}),
        Scan(119_999, "m", {"a": 4.0}, {"a": "uncertain:old"}),
        DeviceStatus(60_500, "n", "bad", "timeout"),
    ]
    found = {(r.ts, r.device): r for r in summarise([message(records)], 60_000)}
    assert found.keys() == {(0, "m"), (60_000, "m"), (60_000, "n")}
    assert {tag: f.count for tag, f in found[60_000, "m"].values.items()} == {"a": 2, "b": 1}
    assert found[60_000, "m"].quality == {"a": "uncertain:old", "b": "uncertain:old"}


@given(
    scans=st.lists(
        st.tuples(
            st.integers(0, 4 * 900),
            st.sampled_from("mn"),
            st.dictionaries(
                st.sampled_from("ab"), st.one_of(st.none(), st.booleans(), st.floats(-1e6, 1e6)), min_size=1
            ),
        ),
        max_size=60,
    )
)
@settings(deadline=None)
def test_thinning_minutes_comes_to_the_same_as_thinning_readings(
    scans: list[tuple[int, str, dict[str, Any]]],
) -> None:
    whole = message(
        [Scan(second * 1000, device, values) for second, device, values in sorted(scans, key=lambda s: s[0])]
    )
    minutes = summarise([whole], 60_000)
    through = summarise([message(minutes, kind=Kind.SUMMARY)], 900_000)
    direct = summarise([whole], 900_000)
    assert [(r.ts, r.device, r.quality) for r in through] == [(r.ts, r.device, r.quality) for r in direct]
    for one, other in zip(through, direct, strict=True):
        assert one.values.keys() == other.values.keys()
        for tag, figures in other.values.items():
            mean = one.values[tag].mean
            assert mean == (figures.mean and pytest.approx(figures.mean, rel=1e-6, abs=1e-3))
            assert msgspec.structs.replace(one.values[tag], mean=None) == msgspec.structs.replace(
                figures, mean=None
            )


def test_no_summary_is_larger_than_a_message() -> None:
    records = [Scan(60_000 * i, "m", {f"tag{t}": 1.5 for t in range(40)}) for i in range(4)]
    run = [Source(i + 1, i + 1, bytes(32), message([record], i + 1)) for i, record in enumerate(records * 8)]
    made = thin([run], 60, 3000)
    assert 4 <= len(made) <= len(run)
    assert all(len(b",".join(one.records)) <= 3000 for one in made)
    assert Ranges((one.first, one.last) for one in made) == Ranges([(1, len(run))])
    counts = [f["count"] for one in made for r in one.records for f in json.loads(r)["values"].values()]
    assert sum(counts) == len(run) * 40
    assert thin([run[:4]], 60, 1000) == [], "four batches cannot make room for more messages than that"


def test_batches_of_different_clocks_are_summarised_apart(tmp_path: Path) -> None:
    from edgegw.domain.era import Era

    hand = Hand(tmp_path / "journal.db", config(4 * MIB, when_full="thin"), max_message=16 * 1024)
    hand.inbox.tell(Era(False, "boot", 1_000, 500))
    fill(hand, 1 * MIB)
    hand.inbox.tell(Era(True, "boot", 1_000_000, 500))
    fill(hand, 6 * MIB, start=100_000)
    clocks = {(m["clock"], json.dumps(m.get("mono"))) for m in summaries(kept(hand.path).bodies.values())}
    assert clocks == {("unsynced", '{"boot": "boot", "ts": 1000, "ms": 500}'), ("synced", "null")}
    assert chain(kept(hand.path).bodies.values()).intact
    hand.close()


def test_what_is_finer_keeps_half_of_the_room() -> None:
    assert retention.finer_periods({0: 100}) == [0, 60]
    assert retention.finer_periods({0: 60, 60: 40}) == [0, 60]
    assert retention.finer_periods({0: 50, 60: 50}) == [60]
    assert retention.finer_periods({0: 40, 60: 40, 900: 20}) == [60]
    assert retention.finer_periods({0: 40, 60: 30, 900: 30}) == []


def test_stretches_end_where_what_has_gone_out_begins() -> None:
    rows = [Stored(i, i, 0, b"", 0, 1) for i in (1, 2, 4, 5, 6, 9)]
    made = retention.stretches(rows, Ranges([(5, 6)]), lambda stored: b"old" if stored.first < 2 else b"new")
    firsts = [[[stored.first for stored in run] for run in stretch] for stretch in made]
    assert firsts == [[[1]], [[2], [4]], [[5, 6]], [[9]]]


def test_a_summary_record_is_what_it_was() -> None:
    (record,) = summarise([message([Scan(0, "m", {"t": 1.0})])], 60_000)
    assert msgspec.json.decode(msgspec.json.encode(record), type=SummaryRecord) == record


def test_of_several_runs_the_last_tell() -> None:
    """A receipt that comes late for the readings of the first settles a summary that tells nothing."""
    runs = [
        [
            Source(seq, seq, bytes(32), message([Scan(60_000 + seq, "m", {"t": float(seq)})], seq))
            for seq in run
        ]
        for run in ((1, 2), (4, 5), (7, 8))
    ]
    made = thin(runs, 60, 10_000)
    assert [(one.first, one.last, len(one.records)) for one in made] == [(1, 2, 0), (4, 5, 0), (7, 8, 1)]
