"""Client and peer together: what is put comes back, in the promised order, within the promised bounds."""

import contextlib
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sglang_kvcodec import __version__, peer_metrics
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, LookupResult, PutOutcome
from sglang_kvcodec.format.page_object import read_header
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.limits import MIN_MESSAGE_BYTES, message_bytes
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.peer_pb2_grpc import PeerStub
from sglang_kvcodec.rpc.server import SERVICE

SIZES = {
    "tiny": (1, 1, 1, 1, 1, 1),
    "odd": (1, 5003, 17, 100_001, 3, 70_000),
    "large": (3_000_001, 2, 1 << 20, (1 << 20) - 1, 1, 65_537),
}


def put_pages(peer, namespace, page, names=SIZES):
    pages = [page(name, SIZES[name]) for name in names]
    assert [result.outcome for result in peer.put(namespace, pages)] == [PutOutcome.STORED] * len(pages)
    return pages


def assemble(events):
    """Objects by page index, in the order the events came; None for a missing page."""
    pages = {}
    for event in events:
        if isinstance(event, FetchedHeader):
            pages[event.page_index] = bytearray(event.header) + bytearray(event.object_bytes - len(event.header))
        elif isinstance(event, FetchedMissing):
            pages[event.page_index] = None
        else:
            pages[event.page_index][event.offset : event.offset + len(event.data)] = event.data
    return pages


@pytest.mark.parametrize("max_message_bytes", [0, 1, 100_000, 1 << 31])
def test_what_is_put_is_fetched(start_peer, connect, namespace, page, max_message_bytes):
    peer = connect(start_peer().remote, max_message_bytes=max_message_bytes)
    pages = put_pages(peer, namespace, page)
    hashes = [page_hash for page_hash, _ in pages]
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(pages)}
    assert peer.lookup(namespace, hashes) == LookupResult(3, (True,) * 3, sum(len(data) for _, data in pages))


def test_a_fetch_tells_what_it_will_read(peer, engine, namespace, page):
    pages = put_pages(peer, namespace, page)
    told = []

    @contextlib.contextmanager
    def reading_ahead(objects):
        told.append(list(objects))
        engine.before = lambda method, key: method == "get_range" and told[0].append(method)
        yield
        told.append("the end")

    engine.reading_ahead = reading_ahead
    hashes = [pages[0][0], bytes(32), *(page_hash for page_hash, _ in pages[1:])]
    assert assemble(peer.fetch(namespace, hashes))[1] is None
    stored = [(namespace + page_hash, len(data)) for page_hash, data in pages]
    assert told[0][: len(pages)] == stored
    assert set(told[0][len(pages) :]) == {"get_range"}
    assert told[1:] == ["the end"]


def test_an_engine_that_never_waits_is_read_without_threads(start_peer, connect, engine, namespace, page):
    engine.reads_wait = False
    readers = set()
    engine.before = lambda method, key: method == "get_range" and readers.add(threading.current_thread().name)
    started = start_peer()
    peer = connect(started.remote, max_message_bytes=100_000)
    pages = put_pages(peer, namespace, page)
    hashes = [pages[0][0], bytes(32), pages[2][0]]
    assert assemble(peer.fetch(namespace, hashes)) == {0: pages[0][1], 1: None, 2: pages[2][1]}
    assert len(readers) == 1
    assert not readers.pop().startswith("kvcodec-read")
    engine.reads_wait = True
    assert assemble(peer.fetch(namespace, hashes)) == {0: pages[0][1], 1: None, 2: pages[2][1]}
    assert any(name.startswith("kvcodec-read") for name in readers)


def test_headers_come_first_then_group_after_group(peer, namespace, page):
    pages = put_pages(peer, namespace, page)
    events = list(peer.fetch(namespace, [page_hash for page_hash, _ in pages]))
    assert all(isinstance(event, FetchedHeader) for event in events[: len(pages)])
    assert all(isinstance(event, FetchedFragment) for event in events[len(pages) :])
    headers = [read_header(event.header) for event in events[: len(pages)]]
    places = []
    for event in events[len(pages) :]:
        ranges = headers[event.page_index].group_ranges
        group = next(index for index, (start, stop) in enumerate(ranges) if start <= event.offset < stop)
        assert event.offset + len(event.data) <= ranges[group][1]
        places.append((group, event.page_index, event.offset))
    assert places == sorted(places)


def test_messages_are_bounded(start_peer, connect, namespace, page):
    started = start_peer()
    pages = put_pages(connect(started.remote), namespace, page)
    with grpc.insecure_channel(started.address) as channel:
        request = pb.FetchRequest(
            namespace_digest=namespace, page_hashes=b"".join(page_hash for page_hash, _ in pages), max_message_bytes=1
        )
        sizes = [
            sum(len(fragment.data) for fragment in response.fragments) for response in PeerStub(channel).Fetch(request)
        ]
    payload = sum(len(data) - read_header(data).header_bytes for _, data in pages)
    assert sum(sizes) == payload
    assert max(sizes) == MIN_MESSAGE_BYTES
    # Fragments are batched: every message but the header's and the last is full.
    assert len(sizes) == 1 + -(-payload // MIN_MESSAGE_BYTES)


@pytest.mark.parametrize(("asked", "given"), [(0, 1 << 20), (1, 16384), (50_000, 50_000), (1 << 31, 4 << 20)], ids=str)
def test_message_bytes(asked, given):
    assert message_bytes(asked) == given


def test_missing_pages(peer, namespace, page):
    pages = put_pages(peer, namespace, page)
    hashes = [pages[0][0], bytes(32), pages[2][0]]
    assert peer.lookup(namespace, hashes) == LookupResult(1, (True, False, True), len(pages[0][1]))
    assert assemble(peer.fetch(namespace, hashes)) == {0: pages[0][1], 1: None, 2: pages[2][1]}
    assert peer.lookup(bytes(32), hashes) == LookupResult(0, (False,) * 3, 0)


def test_no_pages(peer, namespace):
    assert peer.lookup(namespace, []) == LookupResult(0, (), 0)
    assert list(peer.fetch(namespace, [])) == []
    assert peer.put(namespace, []) == []
    assert peer.delete(namespace, []) == 0


def test_delete_and_stat(peer, namespace, page):
    pages = put_pages(peer, namespace, page)
    assert peer.delete(namespace, [pages[1][0], bytes(32)]) == 1
    stat = peer.stat()
    assert (stat.objects, stat.stored_bytes) == (2, len(pages[0][1]) + len(pages[2][1]))
    assert (stat.engine, stat.format_version, stat.software_version) == ("memory", 1, __version__)
    assert peer.lookup(namespace, [pages[0][0], pages[1][0]]).present == (True, False)


def test_a_page_that_is_evicted_while_it_is_sent(start_peer, connect, engine, namespace, page):
    client = connect(start_peer().remote, max_message_bytes=1)
    pages = put_pages(client, namespace, page)
    events = client.fetch(namespace, [page_hash for page_hash, _ in pages])
    seen = [next(events) for _ in range(4)]
    engine.delete(namespace + pages[2][0])
    seen += events
    assert FetchedMissing(2) in seen
    after = seen[seen.index(FetchedMissing(2)) :]
    assert all(event.page_index != 2 for event in after[1:])
    whole = assemble([event for event in seen if event.page_index != 2])
    assert whole == {0: pages[0][1], 1: pages[1][1]}


def test_many_objects_and_clients_at_once(start_peer, connect, engine, namespace, page):
    remote = start_peer(PeerLimits(receive_bytes=300_000)).remote
    pages = [page(f"page {index}") for index in range(12)]
    hashes = [page_hash for page_hash, _ in pages]
    outcomes = [None] * 4
    barrier = threading.Barrier(len(outcomes))

    def work(index):
        client = connect(remote)
        barrier.wait()
        outcomes[index] = [result.outcome for result in client.put(namespace, pages)]
        assert assemble(client.fetch(namespace, hashes)) == {i: data for i, (_, data) in enumerate(pages)}

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(outcomes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in zip(*outcomes, strict=True):
        assert sorted(result.value for result in results) == ["already_stored"] * 3 + ["stored"]
    assert engine.stat().objects == len(pages)


def test_health_and_reflection(start_peer):
    started = start_peer()
    with grpc.insecure_channel(started.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", SERVICE):
            status = check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


def test_calls_are_counted(peer, namespace, page):
    def value(metric):
        return metric._value.get()

    stored = peer_metrics.PEER_PUTS.labels("stored")
    counters = [
        stored,
        peer_metrics.PEER_SENT_BYTES,
        peer_metrics.PEER_RECEIVED_BYTES,
        peer_metrics.PEER_RPCS.labels("Fetch", "OK"),
    ]
    before = [value(counter) for counter in counters]
    pages = put_pages(peer, namespace, page, ["odd"])
    list(peer.fetch(namespace, [pages[0][0]]))
    peer.stat()
    grown = [value(counter) - start for counter, start in zip(counters, before, strict=True)]
    assert grown == [1, len(pages[0][1]), len(pages[0][1]), 1]
    assert value(peer_metrics.PEER_STREAMS.labels("Fetch")) == 0
