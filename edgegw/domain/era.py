"""An era: a stretch of time in which the wall clock ran without a step."""

from typing import Any, NamedTuple


class Era(NamedTuple):
    """How the times of records are to be read.

    When the monotonic clock of this boot stood at `mono_ms`, the wall clock said `wall_ms`. If that is found to
    have been wrong, whoever knows a later pair of the same boot can work out what it should have said.
    """

    synced: bool
    boot: str
    wall_ms: int
    mono_ms: int

    @property
    def offset_ms(self) -> int:
        """How far the wall clock stands ahead of the monotonic one."""
        return self.wall_ms - self.mono_ms

    def wire(self) -> dict[str, Any]:
        """Return what batches and events hold of it."""
        mono = {"boot": self.boot, "ts": self.wall_ms, "ms": self.mono_ms}
        return {"clock": "synced" if self.synced else "unsynced", "mono": mono}
