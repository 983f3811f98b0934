"""Decides which messages are accepted, and sets the others apart."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping

from edgegw.clock import wall_ms
from edgegw.receiver.announce import Throttle
from edgegw.receiver.apart import Apart, Rejected
from edgegw.receiver.senders import Admission, Senders
from edgegw.runtime.text import printable

MAX_REJECTED = 10_000
MAX_REJECTED_BYTES = 64 * 1024**2
"""How much is kept of the rejected messages; what comes after that is counted in the log alone."""
MAX_TOPIC = 512
"""The longest topic, in characters, of a rejected message that is kept."""
MAX_REFUSALS_LOGGED = 1000
"""For how many pairs of topic and gateway a refusal is logged."""

_log = logging.getLogger(__name__)


class Admissions:
    """The senders and the rejected messages of one sink; `malformed` counts this run's."""

    def __init__(
        self, apart: Apart, now_s: Callable[[], float], template: str, rebind: Mapping[str, str] | None
    ) -> None:
        self.malformed = 0
        self._apart = apart
        self._now_s = now_s
        self._throttles: dict[str, Throttle] = {}
        self._refusals_logged: set[tuple[str, str]] = set()
        self._rejected = {(one.topic, one.digest): one for one in apart.rejected()}
        self._rejected_bytes = sum(one.size for one in self._rejected.values())
        self.senders = Senders(template, rebind, apart.senders(), wall_ms())
        for gateway, sender in self.senders.changed.items():
            apart.bind(gateway, sender)
            _log.info("gateway %s: believed on %s from now on", gateway, sender.topic)

    def admit(self, topic: str, payload: bytes, gateway: str) -> Admission:
        """Decide whether a batch of a gateway is accepted on a topic; set it apart if it is not."""
        base = topic.rpartition("/")[0]
        admission = self.senders.admit(gateway, base)
        if admission is Admission.REFUSED:
            self._refuse(topic, payload, gateway)
            return admission
        if admission is not Admission.ADMITTED:
            self._apart.bind(gateway, self.senders.bind(gateway, base, wall_ms()))
        if admission is Admission.MOVED:
            _log.warning("gateway %s: came on its own topic %s; no other is believed any more", gateway, base)
        if self._rejected:
            self._remove(topic, payload)
        return admission

    def _refuse(self, topic: str, payload: bytes, gateway: str) -> None:
        """Set a batch apart whose gateway is not believed on its topic; log it once for each of both."""
        base = topic.rpartition("/")[0]
        refusal = self.senders.refusal(gateway, base)
        known = (base, gateway) in self._refusals_logged
        if not known and len(self._refusals_logged) < MAX_REFUSALS_LOGGED:
            self._refusals_logged.add((base, gateway))
            _log.warning("%s; nothing of them is confirmed, they are set apart", refusal)
        self._keep(topic, payload, f"not believed: {refusal}")

    def reject(self, topic: str, payload: bytes, reason: str) -> None:
        """Set a message apart that is no batch, or cannot be kept."""
        if self._keep(topic, payload, reason):
            self.malformed += 1
            self._complain("malformed", f"rejected a message on {topic}: {reason}")

    def _keep(self, topic: str, payload: bytes, reason: str) -> bool:
        """Keep a rejected message, as far as there is room; return whether it is none of those kept already."""
        one = Rejected(topic, digest(payload), len(payload), printable(reason))
        if (topic, one.digest) in self._rejected:
            return False
        full = len(self._rejected) >= MAX_REJECTED or self._rejected_bytes + one.size > MAX_REJECTED_BYTES
        if full or len(topic) > MAX_TOPIC:
            why = "the table rejected is full" if full else "its topic is too long"
            self._complain("full", f"a rejected message on {topic} is not kept: {why}")
            return True
        self._apart.reject(one, payload, wall_ms())
        self._rejected[topic, one.digest] = one
        self._rejected_bytes += one.size
        return True

    def _remove(self, topic: str, payload: bytes) -> None:
        """Remove a message from the rejected, if it is among them: it is accepted after all."""
        one = self._rejected.pop((topic, digest(payload)), None)
        if one is not None:
            self._rejected_bytes -= one.size
            self._apart.remove(one.topic, one.digest)

    def rejected(self) -> list[Rejected]:
        """Return the rejected messages that are kept."""
        return list(self._rejected.values())

    def payloads(self) -> Iterator[tuple[str, bytes]]:
        """Yield the rejected messages that are kept, each with its topic."""
        for one in self.rejected():
            yield one.topic, self._apart.payload(one)

    def _complain(self, kind: str, text: str) -> None:
        line = self._throttles.setdefault(kind, Throttle()).line(text, self._now_s())
        if line:
            _log.warning("%s", line)


def digest(payload: bytes) -> str:
    """Return what tells a payload from others: its SHA-256, hex."""
    return hashlib.sha256(payload).hexdigest()
