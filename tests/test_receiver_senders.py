"""Promise 10 at the receiver: a sender speaks for no gateway but the one whose topic it may write."""

import asyncio
import json
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import STREAM, Chain
from field import Field, field
from gateway_rig import Subscriber, config, device, gateway, until
from rig import free_port, mosquitto, needs_mosquitto, publish, receive, run
from test_receiver_sinks import Open, open_sink, postgres  # noqa: F401  the fixtures

from edgegw.domain.ranges import Ranges
from edgegw.receiver.intake import Intake
from edgegw.receiver.ndjson import NdjsonSink
from edgegw.receiver.receipts import Receipts
from edgegw.receiver.senders import Admission, Sender, Senders, check_rebind, check_template

ADMITTED, FIRST, MOVED, REFUSED = (
    Admission.ADMITTED, Admission.FIRST, Admission.MOVED, Admission.REFUSED,
)  # fmt: skip
DEFAULT, PLANT = "edgegw/{gateway}", "plant/{gateway}/x"

# -- the decision alone ------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Sender], str, str, Admission]] = [
    (DEFAULT, {}, "site-7", "edgegw/site-7", FIRST),
    (DEFAULT, {}, "site-7", "edgegw/evil", REFUSED),
    (DEFAULT, {}, "site-7", "edgegw/evil/site-7", REFUSED),
    (DEFAULT, {}, "site-7", "edgegw/site-7/evil", REFUSED),
    (DEFAULT, {}, "site-7", "plant/north", FIRST),
    (DEFAULT, {"site-7": Sender("plant/north", False, 0)}, "site-7", "plant/north", ADMITTED),
    (DEFAULT, {"site-7": Sender("plant/north", False, 0)}, "site-7", "plant/south", REFUSED),
    (DEFAULT, {"site-7": Sender("plant/north", False, 0)}, "site-7", "edgegw/site-7", MOVED),
    (DEFAULT, {"site-7": Sender("edgegw/site-7", False, 0)}, "site-7", "plant/north", REFUSED),
    (DEFAULT, {"home": Sender("edgegw/site-7", True, 0)}, "home", "edgegw/site-7", ADMITTED),
    (DEFAULT, {"home": Sender("edgegw/site-7", True, 0)}, "home", "edgegw/home", ADMITTED),
    (DEFAULT, {"home": Sender("edgegw/site-7", True, 0)}, "home", "edgegw/other", REFUSED),
    (DEFAULT, {}, "site.7", "edgegw/site.7", FIRST),
    (DEFAULT, {}, "site.7", "edgegw/site/7", FIRST),
    (DEFAULT, {"site.7": Sender("edgegw/site/7", False, 0)}, "site.7", "edgegw/site/7", ADMITTED),
    (DEFAULT, {"site.7": Sender("edgegw/site/7", False, 0)}, "site.7", "edgegw/site.7", MOVED),
    (DEFAULT, {"site.7": Sender("edgegw/site.7", False, 0)}, "site.7", "edgegw/site/7", REFUSED),
    (PLANT, {}, "site-7", "plant/site-7/x", FIRST),
    (PLANT, {}, "site-7", "plant/site-7", REFUSED),
    (PLANT, {}, "site-7", "plant/evil/x", REFUSED),
    (PLANT, {}, "site-7", "edgegw/site-7", FIRST),
    ("{gateway}", {}, "site-7", "site-7", FIRST),
    ("{gateway}", {}, "site-7", "edgegw/site-7", REFUSED),
    ("edgegw/gw-{gateway}", {}, "site-7", "edgegw/gw-site-7", FIRST),
    ("edgegw/gw-{gateway}", {}, "site-7", "edgegw/site-7", REFUSED),
]


@pytest.mark.parametrize(("template", "known", "gateway_id", "topic", "expected"), CASES)
def test_p10_who_is_believed_where(
    template: str, known: dict[str, Sender], gateway_id: str, topic: str, expected: Admission
) -> None:
    assert Senders(template, None, known.items()).admit(gateway_id, topic) is expected


def test_what_the_operator_says_stays_and_is_news_once() -> None:
    known = {"home": Sender("edgegw/home", False, 0)}
    senders = Senders(DEFAULT, {"home": "edgegw/site-7"}, known.items(), 5)
    assert senders.changed == {"home": Sender("edgegw/site-7", True, 5)}
    assert Senders(DEFAULT, {"home": "edgegw/site-7"}, senders.changed.items(), 9).changed == {}


@pytest.mark.parametrize(
    "template", ["", "edgegw/x", "{gateway}/{gateway}", "a/+/{gateway}", "a/{gateway}/#"]
)
def test_a_template_that_is_none_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="expected a topic"):
        check_template(template)


@pytest.mark.parametrize("text", ["", "site-7", "=x", "site-7=", "site-7=#", "site-7=/"])
def test_a_rebinding_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="GATEWAY=TOPIC"):
        check_rebind(text)


# -- with every kind of sink -------------------------------------------------------------------------------


def receipts(intake: Intake) -> dict[str, Ranges]:
    """Return what the receipts that are due confirm, by topic."""
    intake.commit()
    due = intake.receipts(at_once=True)
    return {topic: Ranges(tuple(pair) for pair in json.loads(body)["ranges"]) for topic, body in due}


def test_p10_a_binding_survives_a_restart_and_what_is_refused_is_kept_apart(open_sink: Open) -> None:  # noqa: F811
    chain, forged = Chain(), Chain()
    sink = open_sink()
    intake = Intake(sink)
    assert intake.take("plant/north/data", chain.data(2))
    assert not intake.take("plant/evil/data", forged.event({"event": "forged"}))
    intake.commit()
    if not isinstance(sink, NdjsonSink):
        intake.close()
        sink = open_sink()
        intake = Intake(sink)
        (rejected,) = intake.report().rejected
        assert (rejected.topic, "not believed" in rejected.reason) == ("plant/evil/data", True)
        ((_, payload),) = intake.rejected()
        assert payload.startswith(b'{"v":1')
    assert not intake.take("plant/evil/data", forged.data(2))
    assert intake.take("plant/north/data", chain.data(2))
    (stream,) = intake.report().streams
    assert (stream.head, stream.kept.conflicts, stream.ok) == (4, 0, True)
    intake.close()


def test_p10_a_receipt_confirms_what_came_on_that_topic_alone(open_sink: Open) -> None:  # noqa: F811
    """Somebody outside of the template's tree speaks first; the gateway's own topic wins, and owes nothing for it."""
    chain = Chain()
    first, second, third = chain.data(2), chain.data(2), chain.data(2)
    intake = Intake(open_sink(), receipts=Receipts())
    assert intake.take("plant/evil/data", first)
    assert receipts(intake) == {"plant/evil/ack": Ranges([(1, 2)])}
    assert intake.take("edgegw/site-7/data", second)
    assert receipts(intake) == {"edgegw/site-7/ack": Ranges([(3, 4)])}
    assert not intake.take("plant/evil/data", third)
    assert receipts(intake) == {}
    assert not intake.take("edgegw/site-7/data", first)
    assert receipts(intake) == {"edgegw/site-7/ack": Ranges([(1, 4)])}, (
        "the same bytes have come there as well"
    )
    intake.close()


def test_p2_a_renamed_gateways_backlog_is_set_apart_and_kept_as_soon_as_the_operator_says_so(
    open_sink: Open,  # noqa: F811
) -> None:
    """The id was changed: what was journaled before comes under the old one, on the new topic."""
    sink, chain = open_sink(), Chain(gateway="home")
    if isinstance(sink, NdjsonSink):
        return  # it has no memory
    before, backlog = chain.data(2), chain.data(3)
    chain.gateway = "site-7"
    after = chain.data(1)
    intake = Intake(sink, receipts=Receipts())
    assert intake.take("edgegw/home/data", before)
    assert receipts(intake)
    assert intake.take("edgegw/site-7/data", after)
    assert not intake.take("edgegw/site-7/backfill", backlog)
    assert receipts(intake) == {"edgegw/site-7/ack": Ranges([(6, 6)])}
    renamed = next(stream for stream in intake.report().streams if stream.key.gateway == "site-7")
    assert (renamed.missing, renamed.elsewhere) == ([(3, 5)], {"home": [(1, 2)]})
    intake.close()
    sink = open_sink()
    intake = Intake(sink, receipts=Receipts(), rebind={"home": "edgegw/site-7"})
    for topic, payload in intake.rejected():
        assert intake.take(topic, payload)
    assert receipts(intake) == {"edgegw/site-7/ack": Ranges([(3, 5)])}
    assert intake.report().ok
    intake.close()
    sink = open_sink()
    intake = Intake(sink)
    assert list(intake.rejected()) == []
    assert not intake.take("edgegw/site-7/backfill", backlog), "a duplicate: the binding is remembered"
    assert intake.report().rejected == []
    intake.close()


def test_p10_who_takes_up_a_stream_later_fills_none_of_its_holes(open_sink: Open) -> None:  # noqa: F811
    chain = Chain()
    first, lost, third = chain.data(2), chain.data(2), chain.data(2)
    intake = Intake(open_sink())
    for body in (first, third):
        assert intake.take("edgegw/site-7/data", body)
    assert intake.take("edgegw/evil/data", lost.replace(b'"site-7"', b'"evil"'))
    intake.commit()
    victim = next(stream for stream in intake.report().streams if stream.key.gateway == "site-7")
    assert victim.missing == [(3, 4)]
    intake.close()


# -- on the real parts -------------------------------------------------------------------------------------

ACL = """
user victim
topic write edgegw/site-7/#
topic read edgegw/site-7/cmd
topic read edgegw/site-7/ack
user evil
topic readwrite edgegw/evil/#
topic read edgegw/site-7/status
user receiver
topic read edgegw/#
topic write edgegw/+/ack
topic write edgegw/+/cmd
user watcher
topic read edgegw/#
"""


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    number = free_port()
    (tmp_path / "acl").write_text(ACL)
    with mosquitto(tmp_path, number, f"allow_anonymous true\nacl_file {tmp_path}/acl"):
        yield number


@pytest.fixture
async def meter() -> AsyncIterator[Field]:
    async with field() as made:
        yield made


def query(file: Path, sql: str, *parameters: object) -> list[Any]:
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()


def kept_head(file: Path) -> int:
    try:
        (row,) = query(file, "SELECT max(seq + count - 1) FROM batches WHERE gateway = 'site-7'")
    except sqlite3.OperationalError:
        return 0
    return row[0] or 0


def forgeries(stream: str, head: int) -> list[tuple[str, bytes]]:
    """Return what a neighbour sends in the gateway's name: records to come, and a summary for all of the stream."""
    chain = Chain(stream=stream)
    chain.following = head + 20
    bodies = [chain.records([{"ts": 1, "device": "meter1", "values": {"n": 666}}]) for _ in range(200)]
    summaries = [chain.summary(bodies[:1], 1, count, bytes(32)) for count in (2**62, 2**31 - 1)]
    own = Chain("evil", stream)
    own.following = head + 500
    return [("edgegw/evil/data", body) for body in (*bodies, own.data(2))] + [
        ("edgegw/evil/summary", body) for body in summaries
    ]


@needs_mosquitto
async def test_p10_a_neighbour_forges_records_and_summaries_and_nothing_of_the_gateway_changes(
    tmp_path: Path, port: int, meter: Field
) -> None:
    kept = tmp_path / "kept.db"
    made = config(
        port,
        {"meter1": device(meter.port)},
        uplink={"acknowledge": "receiver", "username": "victim"},
    )
    acks = Subscriber(port, "edgegw/+/ack", username="watcher")
    with (
        acks,
        receive(port, f"sqlite:///{kept}", "--username", "receiver") as receiver,
        gateway(tmp_path, made) as victim,
    ):
        await until(lambda: kept_head(kept) > 10, "the first records")
        ((stream,),) = query(kept, "SELECT DISTINCT stream FROM batches")
        forged = forgeries(stream, head := kept_head(kept))
        await asyncio.to_thread(publish, port, forged, username="evil")
        await until(lambda: receiver.said("found batches of gateway site-7 on edgegw/evil"), "the refusal")
        await until(lambda: kept_head(kept) > head + 300, "genuine records beyond the forged ones")
        victim.send(signal.SIGTERM)
        await asyncio.to_thread(victim.end)
        receiver.send(signal.SIGTERM)
        assert (await asyncio.to_thread(receiver.end))[0] == 0
    assert query(kept, "SELECT count(*) FROM readings WHERE gateway = 'site-7' AND value = 666") == [(0,)]
    assert query(kept, "SELECT count(*) FROM conflicts") == [(0,)]
    assert sum("found batches of gateway site-7" in line for line in receiver.lines) == 1
    confirmed = {
        topic: Ranges(
            tuple(pair)
            for message in acks.messages
            if message.topic == topic
            for pair in json.loads(message.body)["ranges"]
        )
        for topic in ("edgegw/site-7/ack", "edgegw/evil/ack")
    }
    genuine = Ranges(query(kept, "SELECT seq, seq + count - 1 FROM batches WHERE gateway = 'site-7'"))
    assert all(genuine.covers(first, last) for first, last in confirmed["edgegw/site-7/ack"])
    assert list(confirmed["edgegw/evil/ack"]) == [(head + 500, head + 501)], "its own records, no others"
    report = json.loads(run("--to", f"sqlite:///{kept}", "--report", "--json")[1])
    site = next(one for one in report["streams"] if one["gateway"] == "site-7")
    assert (site["ok"], site["missing"], site["conflicts"]) == (True, [], 0)
    assert sum(one["messages"] for one in report["rejected"]) == 202


@needs_mosquitto
def test_the_refusal_names_the_option_that_mends_it_and_the_next_start_has_it_all(
    tmp_path: Path, port: int
) -> None:
    kept, chain = tmp_path / "kept.db", Chain()
    messages = [("edgegw/evil/data", chain.data(2)) for _ in range(3)]
    once = ("--once", "--idle", "700ms", "--json", "--username", "receiver")
    with receive(port, f"sqlite:///{kept}", *once) as process:
        process.wait_said("ready")
        publish(port, messages, username="evil")
        process.wait_said("--rebind site-7=edgegw/evil")
        code, out = process.end()
    assert (code, json.loads(out)["streams"]) == (0, [])
    with receive(port, f"sqlite:///{kept}", *once, "--rebind", "site-7=edgegw/evil") as process:
        code, out = process.end()
    (stream,) = json.loads(out)["streams"]
    assert (code, stream["stream"], stream["head"], json.loads(out)["rejected"]) == (0, STREAM, 6, [])
