"""What it means that a broker refuses a CONNECT or a subscription, or is silent."""

from edgegw.errors import UplinkError

TLS_ALERT = 0x15
"""The first byte of an alert (RFC 8446, 5.1): no packet of MQTT that a broker sends begins with it."""


class ProtocolRefused(UplinkError):
    """The broker does not speak this version of MQTT."""


class Unanswered(UplinkError):
    """The CONNECT got no answer: the broker was silent or hung up, which shows nothing about the version by itself."""


def silent(url: str, silence_s: float) -> Unanswered:
    """Return what it means that the port is open and nothing came."""
    return Unanswered(
        f"uplink {url}: no answer to CONNECT in {silence_s:.0f} s; the port is open: "
        "is the broker frozen, or is this no MQTT broker?"
    )


def refusal(url: str, why: str | None, *, v5: bool, first_byte: int | None) -> UplinkError:
    """Return what it means that the broker ended the connection in answer to a CONNECT, None: without a reason."""
    plain = url.startswith("mqtt://")
    if plain and first_byte == TLS_ALERT:
        return UplinkError(f"uplink {url}: this port expects TLS; use mqtts://")
    if why is None:
        hint = "; if the port expects TLS, use mqtts://" if plain else ""
        return Unanswered(f"uplink {url}: the broker closed the connection in answer to CONNECT{hint}")
    kind = ProtocolRefused if v5 else UplinkError
    return kind(f"uplink {url}: {why}")


def subscription_refused(topic: str, reason: str) -> str:
    """Return what it means that the broker refuses a subscription, for the operator."""
    hint = "nothing sent there arrives; check the broker's access list"
    return f"the subscription to {topic} is refused: {reason}; {hint}"
