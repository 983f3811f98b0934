"""Time to end, as signals say it to a program without an event loop."""

import os
import select
import signal


class Stop:
    """Set by signals, waited for by the main thread. There is one in a program.

    An Event set by a handler would hang now and then: its lock is not reentrant, and the handler may come while the
    main thread, on its way into a wait, holds it. Here the signal itself writes to a pipe, so that no wait misses it.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._set = False
        self._told, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self._set = True

    def is_set(self) -> bool:
        """Tell whether it is time."""
        return self._set

    def wait(self, timeout_s: float) -> None:
        """Wait until it is time, so long at most."""
        select.select([self._told], [], [], timeout_s)
