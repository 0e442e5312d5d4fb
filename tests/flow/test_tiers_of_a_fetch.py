"""Fetches of pages that are stored in two tiers side by side: which one is taken, and when another takes its place."""

import dataclasses

import pytest
from flow_kit import LIMIT_S, NAMESPACE, SMALL, Clock, new_rates, wait_until

from sglang_kvcodec.errors import PeerUnavailableError
from sglang_kvcodec.flow import blocks, early_admission, switching
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetcher import Fetcher
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import PrefixLookup, Run, Tier
from sglang_kvcodec.format.exchange import FetchedFragment
from sglang_kvcodec.testing.kv_pool import same_bits
from sglang_kvcodec.testing.pages import Pages, hash_of
from sglang_kvcodec.transform import PageTransforms

SMALLER = bytes(range(32, 64))
NAMES = tuple(range(6))
HASHES = [hash_of(name) for name in NAMES]
TIERS = [Tier("raw", (NAMESPACE,)), Tier("exact", (SMALLER,))]


class Setup:
    """A planning fetcher on a peer. ``exact`` takes a quarter less than ``raw``."""

    def __init__(self, engine, connection, config):
        self.engine = engine
        self.pages = {"raw": Pages(SMALL, "raw", NAMESPACE), "exact": Pages(SMALL, "exact", SMALLER)}
        self.peer = connection.peer
        self.rates = new_rates()
        self.clock = Clock()
        self.rates.link._clock = self.clock
        self.rates.restore.part_ended(1000, 500 * 1e-7, None, "raw")
        self.rates.restore.part_ended(1000, 500 * 1e-7, None, "exact")
        for tokens in (100, 1000, 5000):
            self.rates.prefill.forward_pass([tokens], [0], 20.0 * tokens)
        self.cache = BitstreamCache(1 << 30)
        self.fetcher = Fetcher(
            self.peer,
            connection.monitor,
            self.cache,
            StoredPages(),
            PageTransforms(SMALL, ("raw", "exact")),
            config,
            self.rates,
        )

    def store(self, profile, names=NAMES):
        pages = self.pages[profile]
        for name in names:
            assert self.engine.put(pages.key(name), pages.coded(name))

    def link_carries(self, bytes_per_s):
        transfer = self.rates.link.transfer()
        transfer.received(1)
        for _ in range(20):
            self.clock.now_s += 0.06
            transfer.received(int(bytes_per_s * 0.06))
        transfer.end()

    def link_falls_to(self, bytes_per_s, after_messages):
        """From so many messages of a fetch on."""
        seen = 0

        def on_event(event):
            nonlocal seen
            seen += 1
            if isinstance(event, FetchedFragment):
                self.clock.now_s += len(event.data) / (bytes_per_s if seen > after_messages else 1e8)

        self.peer.on_event = on_event

    def start(self):
        return self.fetcher.start(TIERS, HASHES)

    def fetch(self):
        ticket = self.start()
        assert ticket.wait(LIMIT_S)
        return ticket

    def profiles_of(self, ticket):
        """Of its pages, each of which is checked."""
        for name, page in zip(NAMES, ticket.pages, strict=False):
            pages = self.pages[page.header.profile_name]
            assert page.key.namespace_digest == pages.namespace_digest
            assert same_bits(pages.decode(page), pages.values(name))
        return [page.header.profile_name for page in ticket.pages]


@pytest.fixture
def setup(engine, local_peer, connect, config, closing):
    setup = Setup(engine, connect(local_peer.remote), dataclasses.replace(config, plan="auto", admit="landed"))
    closing.callback(setup.fetcher.close)
    return setup


def test_the_better_tier_is_taken_where_it_costs_nothing(setup, delta):
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e12)
    ticket = setup.fetch()
    assert setup.profiles_of(ticket) == ["raw"] * 6
    assert ticket.plan.tier == "raw"
    assert "choice 1" in ticket.plan.words
    assert delta("kvcodec_planned_tiers_total", tier="raw") == 1
    assert sorted(setup.peer.calls) == ["fetch", "lookup", "lookup"]


def test_the_smaller_one_is_taken_where_the_link_is_slow(setup, delta):
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e4)
    ticket = setup.fetch()
    assert setup.profiles_of(ticket) == ["exact"] * 6
    assert delta("kvcodec_planned_tiers_total", tier="exact") == 1
    assert delta("kvcodec_tier_switches_total", tier="exact") == 0


def test_where_a_tier_has_no_more_of_it_another_goes_on(setup):
    setup.store("raw", NAMES[:2])
    setup.store("exact", NAMES[:5])
    setup.link_carries(1e12)
    ticket = setup.fetch()
    assert setup.profiles_of(ticket) == ["raw"] * 2 + ["exact"] * 3


def test_a_tier_that_nobody_has_published_is_no_choice(setup):
    setup.store("exact")
    setup.link_carries(1e12)
    ticket = setup.fetch()
    assert setup.profiles_of(ticket) == ["exact"] * 6
    assert ticket.plan.tier == "exact"


def test_the_next_block_is_of_a_smaller_tier_when_the_link_has_become_slow(setup, delta, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_S", 1e-9)
    monkeypatch.setattr(switching, "PERIOD_S", 1e9)
    # Several messages a page: between them the link is seen.
    setup.peer.inner._max_message_bytes = 8 << 10
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e12)
    setup.link_falls_to(1e3, 0)
    ticket = setup.fetch()
    assert ticket.plan.tier == "raw"
    assert setup.profiles_of(ticket) == ["raw"] + ["exact"] * 5
    assert delta("kvcodec_tier_switches_total", tier="exact") == 1
    for tier, names in (("raw", NAMES[:1]), ("exact", NAMES[1:])):
        coded_bytes = sum(len(setup.pages[tier].coded(name)) for name in names)
        assert delta("kvcodec_fetched_bytes_total", tier=tier) == coded_bytes
    assert ticket.plan.pages == 6
    assert all(page_hash in setup.cache for page_hash in HASHES)


def test_a_block_that_is_under_way_is_asked_for_again_in_a_smaller_tier(setup, delta, monkeypatch):
    monkeypatch.setattr(switching, "PERIOD_S", 0.0)
    setup.peer.inner._max_message_bytes = 4 << 10
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e12)
    setup.link_falls_to(1e3, 0)
    ticket = setup.fetch()
    # Of the second page a part had come when it was known how slow the link is.
    assert setup.profiles_of(ticket) == ["raw"] + ["exact"] * 5
    assert delta("kvcodec_tier_switches_total", tier="exact") == 1
    assert delta("kvcodec_fetches_total", outcome="whole_prefix") == 1
    assert delta("kvcodec_peer_errors_total", rpc="fetch", reason="peer_timeout") == 0


def test_what_is_nearly_there_is_not_asked_for_again(setup, delta, monkeypatch):
    monkeypatch.setattr(switching, "PERIOD_S", 0.0)
    setup.peer.inner._max_message_bytes = 4 << 10
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e12)
    setup.link_falls_to(1e3, 30)
    ticket = setup.fetch()
    assert setup.profiles_of(ticket) == ["raw"] * 6
    assert setup.peer.calls.count("fetch") == 1


def test_pages_that_were_promised_are_not_replaced_in_the_middle(
    engine, local_peer, connect, config, closing, monkeypatch
):
    monkeypatch.setattr(switching, "PERIOD_S", 0.0)
    monkeypatch.setattr(early_admission, "PERIOD_S", 0.0)
    monkeypatch.setattr(early_admission, "WATCH_S", 0.0)
    setup = Setup(engine, connect(local_peer.remote), dataclasses.replace(config, plan="auto"))
    closing.callback(setup.fetcher.close)
    setup.peer.inner._max_message_bytes = 4 << 10
    # Restoring takes so long that the rest of the fetch is in time however busy this machine is.
    for size in (1000, 10_000, 100_000):
        setup.rates.restore.part_ended(size, size / 2 * 1e-4, None, "raw")
        setup.rates.restore.part_ended(size, size / 2 * 3e-4, None, "exact")
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e12)
    tickets = []

    def on_event(event):
        if tickets and tickets[0].is_promised:
            setup.clock.now_s += 10.0
        else:
            setup.clock.now_s += 1e-6

    setup.peer.on_event = on_event
    ticket = setup.start()
    tickets.append(ticket)
    wait_until(lambda: ticket.is_ready)
    assert ticket.wait(LIMIT_S)
    assert setup.profiles_of(ticket) == ["raw"] * 6


def test_an_error_after_a_switch_leaves_what_is_whole(setup, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_S", 1e-9)
    monkeypatch.setattr(switching, "PERIOD_S", 1e9)
    # Several messages a page: between them the link is seen.
    setup.peer.inner._max_message_bytes = 8 << 10
    setup.store("raw")
    setup.store("exact")
    setup.link_carries(1e12)
    setup.link_falls_to(1e3, 0)
    calls = []

    def before(call):
        if call == "fetch":
            calls.append(call)
            if len(calls) == 4:
                raise PeerUnavailableError("gone")

    setup.peer.before = before
    assert setup.profiles_of(setup.fetch()) == ["raw", "exact", "exact"]


@pytest.mark.parametrize(
    ("raw", "exact", "expected"),
    [
        ((), (), [()]),
        ((0, 1, 2), (), [((NAMESPACE, 0, 3),)]),
        ((), (0, 1), [((SMALLER, 0, 2),)]),
        ((0, 1), (0, 1, 2), [((NAMESPACE, 0, 2), (SMALLER, 2, 1)), ((SMALLER, 0, 3),)]),
        ((0, 2), (1,), [((NAMESPACE, 0, 1), (SMALLER, 1, 1), (NAMESPACE, 2, 1))]),
        ((1,), (0, 2, 3), [((SMALLER, 0, 1), (NAMESPACE, 1, 1), (SMALLER, 2, 2))]),
    ],
)
def test_every_tier_is_followed_as_far_as_it_goes_and_told_once(setup, raw, exact, expected):
    setup.store("raw", raw)
    setup.store("exact", exact)
    lookup = PrefixLookup(setup.peer, StoredPages(), setup.rates.link)
    found = lookup.find(TIERS, HASHES)
    lookup.close()
    assert [tuple((run.namespace_digest, run.first, run.pages) for run in prefix.runs) for prefix in found] == expected
    for prefix in found:
        assert prefix.pages == sum(run.pages for run in prefix.runs) == len(prefix.page_bytes) == len(prefix.namespaces)
    # No question is asked twice.
    assert len(setup.peer.calls) <= 2 + 2 * max(len(prefix) for prefix in expected)


def test_the_size_of_a_run_is_shared_out_without_a_rest():
    assert Run(b"", 0, 3, 10).page_bytes == [3, 3, 4]
