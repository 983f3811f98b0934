"""The hash chain: what holds, what breaks it, and what gap events mend."""

from chains import Chain
from hypothesis import given
from hypothesis import strategies as st

from edgegw.domain.batch import GENESIS, ChainReport, Gap, Kind, Link, decode, digest, verify

COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=12)


def links(bodies: list[bytes]) -> list[Link]:
    return [
        Link(m.seq, m.seq + m.count - 1, bytes.fromhex(m.prev), digest(body))
        for body in bodies
        for m in [decode(body)]
    ]


def chain(counts: list[int]) -> list[Link]:
    maker = Chain()
    return links([maker.data(count, tags=1) for count in counts])


@given(COUNTS)
def test_p1_an_untouched_chain_verifies(counts: list[int]) -> None:
    assert verify(chain(counts)) == ChainReport(len(counts), [], [])


@given(COUNTS, st.data())
def test_a_changed_batch_breaks_the_chain_at_the_next(counts: list[int], data: st.DataObject) -> None:
    whole = chain([*counts, 1])
    at = data.draw(st.integers(0, len(counts) - 1))
    changed = [*whole]
    changed[at] = whole[at]._replace(digest=bytes(reversed(whole[at].digest)))
    assert verify(changed).breaks == [whole[at + 1].first]


@given(COUNTS, st.data())
def test_a_hole_that_nothing_names_is_missing(counts: list[int], data: st.DataObject) -> None:
    whole = chain([*counts, 1])
    at = data.draw(st.integers(0, len(counts) - 1))
    report = verify(whole[:at] + whole[at + 1 :])
    assert report.missing == [(whole[at].first, whole[at].last)]
    assert not report.breaks
    assert not report.intact


@given(COUNTS, COUNTS, st.data())
def test_named_holes_are_none_and_the_chain_goes_on_across_them(
    before: list[int], gone: list[int], data: st.DataObject
) -> None:
    whole = chain([*before, *gone, 1])
    kept, lost = [*whole[: len(before)], whole[-1]], whole[len(before) : -1]
    cut = data.draw(st.integers(0, len(lost) - 1))
    gaps = [Gap(part[0].first, part[-1].last, part[-1].digest) for part in (lost[:cut], lost[cut:]) if part]
    assert verify(kept, gaps).intact


def test_a_gap_with_the_wrong_hash_breaks_the_chain() -> None:
    whole = chain([2, 3, 1])
    assert verify([whole[0], whole[2]], [Gap(3, 5, GENESIS)]).breaks == [6]


def test_a_gap_without_a_hash_is_taken_on_trust() -> None:
    whole = chain([2, 3, 1])
    assert verify([whole[0], whole[2]], [Gap(3, 5, None)]).intact


def test_two_gaps_with_the_same_end_both_count() -> None:
    whole = chain([2, 3, 1])
    gaps = [Gap(3, 5, whole[1].digest), Gap(5, 5, whole[1].digest)]
    assert verify([whole[0], whole[2]], gaps).intact


def test_a_gap_before_the_first_batch_received_starts_the_chain() -> None:
    whole = chain([2, 3, 1])
    assert verify(whole[1:], [Gap(1, 2, whole[0].digest)]).intact
    assert verify(whole[1:], [Gap(1, 2, GENESIS)]).breaks == [3]


def test_a_first_batch_that_follows_another_is_a_break() -> None:
    whole = chain([2, 3])
    forged = Link(1, 3, whole[0].digest, whole[1].digest)
    assert verify([forged]).breaks == [1]


def test_overlapping_batches_are_a_break() -> None:
    whole = chain([2, 3])
    assert verify([whole[0], Link(2, 4, whole[0].digest, whole[1].digest)]).breaks == [2]


def test_checking_may_begin_later_than_one() -> None:
    whole = chain([2, 3, 1])
    assert verify(whole[1:], first=3).intact


def test_a_summary_takes_the_place_of_batches_in_the_chain() -> None:
    maker = Chain()
    first = maker.data(2)
    prev = maker.prev
    replaced = [maker.data(2), maker.data(3)]
    last = maker.data(1)
    summary = decode(maker.summary(replaced, 3, 5, prev))
    assert summary.kind is Kind.SUMMARY
    assert summary.last_prev == digest(replaced[-1]).hex()
    link = Link(3, 7, bytes.fromhex(summary.prev), bytes.fromhex(summary.last_prev))
    (before,), (after,) = links([first]), links([last])
    assert verify([before, link, after]).intact
