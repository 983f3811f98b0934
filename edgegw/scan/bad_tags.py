"""Which of a device's tags are bad while the device itself answers, and when that is worth a line in the log."""

from collections.abc import Mapping

from edgegw.domain.quality import is_bad

NAMED = 8
"""So many tags are named in a line."""
CALM_S = 60.0
"""A tag that was bad is named again only after all tags have been good for so long: one that flutters fills no log."""


def bad(quality: Mapping[str, str]) -> dict[str, str]:
    """Return the tags whose quality is bad, with it; one that is uncertain has a value."""
    return {tag: why for tag, why in quality.items() if is_bad(why)}


def listed(tags: Mapping[str, str], total: int) -> str:
    """Return bad tags as an operator reads them, as in `2 of 5 tags are bad: a (illegal-address), b (timeout)`."""
    named = [f"{tag} ({why.removeprefix('bad:')})" for tag, why in list(tags.items())[:NAMED]]
    more = f" and {len(tags) - NAMED} more" if len(tags) > NAMED else ""
    return f"{len(tags)} of {total} tags are bad: {', '.join(named)}{more}"


class BadTags:
    """The bad tags of one device, by its latest readings."""

    def __init__(self, total: int) -> None:
        self.tags: dict[str, str] = {}
        self._total = total
        self._quality: Mapping[str, str] = {}
        self._logged: set[str] = set()
        self._bad_s = 0.0

    def read(self, quality: Mapping[str, str], now_s: float) -> str | None:
        """Note the quality of all tags at the monotonic `now_s`; return what is to be logged, if anything is."""
        if quality != self._quality:
            self._quality = quality
            self.tags = bad(quality)
        if self.tags:
            self._bad_s = now_s
            if self.tags.keys() <= self._logged:
                return None
            self._logged |= self.tags.keys()
            return f"{listed(self.tags, self._total)}; are their addresses and types right?"
        if self._logged and now_s >= self._bad_s + CALM_S:
            self._logged.clear()
            return f"all {self._total} tags have been good for {now_s - self._bad_s:.0f} s"
        return None

    def forget(self) -> None:
        """Note that the device is lost: of its tags nothing is known."""
        self.tags, self._quality = {}, {}
