"""Ids of commands: each is durable before its command acts, and nothing but age makes it forgotten."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from edgegw import clock
from edgegw.control.ids import IDS, KEEP_S, SPARE, CommandIds, Noted

DAY_S = 86_400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db.ids"


def note(ids: CommandIds, name: str, now_s: float, expires_in_s: float) -> bool:
    return asyncio.run(ids.note(name, now_s, expires_in_s))


def noted(path: Path, *names: str, now_s: float = 1000.0, expires_in_s: float = 60.0) -> CommandIds:
    ids = CommandIds(path)
    for name in names:
        assert note(ids, name, now_s, expires_in_s)
    return ids


def other_boot(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(clock.boot_id().encode(), b"another"))


def test_an_id_that_was_noted_is_known_after_a_restart_and_after_a_reboot(path: Path) -> None:
    noted(path, "a", "b")
    ids = CommandIds(path)
    assert ("a" in ids, "b" in ids, "c" in ids) == (True, True, False)
    assert (ids.can_act(1059.0), ids.can_act(1061.0)) == (2, 0)
    other_boot(path)
    ids = CommandIds(path)
    assert ("a" in ids, "b" in ids) == (True, True)
    now_s = clock.mono_s()
    assert ids.can_act(now_s + 30.0) == 2, "the time that the machine was off is not counted"
    assert ids.can_act(now_s + 61.0) == 0
    assert note(ids, "c", now_s, 1.0)
    assert all(name in CommandIds(path) for name in "abc")


def test_ids_age_by_running_time_alone(path: Path) -> None:
    ids = noted(path, "old", now_s=0.0)
    note(ids, "new", 60.0 + KEEP_S - 1.0, 60.0)
    assert "old" in ids
    note(ids, "newer", 60.0 + KEEP_S + 1.0, 60.0)
    assert ("old" in ids, "new" in ids) == (False, True)


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_a_line_that_a_power_cut_tore_is_left_out_and_the_file_goes_on(path: Path, torn: int) -> None:
    noted(path, "a", "b")
    os.truncate(path, path.stat().st_size - torn)
    ids = CommandIds(path)
    assert ("a" in ids, "b" in ids) == (True, False)
    assert note(ids, "c", 1001.0, 60.0)
    again = CommandIds(path)
    assert ("a" in again, "b" in again, "c" in again) == (True, False, True)


def test_lines_that_cannot_be_read_cost_no_other(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noted(path, "a", "b", "c")
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\x00" * len(lines[2])
    path.write_bytes(b"\n".join(lines))
    ids = CommandIds(path)
    assert ("a" in ids, "b" in ids, "c" in ids) == (True, False, True)
    assert "1 of 4 lines cannot be read" in caplog.text


def test_a_disk_that_takes_nothing_makes_no_id_durable_and_later_writes_them_all(path: Path) -> None:
    ids = noted(path, "a")
    path.rename(path.with_suffix(".away"))
    path.mkdir()
    assert not note(ids, "b", 1001.0, 60.0)
    assert "b" in ids, "it may have been written"
    path.rmdir()
    assert note(ids, "c", 1002.0, 60.0)
    assert all(name in CommandIds(path) for name in "abc")


def test_the_file_does_not_grow_for_ever(path: Path) -> None:
    ids = CommandIds(path)
    for number in range(3 * SPARE):
        assert note(ids, f"c{number}", number * DAY_S, 1.0)
    assert len(path.read_bytes().splitlines()) < 2 * SPARE
    assert f"c{3 * SPARE - 1}" in CommandIds(path)


def test_of_more_than_there_is_room_for_those_go_that_expired_first_and_no_hand(path: Path) -> None:
    lines = [msgspec.json.encode({"boot": clock.boot_id()})]
    lines += [msgspec.json.encode(Noted(f"c{number}", 0.0, number + 1.0)) for number in range(IDS + 50)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    ids = CommandIds(path)
    note(ids, "hand-a", 0.0, 1.0)
    note(ids, "last", 0.0, 1e6)
    assert ("c10" in ids, f"c{IDS}" in ids, "hand-a" in ids, "last" in ids) == (False, True, True, True)
    assert ids.can_act(0.0) == IDS


def test_a_command_costs_as_little_with_many_ids_as_with_none(path: Path) -> None:
    """One line is appended, whatever stands before it."""
    ids = CommandIds(path)
    for number in range(200):
        assert note(ids, f"c{number}", 1000.0, 60.0)
    before = path.read_bytes()
    assert note(ids, "one more", 1001.0, 60.0)
    after = path.read_bytes()
    assert after.startswith(before)
    assert msgspec.json.decode(after[len(before) :])[0] == "one more"
    assert len(after) - len(before) < 64
