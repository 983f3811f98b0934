"""Sessions: one connection for each endpoint, kept up for as long as any device uses it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from edgegw import clock
from edgegw.errors import NotConnected

log = logging.getLogger(__name__)

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
STABLE_AFTER_S = 5.0
"""A connection that lasted so long is made anew at once, whatever ended it."""


class Connection(Protocol):
    """What a session keeps up."""

    @property
    def connected(self) -> bool:
        """Whether it can be used."""
        ...

    @property
    def violation(self) -> NotConnected | None:
        """Why the last connection was ended, if for what the endpoint sent over it."""
        ...

    async def connect(self, timeout_s: float) -> None:
        """Connect; raise NotConnected."""
        ...

    def close(self) -> None:
        """Close, at once."""
        ...


C = TypeVar("C", bound=Connection)


class Session(Generic[C]):
    """Connects, and connects again with jittered exponential back-off whenever the connection is gone.

    A connection that the endpoint's bytes brought to an end soon counts as an attempt that failed.
    """

    def __init__(self, connection: C, timeout_s: float) -> None:
        self.connection = connection
        self._timeout_s = timeout_s
        self._lost = asyncio.Event()
        self._lost.set()
        self._tried = asyncio.Event()
        self._failure: NotConnected | None = None
        self._crash: BaseException | None = None
        self.listeners: list[Callable[[], None]] = []

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        try:
            while True:
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(NotConnected),
                    wait=wait_random_exponential(multiplier=RETRY_FIRST_S, max=RETRY_MOST_S),
                    before_sleep=self._failed,
                ):
                    with attempt:
                        await self.connection.connect(self._timeout_s)
                        await self._until_lost()
        finally:
            self.connection.close()

    async def _until_lost(self) -> None:
        """Have the connection used until it is lost; raise its violation if it did not last for one."""
        since_s = clock.mono_s()
        self._failure = None
        self._lost.clear()
        self._tried.set()
        for notify in self.listeners:
            notify()
        await self._lost.wait()
        violation = self.connection.violation
        if violation is not None and clock.mono_s() - since_s < STABLE_AFTER_S:
            raise violation

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._failure = error if isinstance(error, NotConnected) else None
        self._tried.set()

    def ended(self, task: "asyncio.Task[None]") -> None:
        """Note how `run` ended: a bug in it is raised to whoever waits for the connection."""
        self._crash = None if task.cancelled() else task.exception()
        self._tried.set()

    async def ready(self) -> C:
        """Return the connection; wait for one attempt after a loss, raise NotConnected if that fails."""
        if not self.connection.connected:
            self.lost()
            await self._tried.wait()
            if self._crash is not None:
                raise self._crash
            if not self.connection.connected:
                raise (
                    self._failure
                    or self.connection.violation
                    or NotConnected("connection-lost", "the connection is gone; a new one is being tried")
                )
        return self.connection

    def lost(self) -> None:
        """Say that the connection is gone or not to be trusted: it is closed and made anew."""
        if not self._lost.is_set():
            self.connection.close()
            self._tried.clear()
            self._lost.set()


@dataclass(slots=True)
class _Leased(Generic[C]):
    """A session and the task that runs it."""

    session: Session[C]
    task: "asyncio.Task[None]"


class Sessions(Generic[C]):
    """The sessions of a protocol, one for each endpoint, each open while it is leased."""

    def __init__(self, connect: Callable[[str], C]) -> None:
        self._connect = connect
        self._open: dict[tuple[str, int | None], _Leased[C]] = {}

    @asynccontextmanager
    async def lease(
        self, url: str, timeout_s: float, notify: Callable[[], None], *, own: int | None = None
    ) -> AsyncIterator[Session[C]]:
        """Use the endpoint's session; the last to leave closes it. `notify` is called when it has connected.

        `own` asks for a session apart from the others' of this url, for the unit of that number.
        """
        key = (url, own)
        leased = self._open.get(key)
        if leased is None or leased.task.done():
            leased = self._open[key] = self._start(url, timeout_s)
        listeners = leased.session.listeners
        listeners.append(notify)
        try:
            yield leased.session
        finally:
            listeners.remove(notify)
            if not listeners:
                if self._open.get(key) is leased:
                    del self._open[key]
                leased.task.cancel()
                await asyncio.wait([leased.task])

    def _start(self, url: str, timeout_s: float) -> _Leased[C]:
        session = Session(self._connect(url), timeout_s)
        task = asyncio.create_task(session.run(), name=f"session {url}")
        task.add_done_callback(session.ended)
        return _Leased(session, task)
