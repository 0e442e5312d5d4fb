"""A real peer on a machine whose clock jumps, or whose disk fails or waits: what its clients see, and what goes on."""

import contextlib
import errno
import threading

import grpc
import pytest
from bad_machine import BadMachine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peer_kit import HASHES, NAMESPACE, PAGES, fetch_all, make_page, metrics_of

from sglang_kvcodec.errors import PeerRejectedError, PeerUnavailableError
from sglang_kvcodec.format.exchange import FetchedHeader, PutOutcome
from sglang_kvcodec.rpc.admin_client import PeerAdmin
from sglang_kvcodec.testing.peer import PeerProcess

OBJECTS = [data for _, data in PAGES]
ANOTHER = make_page("another")
MODEL = bytes(32)
YEAR_S = 365 * 86_400


@pytest.fixture
def machine(tmp_path):
    return BadMachine(tmp_path)


@pytest.fixture
def start(machine):
    """Starts peers on the machine."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(machine.here())

        def make(*arguments):
            arguments = ["--metrics-port", "0", "--log-level", "error", *arguments]
            return stack.enter_context(PeerProcess(f"lmdb:{machine.disk}/store", arguments=arguments))

        yield make


def is_ready(process):
    with grpc.insecure_channel(process.address) as channel:
        request = health_pb2.HealthCheckRequest(service="sglang_kvcodec.rpc.Peer")
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status
    return status == health_pb2.HealthCheckResponse.SERVING


def put(client, page):
    return client.put(NAMESPACE, [page])[0]


# ---- the clock ----


@pytest.mark.parametrize("jump_s", [10 * YEAR_S, -10 * YEAR_S], ids=["forward", "back"])
def test_the_clock_jumps(machine, start, connect, jump_s):
    """Nothing waits by it and nothing is in order by it: a Fetch goes on, all is kept, what is put last is newest."""
    process = start()
    client = connect(process.remote)
    client.put(NAMESPACE, PAGES)
    before = [client.put_calibration(MODEL, b"%d" % number) for number in range(2)]
    events = client.fetch(NAMESPACE, HASHES)
    received = [next(events) for _ in range(6)]
    machine.set_clock(jump_s)
    received += events
    sizes = [len(event.header) if isinstance(event, FetchedHeader) else len(event.data) for event in received]
    assert sum(sizes) == sum(map(len, OBJECTS))
    assert put(client, ANOTHER).outcome is PutOutcome.STORED
    after = [client.put_calibration(MODEL, b"%d" % number) for number in range(2, 4)]
    for _ in range(2):
        assert fetch_all(client) == OBJECTS
        assert client.lookup(NAMESPACE, [*HASHES, ANOTHER[0]]).covered_pages == 5
        assert client.get_calibration(MODEL) == b"3"
        assert is_ready(process)
        admin = PeerAdmin(client)
        assert {page.key.page_hash for page in admin.pages()} == {*HASHES, ANOTHER[0]}
        admin.close()
        process.kill()
        process.restart()
        client.wait_until_ready(60)
    # Of two that are put after it the first is before the second still, and after what was put in another time.
    for digest, next_newest in zip([*after[::-1], before[1]], (b"2", b"1", b"0"), strict=True):
        client.delete_calibration(MODEL, digest)
        assert client.get_calibration(MODEL) == next_newest


def test_the_clock_jumps_where_pages_have_a_time_to_live(machine, start, connect):
    """What would have expired by the new clock is gone, which is a miss; what is put by it is not kept for less."""
    process = start("--ttl", "3600")
    client = connect(process.remote)
    client.put(NAMESPACE, PAGES)
    machine.set_clock(7200)
    assert client.lookup(NAMESPACE, HASHES).covered_pages == 0
    assert [result.outcome for result in client.put(NAMESPACE, PAGES)] == [PutOutcome.STORED] * 4
    machine.set_clock(0)
    assert fetch_all(client) == OBJECTS
    machine.set_clock(-YEAR_S)
    assert fetch_all(client) == OBJECTS
    assert is_ready(process)


# ---- the disk ----


def test_a_disk_that_hangs(machine, start, connect):
    """Puts wait for it, nothing else does; they end when it goes on."""
    process = start()
    client = connect(process.remote)
    client.put(NAMESPACE, PAGES)
    results = []
    with machine.stuck_disk() as wait_for_sync:
        putting = threading.Thread(target=lambda: results.append(put(client, ANOTHER)))
        putting.start()
        wait_for_sync()
        for _ in range(3):
            assert fetch_all(client) == OBJECTS
            # Not yet: it is there when it is on the disk.
            assert client.lookup(NAMESPACE, [*HASHES, ANOTHER[0]]).covered_pages == 4
            assert client.stat().objects == 4
        assert is_ready(process)
        assert results == []
    putting.join()
    assert results[0].outcome is PutOutcome.STORED
    assert fetch_all(client, [ANOTHER[0]]) == [ANOTHER[1]]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_disk_that_takes_no_writes_any_more(machine, start, connect, number):
    """Puts are refused in words, what is there is served; when the disk takes writes again, so does the peer."""
    process = start()
    client = connect(process.remote)
    client.put(NAMESPACE, PAGES)
    client.put_calibration(MODEL, b"calibration")
    with machine.failing_writes(number):
        for _ in range(3):
            refused = put(client, ANOTHER)
            assert refused.outcome is PutOutcome.NO_CAPACITY
            assert "failed" in refused.detail
            assert fetch_all(client) == OBJECTS
        with pytest.raises(PeerUnavailableError):
            client.delete(NAMESPACE, HASHES)
        with pytest.raises(PeerRejectedError, match="RESOURCE_EXHAUSTED"):
            client.put_calibration(MODEL, b"another")
        assert client.get_calibration(MODEL) == b"calibration"
        assert client.lookup(NAMESPACE, [*HASHES, ANOTHER[0]]).covered_pages == 4
        assert is_ready(process)
    assert put(client, ANOTHER).outcome is PutOutcome.STORED
    client.put_calibration(MODEL, b"another")
    process.kill()
    process.restart()
    client.wait_until_ready(60)
    assert fetch_all(client, [*HASHES, ANOTHER[0]]) == [*OBJECTS, ANOTHER[1]]
    assert client.get_calibration(MODEL) == b"another"
    assert 'status="UNKNOWN"' not in metrics_of(process)
