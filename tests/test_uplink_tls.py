"""Each way in which TLS to a broker fails says its cause, in the log and in `check --connect`."""

import asyncio
import datetime
import json
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from control_field import stop
from gateway_rig import config, device, gateway, toml, until
from rig import Process, free_port, mosquitto, needs_mosquitto
from tls_rig import DAY, Authority

from edgegw.errors import UplinkError
from edgegw.uplink.login import Login
from edgegw.uplink.negotiation import connect

TODAY = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


class Field(NamedTuple):
    """A broker with a port for each kind of certificate, and the files of its clients."""

    folder: Path
    ports: dict[str, int]

    def login(self, **files: str) -> Login:
        """Return how to present oneself, with these files."""
        return Login("edgegw-site-7", **{key: str(self.folder / name) for key, name in files.items()})


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    folder = tmp_path_factory.mktemp("tls")
    ours = Authority(folder, "ca")
    Authority(folder, "stranger")
    ours.issue("client")
    ours.issue("other")
    ours.issue("locked", password=b"secret")
    Authority(folder, "foreign").issue("impostor")
    (folder / "text.pem").write_text("no certificate\n")
    ours.issue("good")
    ours.issue("elsewhere", "192.0.2.1")
    ours.issue("expired", begins=-9 * DAY, ends=-1 * DAY)
    ours.issue("future", begins=2 * DAY)
    ports = {name: free_port() for name in ("plain", "good", "elsewhere", "expired", "future", "demanding")}
    lines = ["allow_anonymous true"]
    for name, port in ports.items():
        if name == "plain":
            continue
        files = "good" if name == "demanding" else name
        lines += [
            f"listener {port} 127.0.0.1",
            f"certfile {folder}/{files}.pem",
            f"keyfile {folder}/{files}.key",
        ]
        if name == "demanding":
            lines += [f"cafile {ours.file}", "require_certificate true"]
    with mosquitto(folder, ports["plain"], "\n".join(lines)):
        yield Field(folder, ports)


OURS = {"ca_file": "ca.pem"}
CLIENT = {"cert_file": "client.pem", "key_file": "client.key"}
FAILURES: list[tuple[str, str, str, dict[str, str], str]] = [
    ("no authority", "mqtts", "good", {}, "not from an authority that is trusted"),
    ("other authority", "mqtts", "good", {"ca_file": "stranger.pem"}, "expected one of uplink.ca_file"),
    ("other host", "mqtts", "elsewhere", OURS, "certificate is not for 127.0.0.1; expected one that names the host"),
    ("expired", "mqtts", "expired", OURS, f"has expired; this machine's clock says {TODAY}"),
    ("not yet valid", "mqtts", "future", OURS, f"not yet valid; this machine's clock says {TODAY}"),
    ("no client certificate", "mqtts", "demanding", OURS, "requires a client certificate"),
    (
        "client certificate of another authority", "mqtts", "demanding",
        OURS | {"cert_file": "impostor.pem", "key_file": "impostor.key"},
        "does not accept the client certificate of uplink.cert_file",
    ),
    (
        "key of another certificate", "mqtts", "demanding", OURS | CLIENT | {"key_file": "other.key"},
        "other.key: is not the key of uplink.cert_file",
    ),
    (
        "encrypted key", "mqtts", "demanding", OURS | {"cert_file": "locked.pem", "key_file": "locked.key"},
        "locked.key: is encrypted; expected a key without a passphrase",
    ),
    ("TLS to a plain port", "mqtts", "plain", OURS, "a plain port needs mqtt://"),
    ("plain to a TLS port", "mqtt", "good", {}, "use mqtts://"),
    ("no such authority file", "mqtts", "good", {"ca_file": "none.pem"}, "none.pem: no such file or directory"),
    ("no such certificate", "mqtts", "good", CLIENT | {"cert_file": "none.pem"}, "uplink.cert_file: "),
    ("no such key", "mqtts", "good", CLIENT | {"key_file": "none.key"}, "uplink.key_file: "),
    ("an authority file that is none", "mqtts", "good", {"ca_file": "text.pem"}, "holds no certificate"),
    ("a certificate that is none", "mqtts", "good", CLIENT | {"cert_file": "text.pem"}, "expected PEM"),
]  # fmt: skip


@needs_mosquitto
@pytest.mark.parametrize(
    ("scheme", "port", "files", "said"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES]
)
async def test_p10_a_failure_of_tls_says_its_cause(
    broker: Field, scheme: str, port: str, files: dict[str, str], said: str
) -> None:
    url = f"{scheme}://127.0.0.1:{broker.ports[port]}"
    with pytest.raises(UplinkError) as raised:
        (await connect(url, "auto", broker.login(**files))).drop()
    assert said in str(raised.value)
    assert str(raised.value).startswith("uplink"), "where"


async def test_a_server_of_tls_1_2_that_demands_a_client_certificate(tmp_path: Path) -> None:
    """It says so before the handshake is over; one of TLS 1.3, as above, says it afterwards."""
    authority = Authority(tmp_path, "ca")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.file)
    context.load_cert_chain(*authority.issue("good"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as server:

        def shake_hands() -> None:  # asyncio's server closes without the alert
            peer, _ = server.accept()
            with suppress(ssl.SSLError), peer:
                context.wrap_socket(peer, server_side=True)

        serving = asyncio.create_task(asyncio.to_thread(shake_hands))
        url = f"mqtts://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UplinkError, match=r"requires a client certificate \(handshake failure\)"):
            await connect(url, "auto", Login("edgegw-site-7", ca_file=str(authority.file)))
        await serving


async def test_a_port_that_greets_in_plain_text() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await hang_up(reader, writer)

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = f"mqtts://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(UplinkError, match="this port does not speak TLS; a plain port needs mqtt://"):
            await connect(url, "auto", Login("edgegw-site-7"))


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Wait for the other side to say something, and close."""
    await reader.read(1)
    writer.close()


@needs_mosquitto
async def test_a_client_certificate_opens_what_demands_one(broker: Field) -> None:
    url = f"mqtts://127.0.0.1:{broker.ports['demanding']}"
    connection = await connect(url, "auto", broker.login(**OURS, **CLIENT))
    assert connection.protocol == "5"
    connection.close()


def uplink(broker: Field, **files: str) -> dict[str, Any]:
    url = f"mqtts://127.0.0.1:{broker.ports['demanding']}"
    return {"url": url} | {key: str(broker.folder / name) for key, name in files.items()}


@needs_mosquitto
async def test_the_log_and_check_name_the_missing_client_certificate(broker: Field, tmp_path: Path) -> None:
    made = config(1, {"m": device(free_port())}, uplink=uplink(broker, **OURS))
    with gateway(tmp_path, made) as run:
        await until(lambda: run.said("set uplink.cert_file and uplink.key_file"), "the cause")
        await stop(run)
    (tmp_path / "config.toml").write_text(toml(made))
    check = (
        sys.executable,
        "-m",
        "edgegw",
        "check",
        "--connect",
        "--json",
        "-c",
        str(tmp_path / "config.toml"),
    )
    with Process(*check) as process:
        code, out = await asyncio.to_thread(process.end)
    assert code == 1
    assert "set uplink.cert_file" in json.loads(out)["tried"][f"uplink {made['uplink']['url']}"]


async def test_a_terminator_that_packs_all_into_one_record_leaves_nothing_unread(tmp_path: Path) -> None:
    """More than one turn's worth lies decrypted in OpenSSL's buffer, and makes no socket readable."""
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue("good")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    topic = b"edgegw/site-7/cmd"
    message = bytes((0x30, 3 + len(topic), 0, len(topic))) + topic + b"\0"
    count = 16_000 // len(message)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError, OSError):
            await reader.read(1024)
            writer.write(b"\x20\x03\x00\x00\x00")
            subscribe = await reader.read(1024)
            writer.write(b"\x90\x04" + subscribe[2:4] + b"\x00\x01" + message * count)
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        login = Login("edgegw-site-7", ca_file=str(authority.file))
        connection = await connect(f"mqtts://127.0.0.1:{port}", "5", login)
        got: list[object] = []
        await connection.subscribe(topic.decode(), got.append)
        await until(lambda: len(got) == count, "all of them")
        connection.drop()
