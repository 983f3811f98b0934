"""What a sound configuration of the uplink still says that its owner may not have meant. Pure."""

from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from edgegw.config.schema import Config, Uplink


def advice(config: Config) -> list[str]:
    """Return a line for each oddity, each with its place."""
    return [*cleartext(config.uplink), *_dots(config)]


def cleartext(uplink: Uplink) -> Iterator[str]:
    """Say what goes over the network unencrypted that should not."""
    plain = [url for url in uplink.url if url.startswith("mqtt://") and not _loopback(url)]
    if plain and uplink.password_file:
        yield f"uplink.url: the password goes unencrypted to {plain[0]}; expected mqtts://"
    if plain and len(plain) < len(uplink.url) and any(url.startswith("mqtts://") for url in uplink.url):
        yield (
            f"uplink.url: found mqtts:// and mqtt:// in one list; whoever blocks the first gets the data, and the "
            f"commands, unencrypted by {plain[0]}; expected mqtts:// throughout"
        )


def _dots(config: Config) -> Iterator[str]:
    """Say where RabbitMQ, which maps dots and slashes on each other, makes other topics of ours."""
    for key, text in (("gateway.id", config.gateway.id), ("uplink.topic", config.uplink.topic)):
        if "." in text:
            yield (
                f"{key}: found a dot in {text!r}; some brokers (RabbitMQ) deliver a dot in a topic as a slash, so "
                "that subscribers see other topics; expected - or _ instead"
            )


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
