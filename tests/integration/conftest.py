import pytest
from integration.cluster import PAGE_TOKENS, Cluster, ask, forget, wait_up


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        # Started without a peer: `no_peer_replies` is what they say then.
        # All prefill in the same chunks: other chunks round differently, which shows in the words now and then.
        chunked = ["--chunked-prefill-size", "256"]
        cluster.a = cluster.start_server("a", extra_args=chunked)
        cluster.b = cluster.start_server("b", extra_args=chunked)
        # Whole pages are cached, as with kvcodec, so that it computes what is left of a prompt in the same chunks too.
        paged = [*chunked, "--page-size", str(PAGE_TOKENS)]
        cluster.plain = cluster.start_server("plain", kvcodec=False, extra_args=paged)
        for server in (cluster.a, cluster.b, cluster.plain):
            server.wait_ready()
        text, _ = cluster.clear_text()
        cluster.no_peer_replies = [ask(server, text) for server in (cluster.a, cluster.plain)]
        cluster.start_peer()
        yield cluster


@pytest.fixture
def fresh(cluster):
    """The cluster with an empty tree at both servers and the peer up."""
    if cluster.peer is None or not cluster.peer.alive:
        cluster.start_peer()
    for server in (cluster.a, cluster.b):
        wait_up(server)
        server.client.wait_published()
        forget(server)
    return cluster


@pytest.fixture
def stored(fresh):
    """A text whose pages are stored, which neither server holds, and the answer to it."""
    text, answer = fresh.clear_text()
    assert ask(fresh.a, text).text == answer
    assert fresh.a.client.wait_published()
    forget(fresh.a)
    return text, answer
