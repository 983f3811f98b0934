"""The only place that reads a clock."""

import ctypes
import time

_STA_UNSYNC = 0x0040
_libc = ctypes.CDLL(None, use_errno=True)


def wall_ms() -> int:
    """Return milliseconds since the Unix epoch, UTC; it may jump either way."""
    return time.time_ns() // 1_000_000


def mono_s() -> float:
    """Return monotonic seconds: what every timer and age is measured with."""
    return time.monotonic()


def boot_id() -> str:
    """Return the identity of this boot of the machine: monotonic times of another mean nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def synchronised() -> bool:
    """Tell whether the kernel holds its wall clock for synchronised (adjtimex(2), STA_UNSYNC).

    A kernel that cannot be asked counts as synchronised: the contract's `unsynced` means known not to be.
    """
    timex = ctypes.create_string_buffer(
        512
    )  # struct timex is 208 bytes with 64-bit longs; modes = 0 only reads
    if _libc.adjtimex(timex) < 0:
        return True
    # modes (int, padded to 8), offset, freq, maxerror, esterror (longs), then status (int)
    status = int.from_bytes(timex.raw[40:44], "little")
    return not status & _STA_UNSYNC
