"""Which gateway is believed on which topic. Pure.

A broker's access list says who may publish where, and nothing about what a message claims to be. So a gateway is
believed below its own topic alone: the one that the template gives it; a topic outside of the template's tree, if it
was the first to name the gateway; or the one that the operator names with `--rebind`.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

PLACE = "{gateway}"
DEFAULT_TEMPLATE = f"edgegw/{PLACE}"
"""Where gateways publish that leave `uplink.topic` as it is."""


class Sender(NamedTuple):
    """The topic on which a gateway is believed, beside the template's; `since_ms` is when that began.

    `configured` ones are the operator's: nothing but the operator replaces them.
    """

    topic: str
    configured: bool
    since_ms: int


class Admission(Enum):
    """What a message's topic says about the gateway that it names."""

    ADMITTED = "admitted"
    FIRST = "first"
    """Admitted, and from now on this topic is the gateway's."""
    MOVED = "moved"
    """The same, in the place of another topic; what came there is no longer believed to be the gateway's."""
    REFUSED = "refused"


def check_template(template: str) -> str:
    """Return a template if it is one, else raise ValueError."""
    if template.count(PLACE) != 1 or any(c in template.replace(PLACE, "") for c in "{}+#\0"):
        raise ValueError(f"found {template!r}; expected a topic without wildcards, with {PLACE} once")
    return template


def check_rebind(text: str) -> tuple[str, str]:
    """Read `GATEWAY=TOPIC`; raise ValueError."""
    gateway, separator, topic = text.partition("=")
    topic = topic.rstrip("/")
    if not (gateway and separator and topic) or any(c in topic for c in "{}+#\0"):
        raise ValueError(f"found {text!r}; expected GATEWAY=TOPIC, a topic without wildcards")
    return gateway, topic


class Senders:
    """The topics of all gateways; `configured` ones replace those `known` from earlier runs."""

    def __init__(
        self,
        template: str = DEFAULT_TEMPLATE,
        configured: Mapping[str, str] | None = None,
        known: Iterable[tuple[str, Sender]] = (),
        now_ms: int = 0,
    ) -> None:
        self._template = template
        head = template.partition(PLACE)[0]
        self._tree = head[: head.rfind("/") + 1]
        self._of = dict(known)
        self.changed: dict[str, Sender] = {}
        """The configured topics that were not known."""
        for gateway, topic in (configured or {}).items():
            before = self._of.get(gateway)
            if before is None or not before.configured or before.topic != topic:
                self.changed[gateway] = self._of[gateway] = Sender(topic, True, now_ms)

    def own(self, gateway: str) -> str:
        """Return the topic that the template gives a gateway."""
        return self._template.replace(PLACE, gateway)

    def admit(self, gateway: str, topic: str) -> Admission:
        """Decide whether a gateway is believed below `topic`, which is without its last level (`/data`)."""
        known = self._of.get(gateway)
        if known is not None and known.topic == topic:
            return Admission.ADMITTED
        own = self.own(gateway)
        if topic == own:
            if known is None:
                return Admission.FIRST
            return Admission.ADMITTED if known.configured else Admission.MOVED
        if known is not None:
            return Admission.REFUSED
        if topic.startswith(self._tree) and _mapped(topic) != _mapped(own):
            return Admission.REFUSED
        return Admission.FIRST

    def bind(self, gateway: str, topic: str, now_ms: int) -> Sender:
        """Note the topic of a gateway that was admitted as the first, or moved."""
        sender = Sender(topic, False, now_ms if gateway in self._of else 0)
        self._of[gateway] = sender
        return sender

    def topic(self, gateway: str) -> str:
        """Return where a gateway is believed."""
        known = self._of.get(gateway)
        return self.own(gateway) if known is None else known.topic

    def since_ms(self, gateway: str) -> int:
        """Return from when on what came in a gateway's name came on its topic."""
        known = self._of.get(gateway)
        return 0 if known is None else known.since_ms

    def refusal(self, gateway: str, topic: str) -> str:
        """Return why a gateway is not believed on a topic, and what an operator can do."""
        return (
            f"found batches of gateway {gateway} on {topic}; expected them on {self.topic(gateway)}; if they are its "
            f"own (renamed, or another uplink.topic), start with --rebind {gateway}={topic} or the right "
            "--topic-template"
        )


def _mapped(topic: str) -> str:
    """Return a topic as RabbitMQ delivers it: a dot in it has become a slash."""
    return topic.replace(".", "/")
