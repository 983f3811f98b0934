"""Subscribes to a broker, and confirms a message to it only when what it holds is kept.

Everything happens in the caller's thread: paho reads a packet or two, the intake takes them in, and when
nothing more is waiting, or enough is, the sink commits and the messages are acknowledged in their order.
While that goes on nothing is read, so that memory is bounded whatever the broker sends.

When the sink fails, the connection is closed with it: the broker keeps what was not acknowledged, and sends it again
when the sink has been opened anew and the intake knows from it what is kept.
"""

import logging
from collections.abc import Callable, Sequence

from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.wait import wait_random_exponential

from edgegw.clock import mono_s
from edgegw.errors import EdgegwError, UplinkError
from edgegw.receiver.admission import digest
from edgegw.receiver.announce import Outage
from edgegw.receiver.intake import Intake
from edgegw.receiver.sink import SinkError, SinkUnusable
from edgegw.receiver.subscriber import Broker, Connection, Protocol, ProtocolError
from edgegw.runtime.stop import Stop
from edgegw.runtime.text import printable

MOST_MESSAGES = 200
MOST_BYTES = 16 * 1024**2
"""What one transaction takes in at most."""
WAIT_S = 0.2
"""How long a turn waits for the broker: the most that a signal to stop goes unnoticed."""
STABLE_S = 20.0
"""How long a connection must have held, from its attempt, for the next to come without a wait."""
RETRY_MAX_S = 2.0
"""The longest pause between two attempts: no longer than any gateway's, whose backlog comes at once."""
GIVE_UP_S = 60.0
"""How long to go without a broker or a sink where an end was asked for."""
REFUSED_S = 600.0
"""How long no receipts, or no commands, are sent after the broker refused one."""
_REFUSED = {
    "ack": "does not let us publish receipts: %s; gateways that wait for them will send again and again",
    "cmd": "does not let us publish commands: %s; what is missing is not requested",
}

_log = logging.getLogger(__name__)


class _PayloadError(EdgegwError):
    """A message raised what nobody expected; it is set apart when it comes again."""


class Receiver:
    """The loop: open, connect, receive, and all of it again, until stopped or nothing new comes.

    `open_intake` is called at the start and after each error of its sink; it raises SinkError or SinkUnusable.
    """

    def __init__(
        self,
        broker: Broker,
        open_intake: Callable[[], Intake],
        stop: Stop,
        idle_s: float | None = None,
        protocols: Sequence[Protocol] = tuple(Protocol),
    ) -> None:
        self._broker = broker
        self._protocols = protocols
        self._open_intake = open_intake
        self.intake: Intake | None = None
        """What the last session left, None while the sink is away."""
        self._stop = stop
        self._idle_s = idle_s
        self._new_s = mono_s()
        self._link_outage = Outage("broker")
        self._sink_outage = Outage("database")
        self._failed: dict[str, str] = {}
        self._five_spoken = False
        self._ready_said = False
        self._blocked_until_s: dict[str, float] = {}
        self._uncommitted = 0
        self._uncommitted_bytes = 0
        self._unacknowledged: list[int] = []

    def run(self) -> None:
        """Receive until `stop` is set or, with `idle_s`, nothing new came for so long while subscribed.

        Raises UplinkError or SinkError if `idle_s` is given and the broker or the sink is away for a minute,
        SinkUnusable if the sink cannot be used at the first start.
        """
        retrying = Retrying(
            retry=retry_if_exception_type((UplinkError, SinkError)),
            wait=wait_random_exponential(multiplier=0.5, max=RETRY_MAX_S),
            sleep=self._stop.wait,
            stop=self._to_give_up,
            reraise=True,
        )
        done = False
        while not done:
            try:
                done = retrying(self._session)
            except (UplinkError, SinkError):
                if not self._stop.is_set():
                    raise
                done = True

    def close(self) -> None:
        """Close the sink, if it is open; what was not committed is gone."""
        self._uncommitted = self._uncommitted_bytes = 0
        if self.intake is not None:
            self.intake.close()
            self.intake = None

    def _to_give_up(self, state: RetryCallState) -> bool:
        away_s = max(self._sink_outage.seconds, self._link_outage.seconds)
        return self._stop.is_set() or (self._idle_s is not None and away_s >= GIVE_UP_S)

    def _session(self) -> bool:
        """Hold one connection; True when all is done, False when it was lost after it had been stable."""
        began_s = mono_s()
        try:
            intake = self._opened()
            try:
                self._receive(intake, self._protocols[0])
            except ProtocolError:
                if self._five_spoken or len(self._protocols) == 1:
                    raise
                self._receive(intake, self._protocols[1])
        except UplinkError as error:
            _warn(self._link_outage.lost(str(error)))
            if mono_s() - began_s < STABLE_S:
                raise
            return False
        except SinkError as error:
            self.close()
            _warn(self._sink_outage.lost(str(error)))
            if mono_s() - began_s < STABLE_S:
                raise
            return False
        except _PayloadError as error:
            self.close()
            _warn(str(error))
            return False
        return True

    def _opened(self) -> Intake:
        """Return the intake, opened if need be, with what had been rejected processed anew."""
        if self.intake is None:
            try:
                self.intake = self._open_intake()
            except SinkUnusable as error:
                if self._sink_outage.ever:  # it could be used before
                    raise SinkError(str(error)) from error
                raise
            for topic, payload in self.intake.rejected():
                self._process(self.intake, topic, payload)
            self.intake.commit()
            _warn(self._sink_outage.over())
        return self.intake

    def _process(self, intake: Intake, topic: str, payload: bytes) -> bool:
        """Have a message processed; return whether it brought anything new. No payload ends the receiver."""
        reason = self._failed.get(digest(payload)) if self._failed else None
        if reason is not None:
            intake.reject(topic, payload, reason)
            return False
        try:
            return intake.take(topic, payload)
        except (SinkError, SinkUnusable, BrokenPipeError):
            raise
        except Exception as error:  # what anybody may send costs that message, not the receiver
            reason = printable(f"{type(error).__name__}: {error}")
            self._failed[digest(payload)] = reason
            raise _PayloadError(f"{topic}: {len(payload)} bytes cannot be processed: {reason}") from error

    def _receive(self, intake: Intake, protocol: Protocol) -> None:
        self._unacknowledged.clear()
        connection = Connection(self._broker, protocol)
        try:
            self._open(connection, intake, protocol)
            intake.reconnected()
            while not (self._stop.is_set() or self._done(connection, intake)):
                self._turn(connection, intake)
            self._commit(connection, intake)
            self._send_receipts(connection, intake, at_once=True)
        finally:
            if connection.lost and "cmd" in connection.unconfirmed:
                connection.refused.setdefault(
                    "cmd", connection.lost
                )  # some hang up on whoever may not publish
            self._note_refusals(connection)
            connection.close()

    def _done(self, connection: Connection, intake: Intake) -> bool:
        """Tell whether an end was asked for, nothing new came for so long, and nothing is left to ask for."""
        if self._idle_s is None or self._uncommitted or mono_s() - self._new_s < self._idle_s:
            return False
        self._new_s = mono_s()
        return not self._request(connection, intake, at_once=True)

    def _open(self, connection: Connection, intake: Intake, protocol: Protocol) -> None:
        connection.connect()
        began_s = mono_s()
        while not self._stop.is_set() and not connection.subscribed():
            self._turn(connection, intake)
            connection.check_answer(mono_s() - began_s)
        if self._stop.is_set():
            return
        self._five_spoken = self._five_spoken or protocol is Protocol.V5
        _warn(self._link_outage.over())
        self._new_s = mono_s()
        if not self._ready_said:
            _log.info("connected to %s, %s, MQTT %s", self._broker.url, self._broker.topic, protocol.value)
            _log.info("ready")
            self._ready_said = True

    def _turn(self, connection: Connection, intake: Intake) -> None:
        """Read a little, process it, and commit when nothing more is waiting or enough is."""
        waiting = self._uncommitted > 0
        connection.read(0.0 if waiting else WAIT_S)
        arrived = len(connection.inbox)
        while connection.inbox:
            message = connection.inbox.popleft()
            if self._process(intake, message.topic, message.payload):
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
            self._commit(connection, intake)
        if not arrived:
            intake.watch()
            self._send_receipts(connection, intake)
            self._request(connection, intake)
        connection.check()

    def _send_receipts(self, connection: Connection, intake: Intake, *, at_once: bool = False) -> None:
        """Confirm to the gateways what is kept for good, if it is time and the broker lets us."""
        self._note_refusals(connection)
        if self._uncommitted or not self._may_publish(connection, "ack"):
            return
        for topic, payload in intake.receipts(at_once=at_once):
            connection.publish(topic, payload)

    def _request(self, connection: Connection, intake: Intake, *, at_once: bool = False) -> bool:
        """Ask the gateways for what is missing, if it is time and the broker lets us; tell whether that was done."""
        if not self._may_publish(connection, "cmd"):
            return False
        commands = intake.requests(at_once=at_once)
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

    def _commit(self, connection: Connection, intake: Intake) -> None:
        if self._uncommitted:
            intake.commit()
            self._uncommitted = self._uncommitted_bytes = 0
        for mid in self._unacknowledged:
            connection.acknowledge(mid)
        self._unacknowledged.clear()
        self._send_receipts(connection, intake)


def _warn(line: str | None) -> None:
    if line:
        _log.warning("%s", line)
