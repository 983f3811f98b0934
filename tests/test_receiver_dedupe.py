"""New, duplicate or conflict; missing or named: against a plain model, and case by case."""

from hypothesis import given
from hypothesis import strategies as st

from edgegw.domain.batch import Kind
from edgegw.receiver.announce import EVERY_S, SETTLE_S, HoleWatch, Throttle, spell
from edgegw.receiver.dedupe import Kept, NamedGap, Stream, Verdict


class Shelf:
    """A stream and the batches kept of it."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.kept: list[Kept] = []

    def offer(self, seq: int, count: int, kind: Kind = Kind.DATA, digest: bytes = b"") -> Verdict:
        last = seq + count - 1
        verdict = self.stream.judge(
            seq, count, kind, digest,
            lambda: [batch for batch in self.kept if batch.seq <= last and batch.seq + batch.count > seq],
        )  # fmt: skip
        if verdict is Verdict.NEW:
            self.stream.keep(seq, count)
            self.kept.append(Kept(seq, count, kind, digest))
        return verdict


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=10),
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30),
)
def test_p2_in_whatever_order_batches_come_each_is_new_once(
    counts: list[int], arrivals: list[tuple[int, bool]]
) -> None:
    bounds, seq = [], 1
    for count in counts:
        bounds.append((seq, count))
        seq += count
    shelf, seen = Shelf(), set[int]()
    for at, changed in arrivals:
        if at >= len(bounds):
            continue
        verdict = shelf.offer(*bounds[at], digest=b"changed" if changed and at in seen else b"")
        expected = (Verdict.CONFLICT if changed else Verdict.DUPLICATE) if at in seen else Verdict.NEW
        assert verdict is expected
        seen.add(at)
    got = {n for at in seen for n in range(bounds[at][0], sum(bounds[at]))}
    missing = {n for first, last in shelf.stream.missing() for n in range(first, last + 1)}
    assert missing == set(range(1, max(got, default=0) + 1)) - got
    assert shelf.stream.head == max(got, default=0)


def test_other_bounds_are_a_conflict() -> None:
    shelf = Shelf()
    assert shelf.offer(5, 5) is Verdict.NEW
    assert shelf.offer(5, 4) is Verdict.DUPLICATE  # same digest: the digest covers the count
    for seq, count in ((5, 4), (6, 2), (4, 2), (9, 2), (1, 20)):
        assert shelf.offer(seq, count, digest=b"other") is Verdict.CONFLICT
    assert shelf.offer(10, 1) is Verdict.NEW
    assert shelf.offer(1, 4) is Verdict.NEW


def test_a_summary_and_the_batches_it_stands_for_are_no_conflict() -> None:
    shelf = Shelf()
    for seq in (1, 3):
        assert shelf.offer(seq, 2, digest=b"%d" % seq) is Verdict.NEW
    assert shelf.offer(1, 4, Kind.SUMMARY, b"s") is Verdict.DUPLICATE
    assert shelf.offer(5, 4, Kind.SUMMARY, b"t") is Verdict.NEW
    assert shelf.offer(5, 2, digest=b"5") is Verdict.DUPLICATE
    assert shelf.offer(5, 4, Kind.SUMMARY, b"u") is Verdict.CONFLICT
    assert shelf.offer(8, 3, digest=b"8") is Verdict.CONFLICT
    assert shelf.offer(4, 2, Kind.SUMMARY, b"v") is Verdict.CONFLICT


def test_what_the_sink_has_forgotten_is_taken_for_a_duplicate() -> None:
    stream = Stream()
    stream.keep(1, 10)
    assert stream.judge(3, 2, Kind.DATA, b"", list) is Verdict.DUPLICATE
    assert stream.judge(9, 4, Kind.DATA, b"", list) is Verdict.CONFLICT


def test_named_gaps_are_not_missing() -> None:
    stream = Stream()
    stream.keep(1, 2)
    stream.keep(20, 1)
    assert stream.missing() == [(3, 19)]
    assert stream.name(NamedGap(5, 9, "full", None))
    assert not stream.name(NamedGap(5, 9, "full", None))
    assert stream.missing() == [(3, 4), (10, 19)]
    assert stream.name(NamedGap(3, 25, "damaged", None))
    assert stream.missing() == []
    assert stream.name(NamedGap(30, 31, "full", None))
    assert stream.missing() == [(26, 29)]


def test_repeated_trouble_is_said_a_few_times_then_counted() -> None:
    throttle = Throttle(burst=2)
    assert [throttle.line("x", 0.0) for _ in range(4)] == ["x", "x", None, None]
    assert throttle.line("x", EVERY_S + 1) == "x (and 2 more)"
    assert throttle.line("x", EVERY_S + 2) is None


def test_a_hole_is_said_when_it_lasts_and_when_it_is_filled() -> None:
    watch, stream = HoleWatch(), Stream()
    stream.keep(1, 1)
    stream.keep(4, 1)
    assert watch.line(stream, 10.0) is None
    assert watch.line(stream, 10.0 + SETTLE_S) == "missing so far: 2-3"
    assert watch.line(stream, 20.0) is None
    stream.keep(2, 2)
    assert watch.line(stream, 21.0) == "complete up to 4"
    assert not watch.open
    assert watch.line(stream, 22.0) is None


def test_a_hole_that_is_filled_at_once_is_not_worth_a_line() -> None:
    watch, stream = HoleWatch(), Stream()
    stream.keep(2, 1)
    assert watch.line(stream, 10.0) is None
    assert watch.open
    stream.keep(1, 1)
    assert watch.line(stream, 11.0) is None


def test_ranges_are_spelt_as_people_read_them() -> None:
    assert spell([]) == ""
    assert spell([(3, 3), (12, 40)]) == "3, 12-40"
    assert spell([(n, n) for n in range(1, 20, 2)], most=2) == "1, 3, and 8 more ranges"
