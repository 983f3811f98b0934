"""The reads of a device, adapted to what it refuses."""

from collections import deque
from collections.abc import Iterable, Mapping

from edgegw.config.schema import ModbusTag
from edgegw.drivers.modbus.plan import NOTHING, Avoid, Block, halves, plan, single

RETRY_FIRST_S = 60.0
RETRY_MAX_S = 3600.0
"""After so long, doubled each time, everything is tried again: a device that refused while it started, or an update."""

PATIENCE = 7
"""After so many refusals and no answer in a block, a few of its tags are tried alone before the search goes on."""

SAMPLES = 4
"""How many: from all over the block, at odd and even places."""


class Search:
    """Finds by halving what a device refuses within a block that it refused: about two reads for each halving.

    Read what `next` returns and `note` whether it was answered, until there is no more. A device that refuses
    everything, as some do while they start, is not asked for each tag: if neither the first parts are answered nor
    some tags by themselves, all are taken to be refused.
    """

    def __init__(self, refused: Block, doubtful: int | None = None) -> None:
        """Begin; `doubtful` is the place of a tag that must be answered by itself before anything else is tried."""
        self.block = refused
        self.refused: set[str] = set()
        self.in_vain = False
        self.answered: list[Block] = []
        self._refusals = 0
        self._queue: deque[Block] = deque()
        self._after_samples: deque[Block] = deque()
        self._pairs: list[tuple[Block, Block]] = []
        self.note(refused, False)
        if doubtful is not None and self._queue:
            self._sample([single(refused, doubtful)])

    def next(self) -> Block | None:
        """Return what to read next, None at the end."""
        return self._queue.popleft() if self._queue else None

    def note(self, part: Block, answered: bool | None) -> None:
        """Note that a part was answered, refused for what it asks, or (None) not answered for another reason."""
        if answered:
            self.answered.append(part)
            self._queue.extend(self._after_samples)
            self._after_samples.clear()
        elif answered is False:
            self._refusals += 1
            pair = halves(part)
            if pair is None:
                self.refused.update(placed.name for placed in part.tags)
            else:
                self._pairs.append(pair)
                self._queue.extend(pair)
            if not self.answered:
                self._doubt()

    def _doubt(self) -> None:
        """Try single tags when nothing was answered for long; give up when none of them is either."""
        if self._after_samples and not self._queue:
            self.in_vain = True
            self.refused = {placed.name for placed in self.block.tags}
        elif self._queue and self._refusals == PATIENCE:
            places = ((2 * i + 1) * len(self.block.tags) // (2 * SAMPLES) + i % 2 for i in range(SAMPLES))
            self._sample([single(self.block, place) for place in places])

    def _sample(self, blocks: list[Block]) -> None:
        self._after_samples, self._queue = self._queue, deque(blocks)

    def conflicts(self) -> list[tuple[Block, Block]]:
        """Return pairs of reads that were answered one by one, but not as one."""
        good = {id(block) for block in self.answered}
        return [(left, right) for left, right in self._pairs if id(left) in good and id(right) in good]


class ReadPlan:
    """What to read of a device in each scan: as few blocks as it answers.

    Begin each scan; where a block is refused, run a search; end the scan. `blocks` is a new list whenever it
    changes. Tags that are refused have reads of their own, a refused gap is not read over, and where neither explains
    the refusal the reads become shorter. Times are seconds of a monotonic clock.
    """

    def __init__(self, tags: Mapping[str, ModbusTag], max_block: int, max_gap: int) -> None:
        self.avoid = NOTHING
        self.blocks = self._whole = plan(tags, max_block, max_gap)
        self._tags, self._max_block, self._max_gap = tags, max_block, max_gap
        self._in_vain: set[str] = set()
        self._scans = 0
        self._searches: list[Search] = []
        self._recovered: set[str] = set()
        self._retry_s = RETRY_FIRST_S
        self._retry_at_s = 0.0

    def begin(self, now_s: float) -> None:
        """Begin a scan: by what is known, or after a while by trying everything again."""
        self._scans += 1
        self._searches = []
        self._recovered = set()
        if self.avoid is not NOTHING and now_s >= self._retry_at_s:
            self._retry_s = min(self._retry_s * 2, RETRY_MAX_S)
            self._all_again()

    def forget(self) -> None:
        """Try everything again in the next scan: after an outage it may be another device, or a newer version."""
        self._retry_s = RETRY_FIRST_S
        self._all_again()

    def _all_again(self) -> None:
        self.avoid, self.blocks = NOTHING, self._whole
        self._in_vain.clear()

    def search(self, refused: Block) -> Search | None:
        """Return a search within a block that was refused, None if it holds only tags that are known to be.

        Where the last one was in vain, it goes on only if a tag is answered by itself: another one in each scan.
        """
        if any(placed.name in self._in_vain for placed in refused.tags):
            search = Search(refused, self._scans % len(refused.tags))
        elif refused.tags[0].name in self.avoid.tags:
            return None
        else:
            search = Search(refused)
        self._searches.append(search)
        return search

    def answered(self, block: Block) -> None:
        """Note that a block was answered: if its tags were refused before, they are not any more."""
        if block.tags[0].name in self.avoid.tags:
            self._recovered.update(placed.name for placed in block.tags)

    def end(self, now_s: float) -> None:
        """End a scan of which every block was answered or refused; what was found holds for the next."""
        if not self._searches and not self._recovered:
            if self.avoid is NOTHING:
                self._retry_s = RETRY_FIRST_S
            return
        if self.avoid is NOTHING:
            self._retry_at_s = now_s + self._retry_s
        avoid = self._learned()
        if avoid != self.avoid:
            self.avoid = NOTHING if avoid == NOTHING else avoid
            self.blocks = plan(self._tags, self._max_block, self._max_gap, self.avoid)

    def _learned(self) -> Avoid:
        tags = self.avoid.tags - self._recovered
        for search in self._searches:
            names = {placed.name for placed in search.block.tags}
            self._in_vain = self._in_vain | names if search.in_vain else self._in_vain - names
            tags = tags - names | search.refused
        searched = {id(search.block) for search in self._searches}
        good = [block for block in self.blocks if id(block) not in searched]
        good += [block for search in self._searches for block in search.answered]
        longest = _longest(block for block in good if block.tags[0].name not in tags)
        cuts, limits = set(self.avoid.cuts), dict(self.avoid.limits)
        for search in self._searches:
            for left, right in search.conflicts():
                size = max(left.end, right.end) - left.start
                if right.start > left.end or size <= longest[left.table]:
                    cuts.add((right.table, right.start))
                else:
                    limits[left.table] = longest[left.table]
        return Avoid(frozenset(tags), frozenset(cuts), frozenset(limits.items()))


def _longest(blocks: Iterable[Block]) -> dict[str, int]:
    """Return the size of the longest block of each table."""
    longest: dict[str, int] = {}
    for block in blocks:
        longest[block.table] = max(block.size, longest.get(block.table, 0))
    return longest
