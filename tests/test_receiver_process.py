"""`edgegw receive` as its users run it: real brokers, real files, killed and started again."""

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from amqtt.broker import Broker
from chains import STREAM, Chain
from paho.mqtt import client as mqtt
from rig import MOSQUITTO, Process, free_port, mosquitto, publish, receive, run, until

from edgegw.domain.batch import digest

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="no mosquitto is installed here")
DATA, EVENT, BACKFILL = (f"edgegw/site-7/{level}" for level in ("data", "event", "backfill"))
ANOTHER = STREAM.replace("0b0e", "0b0f")
ONCE = ("--once", "--idle", "700ms", "--json")


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A broker's port."""
    number = free_port()
    with mosquitto(tmp_path, number):
        yield number


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The file that the receiver writes."""
    return tmp_path / "kept.db"


def rows(file: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def verdict(port: int, file: Path, *messages: tuple[str, bytes]) -> tuple[int, dict[str, Any]]:
    """Publish to a receiver that ends of its own; return its exit code and its report."""
    with receive(port, f"sqlite:///{file}", *ONCE) as process:
        process.wait_said("ready")
        publish(port, messages)
        code, out = process.end()
    return code, json.loads(out)


def test_p2_any_order_any_topic_any_number_of_times_is_each_record_once(port: int, kept: Path) -> None:
    chain = Chain()
    bodies = [chain.data(5) if n % 10 else chain.event({"event": "link"}) for n in range(60)]
    messages = [
        (random.Random(n).choice([DATA, BACKFILL]), zstandard.compress(body) if n % 3 else body)
        for n, body in enumerate(bodies * 2)
    ]
    random.Random(1).shuffle(messages)
    code, report = verdict(port, kept, *messages)
    (stream,) = report["streams"]
    assert (code, report["ok"], stream["missing"], stream["chain"]["verified"]) == (0, True, [], True)
    assert (stream["batches"], stream["duplicates"], stream["head"]) == (60, 60, chain.following - 1)
    stored = rows(kept, "SELECT body FROM batches ORDER BY seq")
    assert [body.encode() for (body,) in stored] == bodies
    assert rows(kept, "SELECT count(*), count(DISTINCT seq || tag) FROM readings") == [(54 * 15, 54 * 15)]
    assert rows(kept, "SELECT count(*) FROM events") == [(6,)]


def test_p2_killed_in_the_middle_and_started_again_it_has_each_record_once(port: int, kept: Path) -> None:
    chain = Chain()
    bodies = [chain.data(20, tags=10) for _ in range(1500)]
    sender = threading.Thread(target=publish, args=(port, [(DATA, body) for body in bodies]))
    options = (f"sqlite:///{kept}", *ONCE)
    with receive(port, *options) as process:
        process.wait_said("ready")
        sender.start()
        for enough in (1, 300):
            until(lambda n=enough: kept_batches(kept) >= n, "batches kept")
            process.send(signal.SIGKILL)
            process.end()
            assert kept_batches(kept) < len(bodies)
            process.__exit__()
            process = receive(port, *options)
        sender.join()
        code, out = process.end()
        process.__exit__()
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert [body.encode() for (body,) in rows(kept, "SELECT body FROM batches ORDER BY seq")] == bodies
    assert rows(kept, "SELECT count(*) FROM readings") == [(1500 * 200,)]


def kept_batches(file: Path) -> int:
    try:
        return int(rows(file, "SELECT count(*) FROM batches")[0][0])
    except sqlite3.OperationalError:
        return 0


def test_a_conflict_fails_and_the_first_stays(port: int, kept: Path) -> None:
    body = Chain().data(2)
    other = body.replace(b"1.5", b"1.6")
    with receive(port, f"sqlite:///{kept}", *ONCE) as process:
        process.wait_said("ready")
        publish(port, [(DATA, body), (BACKFILL, other), (BACKFILL, other)])
        code, out = process.end()
    assert code == 1
    assert json.loads(out)["streams"][0]["conflicts"] == 1
    assert process.said("CONFLICT site-7")
    assert rows(kept, "SELECT body FROM batches") == [(body.decode(),)]
    assert rows(kept, "SELECT body FROM conflicts") == [(other.decode(),)]
    assert run("--to", f"sqlite:///{kept}", "--report")[0] == 1


def test_what_is_missing_is_named_until_it_comes(port: int, kept: Path) -> None:
    chain = Chain()
    bodies = [chain.data(3) for _ in range(4)]
    code, report = verdict(port, kept, *((DATA, body) for body in (bodies[0], bodies[3])))
    assert (code, report["streams"][0]["missing"]) == (1, [[4, 9]])
    code, report = verdict(port, kept, *((BACKFILL, body) for body in bodies))
    assert (code, report["streams"][0]["missing"], report["streams"][0]["duplicates"]) == (0, [], 2)


def test_a_gap_event_names_what_is_gone_and_the_chain_goes_on(port: int, kept: Path) -> None:
    chain = Chain()
    first, lost = chain.data(3), chain.data(4)
    messages = [(DATA, first), (EVENT, chain.gap(4, 7, digest(lost))), (DATA, chain.data(2))]
    code, report = verdict(port, kept, *messages)
    (stream,) = report["streams"]
    assert (code, stream["missing"], stream["chain"]["verified"]) == (0, [], True)
    assert stream["gaps"] == [{"from": 4, "to": 7, "reason": "full"}]
    code, text, _ = run("--to", f"sqlite:///{kept}", "--report")
    assert code == 0
    assert "4-7 (full)" in text


def test_p1_a_broken_chain_fails_where_it_breaks(port: int, kept: Path) -> None:
    chain = Chain()
    first = chain.data(3)
    chain.prev = digest(b"something else")
    code, report = verdict(port, kept, (DATA, first), (DATA, chain.data(2)), (DATA, chain.data(2)))
    assert code == 1
    assert report["streams"][0]["chain"] == {"verified": False, "broken_at": [4]}


def test_what_is_no_batch_stops_nothing(port: int, kept: Path) -> None:
    body = Chain().data(2)
    noise = [
        (DATA, b""),
        (DATA, b"xx"),
        (BACKFILL, b"\x28\xb5\x2f\xfdxx"),
        (EVENT, b"[" * 100_000),
        (DATA, body[:-9]),
    ]
    others = [(f"edgegw/site-7/{level}", b"xx") for level in ("status", "reply", "cmd", "ack", "new")]
    code, report = verdict(port, kept, *noise, *others, (DATA, body))
    assert (code, report["malformed"], report["streams"][0]["batches"]) == (0, 5, 1)


def test_streams_and_gateways_are_apart(port: int, kept: Path) -> None:
    chains = [Chain(), Chain(stream=ANOTHER), Chain(gateway="site-8")]
    messages = [(f"edgegw/{chain.gateway}/data", chain.data(2)) for chain in chains]
    code, report = verdict(port, kept, *messages)
    assert code == 0
    assert [(stream["gateway"], stream["stream"]) for stream in report["streams"]] == [
        ("site-7", STREAM), ("site-7", ANOTHER), ("site-8", STREAM),
    ]  # fmt: skip


def test_a_broker_keeps_for_a_receiver_that_is_away(port: int, kept: Path) -> None:
    chain = Chain()
    code, _ = verdict(port, kept, (DATA, chain.data(2)))
    assert code == 0
    publish(port, [(DATA, chain.data(2)) for _ in range(50)])
    code, report = verdict(port, kept)
    assert (code, report["streams"][0]["head"]) == (0, 102)


def transitions(process: Process) -> list[str]:
    """Return what was logged about the broker, in order: `no` (not yet), `lost`, `back`."""
    kinds = {"no broker yet": "no", "broker lost": "lost", "broker back": "back"}
    return [kind for line in process.lines for text, kind in kinds.items() if line.startswith(text)]


def test_a_lost_broker_is_said_once_and_when_it_is_back(tmp_path: Path, kept: Path) -> None:
    """On a busy machine a handshake may take too long, and be one more loss: only the order is promised."""
    port, chain = free_port(), Chain()
    with receive(port, f"sqlite:///{kept}", "--json") as process:
        until(lambda: transitions(process) == ["no"], "no broker")
        with mosquitto(tmp_path, port):
            process.wait_said("ready")
            publish(port, [(DATA, chain.data(2))])
            until(lambda: kept_batches(kept) == 1, "the first batch")
            before = len(transitions(process))
        until(lambda: transitions(process)[before:] == ["lost"], "the loss")
        with mosquitto(tmp_path, port):
            until(lambda: transitions(process)[-1] == "back", "the broker is back")
            publish(port, [(DATA, chain.data(2))])
            until(lambda: kept_batches(kept) == 2, "the second batch")
            process.send(signal.SIGTERM)
            code, out = process.end()
    assert (code, json.loads(out)["ok"]) == (0, True)
    said = transitions(process)
    assert said == ["no", "back", *["lost", "back"] * (len(said) // 2 - 1)]
    assert sum(line == "ready" for line in process.lines) == 1


def test_it_stops_at_once_while_there_is_no_broker(kept: Path) -> None:
    with receive(free_port(), f"sqlite:///{kept}") as process:
        process.wait_said("no broker yet")
        process.send(signal.SIGINT)
        assert process.end() == (0, "")


def test_ndjson_comes_out_as_it_comes_in(port: int) -> None:
    chain = Chain()
    with receive(port, "-", *ONCE) as process:
        process.wait_said("ready")
        body = chain.data(2, tags=1)
        publish(port, [(DATA, body), (BACKFILL, body), (EVENT, chain.event({"event": "start"}))])
        code, out = process.end()
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(line["seq"], line.get("event")) for line in lines] == [(1, None), (2, None), (3, "start")]
    assert process.said('"ok": true')


async def test_a_broker_that_speaks_only_3_1_1_will_do(kept: Path) -> None:
    port, chain = free_port(), Chain()
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()

    def use() -> tuple[int, str]:
        with receive(port, f"sqlite:///{kept}", *ONCE) as process:
            process.wait_said("ready")
            assert process.said("MQTT 3.1.1")
            publish(port, [(DATA, chain.data(5)) for _ in range(30)], mqtt.MQTTv311)
            return process.end()

    code, out = await asyncio.to_thread(use)
    await broker.shutdown()
    assert code == 0
    assert json.loads(out)["streams"][0]["head"] == 150


def test_a_password_is_read_from_its_file_and_never_shown(tmp_path: Path, kept: Path) -> None:
    port = free_port()
    users, secret = tmp_path / "users", tmp_path / "secret"
    subprocess.run(["mosquitto_passwd", "-c", "-b", users, "scada", "correct horse"], check=True)
    options = ("--username", "scada", "--password-file", str(secret), *ONCE)
    with mosquitto(tmp_path, port, f"allow_anonymous false\npassword_file {users}"):
        secret.write_text("wrong horse\n")
        with receive(port, f"sqlite:///{kept}", *options) as process:
            process.wait_said("connection refused: Not authorized")
        assert not process.said("horse")
        secret.write_text("correct horse\n")
        with receive(port, f"sqlite:///{kept}", *options) as process:
            assert process.end()[0] == 0
        assert process.said("ready")


def test_a_password_may_be_a_credential_of_systemd(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, users = free_port(), tmp_path / "users"
    subprocess.run(["mosquitto_passwd", "-c", "-b", users, "scada", "correct horse"], check=True)
    (tmp_path / "edgegw_mqtt").write_text("correct horse\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    options = ("--username", "scada", "--password-file", "%d/edgegw_mqtt", *ONCE)
    with (
        mosquitto(tmp_path, port, f"allow_anonymous false\npassword_file {users}"),
        receive(port, f"sqlite:///{kept}", *options) as process,
    ):
        assert process.end()[0] == 0
    assert process.said("ready")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate that signs itself, for localhost; return it and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_a_broker_that_asks_for_a_certificate_gets_ours(tmp_path: Path, kept: Path) -> None:
    port = free_port()
    (cert, key), (mine, my_key), (foreign, foreign_key) = (
        certificate(tmp_path, name) for name in ("broker", "mine", "foreign")
    )
    extra = f"allow_anonymous true\ncertfile {cert}\nkeyfile {key}\ncafile {mine}\nrequire_certificate true"
    command = ("--url", f"mqtts://localhost:{port}", "--to", f"sqlite:///{kept}", "--ca-file", str(cert))
    with mosquitto(tmp_path, port, extra):
        code, _, said = run(*command, *ONCE, "--cert-file", str(mine), "--key-file", str(my_key))
        assert (code, "ready" in said.splitlines()) == (0, True)
        for wrong in ((), ("--cert-file", str(foreign), "--key-file", str(foreign_key))):
            with Process(sys.executable, "-m", "edgegw", "receive", *command, *wrong) as process:
                process.wait_said("no broker yet")
                assert not process.said("ready")


def test_tls_trusts_the_given_authority_and_no_other(tmp_path: Path, kept: Path) -> None:
    port = free_port()
    cert, key = certificate(tmp_path, "broker")
    extra = f"allow_anonymous true\ncertfile {cert}\nkeyfile {key}"
    to = f"sqlite:///{kept}"
    with mosquitto(tmp_path, port, extra):
        code, _, said = run(
            "--url", f"mqtts://localhost:{port}", "--to", to, *ONCE, "--ca-file", str(cert)
        )  # fmt: skip
        assert code == 0
        assert "ready" in said.splitlines()
        command = ("edgegw", "receive", "--url", f"mqtts://localhost:{port}", "--to", to)
        with Process(sys.executable, "-m", *command) as process:
            process.wait_said("certificate verify failed")


USAGE: dict[str, tuple[str, ...]] = {
    "--import": ("--to", "-", "--import", "bundle"),
    "--url is needed": ("--to", "-"),
    "expected mqtt://HOST:PORT": ("--to", "-", "--url", "http://x"),
    "expected mqtt://HOST:PORT or": ("--to", "-", "--url", "mqtt://x:port"),
    "use --username": ("--to", "-", "--url", "mqtt://u:secret@x"),
    "expected sqlite:///FILE": ("--to", "file.db", "--url", "mqtt://x"),
    "~/.pgpass": ("--to", "postgresql://u:secret@x/y", "--url", "mqtt://x"),
    "a number and a unit": ("--to", "-", "--url", "mqtt://x", "--idle", "5"),
    "needs --username": ("--to", "-", "--url", "mqtt://x", "--password-file", __file__),
    "/nowhere": ("--to", "-", "--url", "mqtt://x", "--username", "x", "--password-file", "/nowhere"),
    "are for mqtts://": ("--to", "-", "--url", "mqtt://x", "--ca-file", __file__),
    "come together": ("--to", "-", "--url", "mqtts://x", "--cert-file", __file__),
    "does not exist": ("--to", "-", "--url", "mqtts://x", "--ca-file", "/nowhere"),
    "with {gateway} once": ("--to", "-", "--url", "mqtt://x", "--topic-template", "edgegw/x"),
    "expected GATEWAY=TOPIC": ("--to", "-", "--url", "mqtt://x", "--rebind", "site-7"),
    "expected 1KiB to 16MiB": ("--to", "-", "--url", "mqtt://x", "--max-message", "17MiB"),
    "holds nothing": ("--to", "sqlite:////nowhere/x.db", "--report"),
}


@pytest.mark.parametrize(("said", "arguments"), USAGE.items(), ids=USAGE.keys())
def test_wrong_usage_is_exit_code_2(said: str, arguments: tuple[str, ...]) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert said in errors
    assert "secret" not in errors


def test_a_file_that_cannot_be_written_ends_it_and_nothing_is_confirmed(port: int, tmp_path: Path) -> None:
    code, _, errors = run("--url", f"mqtt://127.0.0.1:{port}", "--to", f"sqlite:///{tmp_path}/no/kept.db")
    assert code == 1
    assert "no/kept.db" in errors
