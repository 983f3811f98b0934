"""The uplink's service: finds a broker, drains over it, and does so again whenever it is lost."""

import asyncio
import logging
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from edgegw import __version__, clock
from edgegw.config.schema import Config
from edgegw.domain.command import Replay, ReplayCommand
from edgegw.domain.record import Event
from edgegw.errors import JournalError, UplinkError
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.uplink import receipts, replay
from edgegw.uplink.advice import cleartext
from edgegw.uplink.attempts import STABLE_S, Attempts
from edgegw.uplink.commands import Commands, Obey
from edgegw.uplink.connect_errors import ProtocolRefused, Unanswered, subscription_refused
from edgegw.uplink.drain import Drain
from edgegw.uplink.link import Link, advance
from edgegw.uplink.login import client_id, login
from edgegw.uplink.messages import Ack, Incoming, Will
from edgegw.uplink.mqtt import Connection
from edgegw.uplink.negotiation import connect, protocol
from edgegw.uplink.outbox import Notice, Outbox
from edgegw.uplink.receipts import Receipts
from edgegw.uplink.replay import Replays
from edgegw.uplink.sizes import Sizes

log = logging.getLogger(__name__)

SETTLE_S = 2.0
GOODBYE_S = 1.0


class UplinkService:
    """Keeps one connection upstream, and knows the state of the link."""

    def __init__(
        self, config: Config, config_path: Path, journal: Journal, changed: Callable[[Link], None], obey: Obey
    ) -> None:
        self.link = Link("offline", clock.wall_ms(), clock.mono_s())
        self.broker: str | None = None
        self.acknowledgements = 0
        """How many messages the brokers have confirmed since the start."""
        self.acknowledged_ms: int | None = None
        """When one did so last."""
        self._config = config
        self._config_path = config_path
        self._journal = journal
        self._changed = changed
        self._commands = Commands(config.topic, config.uplink.reply_prefix, obey)
        self._receipts: Receipts | None = None
        self._odd_receipts = 0
        self._replays = Replays()
        self._drain: Drain | None = None
        self._connection: Connection | None = None
        self._outbox: Outbox | None = None
        self._leaving = False
        self._spoken: dict[str, str] = {}  # the version by broker: asking for another costs time
        self._refused: dict[str, str] = {}  # the broker by topic, whose subscription it refuses
        self._sizes: dict[str, Sizes] = {}
        self._attempts = Attempts(config.uplink.reconnect_jitter.s, random.uniform)
        self._connected_s = 0.0
        self._failures = 0
        self._lost_since = clock.mono_s()

    @property
    def in_flight(self) -> bool:
        """Whether batches wait for their acknowledgement."""
        return self._drain is not None and bool(self._drain.in_flight)

    def committed(self, committed: Committed) -> None:
        """Take what has just become durable."""
        if self._drain is not None:
            self._drain.committed(committed)

    async def run(self) -> None:
        """Connect and drain until cancelled."""
        await self._journal.opened.wait()
        for warning in cleartext(self._config.uplink):
            log.warning("%s", warning)
        watch = asyncio.create_task(self._watch_island(), name="island watch")
        try:
            while True:
                connection = await self._connect()
                try:
                    await self._use(connection)
                except UplinkError as error:
                    if self._leaving:
                        return
                    log.warning("%s; records stay in the journal", error)
                    self._learn(connection)
                finally:
                    self._connection = self._drain = self._outbox = self.broker = None
                    self._commands.end()
                    connection.drop()
                    self._lost_since = clock.mono_s()
                self._set_link(connected=False)
                await asyncio.sleep(self._attempts.pause_s())
        finally:
            watch.cancel()

    async def finish(self) -> None:
        """Send what was just committed, if the link is there, and say goodbye."""
        connection, drain, outbox = self._connection, self._drain, self._outbox
        if connection is None or drain is None or outbox is None:
            return
        self._leaving = True
        await drain.settle(SETTLE_S)
        goodbye = Notice(*self._status("offline"), retain=True)
        outbox.send(goodbye)
        try:
            async with asyncio.timeout(GOODBYE_S):
                await goodbye.acknowledged.wait()
        except TimeoutError:
            log.info("uplink %s: did not acknowledge the goodbye; its will says it", connection.url)
            connection.drop()
        else:
            connection.close()

    async def _connect(self) -> Connection:
        """Try the brokers in order, again and again with jittered back-off, until one has us."""
        most_s = max(2.0, 2 * self._config.uplink.reconnect_jitter.s)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UplinkError),
            wait=wait_random_exponential(multiplier=0.5, max=most_s),
            before_sleep=self._failed,
        )
        return await retrying(self._try_brokers)

    async def _try_brokers(self) -> Connection:
        will = Will(*self._status("offline"))
        failures = []
        for url in self._config.uplink.url:
            spoken = self._spoken.get(url, protocol(self._config))
            try:
                presented = login(self._config, self._config_path, client_id(self._config.gateway.id))
                connection = await connect(url, spoken, presented, will)
            except UplinkError as error:
                if isinstance(error, ProtocolRefused | Unanswered):
                    self._spoken.pop(url, None)
                failures.append(f"{error}{self._hint(error)}")
            else:
                self._spoken[url] = connection.protocol
                return connection
        raise UplinkError("; ".join(failures))

    def _hint(self, error: UplinkError) -> str:
        """Return what to add to a failure for the operator."""
        if self._config.uplink.acknowledge != "subscriber":
            return ""
        if isinstance(error, ProtocolRefused):
            return '; acknowledge = "subscriber" needs MQTT 5, which this broker does not speak: use "auto"'
        if isinstance(error, Unanswered):
            return '; acknowledge = "subscriber" needs MQTT 5: does this broker speak it?'
        return ""

    def _failed(self, state: RetryCallState) -> None:
        self._failures += 1
        self._attempts.failed()
        if self._failures == 1:
            log.warning("%s; trying again", state.outcome.exception() if state.outcome else "uplink")

    async def _use(self, connection: Connection) -> None:
        down_s = clock.mono_s() - self._lost_since
        after = f" after {self._failures} failures, {down_s:.0f} s" if self._failures else ""
        log.info("uplink %s: online, MQTT %s%s", connection.url, connection.protocol, after)
        self._failures = 0
        self.broker = connection.url
        self._connection, self._connected_s = connection, clock.mono_s()
        outbox = self._outbox = Outbox(connection)
        commit_s = self._config.journal.commit_interval.s
        drain = self._drain = Drain(
            self._config.uplink, self._config.topic, self._journal, connection, commit_s,
            self._awaited_receipts(), self._replays, self._sizes.setdefault(connection.url, Sizes()), outbox,
        )  # fmt: skip

        def acknowledged(mid: int, ack: Ack) -> None:
            self.acknowledgements += 1
            self.acknowledged_ms = clock.wall_ms()
            if outbox.acknowledge(mid, ack):
                self._commands.proceed()
                drain.wake()
            else:
                drain.acknowledge(mid, ack)

        connection.acknowledged = acknowledged
        outbox.send(Notice(*self._status("online"), retain=True))
        self._commands.begin(connection, outbox)
        self._subscribe(connection, f"{self._config.topic}/cmd", self._commands.arrived)
        if self._wants_receipts:
            self._subscribe(connection, f"{self._config.topic}/ack", self._receipt)
        self._set_link(connected=self._up)
        await drain.run()

    def _subscribe(self, connection: Connection, topic: str, take: Callable[[Incoming], None]) -> None:
        """Subscribe, and say once if the broker refuses: then nothing of that topic arrives."""

        def answered(answer: asyncio.Future[str | None]) -> None:
            if answer.cancelled():
                return
            reason = answer.result()
            if reason is None:
                self._refused.pop(topic, None)
            elif self._refused.get(topic) != connection.url:
                self._refused[topic] = connection.url
                log.error("uplink %s: %s", connection.url, subscription_refused(topic, reason))

        connection.subscribe(topic, take).add_done_callback(answered)

    def _learn(self, connection: Connection) -> None:
        """Note how long a connection lasted, how it ended, and what was in flight at its end."""
        now_s = clock.mono_s()
        lasted_s = now_s - self._connected_s
        in_flight = [] if self._drain is None else self._drain.in_flight
        self._sizes[connection.url].lost(in_flight, now_s, stable=lasted_s >= STABLE_S)
        sudden = connection.sudden and not in_flight
        if self._attempts.ended(lasted_s, taken_over=connection.taken_over, sudden=sudden):
            log.warning(
                "uplink %s: connections end without a reason soon after they began; does another client connect with "
                "the id %s, such as a second gateway of this id?", connection.url, connection.client_id,
            )  # fmt: skip

    @property
    def _up(self) -> bool:
        """Whether the link counts as online: after connections that did not last, a new one must prove itself."""
        return self._connection is not None and self._attempts.proven(clock.mono_s() - self._connected_s)

    @property
    def _wants_receipts(self) -> bool:
        return self._config.uplink.acknowledge in ("auto", "receiver")

    def _awaited_receipts(self) -> Receipts | None:
        """Return what waits for its receipt, since earlier connections if it is of the same stream."""
        if not self._wants_receipts:
            return None
        stream = self._journal.stream
        if self._receipts is None or self._receipts.stream != stream:
            self._receipts = Receipts(stream, clock.mono_s())
        return self._receipts

    def _receipt(self, incoming: Incoming) -> None:
        """Take a receipt; one that is retained may be of any age, and counts for nothing."""
        if self._connection is not None:
            self._connection.confirm(incoming)
        if incoming.retained or self._drain is None:
            return
        try:
            received = receipts.read(incoming.payload, self._journal.stream, self._journal.head)
        except receipts.ReceiptError as error:
            self._odd_receipts += 1
            if self._odd_receipts == 1:
                log.warning("uplink %s/ack: %s; such messages are passed over", self._config.topic, error)
            return
        self._drain.received(received)

    async def plan(self, asked: ReplayCommand) -> Replay | str:
        """Return what a replay would send, or why there can be none."""
        stream, head = self._journal.stream, self._journal.head
        if self._replays.full:
            return f"busy with {replay.MOST} replays; try again later"
        if asked.stream != stream:
            return f"replay.stream: found {asked.stream}; this journal's is {stream}"
        try:
            kept = await self._journal.kept(stream, asked.first, min(asked.last, head))
        except JournalError as error:
            return f"{error}; nothing is sent"
        return replay.planned(asked, kept, head)

    def start(self, asked: Replay) -> bool:
        """Have a replay sent, over this connection and further ones; False if too many are under way."""
        if self._replays.full:
            return False
        self._replays.add(asked)
        if self._drain is not None:
            self._drain.replay()
        return True

    def _status(self, state: str) -> tuple[str, bytes]:
        """Return the topic and payload that say the gateway's state."""
        payload = {
            "gateway": self._config.gateway.id,
            "state": state,
            "stream": self._journal.stream,
            "ts": clock.wall_ms(),
            "version": __version__,
        }
        return f"{self._config.topic}/status", msgspec.json.encode(payload)

    async def _watch_island(self) -> None:
        while True:
            self._set_link(connected=self._up)
            if self._outbox is not None:
                self._outbox.resend()
            self._commands.check_deadlines()
            await asyncio.sleep(min(1.0, max(0.05, self._config.uplink.island_after.s / 4)))

    def _set_link(self, *, connected: bool) -> None:
        link = advance(
            self.link,
            connected=connected,
            now_ms=clock.wall_ms(),
            now_s=clock.mono_s(),
            island_after_s=self._config.uplink.island_after.s,
        )
        if link != self.link:
            was, self.link = self.link, link
            fields = {"state": link.state, "from": was.state}
            self._journal.append(Event(link.since_ms, "link", fields))
            self._changed(link)
