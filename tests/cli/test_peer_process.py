"""Real ``kvcodec serve`` processes: killed, restarted, drained."""

import random
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peer_kit import HASHES, NAMESPACE, PAGES, fetch_all, metrics_of

from sglang_kvcodec.errors import PeerRejectedError, PeerUnavailableError
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.peer_pb2_grpc import PeerStub
from sglang_kvcodec.rpc.server import SERVICE
from sglang_kvcodec.testing.peer import PeerProcess

READY_S = 30


def test_killed_in_the_middle_of_a_fetch_and_back(tmp_path, connect):
    # Slow, so that the fetch can't be over before the kill.
    with PeerProcess(f"lmdb:{tmp_path}/store", bandwidth_limit="1Mbps") as process:
        client = connect(process.remote)
        assert all(result.outcome is PutOutcome.STORED for result in client.put(NAMESPACE, PAGES))
        events = client.fetch(NAMESPACE, HASHES)
        for _ in range(len(PAGES) + 2):
            next(events)
        process.kill()
        with pytest.raises(PeerUnavailableError):
            list(events)
        with pytest.raises(PeerUnavailableError):
            client.lookup(NAMESPACE, HASHES)
    with PeerProcess(f"lmdb:{tmp_path}/store", port=int(process.address.rpartition(":")[2])):
        client.wait_until_ready(READY_S)
        assert client.lookup(NAMESPACE, HASHES).covered_pages == len(PAGES)
        assert fetch_all(client) == [data for _, data in PAGES]


def test_killed_in_the_middle_of_a_put_and_back(tmp_path, connect):
    with PeerProcess(f"lmdb:{tmp_path}/store") as process:
        client = connect(process.remote)
        received, killed = threading.Event(), threading.Event()
        (hash_a, data_a), (hash_b, data_b) = PAGES[:2]

        def steps():
            for page_hash, data in ((hash_a, data_a), (hash_b, data_b[:-1])):
                begin = pb.PutBegin(namespace_digest=NAMESPACE, page_hash=page_hash, object_bytes=len(data_a))
                yield pb.PutRequest(begin=begin)
                yield pb.PutRequest(chunk=data)
                if page_hash == hash_a:
                    yield pb.PutRequest(commit=True)
            received.set()
            killed.wait()

        with grpc.insecure_channel(process.address) as channel:
            call = PeerStub(channel).Put.future(steps())
            received.wait()
            while not client.lookup(NAMESPACE, [hash_a]).covered_pages:
                pass  # until the first object's commit has been served: the peer answers each question in turn
            process.kill()
            killed.set()
            assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
        process.restart()
        client.wait_until_ready(READY_S)
        assert client.lookup(NAMESPACE, [hash_a, hash_b]).present == (True, False)
        outcomes = [result.outcome for result in client.put(NAMESPACE, PAGES)]
        assert outcomes == [PutOutcome.ALREADY_STORED] + [PutOutcome.STORED] * 3
        assert fetch_all(client) == [data for _, data in PAGES]


MODEL = bytes(range(32, 64))
ARTIFACT = random.Random("artifact").randbytes(9_000_011)


def test_calibrations_outlive_a_kill(tmp_path, connect):
    with PeerProcess(f"lmdb:{tmp_path}/store") as process:
        client = connect(process.remote)
        digests = [client.put_calibration(MODEL, artifact) for artifact in (b"another", ARTIFACT)]
        client.put(NAMESPACE, PAGES)
        process.kill()
        process.restart()
        client.wait_until_ready(READY_S)
        assert client.get_calibration(MODEL) == ARTIFACT
        assert client.get_calibration(MODEL, digests[0]) == b"another"
        assert [entry.is_current for entry in client.list_calibrations()] == [False, True]
        assert client.lookup(NAMESPACE, HASHES).covered_pages == len(PAGES)


def test_killed_in_the_middle_of_a_calibration(tmp_path, connect):
    unfinished = tmp_path / "store" / "calibrations"
    with PeerProcess(f"lmdb:{tmp_path}/store", arguments=["--calibration-capacity", "10MB"]) as process:
        client = connect(process.remote)
        killed = threading.Event()

        def kill(moved_bytes, size_bytes):
            if killed.is_set():
                return
            while not any(path.stat().st_size for path in unfinished.glob("*.part")):
                pass  # until the first chunk, which is on its way, has reached the disk
            process.kill()
            killed.set()

        with pytest.raises(PeerUnavailableError):
            client.put_calibration(MODEL, ARTIFACT, kill)
        killed.wait()
        assert len(list(unfinished.glob("*.part"))) == 1
        process.restart()
        client.wait_until_ready(READY_S)
        assert list(unfinished.glob("*.part")) == []
        assert client.list_calibrations() == []
        # There is room for no second one of its size: the first holds none.
        client.put_calibration(MODEL, ARTIFACT)
        with pytest.raises(PeerRejectedError, match="never evicted"):
            client.put_calibration(MODEL, ARTIFACT[:-1])
        assert client.get_calibration(MODEL) == ARTIFACT


def test_sigterm_drains_and_exits_with_0(tmp_path, connect):
    with PeerProcess(f"lmdb:{tmp_path}/store", bandwidth_limit="20Mbps", arguments=["--grace", "60"]) as process:
        client = connect(process.remote)
        client.put(NAMESPACE, PAGES)
        events = client.fetch(NAMESPACE, HASHES)
        first = next(events)
        with grpc.insecure_channel(process.address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            process.signal_stop()
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            health.cancel()
        received = len(first.header) + sum(
            len(getattr(event, "data", getattr(event, "header", b""))) for event in events
        )
        assert received == sum(len(data) for _, data in PAGES)
        assert process.wait() == 0


def test_sigterm_ends_streams_after_the_grace(connect):
    with PeerProcess(bandwidth_limit="1Mbps", arguments=["--grace", "0.1"]) as process:
        client = connect(process.remote)
        client.put(NAMESPACE, PAGES)
        events = client.fetch(NAMESPACE, HASHES)
        next(events)
        process.signal_stop()
        with pytest.raises(PeerUnavailableError):
            list(events)
        assert process.wait() == 0


def test_two_peers_do_not_share_a_port(capfd):
    with PeerProcess() as process:
        port = int(process.address.rpartition(":")[2])
        with pytest.raises(RuntimeError, match="exit status 2"):
            PeerProcess(port=port)
    assert "can't listen" in capfd.readouterr().err


def test_metrics_are_served(connect):
    with PeerProcess(arguments=["--metrics-port", "0"]) as process:
        client = connect(process.remote)
        client.put(NAMESPACE, PAGES[:1])
        text = metrics_of(process)
    assert 'kvcodec_peer_puts_total{outcome="stored"} 1.0' in text
    assert "kvcodec_store_capacity_bytes 1.073741824e+09" in text
    assert process.ready_line.startswith(f"kvcodec peer ready on {process.address} store=memory: capacity=1073741824")
