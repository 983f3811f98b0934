"""The log of commands that run in the foreground: lines on standard error."""

import logging
import sys

from edgegw.receiver.announce import printable


class _Lines(logging.Formatter):
    """One record is one line, whatever has come into it from outside."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr() -> None:
    """Log from INFO on to standard error, the message alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
