"""Commands: what the upstream or a hand at the gateway asks for."""

from collections.abc import Mapping
from typing import NamedTuple

from edgegw.domain.ranges import Ranges
from edgegw.domain.tag import Scalar

HAND = "hand-"
"""What the ids of commands begin with that a hand at the gateway gives."""


class Peer(NamedTuple):
    """The process that asks by hand at the gateway."""

    uid: int
    pid: int


class WriteCommand(NamedTuple):
    """Write setpoints, and hold them for the lease if there is one."""

    id: str
    writes: dict[str, Scalar]
    expires_ms: int
    lease_s: float | None


class ReplayCommand(NamedTuple):
    """Send again what is kept of a stream's records `first` to `last`."""

    id: str
    stream: str
    first: int
    last: int


class Replay(NamedTuple):
    """What a replay comes to: `kept` are the seqs of the batches that it sends, whole ones."""

    id: str
    stream: str
    first: int
    last: int
    kept: tuple[tuple[int, int], ...]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """What was asked for and is no longer there."""
        return list(Ranges(self.kept).gaps(self.first, self.last))


class Reply(NamedTuple):
    """What a command is answered with; `id` is None if none could be made out.

    `replay` is what a command of that kind has set going.
    """

    id: str | None
    ok: bool
    error: str | None = None
    replay: Replay | None = None
    asked: Mapping[str, Scalar] | None = None
    """What it asked to write, as far as that could be made out: for the ledger, not for the answer."""

    def wire(self) -> dict[str, object]:
        """Return the answer as a message holds it."""
        answer: dict[str, object] = {"id": self.id, "ok": self.ok}
        if self.replay is not None:
            answer |= {"from": self.replay.first, "to": self.replay.last, "missing": self.replay.missing}
        return answer if self.error is None else {**answer, "error": self.error}
