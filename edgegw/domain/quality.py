"""Quality: how far a reading may be trusted.

Good is said by leaving it out. Anything else is `uncertain:REASON` or `bad:REASON` (OPC UA Part 8, 6.3.3).
"""

NOT_A_NUMBER = "bad:not-a-number"
BAD_TEXT = "bad:not-text"
TOO_LARGE = "bad:too-large"


def bad(reason: str) -> str:
    """Return the quality of a reading that must not be used."""
    return f"bad:{reason}"


def uncertain(reason: str) -> str:
    """Return the quality of a reading that may be used with care."""
    return f"uncertain:{reason}"


def is_bad(quality: str | None) -> bool:
    """Tell whether a reading of this quality must not be used; None is good."""
    return quality is not None and quality.startswith("bad:")
