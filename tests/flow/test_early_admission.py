"""EarlyAdmission before all has landed, against a simulation of link, restore threads and forward pass."""

import dataclasses
import heapq
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.flow.blocks import (
    BLOCK_S,
    LATE_SHARE,
    MIN_BLOCK_S,
    NOTICE_S,
    block_pages,
    block_s,
    next_block,
    overlappable_s,
)
from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.early_admission import (
    LANDING_MARGIN,
    LEAST_MARGIN,
    MOST_MARGIN,
    PERIOD_S,
    STALL_S,
    STALL_SHARE,
    WATCH_S,
    EarlyAdmission,
    is_in_time,
)
from sglang_kvcodec.flow.link_meter import WINDOW_S
from sglang_kvcodec.flow.planner import Bounds, plan_fetch
from sglang_kvcodec.flow.prediction import NOTHING_KNOWN, Knowledge, Prefix, predict_rest
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_meter import RestoreModel
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES
from sglang_kvcodec.flow.stored_prefix import Run, StoredPrefix

PREFILL = PrefillModel(0.01, 1e-4, 0.0)
RESTORE = RestoreModel(0.0, 1e-7, 20, 32, 2, 10)
"""Ten layer groups of two sides; 20 MB/s with both threads."""
PREFIX = Prefix([100_000] * 64, 64, 0, 64 * 64 + 100)
"""6.4 MB: 0.32 s to restore, and 0.02 s to compute the rest."""


def known(bytes_per_s=10e6, **changes):
    return dataclasses.replace(Knowledge(0.001, bytes_per_s, (), RESTORE, PREFILL, overlaps=True), **changes)


@pytest.mark.parametrize("missing", ["bytes_per_s", "restore", "prefill"])
def test_nothing_is_admitted_on_a_guess(missing):
    assert not is_in_time(PREFIX, 1, dataclasses.replace(known(), **{missing: None}))
    assert not is_in_time(PREFIX, 0, NOTHING_KNOWN)


@pytest.mark.parametrize(
    ("shortfall", "margin"), [(None, LANDING_MARGIN), (0.0, LEAST_MARGIN), (0.2, 0.2), (0.9, MOST_MARGIN)]
)
def test_a_link_is_taken_to_be_as_slow_as_it_was_at_times(shortfall, margin):
    def most_bytes(margin):
        """That may be missing of a link that is so much slower than it was measured."""
        fitting = (size for size in range(6_000_000, 0, -10_000) if is_within(size, margin))
        return next(fitting)

    def is_within(size, margin):
        rest = predict_rest(PREFIX, size, known(), margin, 6_000_000)
        return rest.stall_s <= max(STALL_S, STALL_SHARE * rest.after_s)

    facts = known(link_shortfall=shortfall)
    most = most_bytes(margin)
    assert is_in_time(PREFIX, most, facts, 6_000_000)
    assert not is_in_time(PREFIX, most + 10_000, facts, 6_000_000)


def test_over_a_long_time_slow_moments_of_a_link_even_out():
    link, shortfall = 0.5e6, 0.3
    # Ten seconds, in which most of what is missing can land.
    facts = known(link, link_shortfall=shortfall, prefill=PrefillModel(0.0, 0.1, 0.0))

    def is_within(size):
        margin = shortfall / math.sqrt(size / link / WINDOW_S)
        assert LEAST_MARGIN < margin < shortfall / 3
        rest = predict_rest(PREFIX, size, facts, margin, 6_400_000)
        return rest.stall_s <= STALL_SHARE * rest.after_s

    most = next(size for size in range(6_000_000, 0, -10_000) if is_within(size))
    assert most / link > 8
    assert is_in_time(PREFIX, most, facts, 6_400_000)
    assert not is_in_time(PREFIX, most + 10_000, facts, 6_400_000)


def test_what_has_landed_is_in_time():
    assert is_in_time(PREFIX, 0, known())


def test_the_link_may_take_as_long_as_the_restore():
    # 0.32 s of restoring, 0.64 s of link for all.
    assert not is_in_time(PREFIX, 6_400_000, known())
    assert not is_in_time(PREFIX, 3_200_000, known())
    assert is_in_time(PREFIX, 2_500_000, known())
    assert is_in_time(PREFIX, 6_400_000, known(50e6))
    assert not is_in_time(PREFIX, 2_500_000, known(others_bytes=[10**9]))
    # What else is to be restored gives the link time.
    assert is_in_time(PREFIX, 3_200_000, known(restore=dataclasses.replace(RESTORE, queued_s=0.2)))


def test_it_is_asked_now_and_then():
    admission = EarlyAdmission(PREFIX)
    assert not admission.is_due(6_000_000, known(), 5.0)
    assert not admission.is_worth_asking(0, 5.0)
    assert not admission.is_worth_asking(1_000_000, 5.0 + WATCH_S / 2)
    now_s = 5.0 + WATCH_S
    assert admission.is_worth_asking(6_000_000, now_s)
    assert not admission.is_worth_asking(6_000_000, now_s + PERIOD_S / 2)
    assert admission.is_worth_asking(6_000_000, now_s + PERIOD_S)
    assert admission.is_due(6_000_000, known(), now_s)
    assert not admission.is_due(1_000_000, known(), now_s)
    # More than was announced.
    assert admission.is_due(7_000_000, known(), now_s)


def test_what_the_link_was_does_not_count_more_than_what_it_is():
    admission = EarlyAdmission(PREFIX)
    assert not admission.is_worth_asking(100_000, 5.0)
    # 1 MB/s, where it was 1 GB/s.
    assert not admission.is_due(200_000, known(1e9), 5.1)
    assert not admission.is_due(5_000_000, known(1e9), 9.9)
    assert admission.is_due(6_200_000, known(1e9), 11.1)
    # And one that was slow, and seems to be fast for a moment, is slow.
    assert not EarlyAdmission(PREFIX).is_due(6_000_000, known(1e3), 5.1)
    burst = EarlyAdmission(PREFIX)
    assert not burst.is_worth_asking(0, 5.0)
    assert not burst.is_due(6_000_000, known(1e3), 5.03)


def test_a_link_that_has_just_failed_is_not_trusted():
    admission, now_s, received = EarlyAdmission(PREFIX), 5.0, 0
    while received < 4_000_000:
        admission.is_worth_asking(received, now_s)
        now_s, received = now_s + 0.002, received + 100_000
    assert admission.is_worth_asking(received, now_s)
    assert admission.is_due(received, known(50e6), now_s)
    # A tenth of that from now on; what is known is as old as it was.
    now_s, received = now_s + 0.02, received + 100_000
    assert admission.is_worth_asking(received, now_s)
    now_s, received = now_s + 0.1, received + 500_000
    assert admission.is_worth_asking(received, now_s)
    assert not admission.is_due(received, known(50e6), now_s)


@given(st.floats(1, 1e12), st.floats(1, 1e9), st.integers(1, 4000), st.floats(0, 1))
def test_blocks_tile_segments_or_are_tiled_by_them(bytes_per_s, page_bytes, pages, round_trip_s):
    block = block_pages(bytes_per_s, page_bytes, pages, SEGMENT_PAGES, round_trip_s)
    wanted = bytes_per_s * block_s(pages * page_bytes / bytes_per_s, round_trip_s) / page_bytes
    assert 1 <= block <= max(1, 1.5 * wanted)
    assert block > wanted / 2 - 1
    assert SEGMENT_PAGES % block == 0 or block % SEGMENT_PAGES == 0


def test_a_block_is_a_share_of_the_fetch_between_bounds():
    assert block_s(1.2, 0.001) == pytest.approx(0.2)
    assert block_s(60.0, 0.0) == BLOCK_S
    assert block_s(0.01, 0.0) == MIN_BLOCK_S
    # A far peer is asked less often.
    assert block_s(0.6, 0.02) == pytest.approx(0.4)
    assert block_s(0.6, 0.2) == BLOCK_S


def first_token_s(prefix, missing_bytes, known, landed=False, at_once=False):
    """Simulated time to the first token of a request that is admitted now; ``landed``: as if nothing were missing.

    Blocks land one after another, each layer group by layer group; ``at_once``: all pages are one, whatever the rules
    say. A part of a segment can be restored when the layer group of all its pages has landed, each by one thread. The
    forward pass waits for each layer group.
    """
    restore, groups = known.restore, known.restore.layer_groups
    pages, total = len(prefix.page_bytes), sum(prefix.page_bytes)
    each = block_pages(known.bytes_per_s, total / pages, pages, restore.segment_pages, known.round_trip_s)
    prefill_s = known.prefill.seconds(prefix.prompt_tokens - prefix.tokens_before, prefix.tokens_before)
    after_s = predict_rest(prefix, 0, known).after_s
    overlap_s = overlappable_s(np.array([after_s]), np.array([total / known.bytes_per_s]), prefill_s)[0]
    overlap_pages = overlap_s * known.bytes_per_s / (total / pages)
    lands_s = {}
    position, first = 0.0, 0
    while first < pages:
        block = range(first, pages if at_once else first + next_block(pages - first, each, overlap_pages))
        for group in range(groups):
            for page in block:
                position += prefix.page_bytes[page] / groups
                late_bytes = 0.0 if landed else max(0.0, position - (total - missing_bytes))
                lands_s[page, group] = late_bytes / known.bytes_per_s
        first = block.stop
    sides = restore.parts // groups
    parts = []
    for group in range(groups):
        for start in range(0, pages, restore.segment_pages):
            segment = range(start, min(pages, start + restore.segment_pages))
            part_bytes = sum(prefix.page_bytes[page] for page in segment) / groups / sides
            landed_s = max(lands_s[page, group] for page in segment)
            parts += [(landed_s, group, restore.part_s + part_bytes * restore.byte_s)] * sides
    free = [restore.queued_s] * restore.threads
    ready_s = [0.0] * groups
    while parts:
        now_s = max(heapq.heappop(free), min(parts)[0])
        # Of those that have landed the first layers first.
        _, group, seconds = chosen = min((part for part in parts if part[0] <= now_s), key=lambda part: part[1])
        parts.remove(chosen)
        heapq.heappush(free, now_s + seconds)
        ready_s[group] = max(ready_s[group], now_s + seconds)
    before = prefix.tokens_before + pages * prefix.page_tokens
    forward_s = known.prefill.seconds(max(1, prefix.prompt_tokens - before), before)
    now_s = 0.0
    for group_s in ready_s:
        now_s = max(now_s, group_s) + forward_s / groups
    return now_s


@given(
    pages=st.integers(1, 200),
    page_bytes=st.integers(1_000, 200_000),
    missing=st.floats(0, 1),
    link=st.floats(1e5, 1e9),
    part_s=st.floats(0, 0.005),
    byte_s=st.floats(1e-9, 1e-6),
    threads=st.integers(1, 8),
    rest=st.integers(1, 3000),
    queued_s=st.floats(0, 0.5),
    at_once=st.booleans(),
)
def test_who_is_admitted_early_waits_no_longer_than_for_the_decoders(
    pages, page_bytes, missing, link, part_s, byte_s, threads, rest, queued_s, at_once
):
    prefix = Prefix([page_bytes] * pages, 64, 0, pages * 64 + rest)
    restore = RestoreModel(part_s, byte_s, 20, 32, threads, 10, queued_s)
    state = known(link, restore=restore, round_trip_s=0.0)
    missing_bytes = missing * pages * page_bytes
    last_block_bytes = pages * page_bytes if at_once else None
    if not is_in_time(prefix, missing_bytes, state, last_block_bytes):
        return
    landed_s = first_token_s(prefix, missing_bytes, state, landed=True)
    early_s = first_token_s(prefix, missing_bytes, state, at_once=at_once)
    # Threads that have nothing yet, at the begin, and the uneven last parts are what the prediction leaves out.
    part = part_s + min(pages, 32) * page_bytes / 20 * byte_s
    after_s = predict_rest(prefix, missing_bytes, state).after_s
    assert early_s <= max(landed_s, after_s) * (1 + STALL_SHARE) + STALL_S + 3 * part


@given(missing=st.floats(0, 1), link=st.floats(1e5, 1e9))
def test_less_to_come_is_never_worse(missing, link):
    total = sum(PREFIX.page_bytes)
    if is_in_time(PREFIX, missing * total, known(link)):
        assert is_in_time(PREFIX, missing * total / 2, known(link))
        assert is_in_time(PREFIX, missing * total, known(2 * link))


def test_what_is_fetched_in_one_block_is_in_time_as_soon_as_its_first_layers_are_there():
    # 0.32 s of restoring, and as long for the link: blocks of 0.05 s would not do.
    state = known(20e6 * (1 + LANDING_MARGIN))
    nine_tenths = 5_760_000
    assert is_in_time(PREFIX, nine_tenths, state, 6_400_000)
    assert not is_in_time(PREFIX, nine_tenths, state, 1_000_000)
    assert not is_in_time(PREFIX, 6_400_000, state, 6_400_000)
    admission = EarlyAdmission(PREFIX)
    assert not admission.is_worth_asking(0, 5.0)
    assert admission.is_due(640_000, state, 5.0 + 640_000 / 23e6, 6_400_000)


def test_the_last_block_is_what_comes_while_the_rest_is_computed():
    assert [next_block(left, 4) for left in (4, 10, 11, 40)] == [4, 10, 4, 4]
    assert [next_block(left, 4, 20.5) for left in (4, 20, 21, 40)] == [4, 20, 4, 4]
    assert next_block(10, 4, 2.0) == 10


@pytest.mark.parametrize("changes", [{"overlaps": False}, {"restore": None}, {"prefill": None}])
def test_nothing_is_said_to_overlap_that_does_not_or_is_not_known(changes):
    bounds = Bounds(1, 1 << 60)
    assert plan_fetch(PREFIX, known(), bounds, always=True).overlap_s == pytest.approx(0.32, rel=0.1)
    assert plan_fetch(PREFIX, dataclasses.replace(known(), **changes), bounds, always=True).overlap_s == 0.0


@pytest.mark.parametrize("fetch_s", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("prefill_s", [0.3, 1.0, 2.0, 20.0])
def test_a_link_that_fails_in_the_last_block_costs_a_share_of_the_prefill(fetch_s, prefill_s):
    last_s = overlappable_s(np.array([fetch_s]), np.array([fetch_s]), prefill_s)[0]
    assert 0 <= last_s <= fetch_s
    assert (prefill_s < 20.0) or last_s == fetch_s
    if last_s:
        # It fails at the end: what came before is whole, the last block is computed.
        late_s = fetch_s + NOTICE_S + prefill_s * last_s / fetch_s
        assert late_s <= (1 + LATE_SHARE) * prefill_s + 1e-9


def test_a_course_ends_in_a_block_that_overlaps():
    stored = StoredPrefix("exact", (Run(b"n" * 32, 0, 40, 40_000),))
    course = Course([stored], 0, 40, overlap_s=0.7)
    blocks, first = [], 0
    while first < 40:
        # 40 pages a second: blocks of eight pages, and 28 come while the rest is computed.
        blocks.append((course.block(first, 40_000.0, 32, 0.0), course.last_block_bytes))
        first += blocks[-1][0]
    assert blocks == [(8, None)] * 2 + [(24, 24_000)]
    course.switch(0, 30)
    assert course.last_block_bytes is None
    assert Course([stored], 0, 40, overlap_s=0.5).block(0, None, 32, 0.0) == 40


def test_the_margin_is_kept():
    rest = predict_rest(PREFIX, 10**6, known(round_trip_s=0.0), LANDING_MARGIN)
    assert rest.landing_s == pytest.approx(0.1 * (1 + LANDING_MARGIN))


@pytest.mark.parametrize("link", [2e6, 10e6, 20e6, 40e6, 1e9])
@pytest.mark.parametrize("rest", [1, 300, 3000])
def test_the_plan_expects_what_overlapping_gives(link, rest):
    prefix = dataclasses.replace(PREFIX, prompt_tokens=64 * 64 + rest)
    bounds = Bounds(1, 1 << 60)
    early = plan_fetch(prefix, known(link, prefill=PrefillModel(0.01, 1.0, 0.0)), bounds)
    landed = plan_fetch(prefix, known(link, prefill=PrefillModel(0.01, 1.0, 0.0), overlaps=False), bounds)
    assert early.pages == landed.pages == 64
    prefill = PrefillModel(0.01, 1e-4, 0.0)
    early, landed = (
        plan_fetch(prefix, known(link, prefill=prefill, overlaps=overlaps), bounds, always=True)
        for overlaps in (True, False)
    )
    total = sum(prefix.page_bytes)
    best = min(
        # Admitted at each moment of the transfer, with no stall: what a clairvoyant would do.
        received / link + first_token_s(prefix, total - received, known(link, prefill=prefill))
        for received in range(0, total + 1, total // 64)
        if received == total
        or first_token_s(prefix, total - received, known(link, prefill=prefill))
        <= first_token_s(prefix, 0, known(link, prefill=prefill)) * 1.02 + 0.002
    )
    assert early.ttft_s <= landed.ttft_s
    assert early.ttft_s == pytest.approx(best, rel=0.15, abs=0.02)
