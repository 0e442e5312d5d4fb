import pytest
from plugin.pool_kit import Cache

from sglang_kvcodec.plugin.set_aside import MAX_POOL_SHARE, SetAside


@pytest.mark.parametrize(
    ("free", "evictable", "fits"), [(300, 0, True), (299, 0, False), (250, 50, True), (60, 240, True), (60, 239, False)]
)
def test_a_prompt_has_room_beside_what_is_set_aside_for_it(free, evictable, fits):
    cache = Cache(1000)
    cache.token_to_kv_pool_allocator.free_slots = list(range(free))
    cache.evictable = evictable
    slots = SetAside(cache).allocate(100, 200)
    assert (slots is not None) == fits
    if slots is not None:
        assert slots.numel() == 100
        # No more is evicted than is needed for it.
        assert cache.evictable == min(evictable, evictable + free - 100)


def test_all_together_have_a_share_of_the_pool_at_most():
    cache = Cache(1000)
    aside = SetAside(cache)
    most = int(1000 * MAX_POOL_SHARE)
    first = aside.allocate(most - 10, 10)
    assert aside.allocate(11, 11) is None
    second = aside.allocate(10, 10)
    assert set(first.tolist()).isdisjoint(second.tolist())
    # One was taken by its request, the other is left.
    aside.over(most - 10, None)
    assert len(cache.token_to_kv_pool_allocator.free_slots) == 1000 - most
    aside.over(10, second)
    assert len(cache.token_to_kv_pool_allocator.free_slots) == 1000 - most + 10
    assert aside.allocate(most, 0) is not None
    aside.clear()
    assert aside.allocate(5, 0) is not None
