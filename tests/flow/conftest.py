"""A peer in this process and what the flow needs around it."""

import contextlib
import threading

import pytest
from flow_kit import LIMIT_S, TIMEOUTS, Connection, Delta, HookedEngine, WatchedPeer

from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.local_peer import LocalPeer


@pytest.fixture
def closing():
    """Closes what is entered when the test ends, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def engine():
    return HookedEngine()


@pytest.fixture
def local_peer(engine, closing):
    peer = LocalPeer(engine)
    closing.callback(peer.stop)
    return peer


@pytest.fixture
def connect(closing):
    """Makes clients whose peer is up, or not."""

    def make(remote, expect_up=True, timeouts=TIMEOUTS, max_message_bytes=0):
        peer = GrpcPeer(remote, timeouts, max_message_bytes)
        monitor = PeerMonitor(peer, timeouts.retry_s)
        closing.callback(peer.close)
        closing.callback(monitor.close)
        assert monitor.wait_until_up(LIMIT_S) if expect_up else not monitor.is_up
        return Connection(WatchedPeer(peer), monitor)

    return make


@pytest.fixture
def config():
    return ServerConfig(
        remote="grpc://127.0.0.1:1", profile="raw", plan="always", min_fetch_tokens=1, timeouts=TIMEOUTS
    )


@pytest.fixture
def delta():
    return Delta()


@pytest.fixture
def gate():
    """An event that is set at the end, so that no thread waits for ever."""
    event = threading.Event()
    yield event
    event.set()
