import threading

from flow_kit import NAMESPACE, SMALL, counted
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, SideData, build_page_object
from sglang_kvcodec.testing.pages import hash_of


def page_of(name, payload_bytes=100):
    group = {side: SideData(stored=b"x" * (payload_bytes // 2)) for side in SMALL.sides}
    return PageObject(build_page_object(PageKey(NAMESPACE, hash_of(name)), SMALL, "raw", [group]))


PAGES = {(name, size): page_of(name, size) for name in range(5) for size in (10, 4000)}
OVERHEAD_BYTES = len(page_of(0, 2)) - 2


class CacheMachine(RuleBasedStateMachine):
    """Against a list of (name, page), least recently used first."""

    @initialize(capacity=st.integers(0, 4 * (4000 + OVERHEAD_BYTES)))
    def start(self, capacity):
        self.capacity = capacity
        self.cache = BitstreamCache(capacity)
        self.model = []

    @rule(name=st.integers(0, 4), size=st.sampled_from([10, 4000]))
    def put(self, name, size):
        page = PAGES[name, size]
        self.cache.put(hash_of(name), page)
        self.model = [item for item in self.model if item[0] != name]
        if len(page) <= self.capacity:
            self.model.append((name, page))
        while sum(len(page) for _, page in self.model) > self.capacity:
            self.model.pop(0)

    @rule(names=st.lists(st.integers(0, 4), unique=True))
    def mark_used(self, names):
        self.cache.mark_used([hash_of(name) for name in names])
        for name in reversed(names):
            self.model.sort(key=lambda item: item[0] == name)

    @rule(names=st.lists(st.integers(0, 4)))
    def discard(self, names):
        self.cache.discard(hash_of(name) for name in names)
        self.model = [item for item in self.model if item[0] not in names]

    @rule()
    def clear(self):
        self.cache.clear()
        self.model = []

    @invariant()
    def holds_what_the_model_holds(self):
        held = dict(self.model)
        for name in range(5):
            assert self.cache.get(hash_of(name)) is held.get(name)
            assert (hash_of(name) in self.cache) == (name in held)

    @invariant()
    def counts_its_bytes(self):
        if self.model:
            assert counted("kvcodec_host_cache_bytes") == sum(len(page) for _, page in self.model)


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestCache = CacheMachine.TestCase


def test_a_page_larger_than_the_cache_is_not_kept_and_evicts_nothing():
    small, large = page_of("small", 10), page_of("large", 4000)
    cache = BitstreamCache(len(large) - 1)
    cache.put(hash_of("small"), small)
    cache.put(hash_of("large"), large)
    assert cache.get(hash_of("large")) is None
    assert cache.get(hash_of("small")) is small


def test_the_tail_of_a_prefix_goes_first():
    pages = [page_of(i) for i in range(3)]
    cache = BitstreamCache(sum(len(page) for page in pages))
    for i in reversed(range(3)):
        cache.put(hash_of(i), pages[i])
    cache.mark_used([hash_of(i) for i in range(3)])
    cache.put(hash_of("other"), page_of("other"))
    assert [hash_of(i) in cache for i in range(3)] == [True, True, False]


def test_many_threads_never_break_the_bound():
    pages = [page_of(i, 2000) for i in range(8)]
    capacity = 3 * len(pages[0])
    cache = BitstreamCache(capacity)
    start = threading.Barrier(4)
    failures = []

    def work(offset):
        start.wait()
        try:
            for i in range(400):
                index = (i * 3 + offset) % 8
                cache.put(hash_of(index), pages[index])
                cache.get(hash_of(i % 8))
                cache.mark_used([hash_of(i % 8)])
                cache.discard([hash_of((i + offset) % 8)])
                assert counted("kvcodec_host_cache_bytes") <= capacity
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache.put(hash_of("last"), page_of("last"))
    held = [page for i in [*range(8), "last"] if (page := cache.get(hash_of(i))) is not None]
    assert counted("kvcodec_host_cache_bytes") == sum(len(page) for page in held) <= capacity
