"""Text from outside, made fit for a log or a terminal."""

MAX_LINE = 1000
"""So many characters of a line are shown."""


def printable(text: str) -> str:
    """Return a text as one line without control characters: what came from outside may hold anything."""
    text = text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
