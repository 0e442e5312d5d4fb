import pytest

from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.plugin import provenance as provenance_module
from sglang_kvcodec.plugin.provenance import Provenance

NAMESPACES = {name: name.ljust(32) for name in (b"high", b"old", b"balanced", b"compact", b"?")}
TIERS = [
    Tier("high", (NAMESPACES[b"high"], NAMESPACES[b"old"])),
    Tier("balanced", (NAMESPACES[b"balanced"],)),
    Tier("compact", (NAMESPACES[b"compact"],)),
]


def key(namespace, page_hash):
    return PageKey(NAMESPACES[namespace], page_hash.ljust(32))


@pytest.fixture
def provenance():
    return Provenance()


def pages_by_tier(provenance, before, hashes, tiers=TIERS):
    before, hashes = [[page_hash.ljust(32) for page_hash in several] for several in (before, hashes)]
    found = provenance.targets(before, hashes, tiers)
    return {target.namespace_digest.rstrip(): list(target.pages) for target in found}


def test_what_was_computed_goes_into_all_tiers(provenance):
    assert pages_by_tier(provenance, [b"1"], [b"2", b"3"]) == {
        b"high": [0, 1],
        b"balanced": [0, 1],
        b"compact": [0, 1],
    }


def test_a_restored_page_goes_into_its_own_tier_only_and_what_follows_into_none_better(provenance):
    provenance.restored([key(b"balanced", b"1")], TIERS)
    assert pages_by_tier(provenance, [b"0"], [b"1", b"2"]) == {b"balanced": [0, 1], b"compact": [1]}
    assert pages_by_tier(provenance, [b"0", b"1"], [b"2"]) == {b"balanced": [0], b"compact": [0]}
    assert pages_by_tier(provenance, [], [b"0"]) == {b"high": [0], b"balanced": [0], b"compact": [0]}


def test_a_page_of_before_the_calibration_is_one_of_the_best_tier(provenance):
    provenance.restored([key(b"old", b"1")], TIERS)
    assert pages_by_tier(provenance, [], [b"1", b"2"]) == {b"high": [0, 1], b"balanced": [1], b"compact": [1]}


def test_one_of_a_namespace_that_is_no_more_counts_as_of_the_worst(provenance):
    provenance.restored([key(b"?", b"1")], TIERS)
    assert pages_by_tier(provenance, [b"1"], [b"2"]) == {b"compact": [0]}


def test_a_page_that_is_restored_again_is_what_it_was_restored_from_last(provenance):
    provenance.restored([key(b"compact", b"1")], TIERS)
    provenance.restored([key(b"high", b"1")], TIERS)
    assert pages_by_tier(provenance, [b"1"], [b"2"])[b"high"] == [0]


def test_the_one_that_was_not_asked_about_for_longest_is_forgotten(provenance, monkeypatch):
    monkeypatch.setattr(provenance_module, "MAX_PAGES", 2)
    for page_hash in (b"1", b"2"):
        provenance.restored([key(b"compact", page_hash)], TIERS)
    assert b"high" not in pages_by_tier(provenance, [b"1"], [b"x"])
    provenance.restored([key(b"compact", b"3")], TIERS)
    assert b"high" not in pages_by_tier(provenance, [b"1"], [b"x"])
    assert b"high" in pages_by_tier(provenance, [b"2"], [b"x"])
    provenance.clear()
    assert b"high" in pages_by_tier(provenance, [b"1"], [b"x"])


def test_what_is_computed_after_pages_of_several_ranks_is_worth_the_worst_of_them(provenance):
    asked = []
    provenance.restored([key(b"high", b"1"), key(b"high", b"2")], TIERS, lambda worst: asked.append(worst) or 1)
    assert asked == [0]
    assert pages_by_tier(provenance, [], [b"1", b"2", b"3"]) == {
        b"high": [0, 1],
        b"balanced": [2],
        b"compact": [2],
    }
    # All ranks are asked, those that restore nothing of it as well.
    provenance.restored([], TIERS, lambda worst: asked.append(worst) or 0)
    assert asked == [0, 0]
