"""Runs services, each in a task of its own, and starts one that crashed again with jittered back-off."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable

from edgegw import clock

log = logging.getLogger(__name__)

RESTART_FIRST_S = 0.5
RESTART_MOST_S = 30.0
CALM_S = 60.0
"""A service that ran this long before it crashed begins its back-off anew."""


class Supervisor:
    """The services that run now, by name."""

    def __init__(self) -> None:
        self.crashes = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a service until it is stopped; `run` is called again after each crash."""
        self._tasks[name] = asyncio.create_task(self._keep(name, run), name=name)

    async def stop(self, name: str) -> None:
        """Cancel a service and wait until it has ended."""
        task = self._tasks.pop(name)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def stop_all(self) -> None:
        """Stop every service, the latest first."""
        for name in reversed(list(self._tasks)):
            await self.stop(name)

    async def _keep(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        restarts = 0
        while True:
            began_s = clock.mono_s()
            try:
                await run()
                return
            except Exception:  # the supervisor's own edge: a bug in one service must not stop the others
                self.crashes += 1
                restarts = 0 if clock.mono_s() - began_s > CALM_S else restarts + 1
                pause_s = random.uniform(0.5, 1.0) * min(
                    RESTART_MOST_S, RESTART_FIRST_S * 2 ** min(restarts, 10)
                )
                log.exception("%s crashed; it starts again in %.1f s", name, pause_s)
                await asyncio.sleep(pause_s)
