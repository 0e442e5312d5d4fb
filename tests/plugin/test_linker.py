import threading
import time
import types

import pytest
import torch
from prometheus_client import REGISTRY
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import ExternalCacheHitMarker

from sglang_kvcodec.config import ServerConfig, Timeouts
from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.offload import Offload
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.publisher import Publisher
from sglang_kvcodec.flow.restorer import Restorer
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVDtype, KVSpec
from sglang_kvcodec.plugin.linker import KVCodecLinker
from sglang_kvcodec.plugin.placed_linker import PlacedLinkerWrapper
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.testing.pages import Pages, hash_of, new_decoder, new_encoder

NAMESPACE = bytes(range(32))
SPEC = KVSpec(layers=7, kv_heads=3, head_dim=128, page_tokens=43, dtype=KVDtype.BFLOAT16)
"""Three layer groups."""
LIMIT_S = 30
TIMEOUTS = Timeouts(connect_s=20, lookup_s=20, progress_s=20, fetch_s=60, put_s=60, retry_s=0.05)


class Setup:
    """A linker with all it links; what other parts of the server would answer is set on it."""

    def __init__(self, closing, worst_of_ranks=None):
        self.engine = MemoryEngine(1 << 30)
        server = LocalPeer(self.engine)
        closing.callback(server.stop)
        peer = GrpcPeer(server.remote, TIMEOUTS)
        monitor = PeerMonitor(peer, TIMEOUTS.retry_s)
        assert monitor.wait_until_up(LIMIT_S)
        config = ServerConfig(remote=server.remote, profile="raw", timeouts=TIMEOUTS)
        self.pages = Pages(SPEC, "raw", NAMESPACE)
        self.pool = KnownPool(SPEC, 4)
        self.cache = BitstreamCache(1 << 30)
        self.tiers = [Tier("raw", (NAMESPACE,))]
        self.pays = True
        self.asked = []
        self.held = {}
        self.before_decode = lambda pages, group, side: None
        self.before_encode = lambda: None
        self.encoded = {}
        self.restorer = Restorer(self.pool.wrapped, self._new_decoder, 2)
        self.publisher = Publisher(
            peer, monitor, StoredPages(), self.pool.wrapped, self._new_encoder, lambda namespace: "raw", config
        )
        for part in (self.publisher, peer, monitor, self.restorer):
            closing.callback(part.close)
        self.linker = KVCodecLinker(
            None,
            SPEC.layers,
            SPEC.page_tokens,
            self.cache,
            self.restorer,
            self.publisher,
            lambda: self.tiers,
            lambda rid: self.held.get(rid, {}),
            None,
            restoring_pays=self._pays,
            worst_of_ranks=worst_of_ranks,
        )

    def _new_decoder(self):
        inner = new_decoder(SPEC, "raw")

        def unpack(pages, group, side):
            self.before_decode(pages, group, side)
            return inner.unpack(pages, group, side)

        def decode(pages, group, side):
            return inner.restore(pages, unpack(pages, group, side), group, side)

        return types.SimpleNamespace(unpack=unpack, restore=inner.restore, decode=decode)

    def _new_encoder(self, namespace_digest):
        inner = new_encoder(namespace_digest, SPEC, "raw")

        def encode(page_hash, values, first_position):
            self.before_encode()
            self.encoded[page_hash] = first_position
            return inner.encode(page_hash, values)

        return types.SimpleNamespace(encode=encode)

    def _pays(self, pages):
        self.asked.append([page.key.page_hash for page in pages])
        return self.pays

    def cache_pages(self, *names):
        for name in names:
            self.cache.put(hash_of(name), self.pages.page(name))

    def lookup(self, rid, names):
        return self.linker.lookup(rid, [transfer(names)])

    def load(self, rid, names, numbers):
        return self.linker.load(rid, [transfer(names, self.pool.slots(numbers))])

    def offload(self, names, numbers, before=()):
        with self.linker.offload_after([hash_of(name).hex() for name in before]):
            return self.linker.offload([transfer(names, self.pool.slots(numbers))])


def transfer(names, slots=None):
    return PoolTransfer(name=PoolName.KV, keys=[hash_of(name).hex() for name in names], device_indices=slots)


@pytest.fixture
def closing():
    import contextlib

    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def setup(closing):
    return Setup(closing)


def test_lookup_stops_at_the_first_missing_page(setup):
    setup.cache_pages(0, 1, 3)
    assert setup.lookup("r", [0, 1, 2, 3]) == [1, 2]
    assert setup.lookup("r", [2, 0]) == []
    assert setup.lookup("r", [3]) == [1]


def test_held_and_cached_pages_make_one_prefix(setup):
    setup.cache_pages(0)
    setup.held["r"] = {hash_of(1): setup.pages.page(1)}
    assert setup.lookup("r", [0, 1, 2]) == [1, 2]
    assert setup.lookup("other", [0, 1, 2]) == [1]


def test_what_is_in_host_memory_is_all_of_it_or_nothing(setup):
    setup.cache_pages(0, 1)
    assert setup.linker.in_host_memory([]) == []
    assert [page.key.page_hash for page in setup.linker.in_host_memory([hash_of(1), hash_of(0)])] == [
        hash_of(1),
        hash_of(0),
    ]
    assert setup.linker.in_host_memory([hash_of(0), hash_of(2)]) is None
    setup.linker.blame(setup.linker.in_host_memory([hash_of(1)]))
    assert setup.linker.in_host_memory([hash_of(1)]) is None
    setup.tiers = [Tier("raw", (bytes(32),))]
    assert setup.linker.in_host_memory([hash_of(0)]) is None


def test_nothing_is_found_for_a_request_that_must_be_computed_or_without_a_namespace(setup):
    setup.cache_pages(0)
    setup.held["r"] = None
    assert setup.lookup("r", [0]) == []
    setup.tiers = []
    assert setup.lookup("other", [0]) == []


def test_pages_of_another_namespace_are_no_hit(setup):
    """As a thread may put them into the cache after new weights were loaded."""
    setup.cache_pages(0, 1)
    setup.cache.put(hash_of(1), Pages(SPEC, "raw", bytes(32)).page(1))
    assert setup.lookup("r", [0, 1]) == [1]
    setup.tiers = [Tier("raw", (NAMESPACE, bytes(32)))]
    assert setup.lookup("r", [0, 1]) == [1, 2]
    setup.tiers = []
    assert setup.lookup("r", [0, 1]) == []


def test_pages_that_are_computed_sooner_are_not_restored_and_every_look_up_says_so(setup):
    setup.cache_pages(0, 1)
    setup.pays = False
    assert setup.lookup("r", [0, 1]) == []
    setup.pays = True
    assert setup.lookup("r", [0, 1]) == []
    assert setup.asked == [[hash_of(0), hash_of(1)]]
    setup.linker.forget("r")
    assert setup.lookup("r", [0, 1]) == [1, 2]
    # Once they count, they count.
    setup.pays = False
    assert setup.lookup("r", [0, 1]) == [1, 2]
    # What was fetched was planned.
    setup.held["held"] = {hash_of(1): setup.pages.page(1)}
    assert setup.lookup("held", [0, 1]) == [1, 2]


def restores():
    return tuple(REGISTRY.get_sample_value(f"kvcodec_restore_seconds_{what}") for what in ("count", "sum"))


def test_what_the_restore_of_a_request_takes_is_measured_to_its_last_layer(setup):
    setup.cache_pages(0, 1)
    for rid, name in [("a", 0), ("b", 1)]:
        setup.lookup(rid, [name])
        setup.load(rid, [name], [name])
    before, begun_s = restores(), time.monotonic()
    pause = threading.Event()
    setup.before_decode = lambda pages, group, side: group == 2 and pause.wait(0.05)
    assert setup.linker.finish_layer_wise_loading(setup.linker.start_layer_wise_loading())
    # The forward pass goes on first.
    setup.restorer.close()
    after, took_s = restores(), time.monotonic() - begun_s
    assert after[0] - before[0] == 2
    assert 2 * 0.05 <= after[1] - before[1] <= 2 * took_s


def test_waits_for_layers_are_measured(setup):
    setup.cache_pages(0)
    setup.lookup("r", [0])
    setup.load("r", [0], [1])
    gate = threading.Event()
    setup.before_decode = lambda pages, group, side: gate.wait(LIMIT_S)
    index = setup.linker.start_layer_wise_loading()
    counter = setup.linker.layer_done_counter
    counter.set_consumer(index)
    threading.Timer(0.05, gate.set).start()
    for layer in range(SPEC.layers):
        counter.wait_until(layer)
    assert setup.linker.finish_layer_wise_loading(index)
    waited_s, tokens = setup.linker.take_loaded()
    assert waited_s > 0
    assert tokens == SPEC.page_tokens
    assert setup.linker.take_loaded() == (0.0, 0)


def test_pages_found_are_restored_layer_by_layer_though_evicted_meanwhile(setup):
    setup.cache_pages(0, 1)
    before = setup.pool.bits()
    assert setup.lookup("r", [0, 1]) == [1, 2]
    setup.cache.clear()
    assert setup.load("r", [0, 1], [3, 0])
    assert setup.linker.is_loading("r")
    index = setup.linker.start_layer_wise_loading()
    counter = setup.linker.layer_done_counter
    counter.set_consumer(index)
    for layer in range(SPEC.layers):
        counter.wait_until(layer)
        for name, number in [(0, 3), (1, 0)]:
            expected, now = setup.pages.values(name), setup.pool.page(number)
            assert all(same_bits({side: now[side][layer]}, {side: expected[side][layer]}) for side in SPEC.sides)
    assert setup.linker.finish_layer_wise_loading(index)
    assert setup.pool.others_are(before, [3, 0])
    setup.linker.loaded("r")
    assert not setup.linker.is_loading("r")
    assert not setup.linker.has_pending


def test_pages_found_are_found_again_though_evicted_meanwhile(setup):
    setup.cache_pages(0)
    assert setup.lookup("r", [0, 1]) == [1]
    setup.cache.clear()
    setup.held["r"] = {hash_of(1): setup.pages.page(1)}
    assert setup.lookup("r", [0, 1]) == [1, 2]
    setup.linker.forget("r")
    assert setup.lookup("r", [0, 1]) == []


def test_pages_of_old_weights_are_not_found_again(setup):
    setup.cache_pages(0)
    assert setup.lookup("r", [0]) == [1]
    setup.cache.clear()
    setup.tiers = []
    assert setup.lookup("r", [0]) == []
    setup.tiers = [Tier("raw", (NAMESPACE,))]
    assert setup.lookup("r", [0]) == []


def test_fewer_pages_may_be_loaded_than_were_found(setup):
    setup.cache_pages(0, 1)
    setup.lookup("r", [0, 1])
    before = setup.pool.bits()
    setup.load("r", [0], [2])
    assert setup.linker.finish_layer_wise_loading(setup.linker.start_layer_wise_loading())
    assert same_bits(setup.pool.page(2), setup.pages.values(0))
    assert setup.pool.others_are(before, [2])


def test_more_pages_than_were_found_are_never_loaded(setup):
    setup.cache_pages(0)
    setup.lookup("r", [0, 1])
    with pytest.raises(RuntimeError, match="2 pages of which 1"):
        setup.load("r", [0, 1], [0, 1])


def test_several_requests_are_restored_as_one_batch(setup):
    setup.cache_pages(0, 1)
    for rid, name in [("a", 0), ("b", 1)]:
        setup.lookup(rid, [name])
        setup.load(rid, [name], [name])
    assert setup.linker.finish_layer_wise_loading(setup.linker.start_layer_wise_loading())
    assert same_bits(setup.pool.page(0), setup.pages.values(0))
    assert same_bits(setup.pool.page(1), setup.pages.values(1))
    assert setup.linker.start_layer_wise_loading() == -1


def test_a_cancelled_load_writes_nothing(setup):
    setup.cache_pages(0)
    setup.lookup("r", [0])
    setup.load("r", [0], [0])
    before = setup.pool.bits()
    assert setup.linker.cancel_queued_load("r")
    assert not setup.linker.cancel_queued_load("r")
    assert setup.linker.start_layer_wise_loading() == -1
    assert setup.pool.others_are(before, [])


def test_a_page_that_can_not_be_restored_is_not_offered_again_and_the_others_are(setup):
    setup.cache_pages(0, 1, 2)

    def fail(pages, group, side):
        if group == 1 and any(page.header.key.page_hash == hash_of(1) for page in pages):
            raise CodecError("no")

    setup.before_decode = fail
    setup.lookup("r", [0, 1, 2])
    setup.load("r", [0, 1, 2], [0, 1, 2])
    assert not setup.linker.finish_layer_wise_loading(setup.linker.start_layer_wise_loading())
    assert setup.lookup("r", [0, 1, 2]) == [1]
    assert setup.lookup("r", [2]) == [1]
    assert setup.linker.without_bad((hash_of(0), hash_of(1), hash_of(2))) == (hash_of(0),)
    assert hash_of(1) not in setup.cache
    assert hash_of(0) in setup.cache


def test_offloads_are_completed_in_order(setup):
    setup.pool.fill(0, 1)
    first_may_go = threading.Event()
    gather = setup.pool.wrapped.gather

    def slow_first(slots, after, only):
        assert first_may_go.wait(LIMIT_S)
        return gather(slots, after, only)

    setup.pool.wrapped.gather = slow_first
    assert setup.offload([0], [0])
    setup.tiers = []
    assert setup.offload([1], [1])
    setup.tiers = [Tier("raw", (NAMESPACE,))]
    assert setup.linker.num_completed_offloads() == 0
    assert setup.linker.has_pending
    first_may_go.set()
    assert setup.linker._offloads[0].wait(LIMIT_S)
    assert setup.linker.num_completed_offloads() == 2
    assert [setup.linker.pop_completed_offload() for _ in range(2)] == [True, False]
    assert not setup.linker.has_pending
    assert setup.publisher.wait_until_empty(LIMIT_S)
    stored = setup.engine.get(setup.pages.key(0))
    assert same_bits(setup.pages.decode(PageObject(stored)), setup.pool.page(0))
    assert setup.engine.stat().objects == 1


def test_pages_are_published_with_their_place_in_the_prompt(setup):
    setup.pool.fill(0, 1)
    setup.offload([0, 1], [2, 0], before=range(10, 15))
    setup.offload([2], [1])
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert setup.encoded == {hash_of(0): 5 * SPEC.page_tokens, hash_of(1): 6 * SPEC.page_tokens, hash_of(2): 0}


def test_pages_without_a_place_in_the_prompt_are_the_callers_mistake(setup):
    setup.offload([0], [0], before=range(10, 13))
    with pytest.raises(RuntimeError, match="place in the prompt"):
        setup.linker.offload([transfer([1], setup.pool.slots([1]))])


def test_the_wrapper_says_which_pages_are_before_a_node(setup):
    placed = []

    def offload(transfers, session_id=None):
        placed.append(setup.linker._before)
        return False

    setup.linker.offload = offload
    prefixes = {"root's child": [], "deep": ["00"] * 7}
    cache = types.SimpleNamespace(
        tree_core=types.SimpleNamespace(get_prefix_hash_values=prefixes.__getitem__),
        inc_lock_ref=lambda node: types.SimpleNamespace(to_dec_params=lambda: None),
        dec_lock_ref=lambda node, params: None,
    )
    wrapper = PlacedLinkerWrapper.__new__(PlacedLinkerWrapper)
    wrapper.cache, wrapper.cache_linker, wrapper.pending_offloads = cache, setup.linker, []
    for node in prefixes:
        wrapper._offload_node(node, [transfer([0])])
    assert placed == [[], ["00"] * 7]
    assert setup.linker._before is None


def test_the_wrapper_says_how_much_a_look_up_has_found():
    wrapper = PlacedLinkerWrapper.__new__(PlacedLinkerWrapper)
    wrapper.hit_markers = {"r": ExternalCacheHitMarker(["00", "11"], 640)}
    assert (wrapper.hit_pages("r"), wrapper.hit_pages("other")) == (2, 0)


def test_of_several_tiers_pages_are_published_in_none_that_is_better_than_what_they_were_made_of(closing):
    agreed = []
    setup = Setup(closing, worst_of_ranks=lambda worst: agreed.append(worst) or worst)
    setup.tiers = [Tier("high", (NAMESPACE,)), Tier("balanced", (bytes(32),))]
    offered = []
    setup.publisher.offload = lambda targets, *args: (
        offered.append({target.namespace_digest: list(target.pages) for target in targets})
        or Offload((), [], torch.empty(0))
    )

    setup.offload([0, 1], [0, 1])
    assert offered.pop() == {NAMESPACE: [0, 1], bytes(32): [0, 1]}
    setup.cache_pages(0)
    setup.cache.put(hash_of(1), Pages(SPEC, "raw", bytes(32)).page(1))
    assert setup.lookup("r", [0, 1]) == [1, 2]
    setup.load("r", [0, 1], [0, 1])
    assert setup.linker.finish_layer_wise_loading(setup.linker.start_layer_wise_loading())
    assert agreed == []
    setup.linker.note_restored()
    setup.linker.note_restored()
    assert agreed == [1]
    # What this rank had of the better tier, another may have had of the smaller one.
    setup.offload([0, 1, 2], [0, 1, 2])
    assert offered.pop() == {NAMESPACE: [0], bytes(32): [1, 2]}
    setup.offload([3], [3], before=[0, 1, 2])
    assert offered.pop() == {bytes(32): [0]}
    setup.linker._offloads.clear()
    setup.linker.reset()
    setup.offload([3], [3], before=[0, 1, 2])
    assert offered.pop() == {NAMESPACE: [0], bytes(32): [0]}
    setup.linker._offloads.clear()


def test_reset_waits_until_no_slot_is_read_or_written(setup):
    setup.cache_pages(0, 1)
    release, reading, writing = threading.Event(), threading.Event(), threading.Event()
    gather = setup.pool.wrapped.gather

    def slow_gather(slots, after, only):
        reading.set()
        assert release.wait(LIMIT_S)
        return gather(slots, after, only)

    def slow_decode(pages, group, side):
        writing.set()
        assert release.wait(LIMIT_S)

    setup.pool.wrapped.gather = slow_gather
    setup.before_decode = slow_decode
    setup.lookup("r", [0])
    setup.load("r", [0], [0])
    setup.linker.start_layer_wise_loading()
    setup.offload([3], [3])
    setup.lookup("waits", [1])
    assert reading.wait(LIMIT_S)
    assert writing.wait(LIMIT_S)
    events = []

    def reset():
        setup.linker.reset()
        events.append(same_bits(setup.pool.page(0), setup.pages.values(0)))

    thread = threading.Thread(target=reset)
    thread.start()
    assert setup.linker.has_pending
    assert events == []
    release.set()
    thread.join(LIMIT_S)
    assert events == [True]
    assert not setup.linker.has_pending
    assert not setup.linker.is_loading("r")
    setup.cache.clear()
    assert setup.lookup("waits", [1]) == []
