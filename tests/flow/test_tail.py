"""A tail: what of it is fetched next, when it is in the pool, and whose its slots are. No thread, no clock."""

import dataclasses
import itertools
import types

import pytest
import torch

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.flow.prediction import NOTHING_KNOWN, Knowledge, Prefix
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_meter import RestoreModel
from sglang_kvcodec.flow.tail import Tail

PAGE_TOKENS = 64
PAGES = 40
PAGE_S = 0.01
"""A page takes so long to compute."""
GROUPS = [types.SimpleNamespace(index=index) for index in range(3)]


def known(bytes_per_s, round_trip_s=0.0):
    prefill = PrefillModel(0.0, PAGE_S / PAGE_TOKENS, 0.0)
    return Knowledge(round_trip_s, bytes_per_s, (), RestoreModel(0.0, 0.0, 1, 32, 1, 1), prefill)


EVEN = known(1000 / PAGE_S)


def new_tail(first_page=20):
    return Tail(Prefix([1000] * PAGES, PAGE_TOKENS, 0, PAGES * PAGE_TOKENS + 9), first_page, 128)


def pages(count):
    header = types.SimpleNamespace(group_ranges=GROUPS)
    return [types.SimpleNamespace(header=header) for _ in range(count)]


class Event:
    is_over = False

    def query(self):
        return self.is_over


class Restores:
    """Stands in for the restorer: restores are ended by the test."""

    def __init__(self):
        self.jobs, self.callbacks = [], []

    def start(self, jobs, on_layers, on_failure):
        self.jobs += jobs
        self.callbacks.append((on_layers, on_failure))
        return types.SimpleNamespace(bad_pages=jobs[0].pages[:1])

    def end(self, index, events=()):
        for group in GROUPS:
            self.callbacks[index][0](group, events)


@pytest.fixture
def restores():
    return Restores()


def begin(tail, restores, first=None):
    first = tail.lowest_page if first is None else first
    slots = torch.arange((PAGES - first) * PAGE_TOKENS) + 10_000
    tail.begin(slots, first, restores.start)
    return slots


def fetch_all(tail, facts=EVEN):
    """Every block, with the front where it is."""
    blocks = []
    while (block := tail.next_block(facts)) is not None:
        blocks.append(block)
        tail.landed(block[0], pages(block[1] - block[0]))
    return blocks


def test_blocks_come_from_the_end_and_leave_no_gap():
    tail = new_tail()
    blocks = fetch_all(tail)
    assert blocks[0][1] == PAGES
    assert all(after[1] == before[0] for before, after in itertools.pairwise(blocks))
    assert blocks[-1][0] >= tail.lowest_page


def test_the_last_blocks_before_a_meeting_are_small():
    tail = new_tail(first_page=2)
    # Fetching takes a page as long as computing one: with nothing computed yet half of all are left to the link.
    sizes = [end - first for first, end in fetch_all(tail)]
    assert sizes[-1] <= 2 < sizes[0] <= PAGES / 2


def test_no_page_is_fetched_that_computing_reaches_sooner():
    tail = new_tail()
    tail.computing(30)
    first, end = tail.next_block(EVEN)
    assert (first >= 30, end) == (True, PAGES)
    tail = new_tail()
    tail.computing(30)
    # A page takes a hundred times as long on the link.
    assert tail.next_block(known(1000 / PAGE_S / 100)) is None


def test_no_more_is_fetched_than_can_be_restored():
    slow = dataclasses.replace(known(1e9), restore=RestoreModel(0.0, 50 * PAGE_S / 1000, 1, 32, 1, 1))
    assert fetch_all(new_tail(), slow)[-1][0] > 30
    assert fetch_all(new_tail(), known(1e9))[-1][0] < 15


def test_nothing_is_fetched_of_what_is_over():
    tail = new_tail()
    tail.close()
    assert tail.next_block(EVEN) is None
    assert tail.stop.is_set()


@pytest.mark.parametrize("facts", [NOTHING_KNOWN, known(1e5), dataclasses.replace(EVEN, prefill=None)])
def test_what_is_not_known_is_taken_to_be_as_fast(facts):
    tail = new_tail(first_page=2)
    sizes = [end - first for first, end in fetch_all(tail, facts)]
    assert 0 < sizes[0] <= PAGES / 2


def test_a_block_of_one_namespace_leaves_the_rest_to_the_next():
    tail = new_tail()
    first, _ = tail.next_block(EVEN)
    tail.shorten(first + 1)
    assert tail.next_block(EVEN)[1] == first + 1


def test_what_landed_before_the_request_was_admitted_is_restored_then(restores):
    tail = new_tail()
    first, end = tail.next_block(EVEN)
    tail.landed(first, pages(end - first))
    assert not restores.jobs
    slots = begin(tail, restores)
    (job,) = restores.jobs
    assert len(job.pages) == end - first
    assert job.slots.tolist() == slots[(first - tail.lowest_page) * PAGE_TOKENS :].tolist()


def test_only_what_is_whole_up_to_the_end_counts_as_restored(restores):
    tail = new_tail()
    begin(tail, restores)
    for first in (35, 30, 25):
        tail.landed(first, pages(5))
    assert tail.outlook().restored_from == PAGES
    restores.end(1)
    assert tail.outlook().restored_from == PAGES
    restores.end(0)
    assert tail.outlook().restored_from == 30
    restores.end(2)
    assert tail.outlook().restored_from == 25


def test_pages_are_there_when_the_device_says_so(restores):
    tail = new_tail()
    begin(tail, restores)
    tail.landed(35, pages(5))
    event = Event()
    restores.end(0, [event])
    assert tail.outlook().restored_from == PAGES
    assert not tail.is_idle
    event.is_over = True
    assert tail.outlook().restored_from == 35
    assert tail.is_idle


def test_computing_stops_at_what_is_about_to_land(restores):
    tail = new_tail()
    begin(tail, restores)
    first, end = tail.next_block(EVEN)
    tail.landed(first, pages(end - first))
    restores.end(0)
    on_its_way, _ = tail.next_block(EVEN)
    assert tail.outlook().compute_until == on_its_way
    # Once computing is there it goes on up to what is restored.
    tail.computing(on_its_way)
    assert tail.outlook().compute_until == first


def test_a_transfer_ends_when_computing_has_overtaken_it(restores):
    tail = new_tail()
    begin(tail, restores)
    first, end = tail.next_block(EVEN)
    tail.landed(first, pages(end - first))
    tail.computing(first - 1)
    assert not tail.stop.is_set()
    tail.computing(first)
    assert tail.stop.is_set()


def test_a_request_takes_the_slots_from_where_it_is(restores):
    tail = new_tail()
    slots = begin(tail, restores)
    tail.landed(30, pages(10))
    restores.end(0)
    taken = tail.take(32)
    assert taken.tolist() == slots[-8 * PAGE_TOKENS :].tolist()
    assert tail.joined_pages == 8
    assert len(tail.pages_from(32)) == 8
    assert tail.is_idle
    assert tail.leftover().tolist() == slots[: -8 * PAGE_TOKENS].tolist()
    assert tail.leftover() is None
    # What comes late is nobody's.
    tail.landed(25, pages(5))
    assert len(restores.jobs) == 1


def test_pages_below_the_slots_are_not_restored(restores):
    tail = new_tail()
    tail.landed(10, pages(30))
    slots = begin(tail, restores, first=15)
    (job,) = restores.jobs
    assert len(job.pages) == 25
    assert job.slots.tolist() == slots.tolist()
    restores.end(0)
    assert tail.outlook().restored_from == 15


def test_a_restore_that_fails_leaves_all_to_computing(restores):
    tail = new_tail()
    begin(tail, restores)
    tail.landed(35, pages(5))
    tail.landed(30, pages(5))
    restores.end(0)
    assert not tail.is_idle
    restores.callbacks[1][1](CodecError("a bit has flipped"))
    assert tail.outlook() == tail.outlook().__class__(PAGES, PAGES)
    assert tail.is_idle
    assert tail.bad_pages
    # And nothing more is begun.
    tail.landed(25, pages(5))
    assert len(restores.jobs) == 2


def test_ranks_take_together_what_all_have_planned(restores):
    tail = new_tail()
    for first in (35, 28):
        tail.next_block(EVEN)
        tail.shorten(first)
        tail.landed(first, pages(5 if first == 35 else 7))
    tail.agree(24, 33, 64)
    assert (tail.first_page, tail.end, tail.pass_tokens) == (24, 33, 64)
    assert tail.next_block(EVEN)[1] == 28
    slots = torch.arange((33 - tail.lowest_page) * PAGE_TOKENS)
    tail.begin(slots, tail.lowest_page, restores.start)
    (job,) = restores.jobs
    assert len(job.pages) == 5
    restores.end(0)
    assert tail.outlook().restored_from == 28
    # What was under way when they agreed.
    tail.landed(33, pages(2))
    assert len(restores.jobs) == 1


def turned_tail(head_pages=10, doubted_bytes_per_s=1000 / PAGE_S / 100):
    prefix = Prefix([1000] * PAGES, PAGE_TOKENS, 0, PAGES * PAGE_TOKENS + 9)
    return Tail(prefix, 20, 128, head_pages, doubted_bytes_per_s)


def test_what_is_there_is_not_fetched_again():
    assert turned_tail().lowest_page == 15
    assert turned_tail(head_pages=19).lowest_page == 20
    assert fetch_all(turned_tail(head_pages=19), known(1e9))[-1][0] >= 20


def test_of_a_doubted_link_little_is_asked_at_first():
    tail = turned_tail()
    assert tail.next_block(EVEN) == (PAGES - 1, PAGES)
    tail.landed(PAGES - 1, pages(1))
    # It was a pause.
    first, end = tail.next_block(EVEN)
    assert end - first > 1
    # So it is of one that looks dead: else nobody would learn that it is not.
    assert turned_tail(doubted_bytes_per_s=1e-6).next_block(EVEN) == (PAGES - 1, PAGES)


def test_computing_does_not_stop_for_what_may_never_come(restores):
    tail = turned_tail()
    begin(tail, restores)
    first, _ = tail.next_block(EVEN)
    assert tail.outlook().compute_until == PAGES
    tail.landed(first, pages(PAGES - first))
    restores.end(0)
    following, _ = tail.next_block(EVEN)
    assert tail.outlook().compute_until == following


def test_computing_does_not_stop_where_one_more_pass_takes_longer(restores):
    tail = new_tail()
    begin(tail, restores)
    # Of the last seven pages two are on their way.
    tail.computing(33)
    per_pass = dataclasses.replace(EVEN, prefill=PrefillModel(100 * PAGE_S, PAGE_S / PAGE_TOKENS, 0.0))
    tail.pass_tokens = 8 * PAGE_TOKENS
    tail.next_block(per_pass)
    tail.shorten(PAGES - 2)
    assert tail.outlook().compute_until == PAGES
    tail.pass_tokens = PAGE_TOKENS
    assert tail.outlook().compute_until == PAGES - 2


def test_ranks_compute_from_where_the_one_with_most_is(restores):
    tail = turned_tail()
    tail.agree(20, 33, 64, 18)
    assert tail.lowest_page == 19
