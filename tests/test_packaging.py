"""The systemd unit and the package's scripts, as far as seconds go; packaging/test-deb proves the rest."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNIT = (ROOT / "systemd" / "edgegw.service").read_text()
RECEIVE_UNIT = (ROOT / "systemd" / "edgegw-receive@.service").read_text()
SCRIPTS = [
    path
    for path in sorted((ROOT / "packaging").rglob("*"))
    if path.is_file() and path.read_bytes().startswith(b"#!/bin/sh")
]


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of systemd's programs; skip, saying so, where it is not installed."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed here")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture(params=["edgegw.service", "edgegw-receive@.service"])
def unit(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A unit with a program that is there: verify wants to see it."""
    path = tmp_path / request.param
    text = {"edgegw.service": UNIT, "edgegw-receive@.service": RECEIVE_UNIT}[request.param]
    path.write_text(text.replace("/opt/venvs/edgegw/bin/edgegw", "/bin/sh"))
    return path


def test_the_unit_verifies_without_a_complaint(unit: Path) -> None:
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_is_sandboxed(unit: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", unit)
    assert done.returncode == 0, done.stdout.splitlines()[-1:]


@pytest.mark.parametrize(
    "line",
    ["Type=notify", "WatchdogSec=30s", "Restart=always", "StateDirectory=edgegw", "User=edgegw",
     "SupplementaryGroups=dialout", "DeviceAllow=char-ttyUSB rw", "DeviceAllow=char-ttyACM rw",
     "DeviceAllow=char-ttyS rw", "SystemCallFilter=adjtimex clock_adjtime"],
)  # fmt: skip
def test_the_unit_gives_the_gateway_what_it_needs(line: str) -> None:
    assert line in UNIT.splitlines()


def test_the_unit_hides_nothing_that_the_gateway_needs() -> None:
    assert not re.search("^(PrivateDevices|ProtectClock|PrivateNetwork|IPAddressDeny)=", UNIT, re.MULTILINE)


def test_the_user_and_the_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    users = run("systemd-sysusers", f"--root={tmp_path}", ROOT / "systemd" / "edgegw.sysusers.conf")
    assert users.returncode == 0, users.stderr
    assert "\nedgegw:" in "\n" + (tmp_path / "etc" / "passwd").read_text()
    assert re.search("^dialout:.*:edgegw$", (tmp_path / "etc" / "group").read_text(), re.MULTILINE)
    if os.geteuid() != 0:
        pytest.skip("only root can give folders to another user")
    folders = run(
        "systemd-tmpfiles", f"--root={tmp_path}", "--create", ROOT / "systemd" / "edgegw.tmpfiles.conf"
    )
    assert folders.returncode == 0, folders.stderr
    modes = {
        name: (tmp_path / name).stat().st_mode & 0o777
        for name in ("etc/edgegw", "etc/edgegw/credentials", "var/lib/edgegw")
    }
    assert modes == {"etc/edgegw": 0o755, "etc/edgegw/credentials": 0o700, "var/lib/edgegw": 0o750}


@pytest.mark.parametrize(
    "line",
    ["Restart=always", "RestartPreventExitStatus=2", "User=edgegw", "StateDirectory=edgegw-receive/%i",
     "EnvironmentFile=/etc/edgegw/receive-%i.env", "PrivateDevices=yes"],
)  # fmt: skip
def test_the_receivers_unit_gives_it_what_it_needs(line: str) -> None:
    assert line in RECEIVE_UNIT.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_sound_shell(script: Path) -> None:
    assert os.access(script, os.X_OK)
    done = subprocess.run(["sh", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_package_and_purge_agree_on_the_places() -> None:
    build = (ROOT / "packaging" / "build-deb").read_text()
    purge = (ROOT / "packaging" / "debian" / "postrm").read_text()
    (program,) = re.findall("^ExecStart=(.*) run$", UNIT, re.MULTILINE)
    assert f"home={program.removesuffix('/bin/edgegw')}\n" in build
    (receiver,) = re.findall(r"^ExecStart=(.*) receive \$OPTIONS$", RECEIVE_UNIT, re.MULTILINE)
    assert receiver == program
    assert "rm -rf /etc/edgegw /var/lib/edgegw /var/lib/edgegw-receive" in purge
    assert all(f"{name}" in build for name in ("edgegw.service", "edgegw-receive@.service"))
    assert len(SCRIPTS) >= 6
