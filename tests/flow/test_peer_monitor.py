import threading

import pytest
from flow_kit import LIMIT_S, TIMEOUTS, HookedEngine, counted

from sglang_kvcodec.errors import PeerRejectedError, PeerTimeoutError, PeerUnavailableError
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.format.exchange import PeerStat
from sglang_kvcodec.format.namespace import FORMAT_VERSION
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.local_peer import LocalPeer


class Answers:
    """A transport of which only ``stat`` is asked: each probe takes the next answer, the last one for ever."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self._probed = threading.Condition()
        self.probes = 0

    def stat(self):
        with self._probed:
            self.probes += 1
            self._probed.notify_all()
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait_for_probes(self, number):
        with self._probed:
            assert self._probed.wait_for(lambda: self.probes >= number, LIMIT_S)


def stat_of(format_version=FORMAT_VERSION):
    return PeerStat(0, 0, 1 << 30, 0, "memory", format_version, "0")


@pytest.fixture
def watch(closing):
    def start(peer, retry_s=0.001):
        monitor = PeerMonitor(peer, retry_s)
        closing.callback(monitor.close)
        return monitor

    return start


def test_good_probes_tell_how_long_they_took(closing):
    answers = Answers(PeerUnavailableError("gone"), stat_of())
    told = []
    monitor = PeerMonitor(answers, 0.001, told.append)
    closing.callback(monitor.close)
    answers.wait_for_probes(4)
    monitor.close()
    assert 0 < len(told) <= answers.probes - 1
    assert all(seconds >= 0 for seconds in told)


def test_starts_open_and_comes_up_when_a_peer_appears(closing):
    engine = HookedEngine()
    first = LocalPeer(engine)
    first.stop()
    peer = GrpcPeer(first.remote, TIMEOUTS)
    closing.callback(peer.close)
    monitor = PeerMonitor(peer, TIMEOUTS.retry_s)
    closing.callback(monitor.close)
    assert not monitor.is_up
    assert counted("kvcodec_peer_up") == 0
    second = LocalPeer(engine, first.address)
    closing.callback(second.stop)
    assert monitor.wait_until_up(LIMIT_S)
    assert monitor.is_up
    assert counted("kvcodec_peer_up") == 1


def test_goes_down_at_a_failed_call_and_comes_back(watch):
    peer = Answers(stat_of(), PeerUnavailableError("no"), PeerUnavailableError("no"), stat_of())
    monitor = watch(peer)
    assert monitor.wait_until_up(LIMIT_S)
    monitor.failed("lookup", PeerTimeoutError("slow"))
    assert monitor.wait_until_up(LIMIT_S)
    assert peer.probes >= 4


def test_is_down_until_a_probe_has_succeeded(watch):
    gate = threading.Event()

    class Gated(Answers):
        def stat(self):
            answer = super().stat()
            if self.probes > 1:
                assert gate.wait(LIMIT_S)
            return answer

    peer = Gated(stat_of())
    monitor = watch(peer)
    assert monitor.wait_until_up(LIMIT_S)
    monitor.failed("put", PeerUnavailableError("gone"))
    assert not monitor.is_up
    assert counted("kvcodec_peer_up") == 0
    peer.wait_for_probes(2)
    assert not monitor.is_up
    assert not monitor.wait_until_up(0)
    gate.set()
    assert monitor.wait_until_up(LIMIT_S)


def test_a_refused_request_says_nothing_against_the_peer(watch):
    peer = Answers(stat_of())
    monitor = watch(peer, retry_s=1000)
    assert monitor.wait_until_up(LIMIT_S)
    monitor.failed("fetch", PeerRejectedError("no such thing"))
    assert monitor.is_up
    assert peer.probes == 1


def test_a_peer_of_another_format_version_never_comes_up_and_is_complained_of_once(watch, caplog):
    peer = Answers(stat_of(FORMAT_VERSION + 1))
    monitor = watch(peer)
    peer.wait_for_probes(5)
    assert not monitor.is_up
    assert not monitor.wait_until_up(0)
    complaints = [record.message for record in caplog.records if "format version" in record.message]
    assert len(complaints) == 1
    assert str(FORMAT_VERSION + 1) in complaints[0]


def test_a_peer_that_refuses_the_probe_is_down(watch):
    peer = Answers(PeerRejectedError("not for you"))
    monitor = watch(peer)
    peer.wait_for_probes(3)
    assert not monitor.is_up


def test_close_ends_the_wait_for_a_peer(watch):
    peer = Answers(PeerUnavailableError("no"))
    monitor = watch(peer, retry_s=1000)
    peer.wait_for_probes(1)
    came = []
    waiter = threading.Thread(target=lambda: came.append(monitor.wait_until_up(1000)))
    waiter.start()
    monitor.close()
    waiter.join(LIMIT_S)
    assert came == [False]


def test_a_closed_monitor_is_down(watch):
    monitor = watch(Answers(stat_of()))
    assert monitor.wait_until_up(LIMIT_S)
    monitor.close()
    assert not monitor.is_up
    assert not monitor.wait_until_up(1000)
