"""Requests for retransmission: what of each stream to ask its gateway for, and when. Pure.

A gateway sends again what it still keeps (`replay` on TOPIC/cmd). The backlog may be on its way, so a hole is asked for
only after a while in which nothing of it came; one request a stream is open at a time, and what the gateway does not
keep, or does not answer, is not asked for again in this run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import msgspec

from edgegw.domain.ranges import Ranges
from edgegw.receiver.announce import spell
from edgegw.receiver.dedupe import Key

PATIENCE_S = 20.0
"""How long nothing of the backlog must have come before a hole is asked for."""
ANSWER_S = 30.0
"""How long nothing of what was asked for may come, while the gateway sends other batches."""
MAX_ANSWER_S = 600.0
MAX_TRIES = 3
POLL_S = 1.0
JOIN_RECORDS = 1000
"""Holes that are no farther apart are asked for together."""
LAST = 2**63 - 1
_NOT_LIVE = frozenset({"backfill", "summary"})
_NOT_KEPT, _ENDED = "no longer kept", "replay.stream"
"""What the gateway's error holds where these seqs, or this whole stream, need not be asked for again."""

_Seq = Annotated[int, msgspec.Meta(ge=1, le=LAST)]


class _Reply(msgspec.Struct, frozen=True):
    """A gateway's answer; `missing` are seqs that it no longer keeps."""

    id: str | None
    ok: bool
    error: str = ""
    missing: list[tuple[_Seq, _Seq]] = []


class Request(NamedTuple):
    """Seqs of a stream that a gateway was asked for, both included."""

    id: str
    first: int
    last: int

    def __str__(self) -> str:
        return spell([(self.first, self.last)])

    def payload(self, stream: str) -> bytes:
        """Return the command."""
        replay = {"stream": stream, "from": self.first, "to": self.last}
        return msgspec.json.encode({"id": self.id, "replay": replay})


@dataclass(slots=True)
class _Stream:
    """What is known of one stream's gateway. Times are monotonic seconds."""

    topic: str
    came_s: float
    progress_s: float
    open: Request | None = None
    opened_s: float = 0.0
    tries: int = 0
    gone: Ranges = field(default_factory=Ranges)


class Requests:
    """Keeps the requests of all streams; `new_id` returns an id that no command ever bore.

    `lines` collects what is worth a line in the log.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.lines: list[str] = []
        self._new_id = new_id
        self._streams: dict[Key, _Stream] = {}
        self._asked: dict[str, Key] = {}
        self._poll_s = 0.0

    def came(self, key: Key, topic: str, now_s: float) -> None:
        """Note that a batch of a stream came."""
        base, _, level = topic.rpartition("/")
        stream = self._streams.setdefault(key, _Stream(base, now_s, now_s))
        stream.topic, stream.came_s = base, now_s
        if level in _NOT_LIVE:
            stream.progress_s, stream.tries = now_s, 0

    def reply(self, topic: str, payload: bytes, now_s: float) -> None:
        """Process a message of TOPIC/reply; who else answers than the gateway that was asked is not listened to."""
        try:
            reply = msgspec.json.decode(payload, type=_Reply)
        except (ValueError, RecursionError):
            return  # the answer to another's command may hold anything
        key = self._asked.get(reply.id or "")
        if key is None:
            return
        stream = self._streams[key]
        if topic != f"{stream.topic}/reply":
            return
        asked = stream.open
        assert asked is not None
        if reply.ok:
            stream.progress_s = now_s
            for first, last in reply.missing:
                stream.gone.add(first, last)
            if reply.missing:
                self.lines.append(f"{key}: the gateway no longer keeps {spell(reply.missing)}")
            return
        if _ENDED in reply.error:
            stream.gone.add(1, LAST)
        elif _NOT_KEPT in reply.error:
            stream.gone.add(asked.first, asked.last)
        self.lines.append(f"{key}: the gateway does not resend {asked}: {reply.error[:200]}")

    def due(
        self, missing: Callable[[Key], list[tuple[int, int]]], now_s: float, *, at_once: bool = False
    ) -> list[tuple[str, bytes]]:
        """Return the commands to send now, with their topics; `at_once`: nothing has come for long enough."""
        if now_s < self._poll_s and not at_once:
            return []
        self._poll_s = now_s + POLL_S
        commands = []
        for key, stream in self._streams.items():
            wanted = Ranges(missing(key))
            for first, last in stream.gone:
                wanted.remove(first, last)
            if stream.open is not None and not wanted.overlaps(stream.open.first, stream.open.last):
                self._close(stream)
                stream.progress_s = now_s - PATIENCE_S  # the next hole need not wait
            if wanted and self._ready(stream, wanted, now_s, at_once=at_once):
                request = Request(self._new_id(), *_joined(wanted))
                stream.open, stream.opened_s = request, now_s
                self._asked[request.id] = key
                self.lines.append(f"{key}: requesting {request} again")
                commands.append((f"{stream.topic}/cmd", request.payload(key.stream)))
        return commands

    def _ready(self, stream: _Stream, wanted: Ranges, now_s: float, *, at_once: bool) -> bool:
        """Tell whether to ask now for what is wanted; a request that brought nothing is closed."""
        if stream.open is None:
            return at_once or now_s - stream.progress_s >= PATIENCE_S
        quiet_s = now_s - max(stream.opened_s, stream.progress_s)
        patience_s = min(MAX_ANSWER_S, ANSWER_S * 2**stream.tries)
        if not at_once and (stream.came_s <= stream.opened_s or quiet_s < patience_s):
            return False  # a gateway that is away answers nothing, which means nothing
        stream.tries += 1
        if at_once or stream.tries >= MAX_TRIES:
            wanted.remove(stream.open.first, stream.open.last)
            stream.gone.add(stream.open.first, stream.open.last)
            self.lines.append(f"{stream.topic}: nothing came of {stream.open}; it is not requested again")
        self._close(stream)
        return bool(wanted)

    def _close(self, stream: _Stream) -> None:
        assert stream.open is not None
        del self._asked[stream.open.id]
        stream.open = None


def _joined(wanted: Ranges) -> tuple[int, int]:
    """Return the first hole, with those that follow closely."""
    holes = iter(wanted)
    first, last = next(holes)
    for following, end in holes:
        if following - last > JOIN_RECORDS:
            break
        last = end
    return first, last
