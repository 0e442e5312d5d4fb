"""Servers that keep several tiers side by side: which one is read, and where what was computed is published."""

import collections
import contextlib

import pytest
from integration.calibrations import calibrations
from integration.cluster import forget, metric
from integration.test_calibrated import Site, encoded, generate, hashes_of, publish, serve

from sglang_kvcodec.testing.conversation import source_slices

pytestmark = pytest.mark.sglang


@pytest.fixture
def new_site(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda: Site(tmp_path, stack)


def stored(site, hashes):
    """Profile -> the pages of ``hashes`` that the peer has in it, each once."""
    by_profile = collections.defaultdict(set)
    for page in site.engine.pages:
        key = page.header.key
        if key.page_hash in hashes and site.engine.get(key.to_bytes()) is not None:
            by_profile[page.header.profile_name].add(key.page_hash)
    return dict(by_profile)


def delete(site, profile):
    """The peer loses all pages of a profile."""
    for page in site.engine.pages:
        if page.header.profile_name == profile:
            site.engine.delete(page.header.key.to_bytes())


def prompts(seed):
    first, second = (encoded(text) for text in source_slices([1800] * 2, seed))
    return first, first + second[:300]


def restored(server, tier):
    return metric(server, "kvcodec_restored_tokens_total", tier=tier)


def test_lossless_tiers_give_the_same_words_whichever_is_there(cluster, new_site):
    site = new_site()
    a = site.start("lossless-a", profile="raw,exact")
    b = site.start("lossless-b", profile="raw,exact", kvcodec_args=["--kvcodec-plan", "always"])
    serve(a)
    tokens, _ = prompts("tarfile")
    (answer,) = publish(a, site, [tokens])
    assert answer == generate(cluster.plain, tokens)[0]
    hashes = set(hashes_of(tokens))
    assert stored(site, hashes) == {"raw": hashes, "exact": hashes}

    serve(b)
    for tier in ("raw", "exact"):
        assert restored(b, tier) == 0
        assert generate(b, tokens)[0] == answer
        assert restored(b, tier) > 0
        assert metric(b, "kvcodec_fetched_bytes_total", tier=tier) > 0
        assert metric(a, "kvcodec_published_pages_total", tier=tier) >= len(hashes)
        assert metric(b, "kvcodec_planned_tiers_total", tier=tier) == 1
        # It published nothing: both were there.
        forget(b)
        assert b.client.wait_published()
        delete(site, tier)
    for stage in ("lookup", "fetch", "restore", "layer_wait", "forward"):
        assert metric(b, f"kvcodec_{stage}_seconds_count") >= 2
    for queue in ("held_requests", "queued_fetches", "queued_restore_parts", "write_back_kept_pages"):
        assert metric(b, f"kvcodec_{queue}") == 0
    assert metric(b, "kvcodec_restore_failures_total") == 0


def test_what_is_computed_after_a_small_tier_is_published_in_no_better_one(cluster, new_site):
    site = new_site()
    (calibration,) = calibrations(tiers=("high", "balanced"))
    site.put_calibration(calibration.model_digest, calibration.encoded)
    a = site.start("tiers-a", profile="high,balanced")
    serve(a)
    tokens, longer = prompts("zipfile")
    (answer,) = publish(a, site, [tokens])
    assert answer == generate(cluster.plain, tokens)[0]
    hashes = set(hashes_of(tokens))
    assert stored(site, hashes) == {"high": hashes, "balanced": hashes}
    a.kill()

    # Only the smaller tier is left when the second one comes.
    delete(site, "high")
    b = site.start("tiers-b", profile="high,balanced", kvcodec_args=["--kvcodec-plan", "always"])
    serve(b)
    text, from_peer = generate(b, longer)
    assert from_peer > 0
    assert text == generate(cluster.plain, longer)[0]
    assert metric(b, "kvcodec_planned_tiers_total", tier="balanced") == 1
    assert b.client.wait_published()
    new = set(hashes_of(longer)) - hashes
    assert new
    assert stored(site, new) == {"balanced": new}
    assert stored(site, hashes) == {"balanced": hashes}

    # What it computes from the start is worth either.
    other = encoded(source_slices([1800] * 3, "zipfile")[2])
    publish(b, site, [other])
    others = set(hashes_of(other))
    assert stored(site, others) == {"high": others, "balanced": others}
    b.kill()

    # A server of one tier reads that one, of the same namespace.
    c = site.start("tiers-c", profile="high")
    serve(c)
    assert generate(c, longer)[1] == 0
    assert generate(c, other)[1] > 0


def test_ranks_agree_on_what_was_made_of_which_tier(cluster, new_site):
    site = new_site()
    server = site.start(
        "tiers-tp2",
        *("--tp", "2"),
        profile="raw,exact",
        kvcodec_args=["--kvcodec-plan", "always"],
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    )
    serve(server)
    tokens, longer = prompts("gzip")
    (answer,) = publish(server, site, [tokens])
    hashes = set(hashes_of(tokens))
    # One of the ranks has lost the better tier, so the other one's pages are worth no more.
    lost = next(page.header.key.namespace_digest for page in site.engine.pages if page.header.profile_name == "raw")
    for page_hash in hashes:
        assert site.engine.delete(lost + page_hash)
    forget(server)
    text, from_peer = generate(server, longer)
    assert from_peer > 0
    assert server.client.wait_published()
    new = set(hashes_of(longer)) - hashes
    assert new
    assert stored(site, new) == {"exact": new}
    forget(server)
    assert generate(server, tokens)[0] == answer
    assert generate(server, longer)[0] == text
