import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_kit import PLENTY, PREFILL, RESTORE, known, link_s, prefix, restore_s

from sglang_kvcodec.flow.planner import (
    BLIND_S,
    CUT_TO_HOST_MEMORY,
    LEARNING,
    LINK_TOO_SLOW,
    NOT_STORED,
    PART,
    PREFER_SHARE,
    REASONS,
    RESTORE_TOO_SLOW,
    SWITCH_SHARE,
    TAKE_GAIN,
    TOO_SHORT,
    WHOLE_PREFIX,
    Bounds,
    Choice,
    choose_rest,
    plan_fetch,
    plan_tiers,
)
from sglang_kvcodec.flow.prediction import (
    NOTHING_KNOWN,
    Knowledge,
    Prefix,
    holds_up,
    predict,
    predict_rest,
    restoring_pays,
)
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_meter import RestoreModel


def reference(prefix, known, pages):
    """Predicted TTFT, in plain words of one number of pages."""
    before = prefix.tokens_before + pages * prefix.page_tokens
    new = max(1, prefix.prompt_tokens - before)
    forward_s = known.prefill.seconds(new, before)
    if not pages:
        return forward_s
    size = sum(prefix.page_bytes[:pages])
    fetch_s = known.round_trip_s + link_s(known, size)
    ready_s = restore_s(known.restore, pages, size) + max(0, known.restore.queued_s - fetch_s)
    first_group = min(ready_s, forward_s) / known.restore.layer_groups
    return fetch_s + max(ready_s, forward_s) + first_group


# ---- examples ----


def test_nothing_stored():
    plan = plan_fetch(prefix(0), known(), PLENTY)
    assert (plan.pages, plan.reason) == (0, NOT_STORED)


@pytest.mark.parametrize("always", [False, True])
def test_a_prefix_of_exactly_the_least_length_is_fetched(always):
    assert plan_fetch(prefix(2), known(), Bounds(128, 1 << 60), always=always).pages == 2
    plan = plan_fetch(prefix(2), known(), Bounds(129, 1 << 60), always=always)
    assert (plan.pages, plan.reason) == (0, TOO_SHORT)


@pytest.mark.parametrize("always", [False, True])
def test_what_just_fits_is_fetched_whole(always):
    whole = plan_fetch(prefix(7, 1000), known(), Bounds(1, 7000), always=always)
    assert (whole.pages, whole.reason) == (7, WHOLE_PREFIX)
    cut = plan_fetch(prefix(7, 1000), known(), Bounds(1, 6999), always=always)
    assert (cut.pages, cut.reason) == (6, CUT_TO_HOST_MEMORY)
    assert plan_fetch(prefix(7, 1000), known(), Bounds(65, 1999), always=always).reason == TOO_SHORT


def test_a_slow_link_is_not_waited_for():
    plan = plan_fetch(prefix(30), known(bytes_per_s=1e5), PLENTY)
    assert (plan.pages, plan.reason) == (0, LINK_TOO_SLOW)
    assert plan.ttft_s == plan.prefill_s == pytest.approx(PREFILL.seconds(30 * 64 + 17, 0))
    assert "fetch 30 s" in plan.words
    assert plan_fetch(prefix(30), known(bytes_per_s=1e5), PLENTY, always=True).pages == 30


def test_slow_decoders_are_not_waited_for():
    slow = RestoreModel(1e-4, 1e-6, 10, 32, 2, 5)
    assert plan_fetch(prefix(30), known(restore=slow), PLENTY).reason == RESTORE_TOO_SLOW


def test_a_pass_beside_its_restore_takes_longer_but_no_longer_than_that():
    alone = predict(prefix(30), known())
    for restored_s in (5e-6, 1.0):
        beside = predict(prefix(30), known(prefill=dataclasses.replace(PREFILL, restored_s=restored_s)))
        for pages in (0, 1, 29):
            slowed_s = min(pages * 64 * restored_s, alone.restore_s[pages])
            assert beside.forward_s[pages] == pytest.approx(alone.forward_s[pages] + slowed_s)


def test_decoders_that_are_busy_are_not_waited_for():
    busy = RestoreModel(1e-4, 1e-9, 10, 32, 2, 5, queued_s=7)
    assert plan_fetch(prefix(30), known(restore=busy), PLENTY).reason == RESTORE_TOO_SLOW


def test_a_link_that_others_use_is_shared():
    bytes_per_s = 3e6 / 0.15
    assert plan_fetch(prefix(30), known(bytes_per_s), PLENTY).pages == 30
    assert plan_fetch(prefix(30), known(bytes_per_s, others=[10**9, 10**9]), PLENTY).reason == LINK_TOO_SLOW


def test_what_the_decoders_can_not_do_under_the_forward_pass_is_computed():
    # Restoring all of it takes twice as long as computing all of it: meet in the middle.
    half_as_fast = RestoreModel(0, 4e-6 * 64, 8, 32, 1, 8)
    plan = plan_fetch(prefix(100, 100), known(restore=half_as_fast, prefill=PrefillModel(0, 1e-4, 0)), PLENTY)
    assert plan.reason == PART
    assert 10 < plan.pages < 90
    assert plan.ttft_s < plan.prefill_s


@pytest.mark.parametrize("missing", ["bytes_per_s", "restore"])
def test_what_is_not_known_is_tried(missing):
    plan = plan_fetch(prefix(30), known(**{missing: None}), PLENTY)
    assert (plan.pages, plan.reason) == (30, LEARNING)
    assert plan.ttft_s <= plan.prefill_s


def test_what_is_known_to_be_slow_is_not_tried_for_the_sake_of_the_rest():
    slow = RestoreModel(1e-4, 1e-6, 10, 32, 2, 5)
    assert plan_fetch(prefix(30), known(bytes_per_s=None, restore=slow), PLENTY).reason == RESTORE_TOO_SLOW
    assert plan_fetch(prefix(30), known(bytes_per_s=1e5, restore=None), PLENTY).reason == LINK_TOO_SLOW


def test_decoders_that_were_slow_long_ago_get_another_try_where_nothing_else_pays():
    slow = RestoreModel(1e-4, 1e-6, 10, 32, 2, 5)
    doubted = dataclasses.replace(slow, is_doubted=True)
    assert plan_tiers([Choice(prefix(30), known(restore=slow))], PLENTY)[1].reason == RESTORE_TOO_SLOW
    plan = plan_tiers([Choice(prefix(30), known(restore=doubted))], PLENTY)[1]
    assert (plan.pages, plan.reason) == (30, LEARNING)
    # What pays is known, however old.
    fast = dataclasses.replace(RESTORE, is_doubted=True)
    choice, plan = plan_tiers([Choice(prefix(30), known(restore=each)) for each in (doubted, fast)], PLENTY)
    assert (choice, plan.reason) == (1, WHOLE_PREFIX)
    # The link may be too slow whatever they do.
    dead = known(restore=doubted, bytes_per_s=1e4)
    assert plan_tiers([Choice(prefix(30), dead)], PLENTY)[1].reason == LINK_TOO_SLOW


def test_nothing_known_fetches_all_of_it():
    plan = plan_fetch(prefix(30), NOTHING_KNOWN, PLENTY)
    assert (plan.pages, plan.reason, plan.ttft_s, plan.prefill_s) == (30, LEARNING, None, None)


def test_without_knowing_prefill_no_fetch_takes_long():
    plan = plan_fetch(prefix(100), known(bytes_per_s=1e6, prefill=None), PLENTY)
    assert plan.reason == LEARNING
    assert 0 < plan.pages < 100
    assert plan.fetch_s <= BLIND_S
    assert plan_fetch(prefix(100), known(bytes_per_s=1e3, prefill=None), PLENTY).reason == LINK_TOO_SLOW
    assert plan_fetch(prefix(100), known(bytes_per_s=0.0, prefill=None), PLENTY).pages == 0


def test_a_dead_link_is_no_reason_to_divide_by_zero():
    assert plan_fetch(prefix(3), known(bytes_per_s=0.0), PLENTY).reason == LINK_TOO_SLOW


def test_noise_does_not_change_the_way_taken():
    """Around the break-even: whoever fetched goes on until it is slower, whoever computed waits for a clear gain."""

    def taken(gain, was_fetching):
        total = PREFILL.seconds(30 * 64 + 17, 0)
        free = RestoreModel(0, 0, 10, 32, 2, 1)
        rest = PREFILL.seconds(17, 30 * 64)
        bytes_per_s = 3e6 / (total * (1 - gain) - rest)
        return plan_fetch(prefix(30), known(bytes_per_s, 0.0, (), free), PLENTY, was_fetching).pages == 30

    assert [taken(gain, True) for gain in (-0.02, 0.02, 0.09, 0.12)] == [False, True, True, True]
    assert [taken(gain, False) for gain in (-0.02, 0.02, 0.09, 0.12)] == [False, False, False, True]


def test_pages_in_host_memory_are_restored_if_that_is_not_slower():
    prefill = PrefillModel(0.001, 1e-4, 0)
    assert restoring_pays(RestoreModel(0, 1e-7, 10, 32, 1, 5), prefill, 10, 600_000, 640)
    assert not restoring_pays(RestoreModel(0, 1e-7, 10, 32, 1, 5), prefill, 10, 700_000, 640)
    assert restoring_pays(RestoreModel(0, 1e-7, 10, 32, 2, 5), prefill, 10, 700_000, 640)
    assert not restoring_pays(RestoreModel(0.001, 0, 80, 5, 2, 5), prefill, 10, 1, 640)
    assert not restoring_pays(RestoreModel(0, 1e-7, 10, 32, 2, 5, queued_s=1), prefill, 10, 700_000, 640)


def test_others_are_not_to_wait_for_a_restore_unless_it_is_over_at_once():
    # Four layer groups; a token takes a tenth of a millisecond to compute, a page ten to restore.
    prefill, restore = PrefillModel(0, 1e-4, 0), RestoreModel(0, 1e-6, 10, 32, 1, 4)

    def holds(pages, new_tokens, are_others=True, queued_s=0.0):
        queued = dataclasses.replace(restore, queued_s=queued_s)
        return holds_up(queued, prefill, pages, 10_000 * pages, 640, 640 + new_tokens, are_others)

    # 40 ms of restoring: a quarter of it before the pass can begin, of which it takes a tenth of its own time.
    assert not holds(4, 1000)
    assert holds(4, 300)
    assert holds(4, 1000, queued_s=0.1)
    # A hundredth of a second is nothing.
    assert not holds(1, 1)
    # Where nobody is there: overlapping ten milliseconds with a second gains nothing, a tenth of a second does.
    assert holds(100, 100, are_others=False)
    assert not holds(100, 1000, are_others=False)
    # A quarter of a second is not long.
    assert not holds(25, 1, are_others=False)


def test_beside_others_the_restore_is_over_before_the_forward_pass_begins():
    prefill, restore = PrefillModel(0, 1e-4, 0), RestoreModel(0, 1e-6, 10, 32, 1, 4)
    stored = Prefix([10_000] * 20, 64, 0, 20 * 64 + 500)
    alone = Knowledge(0.0, 1e12, (), restore, prefill, overlaps=True)
    beside = dataclasses.replace(alone, are_others=True)
    # 0.2 s of restoring, 0.05 s of computing the rest.
    assert predict(stored, alone).ttft_s[-1] == pytest.approx(0.2 + 0.05 / 4)
    assert predict(stored, beside).ttft_s[-1] == pytest.approx(0.2 + 0.05)
    assert predict(stored, beside).ttft_s[0] == predict(stored, alone).ttft_s[0]
    # Computing all takes 0.178 s.
    assert plan_fetch(stored, beside, PLENTY).pages < 20
    # Over a link that takes longer than that: the last part is restored when it has come, and then all is computed.
    slow = [dataclasses.replace(known, bytes_per_s=200_000.0) for known in (alone, beside)]
    last_part_s = 10_000 * 20 / 10 * 1e-6
    assert predict(stored, slow[1]).ttft_s[-1] >= 1 + last_part_s + 0.05
    rests = [predict_rest(stored, 100_000, known, 0.0, 100_000) for known in slow]
    assert rests[1].landed_s - rests[0].landed_s == pytest.approx(0.05 * 3 / 4, abs=1e-3)
    assert rests[1].after_s - rests[0].after_s == pytest.approx(0.05 * 3 / 4)


# ---- properties ----

seconds = st.floats(0, 10)
rates = st.floats(1, 1e12)
restores = st.builds(
    RestoreModel,
    st.floats(0, 0.1),
    st.floats(0, 1e-5),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 30),
    st.floats(0, 3),
)
prefills = st.builds(
    PrefillModel, st.floats(0, 1), st.floats(1e-7, 1e-2), st.floats(0, 1e-6), st.sampled_from([0, 1, 97, 8192])
)
prefixes = st.builds(
    lambda sizes, tokens, before, rest: Prefix(sizes, tokens, before, before + len(sizes) * tokens + rest),
    st.lists(st.integers(1, 10**8), max_size=40),
    st.integers(1, 256),
    st.integers(0, 10**5),
    st.integers(1, 10**5),
)
everything = st.builds(Knowledge, seconds, rates, st.lists(st.integers(0, 10**9), max_size=5), restores, prefills)
whatever = st.builds(
    Knowledge,
    seconds,
    st.none() | st.floats(0, 1e12),
    st.lists(st.integers(0, 10**9), max_size=5),
    st.none() | restores,
    st.none() | prefills,
)
all_bounds = st.builds(Bounds, st.integers(0, 10**4), st.integers(0, 10**9))


@given(prefixes, everything)
def test_the_best_number_of_pages_is_found(prefix, known):
    values = [reference(prefix, known, pages) for pages in range(len(prefix.page_bytes) + 1)]
    plan = plan_fetch(prefix, known, Bounds(1, 1 << 60))
    if not prefix.page_bytes:
        assert plan.reason == NOT_STORED
        return
    assert plan.prefill_s == pytest.approx(values[0])
    assert plan.ttft_s == pytest.approx(min(values))
    assert values[plan.pages] == pytest.approx(min(values))


@given(prefixes, whatever, all_bounds, st.booleans())
def test_never_slower_than_prefill_nor_out_of_bounds(prefix, known, bounds, was_fetching):
    plan = plan_fetch(prefix, known, bounds, was_fetching)
    assert 0 <= plan.pages <= len(prefix.page_bytes)
    assert plan.reason in REASONS
    assert plan.words
    if plan.pages:
        assert plan.pages * prefix.page_tokens >= bounds.min_tokens
        assert sum(prefix.page_bytes[: plan.pages]) <= bounds.max_bytes
    if known.prefill is not None and plan.ttft_s is not None:
        assert plan.ttft_s <= plan.prefill_s
    if plan.pages and known.prefill is not None and not was_fetching:
        assert plan.ttft_s <= plan.prefill_s * (1 - TAKE_GAIN)


@given(prefixes, everything, rates, st.booleans())
def test_more_bandwidth_is_never_worse(prefix, known, other, was_fetching):
    slow, fast = sorted([known.bytes_per_s, other])
    plans = [
        plan_fetch(
            prefix,
            Knowledge(known.round_trip_s, rate, known.others_bytes, known.restore, known.prefill),
            PLENTY,
            was_fetching,
        )
        for rate in (slow, fast)
    ]
    if plans[0].ttft_s is None:
        return
    assert plans[1].ttft_s <= plans[0].ttft_s * (1 + 1e-9)
    # Whoever fetches over a slow link fetches over a fast one.
    assert bool(plans[1].pages) >= bool(plans[0].pages)


@given(prefixes, st.floats(1, 1e9), all_bounds)
def test_always_takes_what_fits(prefix, rate, bounds):
    plan = plan_fetch(prefix, known(bytes_per_s=rate), bounds, always=True)
    fitting = [k for k in range(1, len(prefix.page_bytes) + 1) if sum(prefix.page_bytes[:k]) <= bounds.max_bytes]
    enough = [k for k in fitting if k * prefix.page_tokens >= bounds.min_tokens]
    assert plan.pages == max(enough, default=0)


# ---- several tiers ----


def choices(bytes_per_s, sizes=(100_000, 50_000), pages=(32, 32), restore=(RESTORE, RESTORE), prefill=PREFILL):
    return [
        Choice(
            Prefix([size] * count, 64, 0, 32 * 64 + 17), known(bytes_per_s=bytes_per_s, restore=model, prefill=prefill)
        )
        for size, count, model in zip(sizes, pages, restore, strict=True)
    ]


def test_a_fast_link_brings_the_better_tier_and_a_slow_one_the_smaller():
    index, plan = plan_tiers(choices(1e12), PLENTY)
    assert (index, plan.reason) == (0, WHOLE_PREFIX)
    index, plan = plan_tiers(choices(2e7), PLENTY)
    assert (index, plan.pages) == (1, 32)
    assert "choice 0" in plan.words
    index, plan = plan_tiers(choices(1e3), PLENTY)
    assert (plan.pages, plan.reason) == (0, LINK_TOO_SLOW)


def test_a_smaller_tier_that_saves_next_to_nothing_is_not_taken():
    almost = choices(2e7, sizes=(100_000, 99_000))
    assert plan_tiers(almost, PLENTY)[0] == 0
    assert plan_tiers(almost, PLENTY)[1].ttft_s > plan_fetch(almost[1].prefix, almost[1].known, PLENTY).ttft_s


def test_a_small_tier_that_is_slow_to_decode_is_not_taken_on_a_fast_link():
    slow = dataclasses.replace(RESTORE, byte_s=1e-7)
    assert plan_tiers(choices(1e12, restore=(RESTORE, slow)), PLENTY)[0] == 0
    assert plan_tiers(choices(1e12, restore=(slow, RESTORE)), PLENTY)[0] == 1


def test_without_knowing_prefill_the_better_tier_is_fetched_unless_it_brings_less():
    assert plan_tiers(choices(2e7, prefill=None), PLENTY)[0] == 0
    offered = choices(1e6, prefill=None)
    index, plan = plan_tiers(offered, PLENTY)
    assert index == 1
    assert plan.pages > plan_fetch(offered[0].prefix, offered[0].known, PLENTY).pages


def test_always_takes_the_better_tier_unless_it_brings_less():
    assert plan_tiers(choices(1e3), PLENTY, always=True)[0] == 0
    assert plan_tiers(choices(1e12, pages=(31, 32)), PLENTY, always=True)[0] == 1


@given(
    bytes_per_s=st.floats(1e3, 1e12),
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=4),
    was_fetching=st.booleans(),
)
def test_no_tier_would_have_been_much_better(bytes_per_s, sizes, was_fetching):
    offered = choices(bytes_per_s, sizes, [32] * len(sizes), [RESTORE] * len(sizes))
    index, plan = plan_tiers(offered, PLENTY, was_fetching)
    alone = [plan_fetch(choice.prefix, choice.known, PLENTY, was_fetching) for choice in offered]
    assert dataclasses.replace(plan, words="") == dataclasses.replace(alone[index], words="")
    # Each step down may cost the share that quality is worth.
    best_s = min(other.ttft_s for other in alone)
    assert plan.ttft_s <= best_s / (1 - PREFER_SHARE) ** len(sizes)
    assert plan.ttft_s <= plan.prefill_s


def test_a_fetch_goes_on_with_another_tier_if_that_pays():
    assert choose_rest(choices(1e12), 0) == 0
    assert choose_rest(choices(2e7), 0) == 1
    # Back, when the better one takes no longer.
    same = choices(1e12, sizes=(50_000, 50_000))
    assert choose_rest(same, 1) == 0
    assert choose_rest(choices(2e7), 1) == 1
    assert choose_rest(choices(None), 0) == 0


@given(bytes_per_s=st.floats(1e3, 1e12), sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=4))
def test_going_on_with_what_was_chosen_is_what_is_chosen_next(bytes_per_s, sizes):
    offered = choices(bytes_per_s, sizes, [32] * len(sizes), [RESTORE] * len(sizes))
    rests_s = [predict(choice.prefix, choice.known).ttft_s[-1] for choice in offered]
    for current in range(len(sizes)):
        chosen = choose_rest(offered, current)
        assert rests_s[chosen] <= rests_s[current]
        assert rests_s[chosen] <= min(rests_s) / (1 - SWITCH_SHARE)
        assert choose_rest(offered, chosen) <= chosen
