"""A fetch goes on in a smaller tier when its link becomes slow on the way."""

import itertools

import pytest
from integration.cluster import MODEL, ask, forget, metric, wait_up

from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess
from sglang_kvcodec.testing.shaped_link import ShapedLink, falls, steady

pytestmark = pytest.mark.sglang

FAST = 1e9


@pytest.fixture
def link(cluster):
    with ShapedLink(cluster.remote.removeprefix("grpc://"), steady(FAST)) as link:
        yield link


@pytest.fixture
def server(cluster, link):
    """It has a lossless tier and one of a third of its size, and computes nothing while it fetches."""
    arguments = KVCodecArgs(link.remote, "raw,high", ("--kvcodec-compute-while-fetching", "never"), "auto")
    chunked = ["--chunked-prefill-size", "256"]
    server = SGLangProcess("switching", MODEL, cluster.work_dir / "switching.log", arguments, extra_args=chunked)
    server.wait_ready()
    yield server
    server.kill()


def by_tier(server, name):
    return {tier: metric(server, f"kvcodec_{name}_total", tier=tier) for tier in ("raw", "high")}


def test_a_link_that_becomes_slow_on_the_way(fresh, server, link):
    wait_up(server)
    text = fresh.text(pieces=3)
    computed = ask(server, text)
    assert server.client.wait_published()
    coded_bytes = by_tier(server, "published_bytes")
    assert coded_bytes["raw"] > 2 * coded_bytes["high"] > 0
    # Which speeds make the large tier the better one before and the small one afterwards, the machine says.
    for factor, to, share in itertools.product((8, 12, 20, 5), (0.1, 0.2), (0.3, 0.5)):
        speed = factor * coded_bytes["raw"] / computed.ttft_s
        link.begin(steady(speed))
        for _ in range(2):
            forget(server)
            assert ask(server, text).cached.storage > 0
        forget(server)
        switches = metric(server, "kvcodec_tier_switches_total")
        fetched = by_tier(server, "fetched_bytes")
        link.begin(falls(speed, int(share * coded_bytes["raw"]), to))
        reply = ask(server, text)
        if metric(server, "kvcodec_tier_switches_total") > switches:
            break
    else:
        raise AssertionError("no fetch goes on in another tier")
    assert all(now > fetched[tier] for tier, now in by_tier(server, "fetched_bytes").items())
    assert reply.cached.storage > 0
    assert reply.completion_tokens == computed.completion_tokens
    assert server.client.wait_published()
    forget(server)
    assert server.alive
