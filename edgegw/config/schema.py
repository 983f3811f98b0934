"""The configuration as frozen models: every key of the contract, its type and its default."""

import re
from math import ceil, inf
from sys import intern
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, core_schema

from edgegw.config.units import Duration, ModbusAddress, Ramp, Size
from edgegw.domain.tag import GATEWAY_ID, NAME


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(
            f"found {text!r}; expected a small letter, then small letters, digits or _, at most 63"
        )
    return intern(text)


Name = Annotated[str, BeforeValidator(_name)]


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Model(BaseModel):
    """What every section shares: no unknown key, nothing changes after loading."""

    model_config = ConfigDict(**_STRICT, frozen=True)


def not_yet(what: str) -> ValueError:
    """Return the error for a key of the contract that this version does not act on."""
    return ValueError(f"{what} is not yet available in this version; take it out")


class Gateway(Model):
    """Who this gateway is."""

    id: str

    @field_validator("id")
    @classmethod
    def _id(cls, text: str) -> str:
        if not GATEWAY_ID.fullmatch(text):
            raise ValueError(
                f"found {text!r}; expected a letter or digit, then letters, digits, . _ or -, at most 64"
            )
        return text


class Journal(Model):
    """Where records are kept, and how much of them."""

    path: str = "journal.db"
    commit_interval: Duration = Duration(500)
    max_size: Size = Size(1024**3)
    keep: Duration = Duration(86_400_000)
    when_full: Literal["thin", "drop"] = "thin"

    @field_validator("commit_interval")
    @classmethod
    def _interval(cls, value: Duration) -> Duration:
        if not 10 <= value <= 60_000:
            raise ValueError(f"found {value} ms; expected 10ms to 60s")
        return value

    @field_validator("max_size")
    @classmethod
    def _max_size(cls, value: Size) -> Size:
        if value < 4 * 1024**2:
            raise ValueError(f"found {value} bytes; expected 4MiB or more")
        return value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Uplink(Model):
    """The way to the upstream broker."""

    url: Annotated[tuple[str, ...], BeforeValidator(_several)] = ("mqtt://127.0.0.1:1883",)
    topic: str = "edgegw/{gateway}"
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    username: str = ""
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    max_message: Size = Size(128 * 1024)
    inflight: int = Field(32, ge=1, le=1000)
    compression: Literal["none", "zstd"] = "none"
    acknowledge: Literal["auto", "broker", "subscriber", "receiver"] = "auto"
    reconnect_jitter: Duration = Duration(5_000)
    island_after: Duration = Duration(30_000)
    hand_back: Literal["release", "hold"] = "release"
    reply_prefix: str = ""

    @field_validator("url")
    @classmethod
    def _url(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError("found an empty list; expected mqtt://HOST:PORT or mqtts://HOST:PORT")
        for url in urls:
            _check_url(url, ("mqtt", "mqtts"), "mqtt://HOST:PORT or mqtts://HOST:PORT")
        return urls

    @field_validator("topic")
    @classmethod
    def _topic(cls, topic: str) -> str:
        rest = topic.replace("{gateway}", "")
        if not topic or any(c in rest for c in "{}+#\0") or topic[0] in "/$" or topic.endswith("/"):
            raise ValueError(
                f"found {topic!r}; expected a topic without wildcards, {{gateway}} its only placeholder"
            )
        return topic

    @field_validator("reply_prefix")
    @classmethod
    def _reply_prefix(cls, prefix: str) -> str:
        if any(c in prefix for c in "+#\0"):
            raise ValueError(f"found {prefix!r}; expected the beginning of a topic, without wildcards")
        return prefix

    @field_validator("max_message")
    @classmethod
    def _max_message(cls, value: Size) -> Size:
        if not 1024 <= value <= 16 * 1024**2:
            raise ValueError(f"found {value} bytes; expected 1KiB to 16MiB")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.acknowledge == "subscriber" and self.protocol == "3.1.1":
            raise ValueError(
                'acknowledge = "subscriber" needs MQTT 5, which alone tells; found protocol = "3.1.1"; '
                'expected "auto" or "5"'
            )
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file come together; found only one of them")
        files = [key for key in ("ca_file", "cert_file", "key_file") if getattr(self, key)]
        if files and not any(url.startswith("mqtts://") for url in self.url):
            raise ValueError(
                f"{files[0]} is for TLS; found url = {self.url[0]!r}, which is unencrypted; expected mqtts://, or "
                f"no {' and '.join(files)}"
            )
        return self


class Status(Model):
    """The local status server."""

    http: str = "127.0.0.1:8077"

    @field_validator("http")
    @classmethod
    def _http(cls, value: str) -> str:
        if value:
            host, _, port = value.rpartition(":")
            if not host or "/" in host or not port.isdecimal() or not 1 <= int(port) <= 65535:
                raise ValueError(f'found {value!r}; expected HOST:PORT, or "" for none')
        return value


def _check_url(url: str, schemes: tuple[str, ...], expected: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if "@" in url:
        shown = re.sub(r"//.*@", "//...@", url)  # what stands there may be a secret
        raise ValueError(f"found {shown!r}; expected {expected}, without user name and password")
    if not fine:
        raise ValueError(f"found {url!r}; expected {expected}")


_tag = dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
"""Tags are dataclasses with slots: as models they would take 0.8 kB more each."""


def _from_table(kind: type[Any]) -> BeforeValidator:
    """Return what makes a dataclass of a table, which pydantic does not where it is strict."""

    def made(table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        blank = object.__new__(kind)  # as its __init__ does, which takes any key but its own first argument's
        kind.__pydantic_validator__.validate_python(ArgsKwargs((), table), self_instance=blank)
        return blank

    return BeforeValidator(made)


@_tag
class Guard:
    """The limits that stand between any write and a tag."""

    writable: bool = False
    min: float | None = None
    max: float | None = None
    max_step: Annotated[float, Field(gt=0)] | None = None
    ramp: Ramp | None = None
    min_interval: Duration | None = None
    max_per_hour: Annotated[int, Field(ge=1)] | None = None
    safe: float | bool | str | None = None
    eeprom: bool = False
    refresh: Duration | None = None

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"found min {self.min} above max {self.max}")
        if self.refresh is not None:
            self._refresh_fits(self.refresh)
        return self

    def _refresh_fits(self, refresh: Duration) -> None:
        if refresh.s < 1.0:
            raise ValueError(f"found refresh {refresh.s:g} s; expected 1 s or more")
        if self.min_interval is not None and refresh < self.min_interval:
            raise ValueError(
                f"found refresh {refresh.s:g} s, shorter than min_interval {self.min_interval.s:g} s; expected no less"
            )
        writes = ceil(3600.0 / refresh.s)
        if self.max_per_hour is not None and writes > self.max_per_hour:
            raise ValueError(
                f"refresh each {refresh.s:g} s takes {writes} writes an hour; found max_per_hour {self.max_per_hour}"
            )


class Deadband(NamedTuple):
    """How far a number may move from what was last reported: an absolute width, or a share of that value."""

    width: float = 0.0
    share: float = 0.0

    @classmethod
    def parse(cls, given: Any) -> "Deadband":
        """Read a number, or a share written as `2%`; raise ValueError with what would have been right."""
        if isinstance(given, Deadband):
            return given
        if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < inf:
            return cls(width=float(given))
        if isinstance(given, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*%", given)):
            return cls(share=float(match[1]) / 100)
        raise ValueError(
            f"found {given!r}; expected 0 or more in the tag's unit, as in 0.05, or a share of the last reported "
            'value, as in "2%"'
        )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse)


def _deadband_fits(deadband: Deadband, kind: str) -> None:
    """Raise ValueError if a deadband stands beside a type that has no distances."""
    if any(deadband) and (kind == "bool" or kind.startswith("string") or kind.endswith("[]")):
        raise ValueError(f"found a deadband on type {kind!r}, of which any change counts; expected a number")


REGISTERS = {
    "bool": 1, "int16": 1, "uint16": 1, "int32": 2, "uint32": 2, "int64": 4, "uint64": 4, "float32": 2, "float64": 4,
}  # fmt: skip
"""Registers that a value of each fixed type takes."""


@_tag
class ModbusTag(Guard):
    """One point of a Modbus device."""

    address: ModbusAddress
    type: str
    order: Literal["ABCD", "CDAB", "BADC", "DCBA"] = "ABCD"
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""
    deadband: Deadband = Deadband()

    @field_validator("type")
    @classmethod
    def _type(cls, text: str) -> str:
        length = text.removeprefix("string:")
        if text in REGISTERS or (length != text and length.isdecimal() and 1 <= int(length) <= 250):
            return intern(text)
        raise ValueError(
            f"found {text!r}; expected one of {', '.join(REGISTERS)}, or string:LEN with LEN 1 to 250 bytes"
        )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        on_bits = self.address.table in ("coil", "discrete")
        if on_bits and self.type != "bool":
            raise ValueError(f"a {self.address.table} holds a bool; found type {self.type!r}")
        if not on_bits and (self.type == "bool") != (self.address.bit is not None):
            raise ValueError(
                f"found type {self.type!r} at {self.address}; a bool in a register names its bit, as in "
                f"{self.address.table}:{self.address.start}.0, and only a bool does"
            )
        if self.writable and self.address.table in ("input", "discrete"):
            raise ValueError(f"{self.address.table} cannot be written; found writable = true")
        if self.type in ("bool",) or self.type.startswith("string:"):
            if self.scale != 1.0 or self.offset != 0.0:
                raise ValueError(f"a {self.type.partition(':')[0]} has no scale or offset")
        elif self.scale == 0.0:
            raise ValueError("found scale 0; expected a factor that leaves the value")
        _deadband_fits(self.deadband, self.type)
        if self.address.start + self.registers > 65536:
            raise ValueError(
                f"{self.address} with {self.registers} registers ends behind the last address, 65535"
            )
        return self

    @property
    def registers(self) -> int:
        """Registers (or coils) that the value takes."""
        if self.type.startswith("string:"):
            return (int(self.type[7:]) + 1) // 2
        return REGISTERS[self.type]


_NODE_ID = re.compile(
    r"(?:ns=(?P<ns>\d{1,5});)?"
    r"(?:i=(?P<i>\d{1,10})|s=.+|g=[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|b=(?:[A-Za-z0-9+/]{4})*[A-Za-z0-9+/=]{4})"
)


def _node_id(text: str) -> str:
    """Check a node id in its text form (OPC UA Part 6, 5.3.1.10)."""
    match = _NODE_ID.fullmatch(text)
    if match is None or int(match["ns"] or 0) > 0xFFFF or int(match["i"] or 0) > 0xFFFFFFFF:
        raise ValueError(f"found {text!r}; expected a node id, as in ns=2;s=Irradiance or ns=3;i=1001")
    return text


@_tag
class OpcUaTag(Guard):
    """One node of an OPC UA server."""

    address: Annotated[str, AfterValidator(_node_id)]
    type: str = ""
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""
    deadband: Deadband = Deadband()

    @field_validator("type")
    @classmethod
    def _type(cls, text: str) -> str:
        if text and text.removesuffix("[]") not in (*REGISTERS, "string"):
            raise ValueError(
                f"found {text!r}; expected one of {', '.join(REGISTERS)} or string, "
                "for an array with [] behind it, or nothing"
            )
        return intern(text)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _deadband_fits(self.deadband, self.type)
        return self


STALE_PERIODS = 3
"""How many of its device's periods a reading is good for, if nothing else is said."""


class Device(Model):
    """What devices of all protocols share."""

    every: Duration = Duration(1_000)
    timeout: Duration = Duration(1_000)
    report: Literal["all", "change"] = "all"
    heartbeat: Duration = Duration(60_000)
    profile: str = ""

    @field_validator("every")
    @classmethod
    def _every(cls, value: Duration) -> Duration:
        if value < 1:
            raise ValueError("found less than 1ms; expected 1ms or more")
        return value

    @field_validator("timeout")
    @classmethod
    def _timeout(cls, value: Duration) -> Duration:
        if not 1 <= value <= 60_000:
            raise ValueError(f"found {value} ms; expected 1ms to 60s")
        return value


SERIAL = {
    "baudrate": ("1200", "2400", "4800", "9600", "19200", "38400", "57600", "115200"),
    "parity": ("N", "E", "O"),
    "bytesize": ("7", "8"),
    "stopbits": ("1", "2"),
}
"""What a serial url may say of the line."""


class ModbusDevice(Device):
    """A Modbus unit behind a host and port or a serial line."""

    driver: Literal["modbus"]
    url: str
    unit: int = Field(1, ge=0, le=255)
    max_block: int = Field(125, ge=1, le=125)
    max_gap: int = Field(8, ge=0, le=124)
    tags: dict[Name, Annotated[ModbusTag, _from_table(ModbusTag)]] = Field(min_length=1)

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True)
        if parts.scheme == "serial":
            fine = bool(parts.path) and all(
                key in SERIAL and len(values) == 1 and values[0] in SERIAL[key]
                for key, values in options.items()
            )
            if not fine:
                known = "; ".join(f"{key} {'|'.join(values[:8])}" for key, values in SERIAL.items())
                raise ValueError(
                    f"found {url!r}; expected serial:///dev/ttyUSB0?baudrate=9600&parity=N ({known})"
                )
        else:
            expected = "tcp://HOST:PORT, tls://HOST:PORT, rtu+tcp://HOST:PORT or serial:///DEVICE"
            _check_url(url, ("tcp", "tls", "rtu+tcp"), expected)
            if options:
                raise ValueError(f"found {url!r}; expected {expected}, without a query")
        return url

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, tag in self.tags.items():
            if tag.address.table in ("holding", "input") and tag.registers > self.max_block:
                raise ValueError(
                    f"tag {name} takes {tag.registers} registers, more than max_block {self.max_block}"
                )
        return self


class OpcUaDevice(Device):
    """An OPC UA server."""

    driver: Literal["opcua"]
    url: str
    mode: Literal["subscribe", "poll"] = "subscribe"
    security: str = "None"
    timestamp: Literal["source", "gateway"] = "source"
    username: str = ""
    password_file: str = ""
    tags: dict[Name, Annotated[OpcUaTag, _from_table(OpcUaTag)]] = Field(min_length=1)

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        _check_url(url, ("opc.tcp",), "opc.tcp://HOST:PORT/PATH")
        return url

    @field_validator("security", "username", "password_file")
    @classmethod
    def _later(cls, value: str) -> str:
        if value not in ("", "None"):
            raise not_yet("OPC UA with security or a user name")
        return value


AnyDevice = Annotated[ModbusDevice | OpcUaDevice, Field(discriminator="driver")]


def _hold(value: Any) -> Any:
    return None if value == "forever" else Duration.parse(value)


class Rule(Model):
    """A local control rule. Its expressions are compiled, and checked, by `control`."""

    when: str
    until: str = ""
    for_: Duration = Field(Duration(0), alias="for")
    link: Literal["offline", "online", "always"] = "always"
    priority: int = Field(0, ge=0, le=1000)
    min_on: Duration = Duration(0)
    min_off: Duration = Duration(0)
    stale_after: Duration | None = None
    hold: Annotated[Duration | None, BeforeValidator(_hold)] = Duration(0)
    do: dict[str, str | bool | int | float] = Field(min_length=1)
    finally_: dict[str, str | bool | int | float] = Field(default_factory=dict, alias="finally")


MOST_STRETCHES = 3000
"""How many `every` a window may be long, with its lateness: each is kept apart."""


class Window(Model):
    """What tags come to over stretches of time. Whether these tags are there is checked with the rules."""

    of: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(min_length=1)
    size: Duration
    every: Duration | None = None
    agg: Annotated[
        tuple[Literal["mean", "min", "max", "sum", "count", "first", "last", "integral"], ...],
        BeforeValidator(_several),
    ] = Field(("mean", "min", "max"), min_length=1)
    lateness: Duration = Duration(0)

    @field_validator("of", "agg")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"found {', '.join(twice)} more than once; expected each once")
        return names

    @model_validator(mode="after")
    def _fits(self) -> Self:
        every = self.period
        if every < 100:
            raise ValueError(f"found a window every {every} ms; expected 100ms or more")
        if self.size < every or self.size % every:
            raise ValueError(
                f"found size {self.size} ms, every {every} ms; expected a size that is a multiple of every"
            )
        if self.size + self.lateness > MOST_STRETCHES * every:
            raise ValueError(
                f"found size {self.size} ms and lateness {self.lateness} ms, every {every} ms; expected both together "
                f"to be at most {MOST_STRETCHES} times every"
            )
        return self

    @property
    def period(self) -> Duration:
        """How often a stretch is over; one after the other, if nothing is said."""
        return self.size if self.every is None else self.every


class Config(Model):
    """The whole file."""

    gateway: Gateway
    journal: Journal = Journal()
    uplink: Uplink = Uplink()
    status: Status = Status()
    device: dict[Name, AnyDevice] = Field(default_factory=dict)
    rule: dict[Name, Rule] = Field(default_factory=dict)
    window: dict[Name, Window] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.journal.max_size < 8 * self.uplink.max_message:
            raise ValueError(
                f"found journal.max_size {self.journal.max_size} bytes; expected at least eight times "
                f"uplink.max_message, {self.uplink.max_message} bytes"
            )
        return self

    @property
    def topic(self) -> str:
        """The uplink's topic with the gateway's name in its place."""
        return self.uplink.topic.replace("{gateway}", self.gateway.id)
