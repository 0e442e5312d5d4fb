"""Computing the start of a prefix while its end is fetched: where both will meet, and whether they should."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_kit import PLENTY, PREFILL, RESTORE, known, link_s, prefix, restore_s

from sglang_kvcodec.flow.meeting import BLOCKS, MOST_LONGER, plan_meeting, predict_meeting
from sglang_kvcodec.flow.planner import BOTH_ENDS, PREFER_SHARE, REASONS, WHOLE_PREFIX, Bounds, Choice, plan_fetch
from sglang_kvcodec.flow.prediction import NOTHING_KNOWN
from sglang_kvcodec.flow.prefill_meter import PrefillModel


def reference(prefix, known, first, pages, pass_tokens):
    """Predicted TTFT, in plain words, where pages from ``first`` to ``pages`` are fetched."""
    fetched = prefix.page_bytes[first:pages]
    blocks = min(len(fetched), BLOCKS)
    fetch_s = known.round_trip_s * blocks + link_s(known, sum(fetched))
    work_s = restore_s(known.restore, len(fetched), sum(fetched))
    last_s = restore_s(known.restore, 1, sum(fetched) / blocks)
    ready_s = max(fetch_s, known.restore.queued_s + work_s) + last_s
    tokens = first * prefix.page_tokens
    compute_s = sum(
        known.prefill.seconds(min(pass_tokens, tokens - done), prefix.tokens_before + done)
        for done in range(0, tokens, pass_tokens)
    )
    half_s = compute_s / math.ceil(tokens / pass_tokens) / 2
    before = prefix.tokens_before + pages * prefix.page_tokens
    return max(compute_s, ready_s) + half_s + known.prefill.seconds(max(1, prefix.prompt_tokens - before), before)


@given(
    pages=st.integers(2, 60),
    page_bytes=st.integers(1000, 10**6),
    before=st.integers(0, 3000),
    rest=st.integers(1, 500),
    bytes_per_s=st.floats(1e5, 1e10),
    round_trip_s=st.floats(0, 0.1),
    others=st.lists(st.integers(0, 10**7), max_size=2),
    queued_s=st.floats(0, 1),
)
def test_what_is_predicted_is_what_the_words_say(
    pages, page_bytes, before, rest, bytes_per_s, round_trip_s, others, queued_s
):
    stored = prefix(pages, page_bytes, before, rest)
    facts = known(bytes_per_s, round_trip_s, others, dataclasses.replace(RESTORE, queued_s=queued_s))
    meeting = predict_meeting(stored, facts, pages)
    assert 0 < meeting.first_page < pages
    assert meeting.pass_tokens % 64 == 0

    def words(first):
        return reference(stored, facts, first, pages, meeting.pass_tokens)

    assert meeting.ttft_s == pytest.approx(words(meeting.first_page))
    assert meeting.ttft_s <= min(map(words, range(1, pages))) * (1 + 1e-9)


@pytest.mark.parametrize("unknown", [{"prefill": None}, {"restore": None}])
def test_nothing_meets_while_too_little_is_known(unknown):
    assert predict_meeting(prefix(30), dataclasses.replace(known(1e8), **unknown), 30) is None
    assert predict_meeting(prefix(30), dataclasses.replace(known(1e8), bytes_per_s=None), 30) is None
    assert predict_meeting(prefix(30), known(1e8), 1) is None


def test_equally_fast_ones_meet_in_the_middle_in_half_the_time():
    # A page is computed in 6.4 ms, and fetched in as much.
    facts = known(100_000 / 0.0064, prefill=PrefillModel(1e-6, 1e-4, 0.0))
    meeting = predict_meeting(prefix(60), facts, 60)
    assert 25 <= meeting.first_page <= 35
    assert meeting.ttft_s < 0.62 * 60 * 0.0064


def test_passes_are_as_long_as_sglang_allows_at_most():
    facts = known(1e7, prefill=dataclasses.replace(PREFILL, pass_tokens=128))
    assert predict_meeting(prefix(60), facts, 60).pass_tokens <= 128


def test_dear_passes_are_few():
    cheap = predict_meeting(prefix(60), known(1e7), 60)
    dear = predict_meeting(prefix(60), known(1e7, prefill=dataclasses.replace(PREFILL, pass_s=0.1)), 60)
    assert dear.pass_tokens > cheap.pass_tokens


@given(
    pages=st.integers(2, 60),
    bytes_per_s=st.floats(1e5, 1e10),
    pass_s=st.floats(0, 0.2),
    whole_s=st.floats(0, 1e-7),
    most=st.sampled_from([0, 64, 192, 256, 1000, 8192]),
)
def test_computing_all_takes_hardly_longer_in_such_passes(pages, bytes_per_s, pass_s, whole_s, most):
    """For nothing may come."""
    prefill = PrefillModel(pass_s, 1e-4, 1e-9, most, whole_s)
    meeting = predict_meeting(prefix(pages), known(bytes_per_s, prefill=prefill), pages)
    if meeting is not None:
        passes = dataclasses.replace(prefill, pass_tokens=meeting.pass_tokens)
        assert passes.seconds(pages * 64, 0) <= prefill.seconds(pages * 64, 0) * (1 + MOST_LONGER) + 1e-9


def plans(facts, stored=None, bounds=PLENTY):
    stored = stored or prefix(30)
    plan = plan_fetch(stored, facts, bounds)
    index, both = plan_meeting([Choice(stored, facts)], 0, plan, bounds)
    assert index == 0
    return plan, both


def test_both_ends_are_worked_on_where_that_is_faster():
    plan, both = plans(known(100_000 / 0.0064))
    assert both.reason == BOTH_ENDS
    assert BOTH_ENDS in REASONS
    assert 0 < both.first_page < both.pages == 30
    assert both.ttft_s <= plan.ttft_s
    assert both.prefill_s == plan.prefill_s
    assert plan.words in both.words


def test_they_are_worked_on_wherever_that_is_no_slower():
    taken = []
    for bytes_per_s in np.geomspace(1e4, 1e11, 60):
        facts = known(bytes_per_s)
        plan, both = plans(facts)
        meeting = predict_meeting(prefix(30), facts, 30)
        taken.append(both is not plan)
        assert taken[-1] == (meeting.ttft_s <= plan.ttft_s)
    assert 0 < sum(taken) < len(taken)


@pytest.mark.parametrize("bytes_per_s", [1e12, 1e2])
def test_a_link_that_is_much_faster_or_slower_works_alone(bytes_per_s):
    plan, both = plans(known(bytes_per_s))
    assert both is plan


def test_both_ends_are_worked_on_while_it_is_not_known_how_fast_they_are():
    for facts in (NOTHING_KNOWN, known(1e8, prefill=None)):
        plan, both = plans(facts)
        assert both.reason == BOTH_ENDS
        assert both.ttft_s is None
        assert both.pages == plan.pages == 30
        assert (both.first_page, both.pass_tokens) == (15, 3 * 64)
    # Too little to share, or nothing.
    for stored in (prefix(5), prefix(0)):
        plan, both = plans(NOTHING_KNOWN, stored)
        assert both is plan


def test_no_more_is_fetched_than_the_bounds_allow():
    facts = known(100_000 / 0.0064)
    _, both = plans(facts, bounds=Bounds(1, 20 * 100_000))
    assert both.pages == 20
    plan, both = plans(facts, bounds=Bounds(29 * 64, 1 << 60))
    assert both is plan
    assert plan.reason == WHOLE_PREFIX


def test_a_smaller_tier_has_to_save_a_share():
    facts = known(100_000 / 0.0064)
    better = Choice(prefix(30), facts)
    plan = plan_fetch(better.prefix, facts, PLENTY)
    for page_bytes, expected in ((98_000, 0), (30_000, 1)):
        smaller = Choice(prefix(30, page_bytes), facts)
        index, both = plan_meeting([better, smaller], 0, plan, PLENTY)
        assert (index, both.reason) == (expected, BOTH_ENDS)
    assert 0 < PREFER_SHARE < 1
