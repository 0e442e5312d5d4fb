"""Pages that the device has evicted come back from host memory, without the peer."""

import pytest
from integration.cluster import ask, metric, wait_for, wait_up

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def small(cluster):
    """A server whose device holds two of the texts at most, and whose peer can be cut off."""
    # Later arguments win over those that the process helper gives.
    server = cluster.start_server("small", extra_args=["--max-total-tokens", "1600", "--chunked-prefill-size", "256"])
    server.wait_ready()
    yield server
    server.kill()


def fill_device(fresh, server):
    """Has other texts take the slots."""
    for _ in range(3):
        ask(server, fresh.text())


@pytest.mark.parametrize("origin", ["computed here", "fetched"])
def test_evicted_pages_come_back_with_the_network_cut(fresh, small, origin):
    wait_up(small)
    text, answer = fresh.clear_text()
    if origin == "fetched":
        assert ask(fresh.a, text).text == answer
        assert fresh.a.client.wait_published()
    first = ask(small, text)
    assert first.text == answer
    assert (first.cached.storage > 0) == (origin == "fetched")
    assert small.client.wait_published()
    fill_device(fresh, small)
    assert small.client.wait_published()

    fresh.stop_peer()
    wait_for(lambda: metric(small, "kvcodec_peer_up") == 0, "sign of the loss")
    fetched = metric(small, "kvcodec_fetched_bytes_total")
    again = ask(small, text)
    assert again.text == answer
    assert again.cached.host >= first.prompt_tokens // 64 * 64 - 64
    assert again.cached.device == 0
    assert metric(small, "kvcodec_fetched_bytes_total") == fetched
    fresh.start_peer()
