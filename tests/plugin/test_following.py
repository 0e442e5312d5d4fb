"""Who waits for whom, where several requests lack the same pages."""

import pytest

from sglang_kvcodec.plugin.following import Following


def hashes(*pages):
    """Chained, as SGLang's: a hash names all of the prefix."""
    return [repr(pages[: count + 1]).encode() for count in range(len(pages))]


SHARED = tuple(range(10))


@pytest.fixture
def following():
    made = Following()
    made.lead("first", hashes(*SHARED))
    return made


def test_who_lacks_the_same_waits(following):
    assert following.leader_of(hashes(*SHARED)) == "first"
    following.follow("first", "handle 2")
    following.follow("first", "handle 3")
    assert following.over("first") == ["handle 2", "handle 3"]
    assert following.over("first") == []
    assert following.leader_of(hashes(*SHARED)) is None
    assert not following


@pytest.mark.parametrize(
    ("common", "own", "waits"),
    [
        (10, 0, True),
        (10, 10, True),
        (10, 11, False),
        (5, 5, True),
        (5, 6, False),
        # Most of what is fetched would be waited for in vain.
        (4, 0, False),
        (0, 10, False),
    ],
)
def test_only_who_shares_half_of_both_waits(following, common, own, waits):
    wanted = hashes(*SHARED[:common], *(f"own {number}" for number in range(own)))
    assert (following.leader_of(wanted) == "first") == waits


def test_prefixes_of_which_a_part_is_here_already(following):
    # The follower has the first three pages, and so has another leader of the second half.
    assert following.leader_of(hashes(*SHARED)[3:]) == "first"
    later = Following()
    later.lead("late", hashes(*SHARED)[6:])
    assert later.leader_of(hashes(*SHARED)) is None
    assert later.leader_of(hashes(*SHARED)[3:]) == "late"


def test_who_came_first_leads(following):
    following.lead("second", hashes(*SHARED))
    assert following.leader_of(hashes(*SHARED)) == "first"
    assert following.over("second") == []
    assert following.leaders == ("first",)
    following.clear()
    assert following.leader_of(hashes(*SHARED)) is None


def test_no_pages():
    following = Following()
    following.lead("first", [])
    assert not following
    assert following.leader_of([]) is None


def test_a_request_that_leads_and_is_looked_up_again(following):
    following.follow("first", "handle 2")
    following.lead("first", hashes("else"))
    assert following.over("first") == ["handle 2"]
    assert following.leader_of(hashes("else")) is None
