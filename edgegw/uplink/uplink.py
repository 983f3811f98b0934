"""The uplink's service: finds a broker, drains over it, and does so again whenever it is lost."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from edgegw import __version__, clock
from edgegw.config.load import secret
from edgegw.config.schema import Config
from edgegw.domain.command import Replay, ReplayCommand, Reply
from edgegw.domain.record import Event
from edgegw.errors import ConfigError, JournalError, UplinkError
from edgegw.journal.journal import Journal
from edgegw.journal.writer import Committed
from edgegw.uplink import mqtt, receipts, replay
from edgegw.uplink.attempts import STABLE_S, Attempts
from edgegw.uplink.drain import Drain
from edgegw.uplink.link import Link, advance
from edgegw.uplink.outbox import Notice, Outbox
from edgegw.uplink.receipts import Receipts
from edgegw.uplink.replay import Replays
from edgegw.uplink.reply_topics import reply_topics
from edgegw.uplink.sizes import Sizes

log = logging.getLogger(__name__)

SETTLE_S = 2.0
COMMANDS = 16
"""Commands that may be under way at once."""
GOODBYE_S = 1.0


Obey = Callable[[bytes, bool], Awaitable[Reply]]
"""Takes a command's payload and whether it was retained."""


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
        self._obey = obey
        self._obeying: set[asyncio.Task[None]] = set()
        self._receipts: Receipts | None = None
        self._odd_receipts = 0
        self._replays = Replays()
        self._drain: Drain | None = None
        self._connection: mqtt.Connection | None = None
        self._outbox: Outbox | None = None
        self._leaving = False
        self._spoken: dict[
            str, str
        ] = {}  # the version that each broker took last: asking for another costs time
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

    async def _connect(self) -> mqtt.Connection:
        """Try the brokers in order, again and again with jittered back-off, until one has us."""
        most_s = max(2.0, 2 * self._config.uplink.reconnect_jitter.s)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UplinkError),
            wait=wait_random_exponential(multiplier=0.5, max=most_s),
            before_sleep=self._failed,
        )
        return await retrying(self._try_brokers)

    async def _try_brokers(self) -> mqtt.Connection:
        will = mqtt.Will(*self._status("offline"))
        failures = []
        for url in self._config.uplink.url:
            spoken = self._spoken.get(url, protocol(self._config))
            try:
                connection = await mqtt.connect(url, spoken, login(self._config, self._config_path), will)
            except UplinkError as error:
                if isinstance(error, mqtt.ProtocolRefused):
                    self._spoken.pop(url, None)
                failures.append(f"{error}{self._hint(error)}")
            else:
                self._spoken[url] = connection.protocol
                return connection
        raise UplinkError("; ".join(failures))

    def _hint(self, error: UplinkError) -> str:
        """Return what to add to a failure for the operator."""
        if isinstance(error, mqtt.ProtocolRefused) and self._config.uplink.acknowledge == "subscriber":
            return '; acknowledge = "subscriber" needs MQTT 5, which this broker does not speak: use "auto"'
        return ""

    def _failed(self, state: RetryCallState) -> None:
        self._failures += 1
        if self._failures == 1:
            log.warning("%s; trying again", state.outcome.exception() if state.outcome else "uplink")

    async def _use(self, connection: mqtt.Connection) -> None:
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

        def acknowledged(mid: int, ack: mqtt.Ack) -> None:
            self.acknowledgements += 1
            self.acknowledged_ms = clock.wall_ms()
            if outbox.acknowledge(mid, ack):
                drain.wake()
            else:
                drain.acknowledge(mid, ack)

        connection.acknowledged = acknowledged
        outbox.send(Notice(*self._status("online"), retain=True))
        connection.subscribe(f"{self._config.topic}/cmd", lambda incoming: self._command(outbox, incoming))
        if self._wants_receipts:
            connection.subscribe(f"{self._config.topic}/ack", self._receipt)
        self._set_link(connected=self._up)
        await drain.run()

    def _learn(self, connection: mqtt.Connection) -> None:
        """Note how long a connection lasted, and what was in flight at its end."""
        now_s = clock.mono_s()
        lasted_s = now_s - self._connected_s
        self._attempts.ended(lasted_s)
        if self._drain is not None:
            stable = lasted_s >= STABLE_S
            self._sizes[connection.url].lost(self._drain.in_flight, now_s, stable=stable)

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

    def _receipt(self, incoming: mqtt.Incoming) -> None:
        """Take a receipt; one that is retained may be of any age, and counts for nothing."""
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

    def _command(self, outbox: Outbox, incoming: mqtt.Incoming) -> None:
        """Have a command obeyed, and answer it; more than a few at a time are refused."""
        task = asyncio.create_task(self._answer(outbox, incoming, len(self._obeying) < COMMANDS))
        self._obeying.add(task)
        task.add_done_callback(self._obeying.discard)

    async def _answer(self, outbox: Outbox, incoming: mqtt.Incoming, room: bool) -> None:
        if room:
            reply = await self._obey(incoming.payload, incoming.retained)
        else:
            reply = Reply(None, False, f"busy with {COMMANDS} commands; try again")
        if outbox is not self._outbox:
            return  # the connection that asked is gone
        body = msgspec.json.encode(reply.wire())
        prefix = self._config.uplink.reply_prefix
        for topic in reply_topics(self._config.topic, incoming.answer_to, prefix):
            outbox.send(
                Notice(topic, body, content_type="application/json", correlation=incoming.correlation)
            )

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


def protocol(config: Config) -> str:
    """Return the MQTT versions to try: only MQTT 5 tells whether somebody was subscribed."""
    return "5" if config.uplink.acknowledge == "subscriber" else config.uplink.protocol


def login(config: Config, config_path: Path, suffix: str = "") -> mqtt.Login:
    """Return how the gateway presents itself to its brokers; raise UplinkError if the password cannot be read."""
    uplink = config.uplink
    try:
        password = secret(uplink.password_file, config_path) if uplink.password_file else ""
    except ConfigError as error:
        raise UplinkError(f"uplink.password_file: {error}") from None
    files = [
        str(config_path.parent / name) if name else ""
        for name in (uplink.ca_file, uplink.cert_file, uplink.key_file)
    ]
    return mqtt.Login(f"edgegw-{config.gateway.id}{suffix}", uplink.username, password, *files)
