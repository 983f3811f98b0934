"""New, duplicate or conflict; missing or named: against a plain model, and case by case."""

from hypothesis import given
from hypothesis import strategies as st

from edgegw.receiver.announce import EVERY_S, SETTLE_S, HoleWatch, Throttle, spell
from edgegw.receiver.dedupe import NamedGap, Outline, Stream, Verdict


class Shelf:
    """A stream and the batches kept of it."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.kept: list[Outline] = []

    def offer(self, seq: int, count: int, period_s: int = 0, digest: bytes = b"") -> Verdict:
        new = Outline(seq, count, period_s, digest)
        verdict = self.stream.judge(
            new, lambda: [batch for batch in self.kept if batch.seq <= new.last and batch.last >= seq]
        )
        if verdict in (Verdict.NEW, Verdict.BESIDE):
            self.stream.keep(seq, count, recorded=not period_s)
            self.kept.append(new)
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
    for seq, count in ((5, 4), (6, 2), (4, 2), (9, 2), (1, 20)):
        assert shelf.offer(seq, count, digest=b"other") is Verdict.CONFLICT
    assert shelf.offer(10, 1) is Verdict.NEW
    assert shelf.offer(1, 4) is Verdict.NEW


def test_a_summary_beside_the_batches_it_stands_for_is_no_conflict() -> None:
    shelf = Shelf()
    for seq in (1, 3):
        assert shelf.offer(seq, 2, digest=b"%d" % seq) is Verdict.NEW
    assert shelf.offer(1, 2, 60, b"s") is Verdict.BESIDE, "it may tell of more than its own seqs"
    assert shelf.offer(3, 6, 60, b"t") is Verdict.BESIDE
    assert shelf.stream.missing() == []
    assert shelf.offer(3, 6, 60, b"t") is Verdict.DUPLICATE
    assert shelf.offer(5, 2, digest=b"5") is Verdict.BESIDE, "it tells more"
    assert shelf.offer(1, 12, 900, b"u") is Verdict.BESIDE
    assert shelf.offer(9, 4, 60, b"v") is Verdict.BESIDE
    assert shelf.offer(9, 4, 900, b"v") is Verdict.CONFLICT, "a quarter within another"
    for seq, count, period_s in ((8, 3, 0), (4, 2, 60), (3, 6, 60), (8, 9, 900), (6, 2, 0)):
        assert shelf.offer(seq, count, period_s, b"other") is Verdict.CONFLICT


def test_what_the_sink_has_forgotten_is_taken_for_a_duplicate() -> None:
    stream = Stream()
    stream.keep(1, 10, recorded=True)
    assert stream.judge(Outline(3, 2, 0, b""), list) is Verdict.DUPLICATE
    assert stream.judge(Outline(9, 4, 0, b""), list) is Verdict.CONFLICT
    assert stream.judge(Outline(3, 2, 60, b""), list) is Verdict.DUPLICATE
    assert stream.judge(Outline(9, 4, 60, b""), list) is Verdict.BESIDE
    summary = Outline(3, 2, 60, b"s")
    assert stream.judge(Outline(3, 2, 0, b""), lambda: [summary]) is Verdict.DUPLICATE


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
    assert stream.name(NamedGap(26, 29, "full", None, thinned=True))
    assert stream.missing() == [(26, 29)], "the summary is still to come"


def test_repeated_trouble_is_said_a_few_times_then_counted() -> None:
    throttle = Throttle(burst=2)
    assert [throttle.line("x", 0.0) for _ in range(4)] == ["x", "x", None, None]
    assert throttle.line("x", EVERY_S + 1) == "x (and 2 more)"
    assert throttle.line("x", EVERY_S + 2) is None


def test_a_hole_is_said_when_it_lasts_and_when_it_is_filled() -> None:
    watch, stream = HoleWatch(), Stream()
    stream.keep(1, 1)
    stream.keep(4, 1)
    assert watch.line(stream.missing(), stream.head, 10.0) is None
    assert watch.line(stream.missing(), stream.head, 10.0 + SETTLE_S) == "missing so far: 2-3"
    assert watch.line(stream.missing(), stream.head, 20.0) is None
    stream.keep(2, 2)
    assert watch.line(stream.missing(), stream.head, 21.0) == "complete up to 4"
    assert not watch.open
    assert watch.line(stream.missing(), stream.head, 22.0) is None


def test_a_hole_that_is_filled_at_once_is_not_worth_a_line() -> None:
    watch, stream = HoleWatch(), Stream()
    stream.keep(2, 1)
    assert watch.line(stream.missing(), stream.head, 10.0) is None
    assert watch.open
    stream.keep(1, 1)
    assert watch.line(stream.missing(), stream.head, 11.0) is None


def test_ranges_are_spelt_as_people_read_them() -> None:
    assert spell([]) == ""
    assert spell([(3, 3), (12, 40)]) == "3, 12-40"
    assert spell([(n, n) for n in range(1, 20, 2)], most=2) == "1, 3, and 8 more ranges"
