"""Requests whose pages are restored while they wait: which, and what comes of it. The tree is a stand-in."""

import types

import pytest
import torch
from flow.flow_kit import Delta
from plugin.pool_kit import Cache, Restorer, set_aside

from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.prediction import Prefix
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.plugin.ahead import AheadBook
from sglang_kvcodec.plugin.held_requests import HeldRequests

PAGE = 16
DEVICE, HOST, FETCHED = 2, 3, 4
"""Pages of a prompt: on the device, in host memory, and those the peer has."""
START = DEVICE + HOST
HASHES = tuple(bytes([number]) * 32 for number in range(START + FETCHED + 1))
PROMPT_TOKENS = PAGE * len(HASHES) + 5
LAST_GROUP = types.SimpleNamespace(first_layer=0, layers=4)


class Tree(Cache):
    """A tree with one branch: what is on the device of one prompt."""

    def __init__(self, size):
        super().__init__(size)
        self.branch = self.token_to_kv_pool_allocator.alloc(DEVICE * PAGE)
        self.searched = 0

    def match_prefix(self, params):
        self.searched += 1
        return types.SimpleNamespace(device_prefix_len=min(len(self.branch), len(params.key)), last_device_node="node")

    def path_device_indices(self, node):
        assert node == "node"
        return self.branch

    def insert(self, params):
        assert len(params.value) == len(params.key)
        had = len(self.branch)
        self.token_to_kv_pool_allocator.free(params.value[params.prev_prefix_len : had])
        self.branch = torch.cat([self.branch, params.value[had:]])


class Request:
    rid = "r"


class Setup:
    def __init__(self, size=1000):
        self.tree = Tree(size)
        self.all_slots = size
        restorer = Restorer()
        self.restores, self.bad, self.taken_in = restorer.restores, [], []
        self.busy, self.holds_up_for = True, None
        self.holds_up = True
        self.host = {page_hash: f"host {index}" for index, page_hash in enumerate(HASHES[:START])}
        self.others = []
        self.held = HeldRequests()
        self.request = Request()
        self.ticket = FetchTicket(HASHES[START:], START * PAGE, PROMPT_TOKENS, "r")
        self.told_of_tails = []
        self.aside = set_aside(self.tree, restorer, self.smallest, self.bad.extend)
        self.book = AheadBook(
            self.tree,
            self.aside,
            PAGE,
            4,
            self.smallest,
            lambda: self.busy,
            self._holds_up,
            self._in_host_memory,
            self.taken_in.extend,
            Tracer(),
        )

    def _holds_up(self, pages, prefix_tokens, prompt_tokens, are_others):
        self.holds_up_for = list(pages), prefix_tokens, prompt_tokens, are_others
        return self.holds_up

    def _in_host_memory(self, hashes):
        pages = [self.host.get(page_hash) for page_hash in hashes]
        return None if None in pages else pages

    def smallest(self, mine):
        others = self.others.pop(0) if self.others else mine
        return [min(pair) for pair in zip(mine, others, strict=True)]

    def agreed(self, *args):
        """As a book of tails."""
        self.told_of_tails.append(args)

    def hold(self, pages=FETCHED, **changed):
        self.ticket.settle([f"fetched {index}" for index in range(pages)])
        self.ticket.finish()
        given = {"key": range(len(HASHES) * PAGE), "before": HASHES[:START], "device_pages": DEVICE} | changed
        self.held.hold(self.request, self.ticket, START, HASHES[START:], **given)

    def agree(self):
        self.held.agree(self.smallest, self, self.book)

    @property
    def waits(self):
        return "r" in self.held.waiting_rids

    @property
    def has_pending(self):
        return self.book.has_pending or self.aside.has_pending

    @property
    def slots_aside(self):
        return self.all_slots - len(self.tree.token_to_kv_pool_allocator.free_slots) - len(self.tree.branch)


@pytest.fixture
def delta():
    return Delta()


@pytest.fixture
def setup():
    return Setup()


PAGES = [f"host {index}" for index in range(DEVICE, START)] + [f"fetched {index}" for index in range(FETCHED)]


def test_what_the_device_lacks_is_restored_and_then_in_the_tree(setup, delta):
    setup.hold()
    setup.agree()
    assert setup.waits
    assert setup.holds_up_for == (PAGES, (START + FETCHED) * PAGE, PROMPT_TOKENS, True)
    (job,) = setup.restores[0].jobs
    assert list(job.pages) == PAGES
    assert setup.slots_aside == job.slots.numel() == len(PAGES) * PAGE
    # It is asked no more while it waits.
    searched = setup.tree.searched
    setup.agree()
    assert setup.book.ended() == []
    assert setup.tree.searched == searched
    assert setup.has_pending

    setup.restores[0].on_layers(LAST_GROUP, [])
    before = setup.tree.branch
    assert setup.book.ended() == [(setup.request, False)]
    assert setup.tree.branch.tolist() == [*before.tolist(), *job.slots.tolist()]
    assert setup.taken_in == PAGES
    assert not setup.has_pending
    assert setup.slots_aside == 0
    assert delta("kvcodec_ahead_restores_total", outcome="restored") == 1
    setup.held.restored(setup.request)
    assert not setup.waits
    assert setup.held.get(setup.request).agreed_pages == FETCHED


@pytest.mark.parametrize("why", ["no hold-up", "a tail", "no key", "evicted from host memory", "nothing", "no room"])
def test_it_goes_on_as_ever(setup, why, delta):
    changed = {}
    if why == "no hold-up":
        setup.busy = setup.holds_up = False
    elif why == "a tail":
        setup.ticket.tail = Tail(Prefix([1] * 6, PAGE, START * PAGE, PROMPT_TOKENS), 4, 32)
    elif why == "no key":
        changed = {"key": None}
    elif why == "evicted from host memory":
        del setup.host[HASHES[START - 1]]
    elif why == "nothing":
        changed = {"before": HASHES[:DEVICE], "device_pages": DEVICE}
        setup.ticket = FetchTicket((), START * PAGE, PROMPT_TOKENS, "r")
    elif why == "no room":
        setup.tree.token_to_kv_pool_allocator.free_slots = list(range(100))
    setup.hold(0 if why == "nothing" else FETCHED, **changed)
    setup.agree()
    assert not setup.waits
    assert not setup.restores
    assert not setup.has_pending
    assert len(setup.told_of_tails) == 1
    assert delta("kvcodec_ahead_restores_total", outcome="no_room") == (why == "no room")


def test_what_another_request_has_computed_meanwhile_stays(setup):
    setup.hold()
    setup.agree()
    setup.tree.branch = torch.cat([setup.tree.branch, setup.tree.token_to_kv_pool_allocator.alloc(3 * PAGE)])
    there = setup.tree.branch
    setup.restores[0].on_layers(LAST_GROUP, [])
    setup.book.ended()
    assert setup.tree.branch[: len(there)].tolist() == there.tolist()
    assert len(setup.tree.branch) == (START + FETCHED) * PAGE
    assert setup.slots_aside == 0


def test_what_was_on_the_device_before_may_be_evicted(setup, delta):
    setup.hold()
    setup.agree()
    allocator = setup.tree.token_to_kv_pool_allocator
    allocator.free(setup.tree.branch[PAGE:])
    setup.tree.branch = setup.tree.branch[:PAGE]
    setup.restores[0].on_layers(LAST_GROUP, [])
    assert setup.book.ended() == [(setup.request, False)]
    assert len(setup.tree.branch) == PAGE
    assert setup.slots_aside == 0
    assert delta("kvcodec_ahead_restores_total", outcome="prefix_evicted") == 1


def test_it_was_evicted_before_the_restore_begins(setup):
    setup.hold()
    setup.tree.branch = setup.tree.branch[:PAGE]
    setup.agree()
    assert not setup.waits
    assert not setup.restores


def test_more_is_on_the_device_than_there_was(setup):
    setup.hold()
    setup.tree.branch = torch.cat([setup.tree.branch, setup.tree.token_to_kv_pool_allocator.alloc(4 * PAGE)])
    setup.agree()
    (job,) = setup.restores[0].jobs
    assert list(job.pages) == PAGES[4:]
    setup.restores[0].on_layers(LAST_GROUP, [])
    setup.book.ended()
    assert len(setup.tree.branch) == (START + FETCHED) * PAGE


def test_one_that_fails_is_told_of_and_its_pages_before_it_looks_for_others(setup, delta):
    setup.hold()
    setup.agree()
    setup.restores[0].bad_pages = ["fetched 1"]
    setup.restores[0].on_failure(RuntimeError())
    assert setup.book.ended() == [(setup.request, True)]
    assert "fetched 1" in setup.bad
    assert setup.slots_aside == 0
    assert not setup.taken_in
    assert delta("kvcodec_ahead_restores_total", outcome="failed") == 1


def test_ranks_go_on_together(setup):
    setup.hold()
    # Another one has a page less, and has to wait for the restore where this one would not.
    setup.holds_up = False
    setup.others = [[FETCHED - 1, FETCHED - 1, 0, 0, 0, 0, -1, 1]]
    setup.agree()
    (job,) = setup.restores[0].jobs
    assert list(job.pages) == PAGES[:-1]
    setup.restores[0].on_layers(LAST_GROUP, [])
    setup.others = [[0], [-1], [0]]
    assert setup.book.ended() == []
    assert setup.book.ended() == [(setup.request, True)]
    # A third one may still write.
    assert setup.has_pending
    setup.aside.reap()
    assert not setup.has_pending


def test_a_rank_that_can_t_keeps_all_from_it(setup):
    setup.hold()
    setup.others = [[FETCHED, FETCHED, 0, 0, 0, 0, 0, 0]]
    setup.agree()
    assert not setup.waits
    assert not setup.restores
    # Nor does it search the tree, which not all would.
    assert setup.tree.searched == 0


def test_slots_of_a_request_that_is_gone_are_given_back_when_nothing_writes_to_them(setup, delta):
    setup.hold()
    setup.agree()
    setup.book.close("r")
    setup.book.close("r")
    assert setup.book.ended() == []
    assert setup.slots_aside == len(PAGES) * PAGE
    setup.restores[0].on_layers(LAST_GROUP, [])
    setup.aside.reap()
    assert setup.slots_aside == 0
    assert not setup.has_pending
    assert delta("kvcodec_ahead_restores_total", outcome="gone") == 1


def test_a_flush_waits_for_what_is_written(setup):
    setup.hold()
    setup.agree()
    setup.restores[0].on_layers(LAST_GROUP, [])
    setup.book.reset()
    assert not setup.has_pending
