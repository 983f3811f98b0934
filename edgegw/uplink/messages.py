"""What passes between the uplink and its connection: the will, messages to the gateway, and PUBACKs."""

from typing import NamedTuple


class Will(NamedTuple):
    """What the broker says for us, retained, when the connection is gone."""

    topic: str
    payload: bytes


class Ack(NamedTuple):
    """What the broker said to a publish.

    `heard` is False only where MQTT 5 tells that nobody is subscribed.
    """

    accepted: bool
    heard: bool
    reason: str


class Incoming(NamedTuple):
    """A message to the gateway. `answer_to` and `correlation` are MQTT 5's request and response.

    `mid` is None where no acknowledgement is expected (QoS 0).
    """

    payload: bytes
    retained: bool
    answer_to: str | None
    correlation: bytes | None
    mid: int | None
