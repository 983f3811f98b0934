"""Device profiles: tags that many sites share, from a file beside the configuration or shipped with edgegw."""

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def with_profiles(
    raw: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[tuple[tuple[str, ...], str]]]:
    """Return the configuration with each device's profile merged beneath it, and what was wrong with that.

    A profile may hold any of a device's keys but `driver` and `profile`; what the device itself says wins,
    tag by tag.
    """
    devices = raw.get("device")
    if not isinstance(devices, dict):
        return raw, []
    problems: list[tuple[tuple[str, ...], str]] = []
    merged: dict[str, Any] = {}
    for name, device in devices.items():
        merged[name] = device
        wanted = device.get("profile") if isinstance(device, dict) else None
        if not isinstance(wanted, str) or not wanted:
            continue
        try:
            profile = _read(wanted, folder)
        except ValueError as error:
            problems.append((("device", name, "profile"), str(error)))
            continue
        tags = device.get("tags", {})
        merged[name] = profile | device
        if isinstance(tags, dict) and isinstance(profile.get("tags"), dict):
            merged[name]["tags"] = profile["tags"] | tags
    return raw | {"device": merged}, problems


def _read(name: str, folder: Path) -> dict[str, Any]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"found {name!r}; expected a profile's name: small letters, digits, . _ or -")
    beside = folder / "profiles" / f"{name}.toml"
    shipped = resources.files("edgegw") / "profiles" / f"{name}.toml"
    try:
        text = beside.read_text(encoding="utf-8") if beside.is_file() else shipped.read_text(encoding="utf-8")
        profile = tomllib.loads(text)
    except FileNotFoundError:
        known = sorted(p.name.removesuffix(".toml") for p in shipped_profiles())
        raise ValueError(
            f"found {name!r}; there is no {beside}, and shipped are: {', '.join(known)}"
        ) from None
    except RecursionError:
        raise ValueError(f"profile {name!r} is nested too deeply") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"profile {name!r} cannot be read: {error}") from None
    for key in ("driver", "profile"):
        if key in profile:
            raise ValueError(f"profile {name!r} holds {key!r}, which only the device itself may say")
    return profile


def shipped_profiles() -> list[Path]:
    """Return the profile files that come with edgegw."""
    return [
        Path(str(entry))
        for entry in (resources.files("edgegw") / "profiles").iterdir()
        if entry.name.endswith(".toml")
    ]
