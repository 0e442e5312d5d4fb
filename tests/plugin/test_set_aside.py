import pytest
from plugin.pool_kit import Cache, Restorer, set_aside

from sglang_kvcodec.plugin.set_aside import MAX_POOL_SHARE


class Over:
    """What was given slots."""

    def __init__(self, slots, is_idle=True, bad_pages=()):
        self._slots, self.is_idle, self.bad_pages, self.was_waited_for = slots, is_idle, bad_pages, False

    def leftover(self):
        return self._slots

    def wait(self):
        self.was_waited_for = True


def free_slots(cache):
    return len(cache.token_to_kv_pool_allocator.free_slots)


@pytest.mark.parametrize(
    ("free", "evictable", "fits"), [(300, 0, True), (299, 0, False), (250, 50, True), (60, 240, True), (60, 239, False)]
)
def test_a_prompt_has_room_beside_what_is_set_aside_for_it(free, evictable, fits):
    cache = Cache(1000)
    cache.token_to_kv_pool_allocator.free_slots = list(range(free))
    cache.evictable = evictable
    slots = set_aside(cache, Restorer()).allocate(100, 200)
    assert (slots is not None) == fits
    if slots is not None:
        assert slots.numel() == 100
        # No more is evicted than is needed for it.
        assert cache.evictable == min(evictable, evictable + free - 100)


def test_all_together_have_a_share_of_the_pool_at_most():
    cache = Cache(1000)
    aside = set_aside(cache, Restorer())
    most = int(1000 * MAX_POOL_SHARE)
    first = aside.allocate(most - 10, 10)
    assert aside.allocate(11, 11) is None
    second = aside.allocate(10, 10)
    assert set(first.tolist()).isdisjoint(second.tolist())
    # One was taken by its request, the other is left.
    aside.close(Over(None), most - 10)
    assert free_slots(cache) == 1000 - most
    aside.close(Over(second), 10)
    assert free_slots(cache) == 1000 - most + 10
    assert aside.allocate(most, 0) is not None
    aside.reset()
    assert aside.allocate(5, 0) is not None


def test_slots_are_free_when_no_rank_writes_to_them_any_more():
    cache, bad, others = Cache(1000), [], [1]
    aside = set_aside(
        cache, Restorer(), lambda mine: [min(*pair) for pair in zip(mine, others, strict=True)], bad.extend
    )
    over = Over(aside.allocate(100, 0), is_idle=False, bad_pages=["bad"])
    aside.close(over, 100)
    assert aside.has_pending
    over.is_idle, others[:] = True, [0]
    aside.reap()
    assert (free_slots(cache), bad) == (900, [])
    others[:] = [1]
    aside.reap()
    assert (free_slots(cache), bad) == (1000, ["bad"])
    assert not aside.has_pending


def test_restores_begin_after_what_the_device_does_now_and_nobody_waits_for_them():
    restorer = Restorer()
    start = set_aside(Cache(), restorer).restores()
    # The stand-in looks at the rest.
    assert start(["job"], "on layers", "on failure") is restorer.restores[0]


def test_a_flush_waits_for_what_is_written():
    aside = set_aside(Cache(), Restorer())
    over = Over(aside.allocate(10, 0), is_idle=False)
    aside.close(over, 10)
    aside.reset()
    assert over.was_waited_for
    assert not aside.has_pending
