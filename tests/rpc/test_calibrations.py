"""Calibration artifacts between a client and a peer: round trips, and all that can go wrong on the way."""

import concurrent.futures
import contextlib
import os
import socket
import threading

import grpc
import pytest

from sglang_kvcodec import metrics, peer_metrics
from sglang_kvcodec.config import MAX_ARTIFACT_BYTES, Timeouts
from sglang_kvcodec.errors import CapacityError, PeerRejectedError, PeerTimeoutError, PeerUnavailableError
from sglang_kvcodec.format.digest import artifact_digest
from sglang_kvcodec.rpc import client as client_module
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.peer_pb2_grpc import PeerStub
from sglang_kvcodec.rpc.server import SERVICE
from sglang_kvcodec.storage.artifact_directory import DirectoryArtifactStore
from sglang_kvcodec.storage.artifact_memory import MemoryArtifactStore
from sglang_kvcodec.storage.artifacts import ArtifactStat
from sglang_kvcodec.testing.artifacts import make_artifact, make_model

MODEL = make_model("m")
CAPACITY_BYTES = 20_000_003
SIZE_BYTES = 3 * DEFAULT_MESSAGE_BYTES + 17
ARTIFACT = make_artifact("a", SIZE_BYTES)
DIGEST = artifact_digest(ARTIFACT)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
HASTY = Timeouts(connect_s=0.3, lookup_s=0.3, progress_s=0.3, fetch_s=20, put_s=20, calibration_s=20)


@pytest.fixture(params=["memory", "directory"])
def artifacts(request, tmp_path):
    """A store, of either kind."""
    if request.param == "memory":
        store = MemoryArtifactStore(CAPACITY_BYTES)
    else:
        store = DirectoryArtifactStore(tmp_path / "calibrations", CAPACITY_BYTES)
    with contextlib.closing(store):
        yield store


@pytest.fixture
def directory(tmp_path):
    """A store whose files are at hand, in ``tmp_path / "calibrations"``."""
    with contextlib.closing(DirectoryArtifactStore(tmp_path / "calibrations", CAPACITY_BYTES)) as store:
        yield store


@pytest.fixture
def start(start_peer, artifacts):
    return lambda limits=None: start_peer(limits, artifacts)


@pytest.fixture
def running(start):
    return start()


@pytest.fixture
def peer(running, connect):
    return connect(running.remote)


@pytest.fixture
def stub(running):
    """Any gRPC client, with the generated stub."""
    with grpc.insecure_channel(running.address) as channel:
        yield PeerStub(channel)


def value(metric):
    return metric._value.get()


def wait_until(condition, timeout_s=30):
    """For what another thread does without telling anyone."""
    tick = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


# ---- round trips ----


@pytest.mark.parametrize("size_bytes", [1, 4099, DEFAULT_MESSAGE_BYTES, 2 * DEFAULT_MESSAGE_BYTES + 1, 9_000_011])
def test_what_is_put_comes_back(peer, size_bytes):
    artifact = make_artifact("a", size_bytes)
    digest = peer.put_calibration(MODEL, artifact)
    assert digest == artifact_digest(artifact)
    assert peer.get_calibration(MODEL) == artifact
    assert peer.get_calibration(MODEL, digest) == artifact


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_buffer_is_put(peer, kind):
    peer.put_calibration(MODEL, kind(ARTIFACT))
    assert peer.get_calibration(MODEL) == ARTIFACT


def test_what_is_not_there(peer):
    assert peer.get_calibration(MODEL) is None
    peer.put_calibration(MODEL, ARTIFACT)
    assert peer.get_calibration(make_model("n")) is None
    assert peer.get_calibration(MODEL, bytes(32)) is None
    assert peer.get_calibration(make_model("n"), DIGEST) is None


def test_the_one_put_last_is_current_and_the_list_tells_all(peer, artifacts):
    assert peer.list_calibrations() == []
    first, second = make_artifact("first", 1009), make_artifact("second", 2003)
    for artifact in (first, second):
        peer.put_calibration(MODEL, artifact)
    peer.put_calibration(make_model("n"), first)
    assert peer.get_calibration(MODEL) == second
    assert peer.list_calibrations() == artifacts.entries()
    assert len(peer.list_calibrations()) == 3
    peer.put_calibration(MODEL, first)
    assert peer.get_calibration(MODEL) == first
    assert peer.delete_calibration(MODEL, artifact_digest(first)) is True
    assert peer.delete_calibration(MODEL, artifact_digest(first)) is False
    assert peer.get_calibration(MODEL) == second
    assert peer.get_calibration(make_model("n")) == first


def test_progress_is_told(peer):
    told = []
    peer.put_calibration(MODEL, ARTIFACT, lambda *numbers: told.append(numbers))
    steps = [DEFAULT_MESSAGE_BYTES, 2 * DEFAULT_MESSAGE_BYTES, 3 * DEFAULT_MESSAGE_BYTES, SIZE_BYTES]
    assert told == [(step, SIZE_BYTES) for step in steps]
    told.clear()
    peer.get_calibration(MODEL, progress=lambda *numbers: told.append(numbers))
    assert told == [(step, SIZE_BYTES) for step in steps]


def test_the_messages_of_a_get_are_bounded(peer, stub):
    peer.put_calibration(MODEL, ARTIFACT)
    first, *others = stub.GetCalibration(pb.GetCalibrationRequest(model_digest=MODEL))
    assert (first.begin.digest, first.begin.size_bytes) == (DIGEST, SIZE_BYTES)
    assert [len(other.chunk) for other in others] == [DEFAULT_MESSAGE_BYTES] * 3 + [17]


def test_calls_and_bytes_are_counted(peer):
    counters = [
        peer_metrics.PEER_CALIBRATION_RECEIVED_BYTES,
        peer_metrics.PEER_CALIBRATION_SENT_BYTES,
        peer_metrics.PEER_RPCS.labels("PutCalibration", "OK"),
        peer_metrics.PEER_RPCS.labels("GetCalibration", "OK"),
        peer_metrics.PEER_RPCS.labels("GetCalibration", "NOT_FOUND"),
    ]
    before = [value(counter) for counter in counters]
    peer.put_calibration(MODEL, ARTIFACT)
    peer.get_calibration(MODEL)
    peer.get_calibration(MODEL, bytes(32))
    grown = [SIZE_BYTES, SIZE_BYTES, 1, 1, 1]
    # The peer counts when it has answered.
    wait_until(lambda: [value(c) - start for c, start in zip(counters, before, strict=True)] == grown)
    assert value(peer_metrics.STORE_CALIBRATIONS) == 1
    assert value(peer_metrics.STORE_CALIBRATION_BYTES) == SIZE_BYTES
    assert value(peer_metrics.STORE_CALIBRATION_CAPACITY_BYTES) == CAPACITY_BYTES
    peer.delete_calibration(MODEL, DIGEST)
    assert value(peer_metrics.STORE_CALIBRATION_BYTES) == 0


def test_many_clients_at_once(start, connect, artifacts):
    remote = start().remote
    models = [make_model(i) for i in range(3)]
    contents = [make_artifact(i, DEFAULT_MESSAGE_BYTES + 1000 * i) for i in range(3)]

    def work(thread):
        client = connect(remote)
        for i in range(6):
            model, artifact = models[(i + thread) % 3], contents[(i * i + thread) % 3]
            assert client.put_calibration(model, artifact) == artifact_digest(artifact)
            assert client.get_calibration(model) in contents
            assert client.get_calibration(model, artifact_digest(artifact)) == artifact

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, thread) for thread in range(4)]:
            done.result()
    entries = artifacts.entries()
    assert artifacts.stat() == ArtifactStat(len(entries), sum(e.size_bytes for e in entries), CAPACITY_BYTES)


# ---- requests ----


def begin(model=MODEL, digest=DIGEST, size_bytes=SIZE_BYTES):
    return pb.PutCalibrationRequest(
        begin=pb.PutCalibrationBegin(model_digest=model, digest=digest, size_bytes=size_bytes)
    )


def chunks(artifact=ARTIFACT):
    return [
        pb.PutCalibrationRequest(chunk=artifact[start : start + 500_000]) for start in range(0, len(artifact), 500_000)
    ]


COMMIT = pb.PutCalibrationRequest(commit=True)


def refused(code, call, *args):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    assert caught.value.code() is code
    assert caught.value.details()
    return caught.value.details()


STEPS = {
    "nothing": [],
    "no begin": [*chunks(), COMMIT],
    "commit first": [COMMIT],
    "empty step first": [pb.PutCalibrationRequest()],
    "empty step": [begin(), *chunks(), pb.PutCalibrationRequest()],
    "two begins": [begin(), begin(), *chunks(), COMMIT],
    "commit that is none": [begin(), *chunks(), pb.PutCalibrationRequest(commit=False)],
    "no commit": [begin(), *chunks()],
    "commit too early": [begin(), *chunks()[:-1], COMMIT],
    "nothing but a commit": [begin(), COMMIT],
    "more than announced": [begin(), *chunks(), pb.PutCalibrationRequest(chunk=b"x"), COMMIT],
    "empty chunk": [begin(), pb.PutCalibrationRequest(chunk=b""), *chunks(), COMMIT],
    "other bytes": [begin(), *chunks(ARTIFACT[:-1] + b"?"), COMMIT],
    "another digest": [begin(digest=bytes(32)), *chunks(), COMMIT],
    "short model": [begin(model=MODEL[1:]), *chunks(), COMMIT],
    "no model": [begin(model=b""), *chunks(), COMMIT],
    "long digest": [begin(digest=DIGEST + b"x"), *chunks(), COMMIT],
    "no digest": [begin(digest=b""), *chunks(), COMMIT],
    "empty": [begin(size_bytes=0), COMMIT],
    "too large": [begin(size_bytes=MAX_ARTIFACT_BYTES + 1), *chunks(), COMMIT],
    "far too large": [begin(size_bytes=2**64 - 1), *chunks(), COMMIT],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_what_is_no_put_stores_nothing(stub, artifacts, steps, tmp_path):
    refused(INVALID, stub.PutCalibration, iter(steps))
    assert artifacts.stat() == ArtifactStat(0, 0, CAPACITY_BYTES)
    assert not list(tmp_path.glob("**/*.part"))
    # Nor does it hold any room.
    assert has_room(artifacts, CAPACITY_BYTES)


def test_bytes_sent_singly(stub, artifacts):
    artifact = make_artifact("a", 331)
    pieces = [pb.PutCalibrationRequest(chunk=artifact[i : i + 1]) for i in range(len(artifact))]
    stub.PutCalibration(iter([begin(digest=artifact_digest(artifact), size_bytes=331), *pieces, COMMIT]))
    assert artifacts.current(MODEL) == artifact_digest(artifact)


@pytest.mark.parametrize("method", ["PutCalibration", "GetCalibration", "ListCalibrations", "DeleteCalibration"])
def test_garbage_bytes(running, peer, method):
    with grpc.insecure_channel(running.address) as channel:
        path, garbage = f"/{SERVICE}/{method}", b"\xff" * 50
        calls = {
            "PutCalibration": lambda: channel.stream_unary(path)(iter([garbage])),
            "GetCalibration": lambda: list(channel.unary_stream(path)(garbage)),
        }
        refused(INVALID, calls.get(method, lambda: channel.unary_unary(path)(garbage)))
    peer.put_calibration(MODEL, ARTIFACT)


@pytest.mark.parametrize("name", [bytes(31), bytes(33), b"../../../../../../../etc/passwd"])
def test_names_that_are_none(peer, name):
    for call in (
        lambda: peer.put_calibration(name, ARTIFACT),
        lambda: peer.get_calibration(name),
        lambda: peer.get_calibration(MODEL, name),
        lambda: peer.delete_calibration(name, DIGEST),
        lambda: peer.delete_calibration(MODEL, name),
        lambda: peer.delete_calibration(MODEL, b""),
    ):
        with pytest.raises(PeerRejectedError, match="32 bytes"):
            call()


def test_sizes_that_no_peer_takes_are_not_sent(peer, monkeypatch):
    counter = peer_metrics.PEER_RPCS.labels("PutCalibration", "INVALID_ARGUMENT")
    before = value(counter)
    monkeypatch.setattr(client_module, "MAX_ARTIFACT_BYTES", 100)
    for artifact in (b"", bytes(101)):
        with pytest.raises(PeerRejectedError, match="1 to 100 bytes"):
            peer.put_calibration(MODEL, artifact)
    assert value(counter) == before
    peer.put_calibration(MODEL, bytes(100))


# ---- the store ----


def test_a_full_store(peer):
    peer.put_calibration(MODEL, ARTIFACT)
    with pytest.raises(PeerRejectedError, match=r"never evicted.*RESOURCE_EXHAUSTED"):
        peer.put_calibration(MODEL, bytes(CAPACITY_BYTES - SIZE_BYTES + 1))
    assert peer.get_calibration(MODEL) == ARTIFACT
    peer.delete_calibration(MODEL, DIGEST)
    peer.put_calibration(MODEL, bytes(CAPACITY_BYTES))


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_disk_that_is_full_refuses_the_put_and_serves_on(directory, start_peer, connect, monkeypatch, failing):
    peer = connect(start_peer(None, directory).remote)
    peer.put_calibration(MODEL, ARTIFACT)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{failing}", fail)
        with pytest.raises(PeerRejectedError, match="No space left"):
            peer.put_calibration(MODEL, b"another")
    assert peer.get_calibration(MODEL) == ARTIFACT
    assert len(peer.list_calibrations()) == 1
    peer.put_calibration(MODEL, b"another")


def test_a_damaged_file_is_a_miss_counted_and_removed(directory, start_peer, connect, tmp_path):
    peer = connect(start_peer(None, directory).remote)
    peer.put_calibration(MODEL, b"the one before")
    peer.put_calibration(MODEL, ARTIFACT)
    path = tmp_path / "calibrations" / MODEL.hex() / DIGEST.hex()
    damaged = bytearray(ARTIFACT)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    counter = peer_metrics.STORE_CALIBRATIONS_DAMAGED.labels("checksum")
    before = value(counter)
    assert peer.get_calibration(MODEL, DIGEST) is None
    assert value(counter) == before + 1
    assert not path.exists()
    assert peer.get_calibration(MODEL) == b"the one before"
    assert value(peer_metrics.STORE_CALIBRATIONS) == 1
    peer.put_calibration(MODEL, ARTIFACT)
    assert peer.get_calibration(MODEL) == ARTIFACT


def test_a_disk_that_fails_is_no_miss(directory, start_peer, connect, tmp_path, monkeypatch):
    peer = connect(start_peer(None, directory).remote)
    peer.put_calibration(MODEL, ARTIFACT)

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.open", fail)
        with pytest.raises(PeerUnavailableError, match="Input/output error"):
            peer.get_calibration(MODEL)
    assert peer.get_calibration(MODEL) == ARTIFACT


# ---- clients that go, or say nothing ----


def is_idle(running):
    return running.server._calibrations._stream.open_streams == 0


def test_a_client_that_goes_in_the_middle_of_a_put(running, stub, artifacts, tmp_path):
    sent, gone = threading.Event(), threading.Event()

    def steps():
        yield from [begin(), *chunks()[:-1]]
        sent.set()
        gone.wait()

    before = value(peer_metrics.PEER_CALIBRATION_RECEIVED_BYTES)
    call = stub.PutCalibration.future(steps())
    sent.wait()
    sent_bytes = sum(len(step.chunk) for step in chunks()[:-1])
    wait_until(lambda: value(peer_metrics.PEER_CALIBRATION_RECEIVED_BYTES) == before + sent_bytes)
    assert not has_room(artifacts, CAPACITY_BYTES)
    call.cancel()
    gone.set()
    wait_until(lambda: is_idle(running) and has_room(artifacts, CAPACITY_BYTES))
    assert artifacts.stat() == ArtifactStat(0, 0, CAPACITY_BYTES)
    assert not list(tmp_path.glob("**/*.part"))


def has_room(artifacts, size_bytes):
    try:
        artifacts.receive(MODEL, bytes(32), size_bytes).abort()
    except CapacityError:
        return False
    return True


def test_a_client_that_goes_in_the_middle_of_a_get(running, peer, stub):
    peer.put_calibration(MODEL, bytes(CAPACITY_BYTES))
    call = stub.GetCalibration(pb.GetCalibrationRequest(model_digest=MODEL))
    for _ in range(3):
        next(call)
    call.cancel()
    wait_until(lambda: is_idle(running))
    assert peer.get_calibration(MODEL) == bytes(CAPACITY_BYTES)


def test_a_client_that_falls_silent(start, artifacts):
    silent = threading.Event()

    def steps():
        yield from [begin(), *chunks()[:1]]
        silent.wait()

    with grpc.insecure_channel(start(PeerLimits(idle_s=0.2)).address) as channel:
        call = PeerStub(channel).PutCalibration.future(steps())
        assert "no message within 0.2 s" in refused(grpc.StatusCode.DEADLINE_EXCEEDED, call.result)
        silent.set()
    assert has_room(artifacts, CAPACITY_BYTES)


def test_too_many_streams(start, connect, artifacts):
    running = start(PeerLimits(max_streams=1))
    client = connect(running.remote)
    ended = threading.Event()

    def steps():
        yield begin()
        ended.wait()
        yield from [*chunks(), COMMIT]

    with grpc.insecure_channel(running.address) as channel:
        call = PeerStub(channel).PutCalibration.future(steps())
        wait_until(lambda: not is_idle(running))
        with pytest.raises(PeerRejectedError, match="streams"):
            client.get_calibration(MODEL)
        assert client.list_calibrations() == []
        # Pages have streams of their own.
        assert list(client.fetch(bytes(32), [bytes(32)]))
        ended.set()
        assert call.result().digest == DIGEST
    assert client.get_calibration(MODEL) == ARTIFACT


def test_deleted_while_it_is_sent(running, peer, stub):
    peer.put_calibration(MODEL, ARTIFACT)
    call = stub.GetCalibration(pb.GetCalibrationRequest(model_digest=MODEL))
    received = [next(call), next(call)]
    peer.delete_calibration(MODEL, DIGEST)
    received += call
    assert b"".join(each.chunk for each in received) == ARTIFACT


# ---- peers that go, say nothing, or lie ----


def every_call(client):
    return {
        "put": lambda: client.put_calibration(MODEL, ARTIFACT),
        "get": lambda: client.get_calibration(MODEL),
        "list": client.list_calibrations,
        "delete": lambda: client.delete_calibration(MODEL, DIGEST),
    }


CALLS = ["put", "get", "list", "delete"]


@pytest.mark.parametrize("call", CALLS)
def test_nobody_there(connect, call):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"grpc://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(PeerUnavailableError):
        every_call(connect(address))[call]()


@pytest.mark.parametrize("call", CALLS)
def test_somebody_who_never_answers(connect, call):
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = connect(f"grpc://127.0.0.1:{server.getsockname()[1]}", HASTY)
        with pytest.raises((PeerUnavailableError, PeerTimeoutError)):
            every_call(client)[call]()


@pytest.mark.parametrize("call", CALLS)
def test_a_peer_without_calibrations(start_peer, connect, call):
    with pytest.raises(PeerRejectedError, match="UNIMPLEMENTED"):
        every_call(connect(start_peer().remote))[call]()


class Liar:
    """A peer that answers each RPC with messages of the test's choice, then waits if it is to."""

    def __init__(self, answers, stalls=False):
        self.ended = threading.Event()

        def respond(request, context):
            yield from answers
            if stalls:
                self.ended.wait()

        def collect(requests, context):
            for _ in requests:
                pass
            return next(respond(None, context))

        handlers = {
            "GetCalibration": grpc.unary_stream_rpc_method_handler(respond),
            "ListCalibrations": grpc.unary_unary_rpc_method_handler(lambda *args: next(respond(*args))),
            "PutCalibration": grpc.stream_unary_rpc_method_handler(collect),
        }
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.remote = f"grpc://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()


@pytest.fixture
def lie():
    with contextlib.ExitStack() as stack:

        def make(answers, **kwargs):
            liar = Liar([answer.SerializeToString() for answer in answers], **kwargs)
            stack.callback(lambda: liar.server.stop(0).wait())
            stack.callback(liar.ended.set)
            return liar.remote

        yield make


def got_begin(digest=DIGEST, size_bytes=SIZE_BYTES):
    return pb.GetCalibrationResponse(begin=pb.GetCalibrationBegin(digest=digest, size_bytes=size_bytes))


def got_chunks(artifact=ARTIFACT):
    return [
        pb.GetCalibrationResponse(chunk=artifact[start : start + 500_000]) for start in range(0, len(artifact), 500_000)
    ]


LIES = {
    "nothing": [],
    "no begin": got_chunks(),
    "two begins": [got_begin(), got_begin(), *got_chunks()],
    "an empty message": [got_begin(), *got_chunks(), pb.GetCalibrationResponse()],
    "an empty chunk": [got_begin(), pb.GetCalibrationResponse(chunk=b""), *got_chunks()],
    "no bytes": [got_begin()],
    "fewer bytes": [got_begin(), *got_chunks()[:-1]],
    "more bytes": [got_begin(), *got_chunks(), pb.GetCalibrationResponse(chunk=b"x")],
    "other bytes": [got_begin(), *got_chunks(ARTIFACT[:-1] + b"?")],
    "another digest": [got_begin(digest=bytes(32)), *got_chunks()],
    "another artifact": [got_begin(digest=artifact_digest(b"another"), size_bytes=7), *got_chunks(b"another")],
    "a short digest": [got_begin(digest=DIGEST[:-1]), *got_chunks()],
    "no size": [got_begin(size_bytes=0)],
    "too large": [got_begin(size_bytes=MAX_ARTIFACT_BYTES + 1), *got_chunks()],
    "far too large": [got_begin(size_bytes=2**64 - 1), *got_chunks()],
    "not a message": [pb.ListCalibrationsResponse(calibrations=[pb.Calibration(size_bytes=2)])],
}


@pytest.mark.parametrize("answers", LIES.values(), ids=LIES)
def test_what_is_no_artifact_is_refused_and_counted(lie, connect, answers):
    counter = metrics.PEER_ERRORS.labels("getcalibration", "peer_rejected")
    before = value(counter)
    with pytest.raises(PeerRejectedError, match="senseless answer"):
        connect(lie(answers)).get_calibration(MODEL, DIGEST)
    assert value(counter) == before + 1


def test_the_truth_is_believed(lie, connect):
    assert connect(lie([got_begin(), *got_chunks()])).get_calibration(MODEL, DIGEST) == ARTIFACT


@pytest.mark.parametrize(
    "entry",
    [
        pb.Calibration(model_digest=MODEL, digest=DIGEST, size_bytes=0),
        pb.Calibration(model_digest=MODEL, digest=DIGEST, size_bytes=MAX_ARTIFACT_BYTES + 1),
        pb.Calibration(model_digest=MODEL, digest=DIGEST + b"x", size_bytes=1),
        pb.Calibration(digest=DIGEST, size_bytes=1),
        pb.Calibration(model_digest=MODEL, digest=DIGEST, size_bytes=1, stored_at_ms=2**64 - 1),
    ],
)
def test_a_list_of_nonsense(lie, connect, entry):
    with pytest.raises(PeerRejectedError, match="senseless answer"):
        connect(lie([pb.ListCalibrationsResponse(calibrations=[entry])])).list_calibrations()


def test_a_put_that_stored_something_else(lie, connect):
    with pytest.raises(PeerRejectedError, match="another calibration"):
        connect(lie([pb.PutCalibrationResponse(digest=bytes(32))])).put_calibration(MODEL, ARTIFACT)


def test_a_peer_that_stalls_in_a_get(lie, connect):
    client = connect(lie([got_begin(), *got_chunks()[:2]], stalls=True), HASTY)
    with pytest.raises(PeerTimeoutError, match=r"GetCalibration .* silent for 0\.3 s"):
        client.get_calibration(MODEL)


def test_a_peer_that_stalls_in_a_put(directory, start_peer, connect, monkeypatch):
    running = start_peer(None, directory)
    client = connect(running.remote, HASTY)
    client.list_calibrations()
    opened = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: opened.wait())
        with pytest.raises(PeerTimeoutError, match=r"PutCalibration .* silent for 0\.3 s"):
            client.put_calibration(MODEL, ARTIFACT)
        opened.set()
        wait_until(lambda: is_idle(running))


@pytest.mark.parametrize("call", ["put", "get"])
def test_close_ends_calls_under_way(directory, start_peer, connect, monkeypatch, call):
    running = start_peer(None, directory)
    connect(running.remote).put_calibration(MODEL, ARTIFACT)
    client = connect(running.remote)
    reached, opened = threading.Event(), threading.Event()
    name = "write" if call == "put" else "fdopen"
    original = getattr(os, name)

    def slow(*args):
        reached.set()
        opened.wait()
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{name}", slow)
        closer = threading.Thread(target=lambda: (reached.wait(), client.close()))
        closer.start()
        calls = every_call(client)
        with pytest.raises(PeerUnavailableError):
            calls[call]()
        closer.join()
        opened.set()
        wait_until(lambda: is_idle(running))
    for later in calls.values():
        with pytest.raises(PeerUnavailableError):
            later()


@pytest.mark.parametrize("call", ["put", "get"])
def test_a_peer_that_stops_in_the_middle(running, connect, artifacts, tmp_path, call):
    client = connect(running.remote)
    client.put_calibration(MODEL, ARTIFACT)

    def stop(moved_bytes, size_bytes):
        running.stop()

    large = make_artifact("large", CAPACITY_BYTES - SIZE_BYTES)
    if call == "get":
        client.delete_calibration(MODEL, DIGEST)
        client.put_calibration(MODEL, large)
    calls = {
        "put": lambda: client.put_calibration(MODEL, large, stop),
        "get": lambda: client.get_calibration(MODEL, progress=stop),
    }
    with pytest.raises(PeerUnavailableError):
        calls[call]()
    running.stop()
    assert artifacts.current(MODEL) == (DIGEST if call == "put" else artifact_digest(large))
    assert artifacts.stat().artifacts == 1
    assert not list(tmp_path.glob("**/*.part"))
