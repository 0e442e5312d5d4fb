"""A short, always equal run of what scripts/fuzz does to a real ``kvcodec serve`` for long."""

import itertools

import grpc
import pytest
from fuzzing.calls import DELETES, METHODS, Call, Known, calls
from fuzzing.mutations import mutants
from fuzzing.peer import FRAMES, FuzzedPeer
from fuzzing.target import FindingError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.rpc.admission import SCOPE_OF_METHOD


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    with FuzzedPeer(tmp_path_factory.mktemp("peer")) as fuzzed:
        yield fuzzed
        fuzzed.check()


def test_no_rpc_is_left_out():
    assert {method.name for method in METHODS} == set(SCOPE_OF_METHOD)


def test_calls_of_every_rpc(peer):
    """The peer lives, answers in typed words and keeps what it has, whatever is sent."""

    @settings(max_examples=1500, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(peer.known, peer.tokens))
    def make(call):
        peer.make(call)

    make()
    peer.check()
    answered = {method for method, status in peer.statuses if status == "OK"}
    refused = {method for method, status in peer.statuses if status == "INVALID_ARGUMENT"}
    assert answered >= {method.name for method in METHODS}
    assert refused >= {method.name for method in METHODS}


def test_connections_that_begin_as_no_client_does(peer):
    for frame in itertools.islice(mutants(FRAMES, 1), 40):
        peer.send(frame)
    peer.check()


def test_what_is_lost_is_found(peer, tmp_path):
    """The check would see it."""
    with FuzzedPeer(tmp_path) as other:
        data = other.known.kept[0]
        key = PageObject(data).header.key
        other._client.delete(key.namespace_digest, [key.page_hash])
        with pytest.raises(FindingError, match="is missing"):
            other.check()


def test_a_status_that_no_client_should_see_is_found(peer, monkeypatch):
    call = Call("/sglang_kvcodec.rpc.Peer/Stat", (b"",), "token-of-all", None)
    monkeypatch.setattr(peer, "_status_of", lambda call: (grpc.StatusCode.UNKNOWN, "an exception"))
    with pytest.raises(FindingError, match="UNKNOWN"):
        peer.make(call)


@settings(max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_deletes_is_never_told_what_must_stay(data):
    known = Known.golden()
    call = data.draw(calls(known, ("",), [method for method in METHODS if method.name in DELETES]))
    kept = [PageObject(each).header.key.page_hash for each in known.kept]
    assert not any(page_hash in sent for page_hash in kept for sent in call.sent)
