"""Requests for the same stored prefix that come at once: it is fetched once, and each gets its answer."""

import concurrent.futures
import threading

import pytest
from integration.cluster import ask, forget, metric, wait_for, wait_up
from integration.test_both_ends import leave

pytestmark = pytest.mark.sglang

SLOW = "4Mbps"
"""Two seconds and more for a text of three pieces."""


@pytest.fixture
def long_stored(fresh):
    """A text that is stored, the answer, and a longer text with its answer; neither server holds any of it."""
    text, answer = fresh.clear_text(pieces=3)
    longer, longer_answer = fresh.clear_text(after=text)
    assert ask(fresh.a, text).text == answer
    assert fresh.a.client.wait_published()
    forget(fresh.a)
    yield text, answer, longer, longer_answer
    fresh.restart_peer()


def begin_slowly(fresh, text):
    """The second server begins to fetch; what it has fetched before."""
    fresh.restart_peer(SLOW)
    wait_up(fresh.b)
    fetched = metric(fresh.b, "kvcodec_fetched_bytes_total")
    thread = threading.Thread(target=ask, args=(fresh.b, text))
    thread.start()
    wait_for(lambda: metric(fresh.b, "kvcodec_fetched_bytes_total") > fetched, "fetched bytes")
    return thread, fetched


def test_what_is_on_its_way_is_fetched_once(fresh, long_stored):
    text, answer, longer, longer_answer = long_stored
    # Alone, to know how many bytes that is.
    wait_up(fresh.b)
    before = metric(fresh.b, "kvcodec_fetched_bytes_total")
    alone = ask(fresh.b, text)
    size = metric(fresh.b, "kvcodec_fetched_bytes_total") - before
    forget(fresh.b)

    following = metric(fresh.b, "kvcodec_following_requests_total")
    leader, before = begin_slowly(fresh, text)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda each: ask(fresh.b, each), [text, longer, text, fresh.text()]))
    leader.join()
    assert [reply.text for reply in replies[:3]] == [answer, longer_answer, answer]
    assert metric(fresh.b, "kvcodec_following_requests_total") == following + 3
    for reply in replies[:3]:
        assert reply.cached.device >= alone.cached.storage
        assert reply.cached.storage == 0
    assert metric(fresh.b, "kvcodec_fetched_bytes_total") - before <= 1.05 * size


def test_a_leader_that_leaves(fresh, long_stored):
    """Those who wait for it fetch for themselves."""
    text, answer, longer, longer_answer = long_stored
    fresh.restart_peer(SLOW)
    wait_up(fresh.b)
    fetched = metric(fresh.b, "kvcodec_fetched_bytes_total")
    following = metric(fresh.b, "kvcodec_following_requests_total")
    leader = threading.Thread(target=leave, args=(fresh.b, text, 1.0))
    leader.start()
    wait_for(lambda: metric(fresh.b, "kvcodec_fetched_bytes_total") > fetched, "fetched bytes")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda each: ask(fresh.b, each), [text, longer]))
    leader.join()
    assert [reply.text for reply in replies] == [answer, longer_answer]
    assert metric(fresh.b, "kvcodec_following_requests_total") > following
    assert sum(reply.cached.storage for reply in replies) > 0


def test_a_peer_that_goes_while_others_wait(fresh, long_stored):
    text, answer, longer, longer_answer = long_stored
    leader, _ = begin_slowly(fresh, text)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, fresh.b, each) for each in (text, longer)]
        fresh.peer.kill()
        replies = [each.result() for each in asked]
    leader.join()
    assert [reply.text for reply in replies] == [answer, longer_answer]
    fresh.start_peer()
    wait_up(fresh.b)
