"""What `check` and the log note of an uplink whose configuration is sound."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from control_field import stop
from gateway_rig import config, device, gateway, toml, until
from rig import Process, free_port

from edgegw.config.schema import Config
from edgegw.uplink.advice import advice

PASSWORD: dict[str, Any] = {"username": "site", "password_file": "password"}


@pytest.mark.parametrize(
    ("gateway_id", "uplink", "noted"),
    [
        ("site-7", {}, []),
        ("site-7", {"url": "mqtt://broker.example"}, []),
        (
            "site-7",
            {"url": "mqtt://broker.example"} | PASSWORD,
            ["password goes unencrypted to mqtt://broker.example"],
        ),
        ("site-7", {"url": "mqtts://broker.example"} | PASSWORD, []),
        ("site-7", {"url": "mqtt://localhost"} | PASSWORD, []),
        ("site-7", {"url": "mqtt://127.0.0.2"} | PASSWORD, []),
        ("site-7", {"url": "mqtt://[::1]:1883"} | PASSWORD, []),
        ("site-7", {"url": ["mqtts://a", "mqtt://b"]}, ["mqtts:// and mqtt:// in one list"]),
        (
            "site-7",
            {"url": ["mqtts://a", "mqtt://b"], "ca_file": "ca.pem"},
            ["mqtts:// and mqtt:// in one list"],
        ),
        ("site-7", {"url": ["mqtts://a", "mqtt://127.0.0.1"]}, []),
        ("site-7", {"url": ["mqtt://a", "mqtt://b"]}, []),
        ("site.7", {}, ["gateway.id: found a dot"]),
        ("site-7", {"topic": "plant.a/{gateway}"}, ["uplink.topic: found a dot"]),
    ],
)
def test_what_is_noted(gateway_id: str, uplink: dict[str, Any], noted: list[str]) -> None:
    if isinstance(uplink.get("url"), list):
        uplink = uplink | {"url": tuple(uplink["url"])}
    made = Config.model_validate({"gateway": {"id": gateway_id}, "uplink": uplink})
    found = advice(made)
    assert len(found) == len(noted)
    for line, words in zip(found, noted, strict=True):
        assert words in line
        assert "; expected " in line


async def test_p10_an_unencrypted_password_is_said_at_the_start_and_by_check(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "password").write_text("s3cret")
    made = config(port, {"m": device(free_port())}, uplink={"url": f"mqtt://0.0.0.0:{port}"} | PASSWORD)
    with gateway(tmp_path, made) as run:
        await until(lambda: run.said(f"uplink mqtt://0.0.0.0:{port}: "), "the first attempt")
        assert sum("the password goes unencrypted" in line for line in run.lines) == 1
        await stop(run)
    (tmp_path / "config.toml").write_text(toml(made))
    with Process(
        sys.executable, "-m", "edgegw", "check", "--json", "-c", str(tmp_path / "config.toml")
    ) as process:
        code, out = await asyncio.to_thread(process.end)
    assert code == 0
    assert any("the password goes unencrypted" in note for note in json.loads(out)["notes"])
