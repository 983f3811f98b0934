"""Whatever happens to a journal, in any order: its invariants, against a model that is two lists."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from journal_rig import MIB, Hand, Told, chain, config, covered, event, kept, named, numbers, scan

from edgegw.domain.batch import Kind
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record
from edgegw.errors import JournalError
from edgegw.journal.inbox import Damage
from edgegw.journal.store import Store


class Journals(RuleBasedStateMachine):
    """One stream's life; `heard` is all that any listener was ever told of, by seq."""

    @initialize(max_message=st.sampled_from([1024, 3000, 64 * 1024]))
    def begin(self, max_message: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="edgegw-journals-"))
        self.max_message = max_message
        self.lives = self.n = 0
        self.heard: dict[int, Told] = {}
        self.acked = Ranges()
        self.appended: list[Record] = []  # since the last restart, not told of yet
        self.hand = self.opened(self.folder / "0" / "journal.db")

    def opened(self, path: Path) -> Hand:
        path.parent.mkdir(exist_ok=True)
        return Hand(path, config(4 * MIB), self.max_message)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.hand.writer.close()
            shutil.rmtree(self.folder)

    def listen(self) -> None:
        """Take what was told since: nothing again, nothing missing, each record once and in order."""
        told, self.hand.told = self.hand.told, []
        for one in told:
            assert one.batch.seq not in self.heard
            assert one.batch.size == len(one.body) <= self.max_message
            self.heard[one.batch.seq] = one
        for kind in (Event, type(scan(0))):
            came = numbers(one.body for one in told if (one.batch.kind is Kind.EVENT) == (kind is Event))
            mine = [r for r in self.appended if isinstance(r, kind)]
            expected = [r.fields["n"] if isinstance(r, Event) else r.values["n"] for r in mine]
            assert came == expected[: len(came)]
            gone = set(map(id, mine[: len(came)]))
            self.appended = [r for r in self.appended if id(r) not in gone]

    @rule(scans=st.integers(0, 6), tags=st.sampled_from([1, 5, 60]), events=st.integers(0, 3))
    def append(self, scans: int, tags: int, events: int) -> None:
        """Append some scans and events."""
        records: list[Record] = [scan(self.n + i, tags) for i in range(scans)]
        records += [event(self.n + scans + i) for i in range(events)]
        self.n += len(records)
        self.appended += records
        for record in records:
            self.hand.inbox.put(record)

    @rule()
    def turn(self) -> None:
        """Let the writer do its work: nothing that was appended stays behind."""
        self.hand.turn()
        self.listen()
        assert not self.appended

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        """Have the upstream confirm some batches, in any order."""
        for seq in data.draw(
            st.lists(st.sampled_from(sorted(self.heard)), max_size=4) if self.heard else st.just([])
        ):
            self.hand.acknowledge([self.heard[seq]])
            self.acked.add(seq, self.heard[seq].batch.last)

    @rule(call=st.sampled_from(["append", "free_bytes", "acked", "newest"]), after=st.booleans())
    def fail(self, call: str, after: bool) -> None:
        """Have the disk fail in a turn, before or after it did what was asked."""
        real = getattr(Store, call)

        def fail(self: Store, *args: object, **more: object) -> object:
            if after:
                real(self, *args, **more)
            raise JournalError("for the test")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, call, fail)
            self.hand.turn()
        self.listen()

    @rule(every=st.booleans())
    def let_time_pass(self, every: bool) -> None:
        """Have the next turns write down what is settled, or prune."""
        self.hand.writer._acked_at -= 1e6
        if every:
            self.hand.writer._keeper._pruned_at -= 1e6
            self.hand.writer._opened_s -= 90_000.0
            self.turn()

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Find a batch damaged."""
        seq = data.draw(st.sampled_from(sorted(self.heard)))
        self.hand.inbox.tell(Damage(self.hand.writer.stream, "for the test", seq, seq))
        self.turn()
        assert self.hand.settled.copy().covers(seq, self.heard[seq].batch.last)

    @rule()
    def kill(self) -> None:
        """Kill it as it stands and start it again: what was told stays, what was not is gone."""
        self.lives += 1
        path = self.hand.copy_to(self.folder / str(self.lives))
        self.hand.writer.close()
        before = self.hand.settled.copy()
        self.hand = self.opened(path)
        self.appended = []
        found = kept(path)
        for seq, body in found.bodies.items():  # committed, though the kill came before the listener heard
            assert seq in self.heard or seq > max(self.heard, default=0)
            if seq not in self.heard:
                batch = (
                    next(b for b in [self.hand.writer._store.newest()] if b)
                    if self.hand.writer._store
                    else None
                )
                assert batch
                self.heard[seq] = Told(found.stream, batch, body)
        after = self.hand.settled.copy()
        assert all(before.covers(first, last) for first, last in after), "nothing is settled that was not"

    @rule()
    def restart(self) -> None:
        """Stop it in order and start it again: nothing is lost or forgotten."""
        self.hand.close()
        self.listen()
        assert not self.appended
        before = (self.hand.settled.copy(), self.hand.settled.pending_batches)
        self.hand = self.opened(self.hand.path)
        assert (self.hand.settled.copy(), self.hand.settled.pending_batches) == before

    @invariant()
    def every_seq_once(self) -> None:
        """All that was ever told makes one chain without holes; what the file still has of it is the same."""
        if not self.heard:
            return
        bodies = [self.heard[seq].body for seq in sorted(self.heard)]
        assert {one.stream for one in self.heard.values()} == {self.hand.writer.stream}
        assert chain(bodies).intact
        head = max(one.batch.last for one in self.heard.values())
        assert list(covered(bodies)) == [(1, head)]
        found = kept(self.hand.path)
        assert all(self.heard[seq].body == body for seq, body in found.bodies.items() if seq in self.heard)
        settled = self.hand.settled.copy()
        for seq, one in self.heard.items():
            assert seq in found.bodies or settled.covers(seq, one.batch.last)
        assert self.hand.settled.pending_batches == sum(
            not settled.covers(seq, one.batch.last)
            for seq, one in self.heard.items()
            if seq <= self.hand.writer.head
        )

    @invariant()
    def settled_is_acknowledged_or_named(self) -> None:
        """Nothing counts as done but what the upstream has or a gap event names."""
        if self.heard:
            told_of = named((one.body for one in self.heard.values()), self.hand.writer.stream)
            for first, last in self.acked:
                told_of.add(first, last)
            assert all(told_of.covers(first, last) for first, last in self.hand.settled.copy())


Journals.TestCase.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_p1_p2_no_seq_is_missing_or_used_twice_whatever_happens = Journals.TestCase
