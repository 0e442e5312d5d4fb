"""What a real ``kvcodec serve`` makes of garbage, of objects that are not what they say, and of a disk that is full."""

import contextlib
import pathlib
import random
import resource
import socket
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peer_kit import HASHES, NAMESPACE, PAGES, fetch_all, make_page, metrics_of

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.limits import GRPC_MESSAGE_BYTES
from sglang_kvcodec.testing.peer import PeerProcess

MIB = 1 << 20
SERVICE = "/sglang_kvcodec.rpc.Peer"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
ANOTHER = make_page("another")


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """One peer for all of it: whatever was done to it before, it serves."""
    store = f"lmdb:{tmp_path_factory.mktemp('peer')}/store"
    arguments = ["--metrics-port", "0", "--log-level", "warning"]
    with PeerProcess(store, capacity="64MiB", arguments=arguments) as process:
        yield process
        assert process.terminate() == 0


@pytest.fixture
def client(process, connect):
    """A client of a peer that has pages; afterwards the peer must still have them and serve."""
    client = connect(process.remote)
    client.put(NAMESPACE, PAGES)
    client.delete(NAMESPACE, [ANOTHER[0]])
    yield client
    for each in (client, connect(process.remote)):
        assert fetch_all(each) == [data for _, data in PAGES]
    client.delete(NAMESPACE, [ANOTHER[0]])
    assert client.put(NAMESPACE, [ANOTHER])[0].outcome is PutOutcome.STORED
    with grpc.insecure_channel(process.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def channel(process, client):
    """Any gRPC client's way to the peer; it may send what this package's client never would."""
    with grpc.insecure_channel(process.address) as opened:
        yield opened


def refusal(call):
    """Status and sentence of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def counted(process, counter):
    """The value of a counter, written as in the metrics; 0 where it has not counted yet."""
    for line in metrics_of(process).splitlines():
        if line.startswith(f"{counter} "):
            return float(line.rpartition(" ")[2])
    return 0.0


def put(channel, *messages):
    return put_all(channel, iter(messages))


def put_all(channel, messages):
    return channel.stream_unary(f"{SERVICE}/Put", None, pb.PutResponse.FromString)(messages, timeout=60)


def begin(page_hash, object_bytes):
    step = pb.PutBegin(namespace_digest=NAMESPACE, page_hash=page_hash, object_bytes=object_bytes)
    return pb.PutRequest(begin=step).SerializeToString()


def chunk(data):
    return pb.PutRequest(chunk=data).SerializeToString()


COMMIT = pb.PutRequest(commit=True).SerializeToString()


# ---- garbage ----

_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: peer\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(509),
        random.Random(1).randbytes(1_000_003),
        _HTTP2 + random.Random(2).randbytes(1_000_003),
        # Frames: one of 16 MiB, headers that are none, and data of a stream that nobody opened.
        _HTTP2 + _SETTINGS + bytes((255, 255, 255, 0, 0, 0, 0, 0, 1)) + bytes(100_003),
        _HTTP2 + _SETTINGS + bytes((0, 0, 5, 1, 4, 0, 0, 0, 1)) + b"\xff" * 5,
        _HTTP2 + _SETTINGS + bytes((0, 0, 3, 0, 0, 0, 0, 0, 7)) + b"abc",
    ],
    ids=["http1", "tls", "noise", "noise after the preface", "huge frame", "no headers", "no stream"],
)
def test_bytes_that_are_no_grpc(process, client, garbage):
    host, _, port = process.address.rpartition(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            # The peer may close the connection at any byte.
            with contextlib.suppress(OSError):
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while connection.recv(65_536):
                    pass  # until the peer closes the connection


@pytest.mark.parametrize("garbage", [b"\xff" * 50, random.Random(3).randbytes(100_003)], ids=["ones", "noise"])
@pytest.mark.parametrize("method", ["Lookup", "Fetch", "Put", "Delete", "Stat"])
def test_requests_that_are_no_messages(process, channel, method, garbage):
    counter = f'kvcodec_peer_rpcs_total{{method="{method}",status="INVALID_ARGUMENT"}}'
    before = counted(process, counter)
    path = f"{SERVICE}/{method}"
    calls = {
        "Put": lambda: put(channel, garbage),
        "Fetch": lambda: list(channel.unary_stream(path)(garbage, timeout=60)),
    }
    code, sentence = refusal(calls.get(method, lambda: channel.unary_unary(path)(garbage, timeout=60)))
    assert code is INVALID
    assert sentence
    # The client hears of the end before the peer counts it.
    deadline_s = time.monotonic() + 60
    while counted(process, counter) == before:
        assert time.monotonic() < deadline_s
    assert counted(process, counter) == before + 1


def test_a_method_there_is_not(channel):
    assert refusal(lambda: channel.unary_unary(f"{SERVICE}/Format")(b"", timeout=60))[0] is (
        grpc.StatusCode.UNIMPLEMENTED
    )


# ---- too large ----


@pytest.mark.parametrize("method", ["Lookup", "Fetch", "Delete"])
def test_an_oversized_request(channel, method):
    path, oversized = f"{SERVICE}/{method}", bytes(GRPC_MESSAGE_BYTES + 1)
    if method == "Fetch":
        code, sentence = refusal(lambda: list(channel.unary_stream(path)(oversized, timeout=60)))
    else:
        code, sentence = refusal(lambda: channel.unary_unary(path)(oversized, timeout=60))
    assert code is EXHAUSTED
    assert "larger" in sentence


def test_an_oversized_chunk_ends_the_put_and_keeps_what_was_committed(client, channel):
    page_hash, data = ANOTHER
    large_hash, large_bytes = bytes(32), GRPC_MESSAGE_BYTES + 1

    def messages():
        yield from (begin(page_hash, len(data)), chunk(data), COMMIT)
        # gRPC ends the call without a word to the peer, who may not have read the first yet.
        deadline_s = time.monotonic() + 60
        while not client.lookup(NAMESPACE, [page_hash]).covered_pages:
            assert time.monotonic() < deadline_s
        yield from (begin(large_hash, large_bytes), chunk(bytes(large_bytes)))

    code, sentence = refusal(lambda: put_all(channel, messages()))
    assert code is EXHAUSTED
    assert "larger" in sentence
    assert client.lookup(NAMESPACE, [page_hash, large_hash]).present == (True, False)


@pytest.mark.parametrize("object_bytes", [MAX_OBJECT_BYTES + 1, 2**64 - 1])
def test_an_object_announced_larger_than_any(channel, object_bytes):
    code, sentence = refusal(lambda: put(channel, begin(ANOTHER[0], object_bytes)))
    assert code is INVALID
    assert str(object_bytes) in sentence


def test_an_object_larger_than_the_store(process, client):
    before = counted(process, 'kvcodec_peer_puts_total{outcome="no_capacity"}')
    page_hash, data = make_page("large", 12_000_017)
    result = client.put(NAMESPACE, [(page_hash, data)])[0]
    assert result.outcome is PutOutcome.NO_CAPACITY
    assert str(len(data)) in result.detail
    assert client.stat().evicted_objects == 0
    assert counted(process, 'kvcodec_peer_puts_total{outcome="no_capacity"}') == before + 1


def test_more_bytes_than_announced(channel):
    page_hash, data = ANOTHER
    code, sentence = refusal(lambda: put(channel, begin(page_hash, len(data) - 1), chunk(data), COMMIT))
    assert code is INVALID
    assert "more than the announced" in sentence


# ---- not what it says ----


@pytest.mark.parametrize(
    ("page_hash", "data", "reason"),
    [
        (HASHES[0], ANOTHER[1], "foreign_page"),
        (bytes(32), ANOTHER[1], "foreign_page"),
        (ANOTHER[0], ANOTHER[1][:-1] + bytes([ANOTHER[1][-1] ^ 1]), "checksum"),
        (ANOTHER[0], ANOTHER[1][:-1], "truncated"),
        (ANOTHER[0], random.Random(4).randbytes(len(ANOTHER[1])), "unknown_format"),
    ],
    ids=["the hash of a stored page", "a hash of nothing", "a flipped bit", "cut", "noise"],
)
def test_an_object_that_is_not_what_its_key_says(process, client, page_hash, data, reason):
    before = counted(process, 'kvcodec_peer_puts_total{outcome="rejected"}')
    result = client.put(NAMESPACE, [(page_hash, data)])[0]
    assert result.outcome is PutOutcome.REJECTED
    assert result.detail.startswith(f"{reason}: ")
    assert client.lookup(NAMESPACE, [ANOTHER[0], bytes(32)]).present == (False, False)
    assert counted(process, 'kvcodec_peer_puts_total{outcome="rejected"}') == before + 1


# ---- a full disk ----


def fill(client):
    """Puts pages until one is refused; the stored ones, and the refused one with the peer's words for it."""
    stored = []
    for number in range(200):
        page_hash, data = make_page(f"filler {number}")
        result = client.put(NAMESPACE, [(page_hash, data)])[0]
        if result.outcome is not PutOutcome.STORED:
            assert result.outcome is PutOutcome.NO_CAPACITY
            return stored, (page_hash, data), result.detail
        stored.append((page_hash, data))
    raise AssertionError("the disk does not get full")


def check_full_disk(process, client, make_room):
    """Refuses puts, keeps what it has and serves it, and takes the refused page when there is room; even later."""
    stored, refused, sentence = fill(client)
    assert "failed" in sentence
    hashes, objects = [page_hash for page_hash, _ in stored], [data for _, data in stored]
    assert len(stored) > 5
    for _ in range(3):
        assert client.put(NAMESPACE, [refused])[0].outcome is PutOutcome.NO_CAPACITY
        assert fetch_all(client, hashes) == objects
    assert client.lookup(NAMESPACE, [*hashes, refused[0]]).covered_pages == len(stored)
    assert client.stat().evicted_objects == 0
    assert counted(process, 'kvcodec_peer_puts_total{outcome="no_capacity"}') == 4
    make_room()
    assert client.put(NAMESPACE, [refused])[0].outcome is PutOutcome.STORED
    process.kill()
    process.restart()
    client.wait_until_ready(60)
    assert fetch_all(client, [*hashes, refused[0]]) == [*objects, refused[1]]


def start(directory, *arguments):
    return PeerProcess(f"lmdb:{directory}", arguments=["--metrics-port", "0", *arguments])


def test_a_file_that_may_not_grow(tmp_path, connect):
    """The same as a full disk to LMDB, and needs no right to mount one."""
    with start(tmp_path / "store") as process:
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4 * MIB + 1234, limits[1]))
        check_full_disk(
            process,
            connect(process.remote),
            lambda: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits),
        )


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk(6)


def test_a_disk_that_gets_full(small_disk, connect):
    other = small_disk / "other"
    other.write_bytes(bytes(2 * MIB))
    with start(small_disk / "store") as process:
        check_full_disk(process, connect(process.remote), other.unlink)


def test_a_read_only_disk_is_refused_in_one_sentence_and_keeps_what_it_has(small_disk, connect, capfd):
    def remount(how: str, disk: pathlib.Path = small_disk) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

    with start(small_disk / "store") as process:
        connect(process.remote).put(NAMESPACE, PAGES)
        assert process.terminate() == 0
    remount("ro")
    capfd.readouterr()
    with pytest.raises(RuntimeError, match="exit status 2"):
        start(small_disk / "store")
    said = capfd.readouterr().err
    assert "Read-only" in said
    assert "Traceback" not in said
    remount("rw")
    with start(small_disk / "store") as process:
        assert fetch_all(connect(process.remote)) == [data for _, data in PAGES]
