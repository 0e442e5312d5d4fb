import pytest

from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.plugin import provenance as provenance_module
from sglang_kvcodec.plugin.provenance import Provenance

TIERS = [Tier("high", (b"high", b"old")), Tier("balanced", (b"balanced",)), Tier("compact", (b"compact",))]
ALL = range(4)


@pytest.fixture
def provenance():
    return Provenance()


def pages_by_tier(provenance, before, hashes, tiers=TIERS):
    return {target.namespace_digest: list(target.pages) for target in provenance.targets(before, hashes, tiers)}


def test_what_was_computed_goes_into_all_tiers(provenance):
    assert pages_by_tier(provenance, [b"1"], [b"2", b"3"]) == {
        b"high": [0, 1],
        b"balanced": [0, 1],
        b"compact": [0, 1],
    }


def test_a_restored_page_goes_into_its_own_tier_only_and_what_follows_into_none_better(provenance):
    provenance.restored(b"1", b"balanced", TIERS)
    assert pages_by_tier(provenance, [b"0"], [b"1", b"2"]) == {b"balanced": [0, 1], b"compact": [1]}
    assert pages_by_tier(provenance, [b"0", b"1"], [b"2"]) == {b"balanced": [0], b"compact": [0]}
    assert pages_by_tier(provenance, [], [b"0"]) == {b"high": [0], b"balanced": [0], b"compact": [0]}


def test_a_page_of_before_the_calibration_is_one_of_the_best_tier(provenance):
    provenance.restored(b"1", b"old", TIERS)
    assert pages_by_tier(provenance, [], [b"1", b"2"]) == {b"high": [0, 1], b"balanced": [1], b"compact": [1]}


def test_one_of_a_namespace_that_is_no_more_counts_as_of_the_worst(provenance):
    provenance.restored(b"1", b"?", TIERS)
    assert pages_by_tier(provenance, [b"1"], [b"2"]) == {b"compact": [0]}


def test_a_page_that_is_restored_again_is_what_it_was_restored_from_last(provenance):
    provenance.restored(b"1", b"compact", TIERS)
    provenance.restored(b"1", b"high", TIERS)
    assert pages_by_tier(provenance, [b"1"], [b"2"])[b"high"] == [0]


def test_the_one_that_was_not_asked_about_for_longest_is_forgotten(provenance, monkeypatch):
    monkeypatch.setattr(provenance_module, "MAX_PAGES", 2)
    for page_hash in (b"1", b"2"):
        provenance.restored(page_hash, b"compact", TIERS)
    assert b"high" not in pages_by_tier(provenance, [b"1"], [b"x"])
    provenance.restored(b"3", b"compact", TIERS)
    assert b"high" not in pages_by_tier(provenance, [b"1"], [b"x"])
    assert b"high" in pages_by_tier(provenance, [b"2"], [b"x"])
    provenance.clear()
    assert b"high" in pages_by_tier(provenance, [b"1"], [b"x"])
