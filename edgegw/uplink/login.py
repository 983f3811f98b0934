"""How the gateway presents itself to its brokers: client id, user, password, and the files for TLS."""

from pathlib import Path
from typing import NamedTuple

from edgegw.config.load import secret
from edgegw.config.schema import Config
from edgegw.errors import ConfigError, UplinkError


class Login(NamedTuple):
    """How to present oneself to a broker; the files are paths, "" for none."""

    client_id: str
    username: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


def client_id(gateway: str) -> str:
    """Return the MQTT client id of a gateway: without dots, which NATS refuses, and as distinct as the ids are.

    No gateway id holds a tilde.
    """
    return f"edgegw-{gateway.replace('.', '~')}"


def check_id(gateway: str) -> str:
    """Return the client id for trying a broker, which is no gateway's: the running gateway keeps its connection."""
    return f"edgegw~check-{gateway.replace('.', '~')}"


def login(config: Config, config_path: Path, client: str) -> Login:
    """Return how to present oneself as this client; raise UplinkError if the password cannot be read."""
    uplink = config.uplink
    try:
        password = secret(uplink.password_file, config_path) if uplink.password_file else ""
    except ConfigError as error:
        raise UplinkError(f"uplink.password_file: {error}") from None
    files = [
        str(config_path.parent / name) if name else ""
        for name in (uplink.ca_file, uplink.cert_file, uplink.key_file)
    ]
    return Login(client, uplink.username, password, *files)
