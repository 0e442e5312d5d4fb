"""A real peer whose engine on another machine goes and comes back: what its clients see, and what goes on by itself."""

import contextlib
import signal
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peer_kit import HASHES, NAMESPACE, PAGES, fetch_all, make_page, metrics_of

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.errors import PeerTimeoutError, PeerUnavailableError
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.seaweedfs import SeaweedProcess
from sglang_kvcodec.testing.valkey import ValkeyProcess

OBJECTS = [data for _, data in PAGES]
ANOTHER = make_page("another")
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
LONG = Timeouts(connect_s=20, lookup_s=60, progress_s=60, fetch_s=120, put_s=120)
PATIENCE_S = 120


@pytest.fixture
def start():
    """Starts a peer with a client of it."""
    with contextlib.ExitStack() as stack:

        def make(store):
            arguments = ("--metrics-port", "0", "--log-level", "error")
            process = stack.enter_context(PeerProcess(store, arguments=arguments))
            client = GrpcPeer(process.remote, LONG)
            stack.callback(client.close)
            return process, client

        yield make


def wait_for_health(process, service, expected):
    """Waits until the peer says of a service what is expected."""
    with grpc.insecure_channel(process.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        deadline_s = time.monotonic() + PATIENCE_S
        while health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status != expected:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def wait_until_ready(process, is_ready):
    expected = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
    wait_for_health(process, "sglang_kvcodec.rpc.Peer", expected)
    # The process lives all the time.
    wait_for_health(process, "", health_pb2.HealthCheckResponse.SERVING)


def put(client, page):
    return client.put(NAMESPACE, [page])[0]


def check_away(process, client):
    """Every call says that the store is away, and none ends the peer."""
    refused = put(client, ANOTHER)
    assert refused.outcome is PutOutcome.NO_CAPACITY
    assert "failed" in refused.detail
    with pytest.raises(PeerUnavailableError, match="failed"):
        fetch_all(client)
    wait_until_ready(process, False)
    # By now it knows without trying.
    for call in (lambda: client.lookup(NAMESPACE, HASHES), client.stat):
        with pytest.raises(PeerUnavailableError, match="failed"):
            call()
    assert "kvcodec_peer_ready 0.0" in metrics_of(process)


def check_back(process, client):
    """Without a restart, or a word from anybody."""
    wait_until_ready(process, True)
    assert client.lookup(NAMESPACE, HASHES).covered_pages == 4
    assert fetch_all(client) == OBJECTS
    assert put(client, ANOTHER).outcome in (PutOutcome.STORED, PutOutcome.ALREADY_STORED)
    assert fetch_all(client, [ANOTHER[0]]) == [ANOTHER[1]]


def test_redis_is_killed_and_started_again(start, tmp_path):
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(ValkeyProcess(tmp_path / "valkey", DURABLE))
        process, client = start(f"redis://{valkey.address}")
        client.put(NAMESPACE, PAGES)
        valkey.kill()
        check_away(process, client)
        stack.enter_context(valkey.restart())
        check_back(process, client)


def test_redis_is_started_again_without_what_it_had(start, tmp_path):
    """Misses, which are put anew."""
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(ValkeyProcess(tmp_path / "valkey"))
        _, client = start(f"redis://{valkey.address}")
        client.put(NAMESPACE, PAGES)
        valkey.kill()
        stack.enter_context(valkey.restart())
        assert client.lookup(NAMESPACE, HASHES).covered_pages == 0
        assert [result.outcome for result in client.put(NAMESPACE, PAGES)] == [PutOutcome.STORED] * 4
        assert fetch_all(client) == OBJECTS


def test_redis_hangs(start, tmp_path):
    """A client gives up when its time is over; the peer goes on when Redis does."""
    with ValkeyProcess(tmp_path / "valkey", DURABLE) as valkey:
        process, client = start(f"redis://{valkey.address}")
        client.put(NAMESPACE, PAGES)
        hasty = GrpcPeer(process.remote, Timeouts(lookup_s=0.5))
        assert hasty.stat().objects == 4
        valkey.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(PeerTimeoutError):
                hasty.lookup(NAMESPACE, HASHES)
            wait_until_ready(process, False)
        finally:
            valkey.send_signal(signal.SIGCONT)
        check_back(process, client)
        hasty.close()


@pytest.fixture
def bucket_server(tmp_path, monkeypatch):
    with SeaweedProcess(tmp_path / "seaweedfs") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


def test_s3_is_killed_and_started_again(start, bucket_server):
    process, client = start(f"s3://kvcodec?endpoint={bucket_server.endpoint}")
    client.put(NAMESPACE, PAGES)
    bucket_server.kill()
    check_away(process, client)
    bucket_server.restart()
    check_back(process, client)


def test_a_bucket_that_peers_share_is_killed_and_started_again(start, tmp_path, bucket_server):
    with ValkeyProcess(tmp_path / "valkey") as valkey:
        store = f"s3://kvcodec?endpoint={bucket_server.endpoint}&index=redis://{valkey.address}"
        process, client = start(store)
        _, other = start(store)
        client.put(NAMESPACE, PAGES)
        bucket_server.kill()
        check_away(process, client)
        bucket_server.restart()
        check_back(process, client)
        assert fetch_all(other) == OBJECTS


def test_the_index_of_a_bucket_is_killed_and_started_again_without_what_it_had(start, tmp_path, bucket_server):
    """What lies in the bucket is counted anew, by a peer that was there all the time."""
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(ValkeyProcess(tmp_path / "valkey"))
        store = f"s3://kvcodec?endpoint={bucket_server.endpoint}&index=redis://{valkey.address}"
        process, client = start(store)
        _, other = start(store)
        client.put(NAMESPACE, PAGES)
        valkey.kill()
        check_away(process, client)
        stack.enter_context(valkey.restart())
        deadline_s = time.monotonic() + PATIENCE_S
        wait_until_ready(process, True)
        while client.lookup(NAMESPACE, HASHES).covered_pages < 4:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        check_back(process, client)
        assert fetch_all(other) == OBJECTS
        assert other.stat().objects == 5
