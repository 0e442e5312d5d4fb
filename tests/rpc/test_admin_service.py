"""What an operator asks of a peer: everything is listed, read as it lies there, and nothing counts as used."""

import asyncio
import contextlib
import random
import threading

import grpc
import grpc.aio
import pytest

from sglang_kvcodec.errors import PeerRejectedError, PeerTimeoutError, StorageUnavailableError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.rpc import admin_pb2 as pb
from sglang_kvcodec.rpc.admin import SERVICE
from sglang_kvcodec.rpc.admin_client import NamespaceUse, PeerAdmin
from sglang_kvcodec.rpc.peer_limits import PeerLimits

OTHER = bytes(range(32, 64))


def some_hashes(count, seed=0):
    source = random.Random(seed)
    return [source.randbytes(32) for _ in range(count)]


@pytest.fixture
def admin(peer):
    with contextlib.closing(PeerAdmin(peer)) as admin:
        yield admin


def test_an_empty_store(admin, namespace):
    assert admin.namespaces() == []
    assert list(admin.pages()) == []
    assert list(admin.pages(namespace)) == []
    assert list(admin.read(namespace, [])) == []
    assert admin.object_bytes(namespace, []) == []


def test_every_page_is_listed_once_with_its_size(engine, admin, namespace):
    """More than one batch of the engine, whose batches hold 1024 keys, of both namespaces in turn."""
    sizes = {}
    for number, page_hash in enumerate(some_hashes(2503)):
        key = PageKey((namespace, OTHER)[number % 3 == 0], page_hash)
        sizes[key] = number % 7
        engine.put(key.to_bytes(), bytes(number % 7))
    listed = list(admin.pages())
    assert len(listed) == len(sizes)
    assert {page.key: page.object_bytes for page in listed} == sizes
    assert all(page.stored_at_ms > 1_700_000_000_000 for page in listed)
    uses = []
    for digest in (namespace, OTHER):
        of_it = {key: size for key, size in sizes.items() if key.namespace_digest == digest}
        assert {page.key: page.object_bytes for page in admin.pages(digest)} == of_it
        uses.append(NamespaceUse(digest, len(of_it), sum(of_it.values())))
    assert admin.namespaces() == uses
    assert list(admin.pages(bytes(32))) == []


def test_objects_are_read_whole_and_as_they_are(engine, admin, namespace):
    """Several messages, none, damaged ones that a Fetch would delete, and pages that are not there."""
    hashes = some_hashes(5)
    objects = [random.Random("large").randbytes(2_500_003), b"no page object", b"", b"x"]
    for page_hash, data in zip(hashes, objects, strict=False):
        engine.put(namespace + page_hash, data)
    assert list(admin.read(namespace, [*hashes, hashes[1]])) == [*objects, None, objects[1]]
    assert list(admin.warm(namespace, hashes)) == [2_500_003, 14, 0, 1, None]
    assert admin.object_bytes(namespace, [hashes[3], hashes[4], hashes[0]]) == [1, None, 2_500_003]
    assert engine.stat().objects == 4


def test_a_bandwidth_limit_holds_for_an_operator_too(engine, start_peer, connect, namespace):
    peer = connect(start_peer(PeerLimits(bandwidth_bits_per_s=80_000_000)).remote)
    (page_hash,) = some_hashes(1)
    data = random.Random("limited").randbytes(700_001)
    engine.put(namespace + page_hash, data)
    with contextlib.closing(PeerAdmin(peer)) as admin:
        assert list(admin.read(namespace, [page_hash])) == [data]


def test_looking_is_no_use(engine, admin, namespace):
    """What was put first is evicted first, whatever was listed and read in between."""
    hashes = some_hashes(3)
    for page_hash in hashes:
        engine.put(namespace + page_hash, bytes(1 << 20))
    list(admin.pages())
    admin.namespaces()
    list(admin.read(namespace, hashes[:1]))
    list(admin.warm(namespace, hashes[:1]))
    admin.object_bytes(namespace, hashes[:1])
    assert list(engine._objects) == [namespace + page_hash for page_hash in hashes]


def test_an_iterator_that_is_given_up_ends_its_call(engine, admin, namespace):
    """Again and again: a call that stayed open would hold one of the few streams that there are at once."""
    hashes = some_hashes(9)
    for page_hash in hashes:
        engine.put(namespace + page_hash, bytes(3 << 20))
    for _ in range(20):
        objects = admin.read(namespace, hashes)
        assert next(objects) == bytes(3 << 20)
        objects.close()
        pages = admin.pages()
        next(pages)
        pages.close()
    assert len(list(admin.read(namespace, hashes))) == 9


@pytest.mark.parametrize("method", ["ListNamespaces", "ListPages", "StatPages", "ReadPages"])
def test_bytes_that_are_no_request(start_peer, method):
    with grpc.insecure_channel(start_peer().address) as channel:
        call = channel.unary_stream(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\xff\xff\xff"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("ListPages", pb.ListPagesRequest(namespace_digest=b"short")),
        ("StatPages", pb.StatPagesRequest(namespace_digest=b"short")),
        ("StatPages", pb.StatPagesRequest(namespace_digest=OTHER, page_hashes=bytes(33))),
        ("ReadPages", pb.ReadPagesRequest(namespace_digest=bytes(33))),
        ("ReadPages", pb.ReadPagesRequest(namespace_digest=OTHER, page_hashes=bytes(32 * ((1 << 16) + 1)))),
    ],
)
def test_what_no_request_can_ask(start_peer, method, request_):
    with grpc.insecure_channel(start_peer().address) as channel:
        call = channel.unary_stream(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request_.SerializeToString()))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_engine_that_fails_fails_the_call(engine, admin, namespace):
    hashes = some_hashes(2)
    for page_hash in hashes:
        engine.put(namespace + page_hash, b"data")

    def fail(method, key):
        if key == namespace + hashes[1]:
            raise StorageUnavailableError("the disk is gone")

    engine.before = fail
    objects = admin.read(namespace, hashes)
    assert next(objects) == b"data"
    with pytest.raises(Exception, match="the disk is gone"):
        next(objects)


def begin(index, size_bytes, **fields):
    return pb.ReadPagesResponse(begin=pb.ReadPagesBegin(page_index=index, object_bytes=size_bytes, **fields))


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [pb.ReadPagesResponse(chunk=b"x")],
        [begin(1, 1), pb.ReadPagesResponse(chunk=b"x")],
        [begin(0, 2), pb.ReadPagesResponse(chunk=b"x")],
        [begin(0, 1), pb.ReadPagesResponse(chunk=b"xy")],
        [begin(0, 2), pb.ReadPagesResponse(chunk=b"")],
        [begin(0, 2), begin(1, 2)],
        [begin(0, 1 << 40)],
    ],
)
def test_a_senseless_answer_is_refused(connect, namespace, answer):
    async def read_pages(data, context):
        for message in answer:
            await context.write(message)

    with _server({"ReadPages": read_pages}, pb.ReadPagesResponse) as address:
        client = connect(f"grpc://{address}")
        with contextlib.closing(PeerAdmin(client)) as admin, pytest.raises(PeerRejectedError, match="senseless"):
            list(admin.read(namespace, some_hashes(1)))


def test_a_listing_of_another_namespace_is_refused(connect, namespace):
    async def list_pages(data, context):
        await context.write(pb.ListPagesResponse(pages=[pb.ListedPage(namespace_digest=OTHER, page_hash=bytes(32))]))

    with _server({"ListPages": list_pages}, pb.ListPagesResponse) as address:
        client = connect(f"grpc://{address}")
        with contextlib.closing(PeerAdmin(client)) as admin, pytest.raises(PeerRejectedError, match="senseless"):
            list(admin.pages(namespace))


def test_a_peer_that_falls_silent(connect, namespace):
    async def list_pages(data, context):
        await asyncio.sleep(3600)

    with _server({"ListPages": list_pages}, pb.ListPagesResponse) as address:
        client = connect(f"grpc://{address}")
        with contextlib.closing(PeerAdmin(client, silence_s=0.3)) as admin, pytest.raises(PeerTimeoutError):
            list(admin.pages(namespace))


@contextlib.contextmanager
def _server(methods, response):
    """A server whose streaming methods answer what a test says."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    address = []

    async def main():
        server = grpc.aio.server()
        handlers = {
            name: grpc.unary_stream_rpc_method_handler(method, None, response.SerializeToString)
            for name, method in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        address.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        ready.set()
        await stopping.wait()
        await server.stop(0)

    stopping = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    ready.wait()
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()
