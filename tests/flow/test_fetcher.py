import dataclasses
import threading

import pytest
from flow_kit import GROUPED, LIMIT_S, NAMESPACE, SMALL, TIMEOUTS, new_rates

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.flow import fetch_queue
from sglang_kvcodec.flow import fetcher as fetcher_module
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetcher import Fetcher
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader
from sglang_kvcodec.format.page_object import read_header
from sglang_kvcodec.format.spec import KVDtype
from sglang_kvcodec.testing.kv_pool import same_bits
from sglang_kvcodec.testing.pages import Pages, hash_of
from sglang_kvcodec.transform import PageTransforms

NAMES = tuple(range(6))


@pytest.fixture
def pages():
    return Pages(SMALL, "raw", NAMESPACE)


class Setup:
    """A fetcher on a peer, and what it fills."""

    def __init__(self, connection, config, spec=SMALL, on_done=lambda: None):
        self.connection = connection
        self.cache = BitstreamCache(config.host_cache_bytes)
        self.stored = StoredPages()
        self.rates = new_rates()
        self.fetcher = Fetcher(
            connection.peer,
            connection.monitor,
            self.cache,
            self.stored,
            PageTransforms(spec, config.profile),
            config,
            self.rates,
            on_done=on_done,
        )

    def start(self, names=NAMES, namespaces=(NAMESPACE,)):
        return self.fetcher.start([Tier("raw", tuple(namespaces))], [hash_of(name) for name in names])

    def fetch(self, names=NAMES, namespaces=(NAMESPACE,)):
        ticket = self.start(names, namespaces)
        assert ticket.wait(LIMIT_S)
        return ticket

    def settle(self):
        """Waits for what the threads do after a ticket is done."""
        self.fetcher.close()


@pytest.fixture
def set_up(connect, config, closing):
    def make(peer, spec=SMALL, on_done=lambda: None, expect_up=True, max_message_bytes=0, timeouts=TIMEOUTS, **changes):
        connection = connect(peer.remote, expect_up, timeouts, max_message_bytes)
        setup = Setup(connection, dataclasses.replace(config, timeouts=timeouts, **changes), spec, on_done)
        closing.callback(setup.fetcher.close)
        return setup

    return make


def store(engine, pages, names=NAMES):
    for name in names:
        assert engine.put(pages.key(name), pages.coded(name))


def assert_has(ticket, pages, names):
    assert [page.header.key.page_hash for page in ticket.pages] == [hash_of(name) for name in names]
    for page, name in zip(ticket.pages, names, strict=True):
        assert same_bits(pages.decode(page), pages.values(name))


def test_a_whole_prefix(engine, local_peer, set_up, pages, delta):
    store(engine, pages)
    setup = set_up(local_peer)
    ticket = setup.fetch()
    assert_has(ticket, pages, NAMES)
    assert ticket.is_done
    assert [setup.cache.get(hash_of(name)) for name in NAMES] == ticket.pages
    assert setup.stored.missing(NAMESPACE, ticket.page_hashes) == []
    assert delta("kvcodec_fetches_total", outcome="whole_prefix") == 1
    assert delta("kvcodec_lookup_pages_total", outcome="stored") == len(NAMES)
    assert delta("kvcodec_fetched_bytes_total", tier="raw") == sum(len(pages.coded(name)) for name in NAMES)
    assert delta("kvcodec_lookup_seconds_count") == 1
    assert 0 < delta("kvcodec_lookup_seconds_sum") < LIMIT_S
    assert delta("kvcodec_misses_total", reason="not_stored") == 0


def test_pages_of_several_layer_groups_and_pictures(engine, local_peer, set_up):
    pages = Pages(GROUPED, "exact", NAMESPACE)
    store(engine, pages, range(2))
    ticket = set_up(local_peer, GROUPED, profile="exact", max_message_bytes=1).fetch(range(2))
    assert_has(ticket, pages, range(2))


def test_a_partial_prefix(engine, local_peer, set_up, pages, delta):
    store(engine, pages, [0, 1, 2, 4])
    setup = set_up(local_peer)
    ticket = setup.fetch()
    assert_has(ticket, pages, [0, 1, 2])
    assert setup.stored.missing(NAMESPACE, ticket.page_hashes) == [3, 5]
    assert delta("kvcodec_lookup_pages_total", outcome="missing") == 3
    assert delta("kvcodec_misses_total", reason="not_stored") == 3


OLD = bytes(range(64, 96))
"""A namespace whose pages can be read as well."""


@pytest.mark.parametrize(
    ("new", "old", "has", "fetches"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1], "nnnnnn", 1),
        ([], [0, 1, 3], "oo", 1),
        ([0, 1], [1, 2, 3, 5], "nnoo", 2),
        ([3, 4], [0, 1, 2, 4], "ooonn", 2),
        ([1, 3, 5], [0, 2, 4], "onon", 4),
        ([1], [2], "", 0),
    ],
)
def test_what_the_best_namespace_has_not_comes_from_the_other(
    engine, local_peer, set_up, pages, delta, new, old, has, fetches
):
    others = Pages(SMALL, "raw", OLD)
    store(engine, pages, new)
    store(engine, others, old)
    setup = set_up(local_peer)
    ticket = setup.fetch(namespaces=(NAMESPACE, OLD))
    assert_has(ticket, pages, range(len(has)))
    digests = {"n": NAMESPACE, "o": OLD}
    assert [page.header.key.namespace_digest for page in ticket.pages] == [digests[letter] for letter in has]
    assert setup.connection.peer.calls.count("fetch") == fetches
    assert delta("kvcodec_lookup_pages_total", outcome="stored") == len(has)
    assert delta("kvcodec_misses_total", reason="not_stored") == len(NAMES) - len(has)


def test_a_damaged_page_of_the_other_namespace_is_deleted_there(engine, local_peer, set_up, pages):
    others = Pages(SMALL, "raw", OLD)
    store(engine, pages, [0, 3])
    store(engine, others, [2])
    data = others.coded(1)
    engine.put(others.key(1), data[:-1] + bytes([data[-1] ^ 1]))
    setup = set_up(local_peer)
    ticket = setup.fetch(namespaces=(NAMESPACE, OLD))
    assert_has(ticket, pages, [0])
    setup.settle()
    assert engine.get(others.key(1)) is None
    assert engine.get(others.key(2)) is not None
    assert engine.get(pages.key(3)) is not None


def test_nothing_stored_is_not_fetched(local_peer, set_up, delta):
    setup = set_up(local_peer)
    assert setup.fetch().pages == []
    assert setup.connection.peer.calls == ["lookup"]
    assert delta("kvcodec_fetches_total", outcome="not_stored") == 1


def test_too_short_a_request_is_not_even_looked_up(local_peer, set_up, delta):
    setup = set_up(local_peer, min_fetch_tokens=3 * SMALL.page_tokens)
    ticket = setup.start(NAMES[:2])
    assert ticket.is_done
    assert setup.connection.peer.calls == []
    assert delta("kvcodec_misses_total", reason="too_short") == 2


def test_a_page_evicted_between_lookup_and_fetch_ends_the_prefix(engine, local_peer, set_up, pages, delta):
    store(engine, pages)
    setup = set_up(local_peer)
    setup.connection.peer.before = lambda call: call == "fetch" and engine.delete(pages.key(3))
    assert_has(setup.fetch(), pages, [0, 1, 2])
    assert delta("kvcodec_misses_total", reason="gone") == 3
    assert hash_of(4) not in setup.cache


def test_a_page_evicted_in_the_middle_of_its_payload_ends_the_prefix(engine, local_peer, set_up, pages, delta):
    store(engine, pages)
    setup = set_up(local_peer, max_message_bytes=1)
    reads = []

    def evict(method, key):
        if method == "get_range" and key == pages.key(3):
            reads.append(key)
            if len(reads) == 2:
                engine.delete(key)

    engine.before = evict
    assert_has(setup.fetch(), pages, [0, 1, 2])
    assert delta("kvcodec_misses_total", reason="gone") == 3


def damaged_payload(pages):
    data = pages.coded(2)
    return data[:-1] + bytes([data[-1] ^ 1])


def other_profile(pages):
    return Pages(SMALL, "exact", NAMESPACE).coded(2)


def other_spec(pages):
    return Pages(dataclasses.replace(SMALL, dtype=KVDtype.FLOAT16), "raw", NAMESPACE).coded(2)


@pytest.mark.parametrize(
    ("bad_object", "reason"),
    [(damaged_payload, "checksum"), (other_profile, "foreign_page"), (other_spec, "foreign_page")],
)
def test_a_bad_page_ends_the_prefix_and_makes_room_for_a_good_copy(
    engine, local_peer, set_up, pages, delta, bad_object, reason
):
    store(engine, pages, [0, 1, 3, 4, 5])
    engine.put(pages.key(2), bad_object(pages))
    setup = set_up(local_peer)
    ticket = setup.fetch()
    assert_has(ticket, pages, [0, 1])
    assert [hash_of(name) in setup.cache for name in NAMES] == [True, True, False, False, False, False]
    assert delta("kvcodec_fetches_total", outcome=reason) == 1
    assert delta("kvcodec_misses_total", reason=reason) == 4
    # A header that is refused names no tier.
    assert (delta("kvcodec_fetched_bytes_total", tier="unknown") > 0) == (reason == "foreign_page")
    setup.settle()
    assert engine.get(pages.key(2)) is None
    assert setup.stored.missing(NAMESPACE, ticket.page_hashes) == [2]
    assert engine.put(pages.key(2), pages.coded(2))
    assert_has(set_up(local_peer).fetch(), pages, NAMES)


def cut(data):
    return data[:-1]


def damaged_manifest(data):
    size = read_header(data).header_bytes
    return data[: size - 1] + bytes([data[size - 1] ^ 1]) + data[size:]


def other_version(data):
    return data[:4] + b"\x63\x00" + data[6:]


@pytest.mark.parametrize("spoil", [cut, damaged_manifest, other_version, lambda data: b"", lambda data: b"junk" * 100])
def test_what_the_peer_itself_can_not_read_ends_the_prefix_and_goes(engine, local_peer, set_up, pages, delta, spoil):
    store(engine, pages, [0, 1, 3])
    engine.put(pages.key(2), spoil(pages.coded(2)))
    assert_has(set_up(local_peer).fetch(), pages, [0, 1])
    assert engine.get(pages.key(2)) is None
    assert delta("kvcodec_misses_total", reason="gone") == 2
    assert delta("kvcodec_misses_total", reason="not_stored") == 2


def test_a_damaged_page_is_deleted_before_the_request_goes_on(engine, local_peer, set_up, pages):
    # What the request computes in its place would else be taken for stored already.
    engine.put(pages.key(2), damaged_payload(pages))
    store(engine, pages, [0, 1])
    setup = set_up(local_peer)
    assert_has(setup.fetch([0, 1, 2]), pages, [0, 1])
    assert engine.get(pages.key(2)) is None


def test_a_damaged_page_that_can_not_be_deleted_is_counted_as_what_it_is(engine, local_peer, set_up, pages, delta):
    engine.put(pages.key(2), damaged_payload(pages))

    def fail(method, key):
        if method == "delete":
            raise StorageUnavailableError("read-only")

    engine.before = fail
    setup = set_up(local_peer)
    assert setup.fetch([2]).pages == []
    setup.settle()
    assert delta("kvcodec_misses_total", reason="checksum") == 1
    assert delta("kvcodec_peer_errors_total", rpc="delete", reason="peer_unavailable") == 1


def test_cancelled_before_it_starts(engine, local_peer, set_up, pages, delta, gate, monkeypatch):
    monkeypatch.setattr(fetcher_module, "LOOKUP_THREADS", 1)
    store(engine, pages)
    setup = set_up(local_peer)
    started = threading.Event()

    def hold(call):
        started.set()
        gate.wait(LIMIT_S)

    setup.connection.peer.before = hold
    first, second = setup.start(), setup.start()
    assert started.wait(LIMIT_S)
    second.cancel()
    gate.set()
    assert first.wait(LIMIT_S)
    assert second.wait(LIMIT_S)
    assert_has(first, pages, NAMES)
    assert second.pages == []
    assert delta("kvcodec_fetches_total", outcome="cancelled") == 1
    assert setup.connection.peer.calls == ["lookup", "fetch"]


def test_cancelled_on_the_way(engine, local_peer, set_up, pages, delta):
    store(engine, pages)
    setup = set_up(local_peer, max_message_bytes=1)
    tickets = []
    ready = threading.Event()

    def cancel(event):
        ready.wait(LIMIT_S)
        tickets[0].cancel()

    setup.connection.peer.on_event = cancel
    tickets.append(setup.start())
    ready.set()
    assert tickets[0].wait(LIMIT_S)
    assert len(tickets[0].pages) < len(NAMES)
    assert delta("kvcodec_fetches_total", outcome="cancelled") == 1
    assert setup.connection.monitor.is_up


def test_what_arrived_whole_before_the_peer_died_is_kept(engine, local_peer, set_up, pages, delta):
    names = range(200)
    store(engine, pages, names)
    setup = set_up(local_peer, max_message_bytes=1)

    def die(event):
        if isinstance(event, FetchedFragment) and event.page_index == 3:
            local_peer.stop()

    setup.connection.peer.on_event = die
    ticket = setup.fetch(names)
    assert 3 <= len(ticket.pages) < len(names)
    assert_has(ticket, pages, names[: len(ticket.pages)])
    assert not setup.connection.monitor.is_up
    assert delta("kvcodec_fetches_total", outcome="peer_unavailable") == 1
    assert delta("kvcodec_misses_total", reason="peer_unavailable") == len(names) - len(ticket.pages)
    assert delta("kvcodec_peer_errors_total", rpc="fetch", reason="peer_unavailable") == 1


def test_without_a_peer_a_ticket_is_done_at_once(local_peer, set_up, delta):
    local_peer.stop()
    calls = []
    setup = set_up(local_peer, expect_up=False, on_done=lambda: calls.append("done"))
    ticket = setup.start()
    assert ticket.is_done
    assert ticket.pages == []
    assert calls == ["done"]
    assert setup.connection.peer.calls == []
    assert delta("kvcodec_misses_total", reason="peer_down") == len(NAMES)


def test_a_peer_that_dies_unseen_costs_one_failed_call(engine, local_peer, set_up, pages, delta):
    setup = set_up(local_peer)
    setup.connection.peer.before = lambda call: local_peer.stop()
    assert setup.fetch().pages == []
    assert not setup.connection.monitor.is_up
    assert delta("kvcodec_peer_errors_total", rpc="lookup", reason="peer_unavailable") == 1
    assert setup.start().is_done


def test_more_requests_than_may_wait_are_computed(engine, local_peer, set_up, pages, delta, gate, monkeypatch):
    monkeypatch.setattr(fetch_queue, "MAX_TICKETS", 3)
    monkeypatch.setattr(fetcher_module, "FETCH_THREADS", 2)
    store(engine, pages)
    setup = set_up(local_peer)
    setup.connection.peer.before = lambda call: gate.wait(LIMIT_S)
    tickets = [setup.start() for _ in range(5)]
    assert [ticket.is_done for ticket in tickets] == [False, False, False, True, True]
    assert delta("kvcodec_fetches_total", outcome="overload") == 2
    gate.set()
    for ticket in tickets[:3]:
        assert ticket.wait(LIMIT_S)
        assert_has(ticket, pages, NAMES)
    assert_has(setup.fetch(), pages, NAMES)


def test_a_prefix_larger_than_the_host_cache_is_cut(engine, local_peer, set_up, pages, delta):
    store(engine, pages)
    room = sum(len(pages.coded(name)) for name in NAMES) - 1
    setup = set_up(local_peer, host_cache_bytes=room)
    assert_has(setup.fetch(), pages, NAMES[:5])
    assert delta("kvcodec_misses_total", reason="cut_to_host_memory") == 1


def test_a_peer_that_sends_more_than_it_announced_gets_no_more_memory(engine, local_peer, set_up, pages, delta):
    store(engine, pages)
    setup = set_up(local_peer, host_cache_bytes=sum(len(pages.coded(name)) for name in NAMES) - 1)
    inner = setup.connection.peer.inner
    lookup = inner.lookup
    inner.lookup = lambda *args: dataclasses.replace(lookup(*args), covered_bytes=1)
    assert_has(setup.fetch(), pages, NAMES[:5])
    assert delta("kvcodec_fetches_total", outcome="cut_to_host_memory") == 1
    setup.settle()
    assert engine.get(pages.key(5)) is not None


def test_bytes_before_the_header_or_out_of_order_leave_the_peer_and_its_pages_alone(
    engine, local_peer, set_up, pages, delta
):
    store(engine, pages)
    setup = set_up(local_peer)
    data = pages.coded(0)
    size = read_header(data).header_bytes
    header, payload = FetchedHeader(0, len(data), data[:size]), FetchedFragment(0, size, data[size:])
    second = FetchedFragment(1, size, data[size:])
    setup.connection.peer.inner.fetch = lambda *args: iter([header, payload, second])
    assert_has(setup.fetch(), pages, [0])
    setup.connection.peer.inner.fetch = lambda *args: iter([header, FetchedFragment(0, size + 1, data[size + 1 :])])
    assert setup.fetch().pages == []
    assert delta("kvcodec_fetches_total", outcome="peer_rejected") == 2
    assert setup.connection.monitor.is_up
    setup.settle()
    assert engine.get(pages.key(0)) is not None


def test_a_stream_that_ends_early_gives_what_was_whole(engine, local_peer, set_up, pages):
    store(engine, pages)
    setup = set_up(local_peer)
    fetch = setup.connection.peer.inner.fetch

    def cut_short(*args):
        for event in fetch(*args):
            if event.page_index == 2 and isinstance(event, FetchedFragment):
                return
            yield event

    setup.connection.peer.inner.fetch = cut_short
    assert_has(setup.fetch(), pages, [0, 1])


def test_a_request_that_waited_too_long_for_a_thread_is_computed(engine, local_peer, set_up, pages, delta, monkeypatch):
    store(engine, pages)
    now_s = [100.0]
    monkeypatch.setattr(fetcher_module.time, "monotonic", lambda: now_s[0])
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(fetcher_module, "LOOKUP_THREADS", 1)
    setup = set_up(local_peer)

    def hold(call):
        started.set()
        go_on.wait(LIMIT_S)

    setup.connection.peer.before = hold
    setup.start()
    second = setup.start()
    assert started.wait(LIMIT_S)
    now_s[0] += TIMEOUTS.fetch_s + 1
    go_on.set()
    assert second.wait(LIMIT_S)
    assert second.pages == []
    assert delta("kvcodec_fetches_total", outcome="too_slow") == 2


def test_an_error_nobody_thought_of_is_a_miss(local_peer, set_up, delta):
    setup = set_up(local_peer)
    setup.connection.peer.inner.lookup = lambda *args: 1 / 0
    assert setup.fetch().pages == []
    assert delta("kvcodec_fetches_total", outcome="error") == 1
    assert setup.connection.monitor.is_up
