"""Connecting to a broker in a version of MQTT that it speaks."""

import logging

from edgegw.config.schema import Config
from edgegw.uplink.connect_errors import ProtocolRefused, Unanswered
from edgegw.uplink.login import Login
from edgegw.uplink.messages import Will
from edgegw.uplink.mqtt import Connection

log = logging.getLogger(__name__)

VERSION_S = 4.0
"""How long a broker may keep silent to a CONNECT of MQTT 5 before 3.1.1 is tried: some old ones just do."""


def protocol(config: Config) -> str:
    """Return the MQTT versions to try: only MQTT 5 tells whether somebody was subscribed."""
    return "5" if config.uplink.acknowledge == "subscriber" else config.uplink.protocol


async def connect(url: str, protocol: str, login: Login, will: Will | None = None) -> Connection:
    """Connect to one broker; `auto` tries MQTT 5, then 3.1.1. Raise UplinkError.

    A refusal shows that the broker does not speak MQTT 5. Silence or a hang-up does not: it may be frozen, or starting.
    Only if it takes 3.1.1, and after that still does not answer MQTT 5, it speaks 3.1.1 alone.
    """
    if protocol != "auto":
        return await _open(Connection(url, protocol, login, will))
    try:
        return await _open(Connection(url, "5", login, will), VERSION_S)
    except ProtocolRefused:
        pass
    except Unanswered:
        (await _open(Connection(url, "3.1.1", login, None))).close()
        try:
            return await _open(Connection(url, "5", login, will), VERSION_S)
        except (ProtocolRefused, Unanswered):
            pass
    log.info("uplink %s: does not speak MQTT 5; trying 3.1.1", url)
    return await _open(Connection(url, "3.1.1", login, will))


async def _open(connection: Connection, *patience_s: float) -> Connection:
    try:
        await connection.open(*patience_s)
    except BaseException:  # also where it is cancelled: no socket is left behind
        connection.drop()
        raise
    return connection
