"""Tags: the named points of a device."""

import re

Scalar = bool | int | float | str
Value = Scalar | list[Scalar] | None
"""What a reading may hold; None stands for no usable value and comes with a quality."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
"""Device, tag, rule and window names."""

GATEWAY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
