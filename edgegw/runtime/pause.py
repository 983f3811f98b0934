"""A pause: `asyncio.sleep` for whoever sleeps ten thousand times a second."""

import asyncio


class Pause:
    """Sleeps on the loop that it was made on.

    `asyncio.sleep` looks that loop up each time, which asks the kernel for the process id (Python 3.11): with a
    hundred devices at their fastest a twentieth of what the event loop does.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._awake: asyncio.Future[None] | None = None

    async def __call__(self, delay_s: float) -> None:
        """Sleep; a delay that is over already lets others have their turn."""
        awake = self._awake = self._loop.create_future()
        timer = self._loop.call_later(max(0.0, delay_s), _wake, awake)
        try:
            await awake
        finally:
            timer.cancel()

    def end(self) -> None:
        """End the sleep that is under way, if one is."""
        if self._awake is not None:
            _wake(self._awake)


def _wake(awake: asyncio.Future[None]) -> None:
    if not awake.done():
        awake.set_result(None)
