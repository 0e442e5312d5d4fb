"""Which prefixes are asked for: what is kept of them, in which order they are told."""

import pytest

from sglang_kvcodec.rpc.hot_prefixes import HotPrefixes

A, B, C = (bytes([number]) * 64 for number in (1, 2, 3))


def told(prefixes, count=10):
    return [use.key for use in prefixes.top(count)]


def test_the_heaviest_comes_first():
    prefixes = HotPrefixes()
    prefixes.note(A, 7, 0.0)
    prefixes.note(B, 3, 0.0)
    prefixes.note(C, 5, 0.0)
    assert told(prefixes) == [A, C, B]
    for _ in range(2):
        prefixes.note(B, 3, 0.0)
    assert told(prefixes) == [B, A, C]
    assert told(prefixes, 2) == [B, A]


@pytest.mark.parametrize(("added", "first"), [(4, B), (6, A)])
def test_what_was_used_long_ago_counts_less(added, first):
    prefixes = HotPrefixes()
    prefixes.note(A, 100, 0.0)
    prefixes.note(B, 30, 1200.0)
    assert told(prefixes) == [B, A]
    # What is left of the old weight, 25, is added to.
    prefixes.note(A, added, 1200.0)
    assert told(prefixes)[0] == first


def test_what_is_told_of_one():
    prefixes = HotPrefixes()
    prefixes.note(A, 7, 1.0)
    prefixes.note(A, 2, 5.0)
    (use,) = prefixes.top(1)
    assert (use.pages, use.lookups, use.used_at_s) == (7, 2, 5.0)


def test_clocks_that_have_run_for_years_are_no_matter():
    prefixes = HotPrefixes()
    for key in (A, B, B):
        prefixes.note(key, 5, 1e9)
    prefixes.note(C, 1 << 16, 0.0)
    prefixes.note(C, 1, 1e9)
    assert told(prefixes) == [B, A, C]


def test_no_more_than_a_bounded_number_is_kept():
    prefixes = HotPrefixes(prefixes=2)
    for key in (A, B, A, C):
        prefixes.note(key, 1, 0.0)
    assert set(told(prefixes)) == {A, C}
