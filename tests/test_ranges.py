"""Ranges against a plain set."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgegw.domain.ranges import Ranges

TOP = 60
SPANS = st.tuples(st.integers(1, TOP), st.integers(0, 12)).map(lambda span: (span[0], span[0] + span[1]))
STEPS = st.lists(st.tuples(st.booleans(), SPANS), max_size=30)


def numbers(span: tuple[int, int]) -> set[int]:
    return set(range(span[0], span[1] + 1))


def build(steps: list[tuple[bool, tuple[int, int]]]) -> tuple[Ranges, set[int]]:
    ranges, model = Ranges(), set[int]()
    for add, span in steps:
        if add:
            ranges.add(*span)
            model |= numbers(span)
        else:
            ranges.remove(*span)
            model -= numbers(span)
    return ranges, model


@given(STEPS)
def test_ranges_hold_what_a_set_would_hold(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    ranges, model = build(steps)
    assert {n for span in ranges for n in numbers(span)} == model
    assert ranges.total() == len(model)
    assert bool(ranges) == bool(model)


@given(STEPS)
def test_ranges_are_sorted_disjoint_and_never_adjacent(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    spans = list(build(steps)[0])
    assert all(first <= last for first, last in spans)
    assert all(one[1] + 1 < other[0] for one, other in itertools.pairwise(spans))


@given(STEPS, SPANS)
def test_questions_are_answered_as_by_a_set(
    steps: list[tuple[bool, tuple[int, int]]], span: tuple[int, int]
) -> None:
    ranges, model = build(steps)
    assert ranges.covers(*span) == (numbers(span) <= model)
    assert ranges.overlaps(*span) == bool(numbers(span) & model)
    assert {n for hole in ranges.gaps(*span) for n in numbers(hole)} == numbers(span) - model


@given(STEPS)
def test_the_prefix_is_the_unbroken_run_from_one(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    ranges, model = build(steps)
    assert ranges.prefix() == next(n for n in range(TOP + 20) if n + 1 not in model)


@given(STEPS, STEPS)
def test_what_is_common_is_in_both(
    steps: list[tuple[bool, tuple[int, int]]], others: list[tuple[bool, tuple[int, int]]]
) -> None:
    (ranges, model), (other, other_model) = build(steps), build(others)
    assert {n for span in ranges.common(other) for n in numbers(span)} == model & other_model
    assert ranges.total() == len(model)


@given(STEPS, SPANS)
def test_a_copy_is_equal_and_goes_its_own_way(
    steps: list[tuple[bool, tuple[int, int]]], span: tuple[int, int]
) -> None:
    ranges, model = build(steps)
    twin = ranges.copy()
    assert twin == ranges
    twin.remove(*span)
    assert ranges.total() == len(model)


def test_ranges_cannot_be_hashed_and_show_what_they_hold() -> None:
    with pytest.raises(TypeError):
        hash(Ranges())
    assert repr(Ranges([(1, 2), (3, 3), (7, 9)])) == "Ranges([(1, 3), (7, 9)])"
    assert Ranges() != {1}
