"""A server's fetches from three peers in processes of their own, one of which is killed and comes back."""

import contextlib
import time

import pytest
from flow_kit import LIMIT_S, NAMESPACE, SMALL, TIMEOUTS, new_rates

from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetcher import Fetcher
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.connect import connect
from sglang_kvcodec.testing.pages import Pages, hash_of
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.transform import PageTransforms

NAMES = tuple(range(23))


@pytest.fixture
def processes(tmp_path):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(PeerProcess(f"lmdb:{tmp_path / str(number)}")) for number in range(3)]


class Server:
    """What of a server fetches; each with a cache of its own, as after a restart."""

    def __init__(self, processes, replicas, stack):
        self.remote = "grpc://" + ",".join(process.address for process in processes)
        config = ServerConfig(
            self.remote, "raw", min_fetch_tokens=1, replicas=replicas, plan="always", timeouts=TIMEOUTS
        )
        self.peer = connect(self.remote, TIMEOUTS, replicas)
        self.monitor = PeerMonitor(self.peer, TIMEOUTS.retry_s)
        self.fetcher = Fetcher(
            self.peer,
            self.monitor,
            BitstreamCache(config.host_cache_bytes),
            StoredPages(),
            PageTransforms(SMALL, "raw"),
            config,
            new_rates(),
        )
        stack.callback(self.fetcher.close)
        stack.callback(self.peer.close)
        stack.callback(self.monitor.close)
        assert self.monitor.wait_until_up(LIMIT_S)

    def fetched(self):
        """The objects that a request for all pages gets."""
        ticket = self.fetcher.start([Tier("raw", (NAMESPACE,))], [hash_of(name) for name in NAMES])
        assert ticket.wait(LIMIT_S)
        return [bytes(page._data) for page in ticket.pages]


@pytest.fixture
def start_server(processes):
    with contextlib.ExitStack() as stack:
        yield lambda replicas: Server(processes, replicas, stack)


@pytest.fixture
def coded():
    pages = Pages(SMALL, "raw", NAMESPACE)
    return [(hash_of(name), pages.coded(name)) for name in NAMES]


def count(process):
    client = GrpcPeer(process.remote, TIMEOUTS)
    try:
        return client.stat().objects
    finally:
        client.close()


def test_with_two_replicas_any_peer_may_die_and_come_back(processes, start_server, coded):
    server = start_server(2)
    assert {result.outcome for result in server.peer.put(NAMESPACE, coded)} == {PutOutcome.STORED}
    assert sum(map(count, processes)) == 2 * len(NAMES)
    whole = [data for _, data in coded]
    assert server.fetched() == whole
    for process in processes:
        process.kill()
        assert server.fetched() == whole
        assert server.monitor.is_up
        process.restart()
        deadline = time.monotonic() + LIMIT_S
        while len(server.peer._up()) < 3:
            assert time.monotonic() < deadline, "it is not used again"
            time.sleep(0.05)
    assert server.fetched() == whole


def test_without_replicas_a_dead_peer_costs_its_pages_until_it_is_back(processes, start_server, coded):
    server = start_server(1)
    server.peer.put(NAMESPACE, coded)
    assert sum(map(count, processes)) == len(NAMES)
    whole = [data for _, data in coded]
    processes[1].kill()
    first = server.fetched()
    assert len(first) < len(whole)
    assert first == whole[: len(first)]
    # What is missing is computed and put anew, on the peers that are left.
    assert PutOutcome.STORED in {result.outcome for result in server.peer.put(NAMESPACE, coded)}
    assert server.fetched() == whole
    processes[1].restart()
    deadline = time.monotonic() + LIMIT_S
    while len(server.peer._up()) < 3:
        assert time.monotonic() < deadline, "it is not used again"
        time.sleep(0.05)
    assert server.fetched() == whole


def test_a_server_starts_with_a_peer_that_is_down(processes, start_server, coded):
    processes[2].kill()
    server = start_server(2)
    server.peer.put(NAMESPACE, coded)
    assert server.fetched() == [data for _, data in coded]
