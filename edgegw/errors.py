"""The error tree: the type tells what to do about it."""

from typing import Self


class EdgegwError(Exception):
    """Anything edgegw raises on purpose; its text is fit for an operator."""


class ConfigError(EdgegwError):
    """The configuration is wrong: nothing starts, exit code 2.

    `problems` holds one line for each mistake found.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DeviceError(EdgegwError):
    """A device did not do what was asked; the next scan may.

    `reason` is the contract's short word for it (`timeout`, `refused`, `illegal-address`, ...).
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def located(self, where: str) -> Self:
        """Return the same error with the place, such as the device's name, before its text."""
        return type(self)(self.reason, f"{where}: {self}")


class NotConnected(DeviceError):
    """There is no connection to the device right now; a new one is being tried with back-off."""


class NotSent(NotConnected):
    """The connection was gone when the request's turn came: nothing went out."""


class Spoilt(NotConnected):
    """What came over the connection cannot be told apart, so it was ended; who spoilt it is not known."""


class NoAnswer(DeviceError):
    """The device is connected and did not answer in time."""


class BadAnswer(DeviceError):
    """What came back is not an answer to what was asked."""


class Refused(DeviceError):
    """The device answered that it will not; it is alive.

    `final` tells that the same request would be refused again: the device has no such point, forbids it, or no value
    like that fits. Else it is busy or failed, and may do it later.
    """

    def __init__(self, reason: str, detail: str, *, final: bool = True) -> None:
        super().__init__(reason, detail)
        self.final = final

    def located(self, where: str) -> Self:
        """Return the same error with the place before its text."""
        return type(self)(self.reason, f"{where}: {self}", final=self.final)


class Unconfirmed(DeviceError):
    """A write may have taken effect or not: never send it again because of this, look at the device first."""


class JournalError(EdgegwError):
    """The journal cannot be written or read for now; back off and try again."""


class JournalFull(JournalError):
    """There is no room on the disk; give the ballast back, and let go of what may go."""


class JournalDamaged(JournalError):
    """The journal's file cannot be trusted; set it aside and begin a new stream."""


class UplinkError(EdgegwError):
    """The broker cannot be reached or will not have us; back off and try again."""
