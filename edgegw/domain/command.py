"""Commands: what the upstream or a hand at the gateway asks for."""

from typing import NamedTuple

from edgegw.domain.tag import Scalar

HAND = "hand-"
"""What the ids of commands begin with that a hand at the gateway gives."""


class WriteCommand(NamedTuple):
    """Write setpoints, and hold them for the lease if there is one."""

    id: str
    writes: dict[str, Scalar]
    expires_ms: int
    lease_s: float | None


class Reply(NamedTuple):
    """What a command is answered with; `id` is None if none could be made out."""

    id: str | None
    ok: bool
    error: str | None = None

    def wire(self) -> dict[str, object]:
        """Return the answer as a message holds it."""
        answer: dict[str, object] = {"id": self.id, "ok": self.ok}
        return answer if self.error is None else {**answer, "error": self.error}
