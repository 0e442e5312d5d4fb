"""Waiting for bytes: in order, bounded, nothing lost."""

import asyncio

import pytest

from sglang_kvcodec.errors import CapacityError
from sglang_kvcodec.rpc.bandwidth import BandwidthLimit
from sglang_kvcodec.rpc.budget import ByteBudget


def test_who_comes_first_is_served_first():
    async def scenario():
        budget = ByteBudget(10)
        await budget.acquire(8, 60)
        order = []

        async def take(size_bytes):
            await budget.acquire(size_bytes, 60)
            order.append(size_bytes)

        waiting = [asyncio.create_task(take(9)), asyncio.create_task(take(1)), asyncio.create_task(take(2))]
        await asyncio.sleep(0)
        assert order == []
        budget.release(8)
        await asyncio.gather(*waiting[:2])
        assert order == [9, 1]
        budget.release(9)
        await waiting[2]
        assert budget.held_bytes == 3

    asyncio.run(scenario())


def test_too_much_and_too_late():
    async def scenario():
        budget = ByteBudget(10)
        with pytest.raises(CapacityError, match="more than"):
            await budget.acquire(11, 60)
        await budget.acquire(10, 60)
        with pytest.raises(CapacityError, match="busy"):
            await budget.acquire(1, 0)
        budget.release(10)
        assert budget.held_bytes == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("release_first", [False, True])
def test_who_is_cancelled_leaves_nothing(release_first):
    async def scenario():
        budget = ByteBudget(10)
        await budget.acquire(10, 60)
        first = asyncio.create_task(budget.acquire(10, 60))
        second = asyncio.create_task(budget.acquire(10, 60))
        await asyncio.sleep(0)
        if release_first:
            budget.release(10)
            first.cancel()
        else:
            first.cancel()
            budget.release(10)
        await second
        assert first.cancelled()
        assert budget.held_bytes == 10

    asyncio.run(scenario())


def test_bandwidth_adds_up_and_saves_what_makes_up_for_a_late_message(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sglang_kvcodec.rpc.bandwidth.time.monotonic", lambda: now[0])
    waits = []

    async def sleep(seconds):
        waits.append(round(seconds, 6))

    monkeypatch.setattr("sglang_kvcodec.rpc.bandwidth.asyncio.sleep", sleep)

    async def scenario():
        limit = BandwidthLimit(8_000_000)
        await limit.take(500_000)
        await limit.take(250_000)
        now[0] += 3600
        await limit.take(500_000)
        assert limit.message_bytes == 20_000

    asyncio.run(scenario())
    # After an hour it has saved up 10 ms.
    assert waits == [0.5, 0.75, 0.49]
