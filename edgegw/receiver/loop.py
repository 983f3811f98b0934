"""Subscribes to a broker, and confirms a message to it only when what it holds is kept.

Everything happens in the caller's thread: paho reads a packet or two, the intake takes them in, and when
nothing more is waiting, or enough is, the sink commits and the messages are acknowledged in their order.
While that goes on nothing is read, so that memory is bounded whatever the broker sends.
"""

import logging
from collections.abc import Sequence

from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.wait import wait_random_exponential

from edgegw.clock import mono_s
from edgegw.errors import UplinkError
from edgegw.receiver.intake import Intake
from edgegw.receiver.subscriber import Broker, Connection, Protocol, ProtocolError
from edgegw.runtime.stop import Stop

MOST_MESSAGES = 200
MOST_BYTES = 16 * 1024**2
"""What one transaction takes in at most."""
WAIT_S = 0.2
"""How long a turn waits for the broker: the most that a signal to stop goes unnoticed."""
STABLE_S = 20.0
"""How long a connection must have held, from its attempt, for the next to come without a wait."""
RETRY_MAX_S = 5.0
"""The longest pause between two attempts: no longer than a gateway's, which sends its backlog as soon as it is back."""
GIVE_UP_S = 60.0
"""How long to go without a broker where an end was asked for."""
SAY_S = 30.0
REFUSED_S = 600.0
"""How long no receipts, or no commands, are sent after the broker refused one."""
_REFUSED = {
    "ack": "does not let us publish receipts: %s; gateways that wait for them will send again and again",
    "cmd": "does not let us publish commands: %s; what is missing is not requested",
}

_log = logging.getLogger(__name__)


class _Outage:
    """What to say of a link that is away: at once, then in a while with the count, and when it is back."""

    def __init__(self) -> None:
        self._since_s: float | None = mono_s()
        self._said_s: float | None = None
        self._failures = 0
        self._ever = False

    @property
    def seconds(self) -> float:
        """How long the link has been away."""
        return 0.0 if self._since_s is None else mono_s() - self._since_s

    def lost(self, cause: str) -> None:
        """Take note of a loss or of one more failure."""
        now_s = mono_s()
        self._failures += 1
        if self._since_s is None:
            self._since_s, self._said_s, self._failures = now_s, None, 0
        if self._said_s is None:
            _log.warning("%s: %s", "lost" if self._ever else "no connection yet", cause)
        elif now_s - self._said_s >= SAY_S:
            _log.warning("still away after %d failures, %.0f s: %s", self._failures, self.seconds, cause)
        else:
            return
        self._said_s = now_s

    def over(self) -> None:
        """Take note that the link is there."""
        if self._said_s is not None:
            _log.warning("back after %d failures, %.0f s", self._failures, self.seconds)
        self._since_s, self._said_s, self._failures = None, None, 0
        self._ever = True


class Receiver:
    """The loop: connect, receive, and connect again, until stopped or nothing new comes."""

    def __init__(
        self,
        broker: Broker,
        intake: Intake,
        stop: Stop,
        idle_s: float | None = None,
        protocols: Sequence[Protocol] = tuple(Protocol),
    ) -> None:
        self._broker = broker
        self._protocols = protocols
        self._intake = intake
        self._stop = stop
        self._idle_s = idle_s
        self._new_s = mono_s()
        self._outage = _Outage()
        self._five_spoken = False
        self._ready_said = False
        self._blocked_until_s: dict[str, float] = {}
        self._uncommitted = 0
        self._uncommitted_bytes = 0
        self._unacknowledged: list[int] = []

    def run(self) -> None:
        """Receive until `stop` is set or, with `idle_s`, nothing new came for so long while subscribed.

        Raises UplinkError if `idle_s` is given and no broker is there for a minute, SinkError if nothing can
        be kept.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(UplinkError),
            wait=wait_random_exponential(multiplier=0.5, max=RETRY_MAX_S),
            sleep=self._stop.wait,
            stop=self._to_give_up,
            reraise=True,
        )
        done = False
        while not done:
            try:
                done = retrying(self._session)
            except UplinkError:
                if not self._stop.is_set():
                    raise
                done = True

    def _to_give_up(self, state: RetryCallState) -> bool:
        return self._stop.is_set() or (self._idle_s is not None and self._outage.seconds >= GIVE_UP_S)

    def _session(self) -> bool:
        """Hold one connection; True when all is done, False when it was lost after it had been stable."""
        began_s = mono_s()
        try:
            try:
                self._receive(self._protocols[0])
            except ProtocolError:
                if self._five_spoken or len(self._protocols) == 1:
                    raise
                self._receive(self._protocols[1])
        except UplinkError as error:
            self._outage.lost(str(error))
            if mono_s() - began_s < STABLE_S:
                raise
            return False
        return True

    def _receive(self, protocol: Protocol) -> None:
        self._unacknowledged.clear()
        connection = Connection(self._broker, protocol)
        try:
            self._open(connection, protocol)
            self._intake.reconnected()
            while not (self._stop.is_set() or self._done(connection)):
                self._turn(connection)
            self._commit(connection)
            self._send_receipts(connection, at_once=True)
        finally:
            if connection.lost and "cmd" in connection.unconfirmed:
                connection.refused.setdefault(
                    "cmd", connection.lost
                )  # some hang up on whoever may not publish
            self._note_refusals(connection)
            connection.close()

    def _done(self, connection: Connection) -> bool:
        """Tell whether an end was asked for, nothing new came for so long, and nothing is left to ask for."""
        if self._idle_s is None or self._uncommitted or mono_s() - self._new_s < self._idle_s:
            return False
        self._new_s = mono_s()
        return not self._request(connection, at_once=True)

    def _open(self, connection: Connection, protocol: Protocol) -> None:
        connection.connect()
        began_s = mono_s()
        while not self._stop.is_set() and not connection.subscribed():
            self._turn(connection)
            connection.check_answer(mono_s() - began_s)
        if self._stop.is_set():
            return
        self._five_spoken = self._five_spoken or protocol is Protocol.V5
        self._outage.over()
        self._new_s = mono_s()
        if not self._ready_said:
            _log.info("connected to %s, %s, MQTT %s", self._broker.url, self._broker.topic, protocol.value)
            _log.info("ready")
            self._ready_said = True

    def _turn(self, connection: Connection) -> None:
        """Read a little, take it in, and commit when nothing more is waiting or enough is."""
        waiting = self._uncommitted > 0
        connection.read(0.0 if waiting else WAIT_S)
        arrived = len(connection.inbox)
        while connection.inbox:
            message = connection.inbox.popleft()
            if self._intake.take(message.topic, message.payload):
                self._new_s = mono_s()
            self._uncommitted += 1
            self._uncommitted_bytes += len(message.payload)
            if message.mid is not None:
                self._unacknowledged.append(message.mid)
        if (
            (waiting and not arrived)
            or self._uncommitted >= MOST_MESSAGES
            or self._uncommitted_bytes >= MOST_BYTES
            or connection.lost
        ):
            self._commit(connection)
        if not arrived:
            self._intake.watch()
            self._send_receipts(connection)
            self._request(connection)
        connection.check()

    def _send_receipts(self, connection: Connection, *, at_once: bool = False) -> None:
        """Confirm to the gateways what is kept for good, if it is time and the broker lets us."""
        self._note_refusals(connection)
        if self._uncommitted or not self._may_publish(connection, "ack"):
            return
        for topic, payload in self._intake.receipts(at_once=at_once):
            connection.publish(topic, payload)

    def _request(self, connection: Connection, *, at_once: bool = False) -> bool:
        """Ask the gateways for what is missing, if it is time and the broker lets us; tell whether that was done."""
        if not self._may_publish(connection, "cmd"):
            return False
        commands = self._intake.requests(at_once=at_once)
        for topic, payload in commands:
            connection.publish(topic, payload)
        return bool(commands)

    def _may_publish(self, connection: Connection, level: str) -> bool:
        return connection.can_publish and mono_s() >= self._blocked_until_s.get(level, 0.0)

    def _note_refusals(self, connection: Connection) -> None:
        """Publish no more of a kind for a while: some brokers (mosquitto 2.0.11) hang up on whoever may not."""
        for level, why in connection.refused.items():
            if level in _REFUSED and level not in self._blocked_until_s:
                _log.warning("%s: " + _REFUSED[level], self._broker.url, why)
            self._blocked_until_s[level] = mono_s() + REFUSED_S
        connection.refused.clear()

    def _commit(self, connection: Connection) -> None:
        if self._uncommitted:
            self._intake.commit()
            self._uncommitted = self._uncommitted_bytes = 0
        for mid in self._unacknowledged:
            connection.acknowledge(mid)
        self._unacknowledged.clear()
        self._send_receipts(connection)
