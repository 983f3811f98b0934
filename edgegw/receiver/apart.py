"""What is kept beside the records: which gateway is believed where, and the messages that were rejected.

Both databases speak the same SQL here but for the mark of a parameter.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from edgegw.receiver.senders import Sender

SENDERS = {"gateway": "text", "topic": "text", "configured": "bigint", "since_ms": "bigint"}
REJECTED = {"topic": "text", "digest": "text", "received_ts": "bigint", "size": "bigint", "reason": "text"}
"""The columns; `rejected` has the payload as it came, as `payload`, as well."""


class Rejected(NamedTuple):
    """A message that was not accepted; `digest` is the SHA-256 of its payload, hex."""

    topic: str
    digest: str
    size: int
    reason: str


class Apart(Protocol):
    """A part of a sink: its methods raise SinkError, and `commit` of the sink makes safe what they did."""

    def senders(self) -> Iterable[tuple[str, Sender]]:
        """Return the topics of the gateways."""
        ...

    def bind(self, gateway: str, sender: Sender) -> None:
        """Keep a gateway's topic, in the place of an earlier one."""
        ...

    def rejected(self) -> Sequence[Rejected]:
        """Return the rejected messages without their payloads."""
        ...

    def payload(self, rejected: Rejected) -> bytes:
        """Return the payload of a rejected message."""
        ...

    def reject(self, rejected: Rejected, payload: bytes, received_ms: int) -> None:
        """Keep a message that is not among the rejected yet."""
        ...

    def remove(self, topic: str, digest: str) -> None:
        """Remove a message from the rejected."""
        ...


Execute = Callable[[str, Sequence[Any]], Any]
"""Executes one statement and returns a cursor."""


class TablesApart:
    """The tables `senders` and `rejected` of a database."""

    def __init__(self, execute: Execute, mark: str, blob: str) -> None:
        self._execute = execute
        self._mark = mark
        senders = ", ".join(f"{name} {kind} NOT NULL" for name, kind in SENDERS.items())
        rejected = ", ".join(f"{name} {kind} NOT NULL" for name, kind in REJECTED.items())
        execute(f"CREATE TABLE IF NOT EXISTS senders ({senders}, PRIMARY KEY (gateway))", ())
        execute(
            f"CREATE TABLE IF NOT EXISTS rejected ({rejected}, payload {blob} NOT NULL, PRIMARY KEY (topic, digest))",
            (),
        )

    def senders(self) -> Iterable[tuple[str, Sender]]:
        rows = self._execute("SELECT gateway, topic, configured, since_ms FROM senders", ()).fetchall()
        return [
            (gateway, Sender(topic, bool(configured), since)) for gateway, topic, configured, since in rows
        ]

    def bind(self, gateway: str, sender: Sender) -> None:
        self._execute(f"DELETE FROM senders WHERE gateway = {self._mark}", (gateway,))
        self._insert("senders", SENDERS, (gateway, sender.topic, int(sender.configured), sender.since_ms))

    def rejected(self) -> Sequence[Rejected]:
        rows = self._execute(
            "SELECT topic, digest, size, reason FROM rejected ORDER BY received_ts, topic, digest", ()
        )
        return [Rejected(*row) for row in rows.fetchall()]

    def payload(self, rejected: Rejected) -> bytes:
        row = self._execute(f"SELECT payload FROM rejected {self._one()}", rejected[:2]).fetchone()
        return bytes(row[0])

    def reject(self, rejected: Rejected, payload: bytes, received_ms: int) -> None:
        columns = (*REJECTED, "payload")
        topic, digest, size, reason = rejected
        self._insert("rejected", columns, (topic, digest, received_ms, size, reason, payload))

    def remove(self, topic: str, digest: str) -> None:
        self._execute(f"DELETE FROM rejected {self._one()}", (topic, digest))

    def _one(self) -> str:
        return f"WHERE topic = {self._mark} AND digest = {self._mark}"

    def _insert(self, table: str, columns: Iterable[str], row: Sequence[Any]) -> None:
        marks = ", ".join([self._mark] * len(row))
        self._execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", row)


class NoneApart:
    """The part of a sink that has no memory: a binding lasts for a run, and what is rejected is gone."""

    def senders(self) -> Iterable[tuple[str, Sender]]:
        return ()

    def bind(self, gateway: str, sender: Sender) -> None:
        pass

    def rejected(self) -> Sequence[Rejected]:
        return ()

    def payload(self, rejected: Rejected) -> bytes:
        raise KeyError(rejected)

    def reject(self, rejected: Rejected, payload: bytes, received_ms: int) -> None:
        pass

    def remove(self, topic: str, digest: str) -> None:
        pass
