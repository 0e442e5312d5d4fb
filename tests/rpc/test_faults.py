"""What goes wrong on the way: garbage, damage, silence, full and failing stores, peers and clients that go."""

import contextlib
import socket
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sglang_kvcodec import metrics, peer_metrics
from sglang_kvcodec.config import MAX_OBJECT_BYTES, Timeouts
from sglang_kvcodec.errors import (
    CapacityError,
    PeerRejectedError,
    PeerTimeoutError,
    PeerUnavailableError,
    StorageUnavailableError,
)
from sglang_kvcodec.format.exchange import FetchedMissing, PutOutcome
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc import server
from sglang_kvcodec.rpc.admin_client import PeerAdmin
from sglang_kvcodec.rpc.limits import GRPC_MESSAGE_BYTES, MAX_PAGES_PER_REQUEST
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.peer_pb2_grpc import PeerStub
from sglang_kvcodec.rpc.server import SERVICE

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LARGE = (3_000_001, 2, 1 << 20, (1 << 20) - 1, 1, 65_537)


def begin(namespace, page_hash, object_bytes):
    return pb.PutRequest(begin=pb.PutBegin(namespace_digest=namespace, page_hash=page_hash, object_bytes=object_bytes))


def chunk(data):
    return pb.PutRequest(chunk=data)


COMMIT = pb.PutRequest(commit=True)


@pytest.fixture
def running(start_peer):
    return start_peer()


@pytest.fixture
def stub(running):
    """Any gRPC client, with the generated stub."""
    with grpc.insecure_channel(running.address) as channel:
        yield PeerStub(channel)


def refused(code, call, *args):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    assert caught.value.code() is code
    assert caught.value.details()
    return caught.value.details()


# ---- requests ----


@pytest.mark.parametrize("namespace_digest", [b"", bytes(31), bytes(64)])
@pytest.mark.parametrize("kind", ["Lookup", "Fetch", "Delete"])
def test_a_namespace_of_the_wrong_length(stub, kind, namespace_digest):
    request = getattr(pb, f"{kind}Request")(namespace_digest=namespace_digest)
    refused(INVALID, lambda: list(stub.Fetch(request)) if kind == "Fetch" else getattr(stub, kind)(request))


def test_hashes_of_the_wrong_length_and_too_many(stub, namespace):
    refused(INVALID, stub.Lookup, pb.LookupRequest(namespace_digest=namespace, page_hashes=bytes(33)))
    too_many = bytes(32 * (MAX_PAGES_PER_REQUEST + 1))
    refused(INVALID, stub.Lookup, pb.LookupRequest(namespace_digest=namespace, page_hashes=too_many))
    oversized = pb.LookupRequest(namespace_digest=namespace, page_hashes=bytes(GRPC_MESSAGE_BYTES + 32))
    refused(grpc.StatusCode.RESOURCE_EXHAUSTED, stub.Lookup, oversized)


@pytest.mark.parametrize("method", ["Lookup", "Delete", "Stat", "Put", "Fetch"])
def test_garbage_bytes(running, engine, connect, namespace, page, method):
    with grpc.insecure_channel(running.address) as channel:
        path, garbage = f"/sglang_kvcodec.rpc.Peer/{method}", b"\xff" * 50
        calls = {
            "Put": lambda: channel.stream_unary(path)(iter([garbage])),
            "Fetch": lambda: list(channel.unary_stream(path)(garbage)),
        }
        refused(INVALID, calls.get(method, lambda: channel.unary_unary(path)(garbage)))
    assert connect(running.remote).put(namespace, [page("a")])[0].outcome is PutOutcome.STORED


STEPS = {
    "nothing before the first chunk": lambda n, h, d: [chunk(d)],
    "commit first": lambda n, h, d: [COMMIT],
    "empty step": lambda n, h, d: [pb.PutRequest()],
    "two begins": lambda n, h, d: [begin(n, h, len(d)), begin(n, h, len(d))],
    "commit that is none": lambda n, h, d: [begin(n, h, len(d)), chunk(d), pb.PutRequest(commit=False)],
    "no commit": lambda n, h, d: [begin(n, h, len(d)), chunk(d)],
    "more than announced": lambda n, h, d: [begin(n, h, len(d)), chunk(d), chunk(b"x")],
    "empty chunk": lambda n, h, d: [begin(n, h, len(d)), chunk(b"")],
    "short namespace": lambda n, h, d: [begin(n[1:], h, len(d))],
    "long hash": lambda n, h, d: [begin(n, h + b"x", len(d))],
    "empty object": lambda n, h, d: [begin(n, h, 0)],
    "too large": lambda n, h, d: [begin(n, h, MAX_OBJECT_BYTES + 1)],
    "far too large": lambda n, h, d: [begin(n, h, 2**64 - 1)],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_out_of_order_end_the_put_and_keep_what_was_committed(stub, engine, namespace, page, steps):
    first_hash, first = page("first")
    page_hash, data = page("second")
    good = [begin(namespace, first_hash, len(first)), chunk(first), COMMIT]
    refused(INVALID, stub.Put, iter([*good, *steps(namespace, page_hash, data)]))
    assert engine.sizes([namespace + first_hash, namespace + page_hash]) == [len(first), None]


def test_bytes_sent_singly(stub, engine, namespace, page):
    page_hash, data = page("a", (1, 1, 1, 1, 1, 1))
    steps = [begin(namespace, page_hash, len(data)), *[chunk(data[i : i + 1]) for i in range(len(data))], COMMIT]
    assert stub.Put(iter(steps)).results[0].outcome == pb.PUT_OUTCOME_STORED
    assert engine.get(namespace + page_hash) == data


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: flip(data, 0), "unknown_format"),
        (lambda data: flip(data, 4), "unknown_format"),
        (lambda data: flip(data, 50), "checksum"),
        (lambda data: flip(data, len(data) - 1), "checksum"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:16], "truncated"),
        (lambda data: data + b"x", "truncated"),
    ],
)
def test_a_damaged_object_is_rejected_and_the_next_is_stored(peer, engine, namespace, page, damage, reason):
    (hash_a, data_a), (hash_b, data_b) = page("a"), page("b")
    results = peer.put(namespace, [(hash_a, damage(data_a)), (hash_b, data_b)])
    assert [result.outcome for result in results] == [PutOutcome.REJECTED, PutOutcome.STORED]
    assert results[0].detail.startswith(f"{reason}: ")
    assert engine.sizes([namespace + hash_a, namespace + hash_b]) == [None, len(data_b)]


def test_an_object_under_another_hash_or_namespace(peer, engine, namespace, page):
    (hash_a, _), (_, data_b) = page("a"), page("b")
    assert peer.put(namespace, [(hash_a, data_b)])[0].detail.startswith("foreign_page: ")
    assert peer.put(bytes(32), [(page("b")[0], data_b)])[0].outcome is PutOutcome.REJECTED
    assert engine.stat().objects == 0


def test_a_commit_before_the_last_byte(stub, engine, namespace, page):
    page_hash, data = page("a")
    response = stub.Put(iter([begin(namespace, page_hash, len(data)), chunk(data[:-1]), COMMIT]))
    assert response.results[0].outcome == pb.PUT_OUTCOME_REJECTED
    assert engine.stat().objects == 0


def test_an_object_no_peer_takes_is_not_sent(peer, namespace, page):
    page_hash, data = page("a")
    results = peer.put(namespace, [(bytes(32), bytes(MAX_OBJECT_BYTES + 1)), (page_hash, data)])
    assert [result.outcome for result in results] == [PutOutcome.REJECTED, PutOutcome.STORED]


# ---- the store ----


@pytest.mark.parametrize("error", [CapacityError("too large"), StorageUnavailableError("disk full")])
def test_a_full_store(peer, engine, namespace, page, error):
    def fail(method, key):
        if method == "put" and key == namespace + page("a")[0]:
            raise error

    engine.before = fail
    results = peer.put(namespace, [page("a"), page("b")])
    assert [result.outcome for result in results] == [PutOutcome.NO_CAPACITY, PutOutcome.STORED]
    assert results[0].detail == str(error)


@pytest.mark.parametrize("error", [StorageUnavailableError("gone"), KeyError("a bug")])
@pytest.mark.parametrize("method", ["sizes", "get_range", "delete", "stat"])
def test_a_failing_store_ends_one_call(peer, engine, namespace, page, method, error):
    page_hash, data = page("a")
    peer.put(namespace, [(page_hash, data)])
    calls = {
        "sizes": lambda: peer.lookup(namespace, [page_hash]),
        "get_range": lambda: list(peer.fetch(namespace, [page_hash])),
        "delete": lambda: peer.delete(namespace, [page_hash]),
        "stat": peer.stat,
    }

    def fail(called, key):
        if called == method:
            raise error

    engine.before = fail
    with pytest.raises(PeerUnavailableError):
        calls[method]()
    engine.before = lambda called, key: None
    calls[method]()


def test_a_stored_object_that_is_damaged_is_missing_counted_and_deleted(peer, engine, namespace, page):
    (hash_a, data_a), (hash_b, data_b) = page("a"), page("b")
    engine.put(namespace + hash_a, flip(data_a, 50))
    engine.put(namespace + hash_b, data_b)
    counter = peer_metrics.STORE_DAMAGED.labels("checksum")._value
    before = counter.get()
    events = list(peer.fetch(namespace, [hash_a, hash_b]))
    assert events[0].page_index == 1
    assert events[1] == FetchedMissing(0)
    assert counter.get() == before + 1
    assert engine.sizes([namespace + hash_a]) == [None]
    assert peer.put(namespace, [(hash_a, data_a)])[0].outcome is PutOutcome.STORED


# ---- clients that go, or say nothing ----


class Gate:
    """Holds an engine's calls of one method until it is opened."""

    def __init__(self, engine, method):
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.calls = 0
        self._method = method
        engine.before = self

    def __call__(self, method, key):
        if method == self._method:
            self.calls += 1
            self.reached.set()
            self.opened.wait()


@pytest.fixture
def gate(engine):
    gates = []

    def make(method):
        gates.append(Gate(engine, method))
        return gates[-1]

    yield make
    for made in gates:
        made.opened.set()


def test_a_fetch_cancelled_in_the_middle(running, connect, engine, namespace, page):
    client = connect(running.remote, max_message_bytes=1)
    pages = [page(name, LARGE) for name in "abcd"]
    client.put(namespace, pages)
    cancelled = threading.Event()
    events = client.fetch(namespace, [page_hash for page_hash, _ in pages], cancelled)
    for _ in range(6):
        next(events)
    cancelled.set()
    received = sum(len(event.data) for event in events)
    assert received < 3_000_000
    # The peer notices: no stream stays open.
    ended = peer_metrics.PEER_RPCS.labels("Fetch", "CANCELLED")._value
    client.stat()
    wait_until(lambda: ended.get() >= 1 and running.server._servicer._stream.open_streams == 0)


def wait_until(condition, timeout_s=30):
    """For what another process or thread does without telling anyone."""
    tick = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


def test_a_fetch_that_waits_is_cancelled(peer, engine, namespace, page, gate):
    peer.put(namespace, [page("a")])
    held = gate("get_range")
    cancelled = threading.Event()
    canceller = threading.Thread(target=lambda: (held.reached.wait(), cancelled.set()))
    canceller.start()
    assert list(peer.fetch(namespace, [page("a")[0]], cancelled)) == []
    canceller.join()


def test_an_abandoned_iterator_ends_the_call(running, connect, namespace, page):
    client = connect(running.remote, max_message_bytes=1)
    client.put(namespace, [page("a", LARGE)])
    events = client.fetch(namespace, [page("a", LARGE)[0]])
    next(events)
    events.close()
    wait_until(lambda: running.server._servicer._stream.open_streams == 0)


def test_a_put_that_breaks_leaves_nothing_of_the_unfinished_object(running, stub, engine, namespace, page):
    (hash_a, data_a), (hash_b, data_b) = page("a"), page("b")
    broken = threading.Event()

    def steps():
        yield from [begin(namespace, hash_a, len(data_a)), chunk(data_a), COMMIT]
        yield from [begin(namespace, hash_b, len(data_b)), chunk(data_b[:-1])]
        broken.wait()

    call = stub.Put.future(steps())
    servicer = running.server._servicer
    wait_until(lambda: servicer._budget.held_bytes == len(data_b))
    call.cancel()
    broken.set()
    wait_until(lambda: servicer._budget.held_bytes == 0 and servicer._stream.open_streams == 0)
    assert engine.sizes([namespace + hash_a, namespace + hash_b]) == [len(data_a), None]


def test_a_client_that_says_nothing(start_peer, namespace, page):
    started = start_peer(PeerLimits(idle_s=0.05))
    silent = threading.Event()

    def steps():
        yield begin(namespace, page("a")[0], 1000)
        silent.wait()

    with grpc.insecure_channel(started.address) as channel:
        try:
            refused(grpc.StatusCode.DEADLINE_EXCEEDED, PeerStub(channel).Put, steps())
        finally:
            silent.set()
    assert started.server._servicer._budget.held_bytes == 0


def test_more_streams_and_bytes_than_the_peer_takes(start_peer, connect, engine, namespace, page, gate):
    started = start_peer(PeerLimits(max_streams=1, receive_bytes=500_000, receive_wait_s=0.01))
    client = connect(started.remote)
    too_large = page("large", LARGE)
    with pytest.raises(PeerRejectedError, match="receives at once"):
        client.put(namespace, [too_large])
    client.put(namespace, [page("a")])
    held = gate("get_range")
    fetching = threading.Thread(target=lambda: list(client.fetch(namespace, [page("a")[0]])))
    fetching.start()
    held.reached.wait()
    with pytest.raises(PeerRejectedError, match="streams"):
        client.put(namespace, [page("b")])
    assert client.lookup(namespace, [page("a")[0]]).covered_pages == 1
    held.opened.set()
    fetching.join()
    assert client.put(namespace, [page("b")])[0].outcome is PutOutcome.STORED


# ---- peers that go, or say nothing ----

HASTY = Timeouts(connect_s=0.3, lookup_s=0.3, progress_s=0.3, fetch_s=20, put_s=20)


def every_call(client, namespace, page):
    return {
        "lookup": lambda: client.lookup(namespace, [page("a")[0]]),
        "fetch": lambda: list(client.fetch(namespace, [page("a")[0]])),
        "put": lambda: client.put(namespace, [page("a")]),
        "delete": lambda: client.delete(namespace, [page("a")[0]]),
        "stat": client.stat,
    }


CALLS = ["lookup", "fetch", "put", "delete", "stat"]


@pytest.mark.parametrize("call", CALLS)
def test_nobody_there(connect, namespace, page, call):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"grpc://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(PeerUnavailableError):
        every_call(connect(address), namespace, page)[call]()


@pytest.mark.parametrize("call", CALLS)
def test_somebody_who_never_answers(connect, namespace, page, call):
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = connect(f"grpc://127.0.0.1:{server.getsockname()[1]}", HASTY)
        with pytest.raises((PeerUnavailableError, PeerTimeoutError)):
            every_call(client, namespace, page)[call]()


@pytest.mark.parametrize(("call", "method"), [("fetch", "get_range"), ("put", "put"), ("lookup", "sizes")])
def test_a_peer_that_stalls(running, connect, engine, namespace, page, gate, call, method):
    connect(running.remote).put(namespace, [page("a")])
    client = connect(running.remote, HASTY)
    client.stat()
    gate(method)
    with pytest.raises(PeerTimeoutError):
        every_call(client, namespace, page)[call]()


def test_a_slow_reader_is_not_a_silent_peer(running, connect, namespace, page):
    client = connect(running.remote, HASTY, max_message_bytes=1)
    client.put(namespace, [page("a", LARGE)])
    events = client.fetch(namespace, [page("a", LARGE)[0]])
    first = next(events)
    assert not threading.Event().wait(2 * HASTY.progress_s)
    assert len(first.header) + sum(len(event.data) for event in events) == first.object_bytes


@pytest.mark.parametrize("call", ["fetch", "put"])
def test_close_ends_calls_under_way(running, connect, engine, namespace, page, gate, call):
    client = connect(running.remote)
    client.put(namespace, [page("a")])
    held = gate("get_range" if call == "fetch" else "put")
    closer = threading.Thread(target=lambda: (held.reached.wait(), client.close()))
    closer.start()
    calls = every_call(client, namespace, page)
    with pytest.raises(PeerUnavailableError):
        calls[call]()
    closer.join()
    for later in calls.values():
        with pytest.raises(PeerUnavailableError):
            later()


def test_failures_are_counted(connect, namespace):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"grpc://127.0.0.1:{server.getsockname()[1]}"
    counter = metrics.PEER_ERRORS.labels("lookup", "peer_unavailable")._value
    before = counter.get()
    with pytest.raises(PeerUnavailableError):
        connect(address).lookup(namespace, [])
    assert counter.get() == before + 1


def test_draining_lets_a_fetch_end(start_peer, connect, engine, namespace, page, gate):
    started = start_peer()
    client = connect(started.remote)
    client.put(namespace, [page("a")])
    with grpc.insecure_channel(started.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        health = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        held = gate("get_range")
        fetched = []
        fetching = threading.Thread(target=lambda: fetched.extend(client.fetch(namespace, [page("a")[0]])))
        fetching.start()
        held.reached.wait()
        started.begin_stop(60)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # It still lives and says so, but takes no new calls, of old connections or new ones.
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        for other in (client, connect(started.remote)):
            with pytest.raises(PeerUnavailableError, match="shutting down"):
                other.lookup(namespace, [page("a")[0]])
        with contextlib.closing(PeerAdmin(client)) as admin, pytest.raises(PeerUnavailableError, match="shutting"):
            list(admin.pages())
        held.opened.set()
        fetching.join()
    assert sum(len(getattr(event, "data", b"")) + len(getattr(event, "header", b"")) for event in fetched) == len(
        page("a")[1]
    )


def test_a_store_that_is_away_makes_the_peer_unready(start_peer, engine, monkeypatch):
    """Until it is back; the process is alive all the time."""
    monkeypatch.setattr(server, "_METRICS_PERIOD_S", 0.02)
    started = start_peer()
    with grpc.insecure_channel(started.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        health = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING

        def fail(method, key):
            raise StorageUnavailableError("the store is away")

        engine.before = fail
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        engine.before = lambda method, key: None
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        assert peer_metrics.PEER_READY._value.get() == 1
        health.cancel()
