"""The uplink against real brokers: TLS, passwords, versions, limits, the will, compression."""

import asyncio
import datetime
import ipaddress
import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from field import Field, field
from gateway_rig import Proxy, Subscriber, config, device, gateway, union, until
from rig import MOSQUITTO, Process, free_port, mosquitto, needs_mosquitto, wait_for_port


@pytest.fixture
async def meter():
    async with field() as made:
        yield made


async def stopped(process: Process) -> None:
    process.send(signal.SIGTERM)
    code, _ = await asyncio.to_thread(process.end)
    assert code == 0, process.lines


def certificates(folder: Path) -> None:
    """Write a CA and a server certificate for 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def made(name: str, key, issuer: str, issuer_key, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(made("ca", ca_key, "ca", ca_key, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(made("127.0.0.1", key, "ca", ca_key, False).public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


async def test_mqtts_drains_to_a_broker_whose_authority_is_named(tmp_path: Path, meter: Field) -> None:
    certificates(tmp_path)
    plain, secure = free_port(), free_port()
    tls = f"listener {secure} 127.0.0.1\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key"
    uplink = {"url": f"mqtts://127.0.0.1:{secure}", "ca_file": "ca.pem"}
    with mosquitto(tmp_path, plain, f"allow_anonymous true\n{tls}"), Subscriber(plain) as seen:
        with gateway(tmp_path, config(plain, {"m": device(meter.port, every="5ms")}, uplink=uplink)) as run:
            await until(lambda: len(seen.batches("data")) > 5, "batches through TLS")
            await stopped(run)
        assert union(seen.batches()).chain.intact


async def test_a_broker_of_an_unknown_authority_is_refused(tmp_path: Path, meter: Field) -> None:
    certificates(tmp_path)
    plain, secure = free_port(), free_port()
    tls = f"listener {secure} 127.0.0.1\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key"
    uplink = {"url": f"mqtts://127.0.0.1:{secure}"}
    with mosquitto(tmp_path, plain, f"allow_anonymous true\n{tls}"), Subscriber(plain) as seen:
        with gateway(tmp_path, config(plain, {"m": device(meter.port)}, uplink=uplink)) as run:
            await until(lambda: run.said("tls failed"), "the refusal to be said")
            await until(lambda: meter.counts[1] > 10, "scans all the same")
            await stopped(run)
        assert not seen.batches()


@needs_mosquitto
async def test_user_and_password_file(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    users = tmp_path / "users"
    passwd = Path(MOSQUITTO).parent.parent / "bin" / "mosquitto_passwd"
    with Process(str(passwd), "-b", "-c", str(users), "site", "s3cret") as made:
        assert made.end()[0] == 0
    (tmp_path / "password").write_text("wrong\n")
    uplink = {"username": "site", "password_file": "password"}
    configuration = config(port, {"m": device(meter.port)}, uplink=uplink)
    broker = mosquitto(tmp_path, port, f"allow_anonymous false\npassword_file {users}")
    with broker, gateway(tmp_path, configuration) as run:
        await until(lambda: run.said("not authorized"), "the refusal to be said")
        (tmp_path / "password").write_text("s3cret\n")
        await until(lambda: run.said("online"), "the new password to be used without a restart")
        assert not run.said("s3cret")
        await stopped(run)


async def test_status_is_retained_and_is_the_will(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    with mosquitto(tmp_path, port), Subscriber(port) as seen:

        def states() -> list[str]:
            return [json.loads(m.body)["state"] for m in seen.messages if m.topic.endswith("/status")]

        with gateway(tmp_path, config(port, {"m": device(meter.port)})) as run:
            await until(lambda: states() == ["online"], "online")
            run.send(signal.SIGKILL)
            await until(lambda: states() == ["online", "offline"], "the will")
        with gateway(tmp_path, config(port, {"m": device(meter.port)})) as run:
            await until(lambda: states()[2:] == ["online"], "online again")
            await stopped(run)
        await until(lambda: states()[3:] == ["offline"], "the goodbye")
        with Subscriber(port, "edgegw/site-7/status") as late:
            await until(lambda: late.messages, "the retained status")
            kept = json.loads(late.messages[0].body)
    assert kept["state"] == "offline"
    assert set(kept) == {"gateway", "state", "stream", "ts", "version"}


async def test_compressed_payloads_are_one_zstd_frame_of_the_same_json(tmp_path: Path, meter: Field) -> None:
    port = free_port()
    made = config(port, {"m": device(meter.port, every="10ms")}, uplink={"compression": "zstd"})
    with mosquitto(tmp_path, port), Subscriber(port) as seen:
        with gateway(tmp_path, made) as run:
            await until(lambda: len(seen.batches("data")) > 3, "batches")
            await stopped(run)
        plain = [m._replace(body=zstandard.decompress(m.body)) for m in seen.batches()]
    assert union(plain).chain.intact


async def test_a_broker_that_speaks_only_3_1_1(tmp_path: Path, meter: Field) -> None:
    """amqtt stays silent to a CONNECT of MQTT 5: the gateway falls back, and remembers at the next connection."""
    port, first_port, second_port = free_port(), free_port(), free_port()
    broker = (sys.executable, "-m", "edgegw.demo.broker")
    with ExitStack() as stack, gateway(tmp_path, config(port, {"m": device(meter.port)})) as run:
        with Process(*broker, str(first_port)) as first:
            async with Proxy(first_port, port=port):
                await until(lambda: run.said("online, MQTT 3.1.1"), "the fallback")
            first.send(signal.SIGKILL)  # behind a way that nobody listens on any more
            await until(lambda: run.said("connection lost; records stay in the journal"), "the loss")
        run.lines.clear()
        with Process(*broker, str(second_port)):
            await asyncio.to_thread(wait_for_port, second_port)
            seen = stack.enter_context(Subscriber(second_port, protocol=4))
            async with Proxy(
                second_port, port=port
            ):  # now that it answers: a broker that starts is another matter
                await until(lambda: run.said("online"), "the second broker")
                await until(lambda: len(seen.batches("data")) > 3, "batches")
                assert not run.said("trying 3.1.1")
                await stopped(run)


async def test_a_small_receive_maximum_is_kept_to(tmp_path: Path, meter: Field) -> None:
    """mosquitto tells how many unacknowledged messages it takes; a backlog must not send more at once."""
    port = free_port()
    made = config(port, {"m": device(meter.port, every="5ms")}, uplink={"max_message": "1KiB"})
    with gateway(tmp_path, made) as run:
        await until(lambda: meter.counts[1] > 500, "a backlog")
        broker = mosquitto(tmp_path, port, "allow_anonymous true\nmax_inflight_messages 2")
        with broker, Subscriber(port) as seen:
            await until(lambda: seen.batches() and union(seen.batches()).covered.prefix() > 500, "the drain")
            assert not run.said("records stay in the journal")
            await stopped(run)
