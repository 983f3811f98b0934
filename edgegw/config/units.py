"""Durations, sizes and Modbus addresses as the configuration writes them."""

import re
from sys import intern
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema


class _Quantity(int):
    """An integer written in the configuration as a number and a unit."""

    units: ClassVar[dict[str, int]]
    example: ClassVar[str]

    @classmethod
    def parse(cls, text: Any) -> Self:
        """Read a number and a unit; raise ValueError with what would have been right."""
        if isinstance(text, cls):
            return text
        match = (
            re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)", text) if isinstance(text, str) else None
        )
        if match is None or match[2] not in cls.units:
            raise ValueError(
                f"found {text!r}; expected a number and a unit of {', '.join(cls.units)}, as in {cls.example}"
            )
        return cls(round(float(match[1]) * cls.units[match[2]]))

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse)


class Duration(_Quantity):
    """Milliseconds, written as `250ms`, `5s`, `15m`, `24h` or `7d`."""

    units: ClassVar = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
    example: ClassVar = '"5s"'

    @property
    def s(self) -> float:
        """The same in seconds."""
        return self / 1000


class Ramp(float):
    """Units a second, written as `10/s`, `0.5/s` or `60/m`."""

    @classmethod
    def parse(cls, text: Any) -> Self:
        """Read a number and `/s`, `/m` or `/h`; raise ValueError with what would have been right."""
        if isinstance(text, cls):
            return text
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*/\s*(s|m|h)", text) if isinstance(text, str) else None
        if match is None or float(match[1]) <= 0:
            raise ValueError(f'found {text!r}; expected units a second, a minute or an hour, as in "10/s"')
        return cls(float(match[1]) / {"s": 1, "m": 60, "h": 3600}[match[2]])

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse)


class Size(_Quantity):
    """Bytes, written as `64KiB`, `512MiB` or `1GiB`."""

    units: ClassVar = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
    example: ClassVar = '"64KiB"'


class ModbusAddress(NamedTuple):
    """A zero-based protocol address: a table, a place in it and, for one bit of a register, which."""

    table: str
    start: int
    bit: int | None = None

    @classmethod
    def parse(cls, text: Any) -> "ModbusAddress":
        """Read `holding:N`, `input:N`, `coil:N`, `discrete:N`, or with a bit `holding:N.B`."""
        if isinstance(text, ModbusAddress):
            return text
        match = (
            re.fullmatch(r"(holding|input|coil|discrete):(\d{1,5})(?:\.(\d{1,2}))?", text)
            if isinstance(text, str)
            else None
        )
        if match is None:
            raise ValueError(
                f"found {text!r}; expected holding:N, input:N, coil:N, discrete:N or holding:N.B, N counted from 0"
            )
        table, start, bit = intern(match[1]), int(match[2]), int(match[3]) if match[3] else None
        if start > 65535:
            raise ValueError(
                f"found address {start}; expected 0 to 65535, counted from 0 (40001 is holding:0)"
            )
        if bit is not None and (bit > 15 or table not in ("holding", "input")):
            raise ValueError(f"found {text!r}; expected a bit 0 to 15 of a holding or input register")
        return cls(table, start, bit)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse)

    def __str__(self) -> str:
        return f"{self.table}:{self.start}" + ("" if self.bit is None else f".{self.bit}")
