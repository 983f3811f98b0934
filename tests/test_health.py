"""Health as a pure verdict: which facts make which problem, since when, and how a broker's silence is counted."""

import datetime
from math import inf
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgegw.scan.bad_tags import BadTags
from edgegw.status.certificates import valid_for_s
from edgegw.status.health import DeviceFacts, Facts, History, Silence, judge

UP, DOWN, UNKNOWN = (DeviceFacts(answers, 4, 0, stale=False) for answers in (True, False, None))
DAY_S = 86_400.0

VERDICTS = {
    "all is well": (Facts({"a": UP}), []),
    "no device configured": (Facts(), []),
    "not yet read": (Facts({"a": UNKNOWN}), []),
    "one device down": (Facts({"a": UP, "b": DOWN}), [("device-down", "b", False)]),
    "all tags bad": (Facts({"a": UP._replace(bad_tags=4)}), [("tags-bad", "a", False)]),
    "some tags bad": (Facts({"a": UP._replace(bad_tags=3)}), []),
    "stale": (Facts({"a": UP._replace(stale=True)}), [("device-stale", "a", False)]),
    "down and stale": (Facts({"a": UP, "b": DOWN._replace(stale=True)}), [("device-down", "b", False)]),
    "link lost": (Facts(link_online=False), [("link-lost", "uplink", False)]),
    "clock": (Facts(clock_synced=False), [("clock-unsynced", "the system clock is not synchronised", False)]),
    "certificate": (
        Facts(certificates={"a.pem": 29 * DAY_S, "b.pem": 31 * DAY_S}),
        [("certificate-expires", "a.pem", False)],
    ),
    "certificate over": (Facts(certificates={"a.pem": -1.0}), [("certificate-expires", "a.pem", False)]),
    "journal nearly full": (
        Facts(journal_share=0.91),
        [("journal-full", "91% of the journal hold what is not confirmed", False)],
    ),
    "journal with room": (Facts(journal_share=0.9), []),
    "disk full": (Facts(disk_share=0.95), [("disk-full", "95% of the journal's disk are used", False)]),
    "journal error": (Facts(journal_error="it hangs"), [("journal-error", "it hangs", True)]),
    "broker silent": (
        Facts(unacknowledged_s=60.0),
        [("no-acknowledgement", "the broker has confirmed nothing for 60 s", True)],
    ),
    "broker silent for a while": (Facts(unacknowledged_s=59.9), []),
    "silent and lost": (Facts(unacknowledged_s=90.0, link_online=False), [("link-lost", "uplink", False)]),
    "control stopped": (
        Facts(control_idle_s=15.0),
        [("control-stopped", "control has completed no cycle for 15 s", True)],
    ),
    "control slow": (Facts(control_idle_s=14.9), []),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS.values(), ids=VERDICTS)
def test_each_fact_makes_its_problem(case: tuple[Facts, list[tuple[str, str, bool]]]) -> None:
    facts, expected = case
    assert [tuple(fault) for fault in judge(facts)] == expected


def test_what_makes_the_gateway_failing_comes_first() -> None:
    faults = judge(Facts({"a": DOWN, "b": DOWN}, link_online=False))
    assert [fault.code for fault in faults] == ["no-device", "device-down", "device-down", "link-lost"]


def test_a_problem_keeps_the_time_at_which_it_began_whatever_its_figures() -> None:
    history = History()
    assert history.update([], 1).state == "ok"
    first = history.update(judge(Facts({"a": UP, "b": DOWN}, disk_share=0.92)), 1000)
    assert first.state == "degraded"
    second = history.update(judge(Facts({"a": DOWN, "b": DOWN}, disk_share=0.95)), 2000)
    assert second.state == "failing"
    assert {(p.code, p.what): p.since for p in second.problems} == {
        ("no-device", "none of 2 devices answers"): 2000,
        ("device-down", "a"): 2000, ("device-down", "b"): 1000,
        ("disk-full", "95% of the journal's disk are used"): 1000,
    }  # fmt: skip
    assert history.update([], 3000).problems == []
    assert history.update(judge(Facts({"b": DOWN, "a": UP})), 4000).problems[0].since == 4000


def silent(*looks: tuple[float, bool, bool, int]) -> list[float]:
    """Return what is counted at each look: time, online, batches on the way, acknowledgements so far."""
    silence = Silence()
    return [
        silence.look(now_s, online=online, in_flight=in_flight, acknowledgements=count)
        for now_s, online, in_flight, count in looks
    ]


def test_a_brokers_silence_counts_from_the_first_batch_that_it_left_without_an_answer() -> None:
    assert silent((0, True, False, 0), (50, True, False, 0), (100, True, True, 0), (170, True, True, 0)) == [
        0, 0, 0, 70,
    ]  # fmt: skip
    assert silent((0, True, True, 0), (50, True, True, 1), (60, True, True, 1)) == [0, 0, 10]


def test_a_broker_that_is_silent_on_one_connection_after_the_other_is_silent() -> None:
    """The uplink gives up such a connection after half a minute; that is no sign of life of the broker."""
    looks = [(float(t), t % 31 != 30, t % 31 < 29, 0) for t in range(100)]
    assert silent(*looks)[-1] == 99.0


def test_after_a_real_outage_a_brokers_silence_counts_anew() -> None:
    looks = [(0.0, True, True, 0), *((float(t), False, False, 0) for t in range(1, 100))]
    assert silent(*looks, (100.0, True, True, 0), (101.0, True, True, 0))[-1] == 1.0


def certificate(days: float) -> bytes:
    """Return a certificate that ends in so many days."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edgegw")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - datetime.timedelta(days=400), now + datetime.timedelta(days=days)
    )  # fmt: skip
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_the_first_certificate_of_a_file_to_end_counts_and_files_without_one_do_not(tmp_path: Path) -> None:
    chain, text, none = tmp_path / "chain.pem", tmp_path / "text.pem", tmp_path / "none.pem"
    chain.write_bytes(certificate(300) + certificate(10))
    text.write_text("no certificate")
    now_s = datetime.datetime.now(datetime.UTC).timestamp()
    found = valid_for_s([chain, text, none], now_s)
    assert found == {str(chain): pytest.approx(10 * DAY_S, abs=60)}
    assert [fault.code for fault in judge(Facts(certificates=found))] == ["certificate-expires"]


# -- bad tags ---------------------------------------------------------------------------------------------------------


def test_bad_tags_are_logged_once_and_named_anew_only_after_calm() -> None:
    bad = BadTags(3)
    a, b = {"a": "bad:illegal-address"}, {"b": "bad:timeout"}
    assert bad.read({}, 0.0) is None
    assert (
        bad.read(a, 1.0) == "1 of 3 tags are bad: a (illegal-address); are their addresses and types right?"
    )
    assert bad.read(a, 2.0) is None
    assert bad.read(a | b, 3.0) is not None
    assert bad.tags == a | b
    for second in range(4, 60, 2):  # it flutters: nothing more to say
        assert bad.read({}, float(second)) is None
        assert bad.tags == {}
        assert bad.read(b, second + 1.0) is None
    assert bad.read({}, 118.0) is None
    assert bad.read({}, 120.0) == "all 3 tags have been good for 61 s"
    assert bad.read({}, inf) is None
    assert bad.read(b, 200.0) is not None


def test_an_uncertain_tag_is_not_bad() -> None:
    bad = BadTags(2)
    assert bad.read({"a": "uncertain:last-usable-value"}, 0.0) is None
    assert bad.tags == {}


def test_a_device_with_a_thousand_bad_tags_makes_one_line_of_bounded_length() -> None:
    line = BadTags(1000).read({f"tag_{n}": "bad:illegal-address" for n in range(1000)}, 0.0)
    assert line is not None
    assert "1000 of 1000 tags are bad" in line
    assert "and 992 more" in line
    assert len(line) < 500
