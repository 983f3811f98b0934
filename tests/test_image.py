"""The image: what is known of a device, and how long it counts."""

from math import inf

from edgegw.domain.image import Image
from edgegw.domain.record import Scan


def image(*, held: bool = False) -> Image:
    made = Image()
    made.take(Scan(1000, "a", {"x": 1.0, "y": 2.0}, {"y": "bad:odd"}), 1.0, held=held)
    return made


def test_a_scan_of_some_tags_leaves_the_others_as_they_were() -> None:
    made = image()
    made.take(Scan(2000, "a", {"x": 3.0}), 2.0)
    assert (made.devices["a"].values, made.devices["a"].quality) == ({"x": 3.0, "y": 2.0}, {"y": "bad:odd"})
    assert made.devices["a"].since_s == -inf


def test_after_a_loss_nothing_counts_that_was_not_read_since() -> None:
    made = image(held=True)
    made.lost("a", 5.0)
    made.lost("a", 6.0)
    lost = made.devices["a"]
    assert (lost.lost, lost.since_s, lost.at_s, lost.held) == (True, 5.0, 5.0, False)
    made.take(Scan(9000, "a", {"x": 3.0}), 9.0, held=True)
    back = made.devices["a"]
    assert (back.lost, back.since_s, back.values, back.quality) == (False, 9.0, {"x": 3.0}, {})


def test_a_device_answers_until_it_is_lost_or_overdue_however_long_its_scan_takes() -> None:
    made = Image()
    made.take(Scan(1000, "a", {"x": 1.0}), 1.0, seen_s=9.0)
    assert made.devices["a"].answering(11.9, 3.0)
    assert not made.devices["a"].fresh(11.9, 3.0), "what it read is old all the same"
    assert not made.devices["a"].answering(12.1, 3.0)
    made.lost("a", 10.0)
    assert not made.devices["a"].answering(10.0, 3.0)
