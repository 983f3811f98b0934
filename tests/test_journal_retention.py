"""What goes when there must be room, and under which names: pure."""

from hypothesis import given
from hypothesis import strategies as st

from edgegw.domain.ranges import Ranges
from edgegw.journal.retention import Loss, NamedLosses, joined


def loss(first: int, last: int, reason: str = "full") -> Loss:
    """Return a loss of one batch, whose hash names its end."""
    return Loss(first, last, last.to_bytes(32, "big"), [(first, last)], reason)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20))))
def test_joined_losses_cover_the_same_seqs_and_end_with_the_hash_of_their_last(
    pairs: list[tuple[int, int]],
) -> None:
    lost = [loss(first, first + more) for first, more in pairs]
    joint = joined(lost)
    assert [(one.first, one.last) for one in joint] == list(Ranges((one.first, one.last) for one in lost))
    assert all(one.digest == one.last.to_bytes(32, "big") for one in joint)


def test_a_journal_that_drops_its_oldest_for_days_names_one_range() -> None:
    """Each time a hundredth goes, and with it, a round later, the event that named another hundredth."""
    named, events, settled = NamedLosses(), [], Ranges()
    for turn in range(1_000):
        again = [events[turn - 100]] if turn >= 100 else []
        lost = named.widened([loss(10 * turn + 1, 10 * turn + 10), *again], settled)
        named.add(lost, 10 * turn + 1_010)
        assert len(lost) == 1
        events.append(lost[0])
    assert (events[-1].first, events[-1].last) == (1, 10_000)


def test_what_was_confirmed_upstream_is_not_named_again() -> None:
    named = NamedLosses()
    named.add([loss(1, 10)], 20)
    assert [one[:2] for one in named.widened([loss(11, 12)], Ranges())] == [(1, 12)]
    assert [one[:2] for one in named.widened([loss(11, 12)], Ranges([(20, 20)]))] == [(11, 12)]


def test_losses_apart_from_each_other_stay_apart() -> None:
    named = NamedLosses()
    named.add([loss(1, 10), loss(50, 60)], 70)
    assert [one[:2] for one in named.widened([loss(48, 49)], Ranges())] == [(48, 60)]
