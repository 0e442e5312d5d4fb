"""What one client may take, in streams, bytes and time."""

import asyncio
import contextlib
import time

import grpc
import pytest

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import CapacityError, ClientLimitError
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.shares import ClientBandwidth, ClientBudgets, StreamSlots


def refused(reason):
    return peer_metrics.PEER_REFUSED.labels(reason)._value.get()


def test_default_limits_leave_room_for_others():
    for streams in (1, 2, 3, 4, 256):
        of_one = PeerLimits(max_streams=streams).streams_of_a_client
        assert 1 <= of_one <= streams
        assert of_one < streams or streams < 4
    limits = PeerLimits()
    assert limits.receive_bytes_of_a_client * 2 == limits.receive_bytes
    assert PeerLimits(receive_bytes=1000).receive_bytes_of_a_client == 1000


def test_streams_of_a_client_and_of_all():
    async def run():
        slots = StreamSlots(3, 2)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(slots("Put", "a"))
            before = refused("client_streams"), refused("streams")
            with pytest.raises(ClientLimitError):
                async with slots("Fetch", "a"):
                    pass
            await stack.enter_async_context(slots("Fetch", "b"))
            with pytest.raises(CapacityError):
                async with slots("Fetch", "c"):
                    pass
            assert (refused("client_streams"), refused("streams")) == (before[0] + 1, before[1] + 1)
        assert slots.open_streams == 0
        assert not slots._of_client
        async with slots("Put", "a"):
            assert slots.open_streams == 1

    asyncio.run(run())


def test_budgets_are_each_clients_own_and_forgotten_when_idle():
    async def run():
        budgets = ClientBudgets(100)
        await budgets.acquire("a", 80, 60)
        await budgets.acquire("b", 80, 60)
        before = refused("client_bytes")
        with pytest.raises(ClientLimitError):
            await budgets.acquire("a", 30, 0.01)
        assert refused("client_bytes") == before + 1
        waiting = asyncio.create_task(budgets.acquire("a", 30, 60))
        await asyncio.sleep(0)
        budgets.release("a", 80)
        await waiting
        budgets.release("a", 30)
        budgets.release("b", 80)
        with pytest.raises(CapacityError):
            await budgets.acquire("c", 101, 60)
        assert not budgets._budgets

    asyncio.run(run())


def test_bandwidth_is_each_clients_own_and_its_delay_bounded():
    async def run():
        bandwidth = ClientBandwidth(8_000)  # 1000 bytes a second
        started_s = time.monotonic()
        held = asyncio.create_task(bandwidth.take("a", 60_000))
        await asyncio.sleep(0)
        await bandwidth.take("b", 10)
        assert not held.done()
        before = refused("client_bandwidth")
        with pytest.raises(ClientLimitError, match="of its bandwidth under way"):
            await bandwidth.take("a", 1)
        assert refused("client_bandwidth") == before + 1
        held.cancel()
        assert time.monotonic() - started_s >= 0.01
        await ClientBandwidth(None).take("a", 1 << 60)

    asyncio.run(run())


def test_an_object_that_comes_byte_by_byte_is_given_up(start_peer, connect, namespace, page):
    """Each message is in time, the object is not: it would hold its memory for days."""
    started = start_peer(PeerLimits(idle_s=60, object_s=0.5, receive_bytes=1 << 20, receive_wait_s=60))
    page_hash, data = page("a")
    before = refused("slow")

    def messages():
        begin = pb.PutBegin(namespace_digest=namespace, page_hash=page_hash, object_bytes=1 << 20)
        yield pb.PutRequest(begin=begin).SerializeToString()
        while True:
            time.sleep(0.02)
            yield pb.PutRequest(chunk=b"x").SerializeToString()

    with grpc.insecure_channel(started.address) as channel:
        put = channel.stream_unary("/sglang_kvcodec.rpc.Peer/Put", None, None)
        call = put.future(messages(), timeout=60)
        # Somebody else's waits for that memory, and gets it.
        assert connect(started.remote).put(namespace, [(page_hash, data)])
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "not complete within" in call.details()
    assert refused("slow") == before + 1
