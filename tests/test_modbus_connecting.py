"""Why there is no connection, in the words of the log: real ports and terminals where one can have them."""

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import free_port
from test_modbus_driver import config, drivers, scanned

from edgegw.drivers.modbus.connecting import network_failure, serial_failure
from edgegw.errors import NotConnected


async def failure(url: str) -> NotConnected:
    """Return why a device at this url is not there."""
    async with asyncio.timeout(20), drivers(config(url, timeout="2s")) as (driver,):
        with pytest.raises(NotConnected) as caught:
            await scanned(driver)
    return caught.value


@pytest.fixture
def terminal() -> Iterator[str]:
    """The path of a terminal that can be opened as a serial port."""
    far, near = os.openpty()
    yield os.ttyname(near)
    os.close(far)
    os.close(near)


async def test_a_serial_port_that_is_not_there_is_said(tmp_path: Path) -> None:
    error = await failure(f"serial://{tmp_path}/ttyUSB0")
    assert error.reason == "no-such-device"
    assert str(error).endswith(
        "/ttyUSB0: no such device; expected a serial port; is the adapter plugged in?"
    ), error


async def test_a_file_that_is_no_serial_port_is_said(tmp_path: Path) -> None:
    (tmp_path / "ttyUSB0").write_text("")
    error = await failure(f"serial://{tmp_path}/ttyUSB0")
    assert error.reason == "no-serial-port"
    assert "/ttyUSB0: found something else than a serial port" in str(error)


async def test_a_serial_port_that_another_program_has_is_said(terminal: str) -> None:
    other = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    fcntl.flock(other, fcntl.LOCK_EX)
    error = await failure(f"serial://{terminal}")
    os.close(other)
    assert error.reason == "busy"
    assert f"{terminal}: in use by another program" in str(error)


@pytest.mark.parametrize(
    ("number", "reason", "said"),
    [
        (errno.EACCES, "not-permitted", "is this user in its group, as a rule dialout?"),
        (errno.EPERM, "not-permitted", "permission denied"),
        (errno.EBUSY, "busy", "in use by another program"),
        (errno.ENXIO, "no-such-device", "is the adapter plugged in?"),
        (errno.EMFILE, "unreachable", "too many open files"),
    ],
)
def test_what_keeps_a_serial_port_closed_is_said(number: int, reason: str, said: str) -> None:
    error = serial_failure("/dev/ttyUSB0", OSError(number, os.strerror(number)), 1.0)
    assert error.reason == reason
    assert str(error).startswith("/dev/ttyUSB0: ")
    assert said in str(error)


@pytest.mark.parametrize("scheme", ["tcp", "rtu+tcp"])
async def test_a_port_where_nobody_listens_is_said(scheme: str) -> None:
    error = await failure(f"{scheme}://127.0.0.1:{free_port()}")
    assert error.reason == "refused"
    assert str(error).endswith("connection refused; is it switched on, and is the port right?")


def test_a_name_that_is_unknown_is_said() -> None:
    error = network_failure(socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1.0)
    assert error.reason == "unreachable"
    assert str(error) == "name or service not known; is it spelt right?"
