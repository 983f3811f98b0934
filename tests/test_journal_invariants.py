"""Whatever happens to a journal, in any order: its invariants, against a model that is a list of what was appended."""

import asyncio
import io
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from journal_rig import GATEWAY, Hand, Told, config, event, gaps_in, kept, numbers, spoil
from test_journal_faults import Drained
from test_journal_thin import joint, recomputed

from edgegw.config.units import Size
from edgegw.domain import batch as batches
from edgegw.domain.batch import Batch, Gap, Kind, Link
from edgegw.domain.era import Era
from edgegw.domain.ranges import Ranges
from edgegw.domain.record import Event, Record, Scan
from edgegw.errors import JournalError
from edgegw.journal import bundle
from edgegw.journal.bundle import Bundle
from edgegw.journal.export import chosen
from edgegw.journal.inbox import Damage, Prune
from edgegw.journal.journal import Found
from edgegw.journal.period import Period
from edgegw.journal.receipt import Held, Receipt
from edgegw.journal.release import releasable
from edgegw.journal.store import Reader, Row, Store, unpack

MAX_SIZE = 512 * 1024
START_MS = 1_700_000_000_000 - 1_700_000_000_000 % 900_000
FLOOD = 24
PLACES = st.integers(0, 9999)
"""Where in what there is then; how much that is varies with the stream's identity, which packs as it may."""


class Said(NamedTuple):
    """What a batch's bytes say."""

    message: batches.Message
    link: Link
    gaps: list[Gap]

    @property
    def named(self) -> list[tuple[int, int]]:
        """The seqs that are gone for good, as it says."""
        return [gap[:2] for gap in self.gaps]


class Journals(RuleBasedStateMachine):
    """One stream's life.

    `heard` is all that any listener was ever told of, `standing` what stands for each seq now (a batch, or the summary
    that took its place), `upstream` all that ever came there; each by its first seq.
    """

    @initialize(
        max_message=st.sampled_from([1024, 3000, 64 * 1024]),
        when_full=st.sampled_from(["thin", "thin", "drop"]),
        floods=st.sampled_from([0, 4, 8]),
    )
    def begin(self, max_message: int, when_full: Any, floods: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="edgegw-journals-"))
        self.loop = asyncio.new_event_loop()
        self.readers = ThreadPoolExecutor(1)
        self.max_message = max_message
        self.config = config(when_full=when_full).model_copy(update={"max_size": Size(MAX_SIZE)})
        self.patch = pytest.MonkeyPatch()
        append = Store.append
        machine = self

        def watched(store: Store, rows: Sequence[Row], **more: Any) -> None:
            append(store, rows, **more)
            try:
                machine.committed(rows)
            except AssertionError as error:
                machine.wrong.append(error)  # the writer would survive it

        self.patch.setattr(Store, "append", watched)
        self.wrong: list[AssertionError] = []
        self.lives = self.n = 0
        self.ts = START_MS
        self.said: dict[bytes, Said] = {}
        self.heard: dict[int, Told] = {}
        self.standing: dict[int, bytes] = {}
        self.upstream: dict[int, list[bytes]] = {}
        self.excused = Ranges()
        self.appended: list[Record] = []  # since the last restart, not told of yet
        self.live = False
        self.eras: dict[int, bytes] = {}
        self.exported: list[tuple[str, list[bytes], list[tuple[int, int]]]] = []
        self.open(self.folder / "0" / "journal.db")
        for _ in range(floods):
            self.flood()

    def open(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self.hand = Hand(path, self.config, self.max_message)
        self.hand.listener = self.listen
        journal = self.journal = Drained(self.hand).journal
        journal._loop, journal._readers = self.loop, self.readers
        self.era = self.hand.writer._era
        self.found: Found | None = None
        self.on_the_way: dict[int, Told] = {}

    def close(self) -> None:
        self.journal._close_reader()
        self.hand.writer.close()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.close()
            self.patch.undo()
            self.readers.shutdown()
            self.loop.close()
            shutil.rmtree(self.folder)

    # -- what is watched ---------------------------------------------------------------------------------------------

    def look(self, body: bytes) -> Said:
        """Read a batch, once."""
        if body not in self.said:
            message = batches.decode(body)
            own = bytes.fromhex(message.last_prev) if message.last_prev else batches.digest(body)
            last = message.seq + message.count - 1
            link = Link(message.seq, last, bytes.fromhex(message.prev), own, message.kind is Kind.SUMMARY)
            gaps = [
                Gap(g["from"], g["to"], bytes.fromhex(g["last_prev"])) for g in gaps_in(body, message.stream)
            ]
            self.said[body] = Said(message, link, gaps)
        return self.said[body]

    def listen(self, told: list[Told]) -> None:
        """Take what was told: nothing again, nothing missing, each record once, in order and in its era."""
        for one in told:
            assert one.batch.seq not in self.heard
            assert one.batch.size == len(one.body) <= self.max_message
            self.heard[one.batch.seq] = one
            self.standing.setdefault(one.batch.seq, one.body)
            if self.live:
                assert self.hand.settled.hold([one.batch])
                self.publish(one)
        for kind in (Event, Scan):
            mine_told = [one for one in told if (one.batch.kind is Kind.EVENT) == (kind is Event)]
            came = numbers(one.body for one in mine_told)
            mine = [r for r in self.appended if isinstance(r, kind)]
            expected = [r.fields["n"] if isinstance(r, Event) else r.values["n"] for r in mine]
            assert sorted(came) == sorted(expected[: len(came)])
            for one in mine_told:
                assert all(self.eras[n] in one.body[: batches.HEAD_ROOM] for n in numbers([one.body]))
            gone = set(map(id, mine[: len(came)]))
            self.appended = [r for r in self.appended if id(r) not in gone]

    def committed(self, rows: Sequence[Row]) -> None:
        """Check what was written: within the limit, and a summary says what those said whose place it takes."""
        ballast = self.hand.path.with_name("journal.db.ballast")
        assert self.hand.bytes + (ballast.stat().st_size if ballast.exists() else 0) <= MAX_SIZE
        short = [self._body(row) for row in rows if row.period]
        if not short:
            return
        taken: list[bytes] = []
        for body in short:
            link = self.look(body).link
            assert not any(link.first <= seq <= link.last for seq in self.on_the_way), "it is on its way"
            mine = [seq for seq in self.standing if link.first <= seq <= link.last]
            taken += [self.standing[seq] for seq in sorted(mine)]
            links = [self.look(self.standing[seq]).link for seq in sorted(mine)]
            assert (links[0].first, links[-1].last) == (link.first, link.last)
            assert (links[0].prev, links[-1].digest) == (link.prev, link.digest)
            assert sum(one.last - one.first + 1 for one in links) == link.last - link.first + 1
            for seq in mine:
                del self.standing[seq]
            self.standing[link.first] = body
        period_ms = 1000 * next(row.period for row in rows if row.period)
        found = joint(map(batches_json, short), period_ms)
        if self.look(taken[0]).message.kind is Kind.SUMMARY:
            expected = joint(map(batches_json, taken), period_ms)
        else:
            replaced = Ranges(self.look(body).link[:2] for body in taken)
            expected = recomputed(self.heard.values(), replaced, period_ms)
        assert found.keys() == expected.keys()
        for key, stretch in expected.items():
            assert found[key].mean == pytest.approx(stretch.mean)
            assert found[key]._replace(mean=None) == stretch._replace(mean=None)

    def _body(self, row: Row) -> bytes:
        kind = Kind(row.kind)
        return unpack(
            Batch(self.hand.writer.stream, row.seq, row.records, kind, row.digest, row.size, row.packed)
        )

    # -- the gateway -------------------------------------------------------------------------------------------------

    def reading(self, tags: int) -> Scan:
        """Return a scan whose numbers do not pack well."""
        self.n += 1
        self.ts += 1500
        noise = random.Random(self.n)
        values: dict[str, Any] = {f"t{i}": noise.random() for i in range(tags)}
        return Scan(self.ts, f"m{self.n % 2}", {"n": self.n} | values)

    def put(self, records: Sequence[Record]) -> None:
        for record in records:
            self.hand.inbox.put(record)
            n = record.fields["n"] if isinstance(record, Event) else record.values["n"]  # type: ignore[union-attr]
            self.eras[n] = batches.timing(self.era)
        self.appended += records

    @rule(scans=st.integers(0, 6), tags=st.sampled_from([1, 5, 60]), events=st.integers(0, 3))
    def append(self, scans: int, tags: int, events: int) -> None:
        """Append some scans and events."""
        self.put([self.reading(tags) for _ in range(scans)])
        self.n += events
        self.put([event(self.n - i) for i in reversed(range(events))])

    @rule()
    def turn(self) -> None:
        """Let the writer do its work: nothing that was appended stays behind."""
        self.hand.turn()
        assert self.hand.writer.error is None
        assert not self.appended

    @rule()
    def flood(self) -> None:
        """Journal so much that the file is full soon."""
        for at in range(FLOOD):
            self.append(2, 80, int(at % 8 == 0))
            self.turn()

    @rule(synced=st.booleans(), step_ms=st.sampled_from([-7_200_000, -60_000, 30_000, 3_600_000]))
    def step(self, synced: bool, step_ms: int) -> None:
        """Set the clock."""
        self.ts += step_ms
        self.era = Era(synced, "boot", self.ts, 1000 * self.n)
        self.hand.inbox.tell(self.era)

    @rule(
        call=st.sampled_from(["append", "checkpoint", "free_bytes", "acked", "newest", "oldest", "batch"]),
        after=st.booleans(), turns=st.integers(1, 2),
    )  # fmt: skip
    def fail(self, call: str, after: bool, turns: int) -> None:
        """Have the disk fail in a turn, before or after it did what was asked."""
        real = getattr(Store, call)

        def fail(self: Store, *args: object, **more: object) -> object:
            if after:
                real(self, *args, **more)
            raise JournalError("for the test")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, call, fail)
            for _ in range(turns):
                self.hand.turn()

    @rule(every=st.booleans())
    def let_time_pass(self, every: bool) -> None:
        """Have the next turns write down what is settled, or let go of what is old."""
        self.hand.writer._acked_at -= 1e6
        if every:
            self.hand.writer._keeper._pruned_at -= 1e6
            self.hand.writer._odometer._since_s -= 90_000.0
            self.turn()

    @rule(older_than_ms=st.sampled_from([0, 100]))
    def prune(self, older_than_ms: int) -> None:
        """Let go by hand of what is settled."""
        prune = Prune(older_than_ms, self.loop.create_future())
        self.hand.inbox.tell(prune)
        self.turn()
        assert self.hand.flushed[-1] is prune.done

    @precondition(lambda self: self.standing)
    @rule(at=PLACES)
    def damage(self, at: int) -> None:
        """Find a batch damaged; what it said of others nobody can say any more."""
        seq = sorted(self.standing)[at % len(self.standing)]
        if seq in kept(self.hand.path).bodies:
            self.excused = Ranges([*self.excused, *self.look(self.standing[seq]).named])
        spoil(self.hand.path, seq)
        self.hand.inbox.tell(Damage(self.hand.writer.stream, "for the test", seq, seq))
        self.turn()
        assert self.hand.settled.copy().covers(seq, seq)

    @rule()
    def kill(self) -> None:
        """Kill it as it stands and start it again: what was told stays, what was not is gone."""
        self.lives += 1
        path = self.hand.copy_to(self.folder / str(self.lives))
        self.close()
        self.appended = []
        self.open(path)
        assert self.hand.writer.error is None
        self.learn()

    @rule()
    def restart(self) -> None:
        """Stop it in order and start it again: nothing is lost or forgotten."""
        self.journal._close_reader()
        self.hand.close()
        assert not self.appended
        before = (self.hand.settled.copy(), self.hand.settled.pending_batches)
        self.open(self.hand.path)
        assert (self.hand.settled.copy(), self.hand.settled.pending_batches) == before

    def learn(self) -> None:
        """Learn of what was committed though a kill came before the listener heard."""
        found = kept(self.hand.path)
        for seq, body in found.bodies.items():
            if seq > max(self.heard, default=0):
                self.heard[seq] = Told(found.stream, found.batches[seq], body)
                self.standing[seq] = body

    # -- the drain ---------------------------------------------------------------------------------------------------

    @rule(live=st.booleans())
    def link(self, live: bool) -> None:
        """Have what is journaled from now on go out at once, or not."""
        self.live = live

    @rule(limit=st.sampled_from([1, 8, 64]), skip=st.integers(0, 2))
    def read(self, limit: int, skip: int) -> None:
        """Read some of what is pending."""
        pending = list(self.hand.settled.copy().gaps(1, self.hand.writer.head))[skip:]
        if pending and self.hand.writer.error is None:
            self.found = self.journal._read(*pending[0], limit)
            for batch, body in self.found.batches:
                assert body == self.standing[batch.seq]

    @precondition(lambda self: self.found)
    @rule()
    def send(self) -> None:
        """Send what was read, unless it has been thinned meanwhile."""
        assert self.found
        some = [
            Told(batch.stream, batch, body)
            for batch, body in self.found.batches
            if body and batch.seq not in self.on_the_way
        ]
        if self.hand.settled.hold([one.batch for one in some], self.found.generation):
            gone = self.hand.settled.copy()
            for one in some:
                assert self.standing[one.batch.seq] == one.body or gone.covers(one.batch.seq, one.batch.last)
                self.publish(one)
        self.found = None

    def publish(self, one: Told) -> None:
        self.hand.settled.publish(one.batch)
        self.on_the_way[one.batch.seq] = one

    @precondition(lambda self: self.on_the_way)
    @rule(at=PLACES, most=st.sampled_from([1, 5, 100]))
    def arrive(self, at: int, most: int) -> None:
        """Have some of what is on its way arrive and be confirmed."""
        for seq in sorted(self.on_the_way)[at % len(self.on_the_way) :][:most]:
            one = self.on_the_way.pop(seq)
            self.take(one.body)
            self.hand.settled.acknowledge(one.batch)
            self.hand.settled.release([one.batch])

    @rule(arrived=st.booleans())
    def lose_the_link(self, arrived: bool) -> None:
        """Lose the link: what was on its way may have arrived, and is not confirmed."""
        for one in self.on_the_way.values():
            if arrived:
                self.take(one.body)
        self.on_the_way = {}
        self.found = None
        self.live = False
        self.hand.settled.release()

    def take(self, body: bytes) -> None:
        """Take in a batch upstream: equal seqs are equal bytes, unless one is a summary."""
        link = self.look(body).link
        known = self.upstream.setdefault(link.first, [])
        if body not in known:
            assert link.summary or all(self.look(other).link.summary for other in known)
            known.append(body)

    # -- by hand -----------------------------------------------------------------------------------------------------

    def reader(self) -> Reader:
        """Open the file beside the gateway."""
        return Reader(self.hand.path)

    @precondition(lambda self: self.hand.writer.error is None)
    @rule(unsent=st.booleans(), noted=st.booleans())
    def export(self, unsent: bool, noted: bool) -> None:
        """Write a file with what there is; the gateway may or may not be there to note it."""
        reader, file = self.reader(), io.BytesIO()
        try:
            some = chosen(reader, GATEWAY, Period(), unsent=unsent, left_out=pytest.fail)
            made = bundle.write(file, some, gateway=GATEWAY, stream=reader.stream, made_ms=1)
        finally:
            reader.close()
        bodies = list(Bundle(file).bodies())
        assert bodies == [self.standing[self.look(body).link.first] for body in bodies]
        self.exported.append((made.stream, bodies, made.ranges))
        if noted:
            self.hand.settled.carry(made.stream, made.ranges)

    @precondition(lambda self: self.exported and self.hand.writer.error is None)
    @rule(at=PLACES, receipt=st.booleans())
    def take_in(self, at: int, receipt: bool) -> None:
        """Take a file in upstream, and perhaps bring the receipt back."""
        stream, bodies, ranges = self.exported[at % len(self.exported)]
        for body in bodies:
            self.take(body)
        if receipt:
            ends = {self.look(body).link.last: self.look(body).link.digest.hex() for body in bodies}
            held = [Held(first, last, ends[last]) for first, last in ranges]
            reader = self.reader()
            try:
                mine, _ = releasable(reader, GATEWAY, Receipt(1, GATEWAY, stream, 1, held))
            finally:
                reader.close()
            self.loop.run_until_complete(self.journal.acknowledge_ranges(stream, mine))

    @precondition(lambda self: self.heard and self.hand.writer.error is None)
    @rule(at=PLACES, count=st.integers(0, 100))
    def replay(self, at: int, count: int) -> None:
        """Read anything once more: what is kept is what stands."""
        first = 1 + at % self.hand.writer.head
        last = min(first + count, self.hand.writer.head)
        stream = self.hand.writer.stream
        there = self.loop.run_until_complete(self.journal.kept(stream, first, last))
        bodies = [body for _, body in self.journal._read(first, last, 1000).batches]
        assert bodies == [self.standing[self.look(body).link.first] for body in bodies if body]
        assert there == Ranges(self.look(body).link[:2] for body in bodies if body)

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def every_seq_is_there_or_upstream_or_named(self) -> None:
        """What is kept, with what came upstream, covers or names all, and makes one chain."""
        for error in self.wrong:
            raise error
        if not self.heard:
            return
        found = kept(self.hand.path)
        assert all(self.standing.get(seq, body) == body for seq, body in found.bodies.items())
        known = {*found.bodies.values(), *(body for some in self.upstream.values() for body in some)}
        covered = Ranges(self.look(body).link[:2] for body in known)
        named = Ranges(gap for body in known for gap in self.look(body).named)
        whole = Ranges([*covered, *named, *self.excused])
        head = max(one.batch.last for one in self.heard.values())
        assert whole.covers(1, head), list(whole.gaps(1, head))
        self.is_chained(found.bodies.values())
        self.is_chained(known)
        self.is_chained({*known, *(one.body for one in self.heard.values() if one.batch.seq % 3)})
        settled = self.hand.settled.copy()
        came = Ranges(self.look(body).link[:2] for some in self.upstream.values() for body in some)
        done = Ranges([*came, *named, *self.excused])
        assert all(done.covers(*seqs) for seqs in settled), "what is settled has arrived or is named"
        if self.hand.writer.error is None:
            waiting = [b for b in found.batches.values() if not settled.covers(b.seq, b.last)]
            assert self.hand.settled.pending_batches == len(waiting)
            unsent = Ranges((b.seq, b.last) for b in found.batches.values())
            assert all(unsent.covers(*gap) for gap in settled.gaps(1, found.head)), (
                "what is not settled is there"
            )

    def is_chained(self, bodies: Any) -> None:
        """Check that each link holds that can be checked."""
        said = [self.look(body) for body in bodies]
        links, gaps = sorted(one.link for one in said), [gap for one in said for gap in one.gaps]
        assert batches.verify(links, gaps).breaks == []


def batches_json(body: bytes) -> dict[str, Any]:
    """Return a batch as a plain object."""
    return dict(json.loads(body))


Journals.TestCase.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_p1_p2_p5_no_seq_is_missing_or_used_twice_whatever_happens = Journals.TestCase


def test_looking_for_what_may_go_passes_over_what_is_gone_already(tmp_path: Path) -> None:
    hand = Hand(tmp_path / "journal.db", config())
    loop = asyncio.new_event_loop()
    for n in range(14):
        hand.turn(event(n))
    store, sealer = hand.writer._ready()
    for seqs in ((5, 6), (10, 11), (1, 4), (7, 9)):
        hand.acknowledge(one for one in hand.told if seqs[0] <= one.batch.seq <= seqs[1])
        hand.inbox.tell(Prune(-1, loop.create_future()))
        hand.turn()
        assert list(hand.writer._keeper._settled_rows(store, sealer.head, hand.settled.copy())) == []
    assert list(kept(hand.path).bodies) == [12, 13, 14, 15]
    assert hand.writer.error is None
    hand.close()
    loop.close()
