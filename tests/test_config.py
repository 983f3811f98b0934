"""The configuration: every mistake is found at once and nothing starts on it (promise 9); what is right loads."""

import asyncio
import signal
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from field import field
from gateway_rig import TAGS, config, device, gateway, toml, until
from journal_rig import kept
from rig import ROOT, Process, free_port

from edgegw.config import profiles
from edgegw.config.lines import key_lines
from edgegw.config.load import find, journal_path, load, secret
from edgegw.config.schema import Config
from edgegw.control.build import load_with_rules
from edgegw.errors import ConfigError

CASES = Path(__file__).with_name("cases")
WRONG = tomllib.loads((CASES / "config_wrong.toml").read_text())["case"]
CONTRACT = CASES / "config_contract.toml"


def problems(path: Path) -> list[str]:
    """Return what is said of a wrong configuration."""
    with pytest.raises(ConfigError) as caught:
        load_with_rules(path)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("case", WRONG, ids=[case["name"] for case in WRONG])
def test_p9_a_mistake_is_told_with_its_line_its_path_and_what_was_expected(
    tmp_path: Path, case: dict[str, Any]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(case["config"])
    found = [problem.removeprefix(str(path)).replace(str(tmp_path), "FOLDER") for problem in problems(path)]
    if "not TOML" in case["problems"][0]:  # the rest is Python's own words
        found = [found[0][: len(case["problems"][0])]]
    assert found == case["problems"]


def test_every_kind_of_section_has_a_wrong_case() -> None:
    said = "\n".join(problem for case in WRONG for problem in case["problems"])
    for section in Config.model_fields:
        assert f" {section}" in said, section


@pytest.mark.parametrize("text", [b"\xff\xfe", b'[gateway]\nid = "caf\xe9"\n'])
def test_what_is_no_text_is_said_to_be_none(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text)
    assert "not UTF-8" in problems(path)[0]


@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_cannot_be_read_is_named_with_the_way_out(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "config.toml"
    if there:
        path.mkdir()
    (problem,) = problems(path)
    assert problem.startswith(str(path))
    assert "--config" in problem


# -- what is right -------------------------------------------------------------------------------------------


def test_the_contracts_example_loads_with_its_rule_and_its_window() -> None:
    config, _ = load_with_rules(CONTRACT)
    assert list(config.device) == ["meter1", "battery", "plant"]
    assert list(config.rule) == ["peak_shave"]
    assert list(config.window) == ["load_15m"]
    assert config.topic == "edgegw/site-7"


def test_defaults_are_the_contracts() -> None:
    """What the contract's example spells out for journal, uplink, status and devices is what is left out means."""
    written = load(CONTRACT)
    bare = Config.model_validate(
        {
            "gateway": {"id": "site-7"},
            "device": {
                "meter1": {"driver": "modbus", "url": "tcp://127.0.0.1:5020", "tags": TAGS},
                "plant": {
                    "driver": "opcua",
                    "url": "opc.tcp://127.0.0.1:4840/",
                    "tags": {"a": {"address": "i=1"}},
                },
            },
        }
    )
    assert written.journal == bare.journal
    assert written.uplink == bare.uplink
    assert written.status == bare.status
    for name in ("meter1", "plant"):
        assert written.device[name].model_copy(update={"tags": {}}) == bare.device[name].model_copy(
            update={"tags": {}}
        )
    meter = written.device["meter1"]
    assert (meter.max_block, meter.max_gap) == (125, 8)  # type: ignore[union-attr]
    tag = written.device["meter1"].tags["voltage"]
    assert (tag.scale, tag.offset, tag.writable, tag.order) == (1.0, 0.0, False, "ABCD")  # type: ignore[union-attr]


def test_the_example_that_is_shipped_loads_and_says_the_defaults() -> None:
    example = ROOT / "config.example.toml"
    config, _ = load_with_rules(example)
    bare = Config.model_validate({"gateway": {"id": "site-7"}})
    assert (config.journal, config.uplink, config.status) == (bare.journal, bare.uplink, bare.status)


def test_one_broker_or_several(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[gateway]\nid = "a"\n[uplink]\nurl = ["mqtt://a", "mqtts://[::1]:8883"]\n')
    assert load(path).uplink.url == ("mqtt://a", "mqtts://[::1]:8883")


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(Path("given")) == Path("given")
    monkeypatch.setenv("EDGEGW_CONFIG", "/named")
    assert find(None) == Path("/named")
    monkeypatch.delenv("EDGEGW_CONFIG")
    monkeypatch.setattr("edgegw.config.load.SYSTEM_PATH", tmp_path / "none")
    assert find(None) == Path("config.toml")
    monkeypatch.setattr("edgegw.config.load.SYSTEM_PATH", tmp_path)
    assert find(None) == tmp_path


def test_the_journal_is_beside_the_file_or_in_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"gateway": {"id": "a"}})
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert journal_path(config, tmp_path / "config.toml") == tmp_path / "journal.db"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edgegw:/var/lib/other")
    assert journal_path(config, tmp_path / "config.toml") == Path("/var/lib/edgegw/journal.db")
    away = Config.model_validate({"gateway": {"id": "a"}, "journal": {"path": "/data/j.db"}})
    assert journal_path(away, tmp_path / "config.toml") == Path("/data/j.db")


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    assert secret("password", tmp_path / "config.toml") == "s3cret"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert secret("%d/password", Path("/elsewhere/config.toml")) == "s3cret"
    with pytest.raises(ConfigError, match="expected a file that holds the password"):
        secret("nothing", tmp_path / "config.toml")


def test_a_password_in_a_url_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for url in ("mqtt://me:s3cret@broker", "http://me:s3cret@broker", "mqtt://s3cret@broker:99999"):
        path.write_text(f'[gateway]\nid = "a"\n[uplink]\nurl = "{url}"\n')
        (problem,) = problems(path)
        assert "s3cret" not in problem


def test_lines_are_found_in_whatever_way_a_key_is_written() -> None:
    text = 'a = 1\n[b]\n"c d" = 1\ne.f = 2\n[ g . "h.i" ]\nj = """\nk = 1\n"""\n[[l]]\nm = 1\n'
    lines = key_lines(text)
    assert lines[("a",)] == 1
    assert lines[("b", "c d")] == 3
    assert lines[("b", "e", "f")] == 4
    assert lines[("g", "h.i")] == 5
    assert lines[("g", "h.i", "j")] == 6
    assert lines[("l", "m")] == 10


# -- profiles ------------------------------------------------------------------------------------------------


def with_profile(folder: Path, name: str, tags: str = "", profile: str | None = None) -> Path:
    path = folder / "config.toml"
    path.write_text(
        f'[gateway]\nid = "a"\n[device.m]\ndriver = "modbus"\nurl = "tcp://h"\nprofile = "{name}"\n'
        + (f"[device.m.tags]\n{tags}\n" if tags else "")
    )
    if profile is not None:
        (folder / "profiles").mkdir()
        (folder / "profiles" / f"{name}.toml").write_text(profile)
    return path


def test_a_shipped_profile_gives_its_tags(tmp_path: Path) -> None:
    (found,) = load(with_profile(tmp_path, "eastron-sdm630")).device.values()
    assert found.tags["frequency"].unit == "Hz"


@pytest.mark.parametrize("file", profiles.shipped_profiles(), ids=lambda file: file.stem)
def test_every_shipped_profile_loads_and_names_its_source(tmp_path: Path, file: Path) -> None:
    (found,) = load(with_profile(tmp_path, file.stem)).device.values()
    assert found.tags
    assert "Source:" in file.read_text()


def test_a_profile_beside_the_file_comes_before_a_shipped_one_and_the_device_has_the_last_word(
    tmp_path: Path,
) -> None:
    path = with_profile(
        tmp_path, "eastron-sdm630",
        tags='b = { address = "input:9", type = "int16" }\nc = { address = "coil:1", type = "bool" }',
        profile='every = "7s"\nunit = 3\n[tags]\na = { address = "coil:0", type = "bool" }\n'
        'b = { address = "holding:1", type = "float32", scale = 2.0 }\n',
    )  # fmt: skip
    path.write_text(path.read_text().replace("[device.m.tags]", "unit = 4\n[device.m.tags]"))
    (found,) = load(path).device.values()
    assert sorted(found.tags) == ["a", "b", "c"]
    assert (str(found.tags["b"].address), found.tags["b"].scale) == ("input:9", 1.0)
    assert (found.every, found.unit) == (7000, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("tags = [", "profile 'acme' cannot be read"),
        ('driver = "modbus"\n', "profile 'acme' holds 'driver', which only the device itself may say"),
        ('[tags]\na = { address = "coil:0", type = "int16" }\n', "device.m.tags.a: a coil holds a bool"),
        (
            'colour = "red"\n[tags]\na = { address = "coil:0", type = "bool" }\n',
            "device.m.colour: unknown key",
        ),
    ],
)
def test_p9_a_mistake_in_a_profile_is_one_of_the_device(tmp_path: Path, profile: str, said: str) -> None:
    (problem,) = problems(with_profile(tmp_path, "acme", profile=profile))
    assert said in problem


# -- nothing starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["run"], ["check"], ["check", "--connect"], ["status"], ["size"]])
def test_p9_with_a_wrong_configuration_nothing_starts(tmp_path: Path, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as anyone:  # the device and the broker
        anyone.settimeout(0)
        port = anyone.getsockname()[1]
        made = config(
            port, {"m": device(port), "n": device(port, every="1 fortnight")}, journal={"keep": "for ever"}
        )
        path = tmp_path / "config.toml"
        path.write_text(toml(made))
        with Process(sys.executable, "-m", "edgegw", *command, "-c", str(path)) as run:
            code, out = run.end()
        with pytest.raises(BlockingIOError):
            anyone.accept()
    assert code == 2
    assert out == ""
    assert len(run.lines) == 2, run.lines
    assert all(line.startswith(f"error: {path}:") for line in run.lines)
    assert "journal.keep" in run.lines[0]
    assert "device.n.every" in run.lines[1]
    assert [file.name for file in tmp_path.iterdir()] == ["config.toml"]


# -- SIGHUP --------------------------------------------------------------------------------------------------


async def test_p9_a_reload_with_mistakes_keeps_the_old_configuration_and_says_so(tmp_path: Path) -> None:
    async with field() as meter:
        made = config(free_port(), {"m": device(meter.port)})
        with gateway(tmp_path, made) as run:
            await until(lambda: meter.counts[1] > 3, "scans")
            (tmp_path / "config.toml").write_text(toml(made | {"journal": {"keep": "for ever"}}))
            run.send(signal.SIGHUP)
            await until(lambda: run.said("the old one stays in force"), "the refusal")
            assert run.said("journal.keep: found 'for ever'")
            scans = meter.counts[1]
            await until(lambda: meter.counts[1] > scans + 3, "scans after it")
            assert meter.connections == 1
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
    journaled = b"".join(kept(tmp_path / "journal.db").bodies.values())
    assert b'"event":"config","ok":false' in journaled
    assert b"for ever" in journaled


async def test_a_reload_restarts_what_has_changed_and_nothing_else(tmp_path: Path) -> None:
    async with field() as same, field() as other, field() as late:
        made = config(
            free_port(),
            {"same": device(same.port), "other": device(other.port), "gone": device(late.port, 2)},
        )
        with gateway(tmp_path, made) as run:
            await until(lambda: same.counts[1] > 3 and other.counts[1] > 3 and late.counts[2] > 3, "scans")
            devices = {
                "same": device(same.port),
                "other": device(other.port, 7),
                "late": device(late.port, 3),
            }
            (tmp_path / "config.toml").write_text(toml(made | {"device": devices}))
            scans = same.counts[1]
            run.send(signal.SIGHUP)
            await until(lambda: other.counts[7] > 3 and late.counts[3] > 3, "scans as newly configured")
            before = (other.counts[1], late.counts[2])
            await until(lambda: same.counts[1] > scans + 20, "scans of the unchanged device")
            assert (other.counts[1], late.counts[2]) == before, (
                "what is no longer configured is no longer asked"
            )
            assert same.connections == 1, "the unchanged device never noticed"
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
    journaled = b"".join(kept(tmp_path / "journal.db").bodies.values())
    assert b'"event":"config","ok":true,"stopped":["other","gone"],"started":["other","late"]' in journaled


async def test_reloads_in_quick_succession_are_taken_up_one_after_the_other(tmp_path: Path) -> None:
    """The last configuration is in force in the end; nothing crashes, whatever a reload before it was at."""
    async with field() as meter:
        made = config(free_port(), {"m": device(meter.port)})
        with gateway(tmp_path, made) as run:
            await until(lambda: meter.counts[1] > 3, "scans")
            for unit in (*range(10, 22), 5):
                devices = {"m": device(meter.port), "x": device(meter.port, unit)}
                new = tmp_path / "new.toml"
                new.write_text(toml(made | {"device": devices}))
                new.rename(tmp_path / "config.toml")
                run.send(signal.SIGHUP)
                await asyncio.sleep(0.005 * (unit % 4))  # a signal that is still pending is one with the next
            await until(lambda: meter.counts[5] > 20, "scans of the last configuration")
            before = dict(meter.counts)
            await until(lambda: meter.counts[5] > before[5] + 20, "more")
            asked = [unit for unit in range(10, 22) if meter.counts[unit] != before.get(unit, 0)]
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
            assert not [line for line in run.lines if "crashed" in line], run.lines
    assert asked == [], "a device that is no longer configured is still read"


async def test_a_reload_of_what_takes_a_restart_says_so(tmp_path: Path) -> None:
    async with field() as meter:
        made = config(free_port(), {"m": device(meter.port)})
        with gateway(tmp_path, made) as run:
            await until(lambda: meter.counts[1] > 3, "scans")
            (tmp_path / "config.toml").write_text(
                toml(config(free_port(), made["device"], journal={"keep": "1h"}))
            )
            run.send(signal.SIGHUP)
            await until(lambda: run.said("[journal] has changed; that takes a restart"), "the hint")
            assert run.said("[uplink] has changed")
            assert meter.connections == 1
            run.send(signal.SIGTERM)
            assert (await asyncio.to_thread(run.end))[0] == 0
