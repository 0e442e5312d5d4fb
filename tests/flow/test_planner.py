from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.flow.planner import CUT_TO_HOST_MEMORY, WHOLE_PREFIX, FetchPlan, plan_fetch


def test_nothing_stored():
    assert plan_fetch(0, 0, 64, 1, 1000) == FetchPlan(0, "not_stored")


def test_a_prefix_of_exactly_the_least_length_is_fetched():
    assert plan_fetch(2, 10, 64, 128, 1000) == FetchPlan(2, WHOLE_PREFIX)
    assert plan_fetch(2, 10, 64, 129, 1000) == FetchPlan(0, "too_short")


def test_what_just_fits_is_fetched_whole():
    assert plan_fetch(7, 1000, 16, 1, 1000) == FetchPlan(7, WHOLE_PREFIX)
    assert plan_fetch(7, 1001, 16, 1, 1000) == FetchPlan(6, CUT_TO_HOST_MEMORY)


def test_a_prefix_cut_below_the_least_length_is_computed():
    assert plan_fetch(10, 1000, 16, 64, 399) == FetchPlan(0, "too_short")
    assert plan_fetch(10, 1000, 16, 64, 400) == FetchPlan(4, CUT_TO_HOST_MEMORY)


@given(st.integers(0, 10**6), st.integers(1, 2**60), st.integers(1, 256), st.integers(1, 10**5), st.integers(1, 2**60))
def test_a_plan_is_never_out_of_bounds(covered, covered_bytes, page_tokens, min_tokens, max_bytes):
    plan = plan_fetch(covered, covered_bytes, page_tokens, min_tokens, max_bytes)
    assert 0 <= plan.pages <= covered
    assert plan.pages == 0 or plan.pages * page_tokens >= min_tokens
    if covered:
        assert plan.pages * covered_bytes <= max_bytes * covered or covered_bytes <= max_bytes
    assert plan.reason
