"""Reads a configuration file, and finds everything that is wrong with it at once."""

import hashlib
import os
import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from edgegw.config.lines import key_lines
from edgegw.config.profiles import with_profiles
from edgegw.config.schema import AnyDevice, Config, ModbusDevice, OpcUaDevice
from edgegw.errors import ConfigError

SYSTEM_PATH = Path("/etc/edgegw/config.toml")
SYSTEM_STATE = Path("/var/lib/edgegw")
SERVICE_CREDENTIALS = Path("/run/credentials/edgegw.service")
"""Where systemd keeps the credentials of the packaged service while it runs."""

MOST_PROBLEMS = 200
"""So many mistakes are reported at once; looking for the nearest key costs a millisecond each."""

Problem = tuple[tuple[str, ...], str]
"""A place in the configuration, and what is wrong there."""


def find(path: Path | None) -> Path:
    """Return the file to load: the one given, $EDGEGW_CONFIG, the system's, or ./config.toml."""
    if path is not None:
        return path
    if named := os.environ.get("EDGEGW_CONFIG"):
        return Path(named)
    return SYSTEM_PATH if SYSTEM_PATH.exists() else Path("config.toml")


def load(path: Path, *, inspect: Callable[[Config], list[Problem]] | None = None) -> Config:
    """Read and validate a configuration file; raise ConfigError with every problem found.

    `inspect` looks for problems that the schema cannot see. Where the schema has found some of its own, it is
    shown what of the file is sound.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            [f"{path}: {(error.strerror or str(error)).lower()}; name the file with --config"]
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text (byte {error.start})"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from None
    except RecursionError:
        raise ConfigError(
            [f"{path}: nested too deeply; no key of edgegw needs more than four levels"]
        ) from None
    raw, problems = with_profiles(raw, path.parent)
    config: Config | None = None
    sound: Config | None = None
    gone: list[str] = []
    try:
        sound = config = Config.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True)
        missed = {(*where[:2], "tags") for where, _ in problems}  # they were to come with the profile
        found = [one for one in found if one["loc"][:2] + one["loc"][3:] not in missed]
        problems += [_problem(raw, one) for one in found[:MOST_PROBLEMS]]
        if len(found) > MOST_PROBLEMS:
            problems.append(((), f"and {len(found) - MOST_PROBLEMS} more problems"))
        sound, gone = _sound_part(raw, [place for place, _ in problems])
    if inspect is not None and sound is not None:
        problems += [
            (where, what) for where, what in inspect(sound) if not any(name in what for name in gone)
        ]
    if problems or config is None:
        lines = key_lines(text)
        problems.sort(key=lambda problem: _line(lines, problem[0]) or 0)
        raise ConfigError([_located(path, lines, where, what) for where, what in problems])
    return config


def _sound_part(raw: dict[str, Any], places: list[tuple[str, ...]]) -> tuple[Config | None, list[str]]:
    """Return the configuration without what is wrong, and the names of tags and devices that went with it."""
    rest: dict[str, Any] = {
        name: {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in section.items()}
        for name, section in raw.items()
        if isinstance(section, dict) and name in Config.model_fields
    }
    gone = []
    for place in places:
        match place:
            case ("device", device, "tags", tag, *_) if isinstance(rest["device"].get(device), dict):
                tags = rest["device"][device].get("tags")
                if isinstance(tags, dict):
                    rest["device"][device]["tags"] = {name: one for name, one in tags.items() if name != tag}
                gone.append(f"{device}.{tag}")
            case ("device", device, key) if (
                key in rest.get("device", {}).get(device, {}) and key not in _NEEDED
            ):
                del rest["device"][device][key]
            case (("device" | "rule" | "window") as section, name, *_):
                rest.get(section, {}).pop(name, None)
                gone.append(f"{name}.")
            case (section, *_):
                rest.pop(section, None)
    try:
        return Config.model_validate({"gateway": {"id": "unnamed"}} | rest), gone
    except ValidationError:
        return None, gone


_NEEDED = ("driver", "url", "tags")


def state_directory(config_path: Path) -> Path:
    """Return where what a gateway keeps stands, if its path is relative.

    $EDGEGW_STATE, else $STATE_DIRECTORY, which systemd sets for the service; a shell does not have it, so for the
    system's configuration it is the same folder; else beside the configuration.
    """
    for variable in ("EDGEGW_STATE", "STATE_DIRECTORY"):
        if named := os.environ.get(variable, "").split(":")[0]:
            return Path(named)
    if SYSTEM_PATH.parent in (*config_path.absolute().parents, *config_path.resolve().parents):
        return SYSTEM_STATE
    return config_path.parent


def digest(config_path: Path) -> str:
    """Return the SHA-256 of a configuration file in hex, "" if it cannot be read."""
    try:
        return hashlib.sha256(config_path.read_bytes()).hexdigest()
    except OSError:
        return ""


def fingerprint(device: AnyDevice) -> str:
    """Return what tells one device's configuration from another, in hex."""
    return hashlib.sha256(device.model_dump_json().encode()).hexdigest()


def journal_path(config: Config, config_path: Path) -> Path:
    """Return where the journal's file is."""
    return state_directory(config_path) / config.journal.path


def credential_path(path: str, config_path: Path) -> Path:
    """Return where a secret's file is, `%d/` standing for systemd's credentials, also in a shell."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY") or str(SERVICE_CREDENTIALS)
    return config_path.parent / path.replace("%d", folder, 1)


def secret(path: str, config_path: Path) -> str:
    """Return the secret in a file, found as `credential_path` does; raise ConfigError."""
    try:
        return credential_path(path, config_path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        hint = "expected a file that holds the password"
        if "%d" in path and "CREDENTIALS_DIRECTORY" not in os.environ:
            hint = (
                "it is a credential of the service, which root alone can read from a shell, in "
                f"{SERVICE_CREDENTIALS}, while the service runs"
            )
        raise ConfigError([f"{path}: cannot be read: {why.lower()}; {hint}"]) from None


def _line(lines: dict[tuple[str, ...], int], where: tuple[str, ...]) -> int | None:
    """Return the line of a key, else of the innermost table around it, else of the first key within."""
    for n in range(len(where), 0, -1):
        if where[:n] in lines:
            return lines[where[:n]]
    return min((line for key, line in lines.items() if where and key[: len(where)] == where), default=None)


def _located(path: Path, lines: dict[tuple[str, ...], int], where: tuple[str, ...], what: str) -> str:
    line = _line(lines, where)
    place = f"{path}:{line}" if line else str(path)
    return f"{place}: {'.'.join(where)}: {what}" if where else f"{place}: {what}"


_DRIVERS = {"modbus": ModbusDevice, "opcua": OpcUaDevice}


def _problem(raw: dict[str, Any], found: Any) -> Problem:
    """Turn one of pydantic's errors into a place and an operator's sentence."""
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    where = tuple(str(part) for part in found["loc"])
    if where[:1] == ("device",) and len(where) > 2 and where[2] in _DRIVERS:
        where = (*where[:2], *where[3:])  # the discriminator's value is no key
    if where[-1:] == ("[key]",):
        where = where[:-1]
    match kind:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return where, _unknown(where, raw)
        case "missing":
            return where, "missing; it has no default"
        case "value_error":
            return where, str(context["error"])
        case "literal_error" | "enum":
            return where, f"found {value!r}; expected {context['expected']}"
        case "union_tag_invalid":
            return (*where, "driver"), f"found {context['tag']!r}; expected {context['expected_tags']}"
        case "union_tag_not_found":
            return (*where, "driver"), "missing; expected 'modbus' or 'opcua'"
        case "model_type" | "dict_type" | "model_attributes_type" | "dataclass_exact_type":
            return where, f"found {value!r}; expected a table"
        case "too_short":
            return where, "is empty; expected at least one"
        case "tuple_type":
            return where, f"found {value!r}; expected a string or a list of strings"
    message = found["msg"]
    expected = message.removeprefix("Input should be ")
    if expected != message:
        return where, f"found {value!r}; expected {expected}"
    return where, f"found {value!r}; {message[0].lower()}{message[1:]}"


def _unknown(where: tuple[str, ...], raw: dict[str, Any]) -> str:
    near = get_close_matches(where[-1], _keys_at(where[:-1], raw), n=1, cutoff=0.5)
    return "unknown key" + (f"; did you mean {near[0]}?" if near else "")


def _keys_at(where: tuple[str, ...], raw: dict[str, Any]) -> list[str]:
    """Return the keys that may stand in the table at this place."""
    model: Any = Config
    here: Any = raw
    for part in where:
        here = here.get(part) if isinstance(here, dict) else None
        if fields := _fields(model):
            model = fields[part].annotation
        elif args := get_args(model):  # dict[Name, what]
            model = getattr(args[1], "__origin__", args[1])  # without what is annotated
        if not isinstance(model, type) and isinstance(here, dict) and "driver" in here:
            model = _DRIVERS.get(here["driver"], model)
    return [field.alias or name for name, field in _fields(model).items()]


def _fields(model: Any) -> dict[str, FieldInfo]:
    """Return the keys of a section, none if it is something else."""
    return getattr(model, "__pydantic_fields__", {})
