"""What is done with a fetch that was given up, from what it has brought and what is known."""

import dataclasses
import types

import pytest

from sglang_kvcodec.flow.fetch_planning import PlannedFetch
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.meeting import MOST_LONGER
from sglang_kvcodec.flow.pacing import PROGRESS, Flight, Stage
from sglang_kvcodec.flow.planner import FetchPlan
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.prefix_fetch import Fetched
from sglang_kvcodec.flow.restore_meter import RestoreModel
from sglang_kvcodec.flow.turning import turn

PAGES = 30
PAGE_TOKENS = 64
SIZES = [[1000] * PAGES, [500] * (PAGES - 4)]
"""Of two tiers. Of the smaller one less is stored."""
PREFILL = PrefillModel(0.005, 1e-3, 0.0, 4 * PAGE_TOKENS)
KNOWN = Knowledge(0.001, 1e6, (), RestoreModel(0.0, 0.0, 2, 32, 1, 1), PREFILL)
PREFIX = Prefix(SIZES[0], PAGE_TOKENS, 128, 128 + PAGES * PAGE_TOKENS + 5)


def planned(doubted_bytes_per_s=1e4, pages=PAGES, may_turn=True):
    ticket = FetchTicket([bytes([index]) * 32 for index in range(PAGES)])
    flight = Flight(Stage(PROGRESS, 0.0, PREFIX), lambda phase: None)
    flight.may_turn, flight.given_up_at_bytes_per_s = may_turn, doubted_bytes_per_s
    stored = [types.SimpleNamespace(page_bytes=sizes, pages=len(sizes)) for sizes in SIZES]
    prefix = dataclasses.replace(PREFIX, page_bytes=SIZES[0][:pages])
    return PlannedFetch(ticket, flight, stored, 0, FetchPlan(pages, "part"), prefix, 0.0, 60.0)


def fetched(pages=10, choice=0):
    return Fetched(pages=[object()] * pages, choice=choice)


def test_what_is_whole_is_its_head_and_the_rest_is_shared():
    plan, tail = turn(planned(), fetched(), KNOWN, 1)
    assert tail.head_pages == 10
    assert 10 < tail.lowest_page <= tail.first_page < tail.end == PAGES
    assert tail.prefix.page_bytes == SIZES[0]
    assert plan.prefix is tail.prefix


def test_it_goes_on_in_the_tier_that_it_came_to():
    plan, tail = turn(planned(), fetched(choice=1), KNOWN, 1)
    assert plan.choice == 1
    assert tail.prefix.page_bytes == SIZES[1]
    assert tail.end == PAGES - 4


def test_no_more_is_fetched_than_was_planned():
    _, tail = turn(planned(pages=20), fetched(), KNOWN, 1)
    assert tail.end == 20


@pytest.mark.parametrize(
    ("changes", "brought", "facts", "min_tokens"),
    [
        ({"may_turn": False}, 10, {}, 1),
        ({"doubted_bytes_per_s": None}, 10, {}, 1),
        ({}, 10, {"prefill": None}, 1),
        ({}, 10, {"restore": None}, 1),
        ({}, PAGES - 1, {}, 1),
        ({}, 10, {}, 21 * PAGE_TOKENS),
    ],
)
def test_else_what_is_missing_is_computed(changes, brought, facts, min_tokens):
    assert turn(planned(**changes), fetched(brought), dataclasses.replace(KNOWN, **facts), min_tokens) is None


def test_nobody_is_there_to_compute_for():
    given_up = planned()
    given_up.ticket.cancel()
    assert turn(given_up, fetched(), KNOWN, 1) is None


@pytest.mark.parametrize("pass_s", [0.0, 0.005, 0.1, 10.0])
@pytest.mark.parametrize("doubted_bytes_per_s", [1e-6, 1e2, 1e4, 1e9])
def test_passes_are_not_so_short_that_computing_alone_takes_much_longer(pass_s, doubted_bytes_per_s):
    prefill = dataclasses.replace(PREFILL, pass_s=pass_s)
    _, tail = turn(planned(doubted_bytes_per_s), fetched(), dataclasses.replace(KNOWN, prefill=prefill), 1)
    missing, before = (PAGES - 10) * PAGE_TOKENS, 128 + 10 * PAGE_TOKENS
    short = dataclasses.replace(prefill, pass_tokens=min(tail.pass_tokens, prefill.pass_tokens))
    assert tail.pass_tokens % PAGE_TOKENS == 0
    assert short.seconds(missing, before) <= prefill.seconds(missing, before) * (1 + MOST_LONGER)
