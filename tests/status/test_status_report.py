"""What the page is told: of the peer's metrics, its clients and prefixes, and never without bound."""

import json
import time

import pytest
from report_kit import facts_of

from sglang_kvcodec import __version__, peer_metrics
from sglang_kvcodec.status import StatusReport
from sglang_kvcodec.status.report import HISTORY_S, PERIOD_S


@pytest.fixture(autouse=True)
def _gauges_are_left_as_they_were():
    gauges = (
        peer_metrics.PEER_READY,
        peer_metrics.PEER_CERTIFICATE_EXPIRY_SECONDS,
        peer_metrics.STORE_OBJECTS,
        peer_metrics.STORE_CAPACITY_BYTES,
    )
    before = [gauge._value.get() for gauge in gauges]
    yield
    for gauge, value in zip(gauges, before, strict=True):
        gauge.set(value)


def test_it_is_json_from_the_start():
    report = StatusReport(facts_of(store="lmdb:/there"))
    told = json.loads(json.dumps(report.to_dict()))
    assert told["peer"]["store"] == "lmdb:/there"
    assert told["peer"]["version"] == __version__
    assert told["traffic"]["sent_bytes_per_s"] == []
    assert told["prefixes"] == []
    assert told["clients"] == {"count": 0, "shown": []}


def test_the_state_is_what_the_peer_says_of_itself():
    draining = [False]
    report = StatusReport(facts_of(is_draining=lambda: draining[0]))
    peer_metrics.PEER_READY.set(0)
    assert report.to_dict()["peer"]["state"] == "not ready"
    peer_metrics.PEER_READY.set(1)
    assert report.to_dict()["peer"]["state"] == "ready"
    draining[0] = True
    assert report.to_dict()["peer"]["state"] == "draining"


def test_a_certificate_has_time_left_or_there_is_none():
    report = StatusReport(facts_of())
    peer_metrics.PEER_CERTIFICATE_EXPIRY_SECONDS.set(0)
    assert report.to_dict()["peer"]["certificate_left_s"] is None
    peer_metrics.PEER_CERTIFICATE_EXPIRY_SECONDS.set(time.time() + 86400)
    assert report.to_dict()["peer"]["certificate_left_s"] == pytest.approx(86400, abs=600)


def test_counts_of_the_store():
    peer_metrics.STORE_OBJECTS.set(17)
    peer_metrics.STORE_CAPACITY_BYTES.set(1e9)
    told = StatusReport(facts_of()).to_dict()["store"]
    assert (told["objects"], told["capacity_bytes"]) == (17, 1e9)


def test_pages_recently_and_since_the_start():
    report = StatusReport(facts_of())
    asked = peer_metrics.PEER_ASKED_PAGES
    asked.labels("Lookup", "stored").inc(1000)
    before = report.to_dict()["pages"]["Lookup"]["all"]
    report.sample(0.0)
    asked.labels("Lookup", "stored").inc(3)
    asked.labels("Lookup", "missing").inc(2)
    report.sample(2.0)
    told = report.to_dict()["pages"]["Lookup"]
    assert told["recent"] == {"stored": 3, "missing": 2}
    assert told["all"] == {"stored": before["stored"] + 3, "missing": before["missing"] + 2}
    assert report.to_dict()["recent_s"] == 2


def test_throughput_by_the_second():
    report = StatusReport(facts_of())
    report.sample(0.0)
    peer_metrics.PEER_SENT_BYTES.inc(4000)
    report.sample(2.0)
    peer_metrics.PEER_RECEIVED_BYTES.inc(300)
    report.sample(4.0)
    told = report.to_dict()["traffic"]
    assert told["sent_bytes_per_s"] == [2000, 0]
    assert told["received_bytes_per_s"] == [0, 150]


def test_the_history_ends():
    report = StatusReport(facts_of())
    for number in range(1000):
        report.sample(number * PERIOD_S)
    told = report.to_dict()
    assert told["recent_s"] == HISTORY_S
    assert len(told["traffic"]["sent_bytes_per_s"]) == HISTORY_S / PERIOD_S


def test_errors_by_reason_the_latest_first():
    report = StatusReport(facts_of())
    peer_metrics.STORE_DAMAGED.labels("an old one").inc(5)
    report.sample(0.0)
    peer_metrics.PEER_REFUSED.labels("a new one").inc(2)
    peer_metrics.PEER_RPCS.labels("Lookup", "OK").inc()
    peer_metrics.PEER_RPCS.labels("Lookup", "CANCELLED").inc()
    peer_metrics.PEER_PUTS.labels("stored").inc()
    peer_metrics.PEER_TOKEN_RELOADS.labels("ok").inc()
    report.sample(2.0)
    errors = report.to_dict()["errors"]
    assert errors[0] == {"what": "refused", "reason": "a new one", "recent": 2, "all": 2}
    assert {"what": "damaged object", "reason": "an old one", "recent": 0, "all": 5} in errors
    assert not {"OK", "CANCELLED", "stored", "ok"} & {error["reason"] for error in errors}
    for metric, reason in ((peer_metrics.STORE_DAMAGED, "an old one"), (peer_metrics.PEER_REFUSED, "a new one")):
        metric.remove(reason)


def test_few_of_many_clients_and_prefixes():
    facts = facts_of()
    for number in range(300):
        with facts.clients.call(f"client {number}"):
            pass
        facts.prefixes.note(number.to_bytes(64, "big"), number + 1)
    with facts.clients.call("busy"):
        for number in range(300):
            with facts.clients.call(f"client {number}"):
                pass
        told = StatusReport(facts).to_dict()
    assert told["clients"]["count"] == 301
    assert [client["name"] for client in told["clients"]["shown"][:2]] == ["busy", "client 299"]
    assert len(told["clients"]["shown"]) == 20
    assert [prefix["pages"] for prefix in told["prefixes"]] == list(range(300, 290, -1))
    assert told["prefixes"][0]["page"] == (299).to_bytes(32, "big").hex()
    assert told["prefixes"][0]["namespace"] == bytes(32).hex()
