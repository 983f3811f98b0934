"""The log of commands that run in the foreground: lines on standard error."""

import logging
import sys

from edgegw.runtime.text import printable

DAEMON = "%(asctime)s %(levelname)s %(message)s"


class _Lines(logging.Formatter):
    """One message is one line, whatever has come into it from outside; a traceback stands below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 the library's name
        return printable(super().formatMessage(record))


def log_to_stderr(level: int | str = logging.INFO, layout: str = "%(message)s") -> None:
    """Log from a level on to standard error, by default the message alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(layout))
    logging.basicConfig(level=level, handlers=[handler])
