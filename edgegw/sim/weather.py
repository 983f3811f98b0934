"""What the site cannot choose: sun, clouds and the demand, as pure functions of the time of day."""

import hashlib
import math
import struct

DAY_S = 86_400.0
CLEAR_SKY_W_M2 = 1000.0


def noise(seed: int, time_s: float, period_s: float) -> float:
    """Return smooth noise between -1 and 1 that turns once in about `period_s`, the same for a seed."""
    place = time_s / period_s
    index = math.floor(place)
    part = place - index
    ease = part * part * (3.0 - 2.0 * part)
    return _at(seed, index) * (1.0 - ease) + _at(seed, index + 1) * ease


def _at(seed: int, index: int) -> float:
    digest = hashlib.blake2b(struct.pack(">qq", seed, index), digest_size=8).digest()
    return float(int.from_bytes(digest, "big")) / 2**63 - 1.0


def sun(day: float) -> float:
    """Return the clear sky's share of full sun at a time of day, 0 and 1 being midnight."""
    return max(0.0, math.sin(2.0 * math.pi * (day - 0.25)))


def clouds(seed: int, time_s: float) -> float:
    """Return the share of light that clouds take away, 0 to 0.8."""
    cover = 0.6 * noise(seed, time_s, 45.0) + 0.4 * noise(seed + 1, time_s, 11.0)
    return 0.8 * min(1.0, max(0.0, 1.6 * cover))


def demand_kw(seed: int, time_s: float, day: float) -> float:
    """Return what the site's consumers ask for: a base, two peaks a day, a compressor and unrest."""
    morning = 22.0 * math.exp(-(((day - 0.35) / 0.07) ** 2))
    evening = 38.0 * math.exp(-(((day - 0.79) / 0.08) ** 2))
    compressor = 12.0 if noise(seed + 2, time_s, 40.0) > 0.15 else 0.0
    return 58.0 + morning + evening + compressor + 4.0 * noise(seed + 3, time_s, 3.0)
