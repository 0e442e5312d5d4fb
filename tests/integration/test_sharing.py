"""Two real SGLang servers share KV through a real peer, with the words of a server that has neither."""

import json
import threading
import urllib.request

import pytest
from integration.cluster import PAGE_TOKENS, ask, forget, metric, wait_for, wait_up

from sglang_kvcodec.testing.clear_texts import CLEAR_MARGIN
from sglang_kvcodec.testing.sglang_client import ChatReply

pytestmark = pytest.mark.sglang


def test_without_the_flag_nothing_changes(cluster):
    log = cluster.plain.log_text()
    assert "kvcodec:" not in log
    assert "kvcodec_lookup_pages" not in str(cluster.plain.client.metrics())


def test_starts_and_answers_without_a_peer(cluster):
    with_kvcodec, plain = cluster.no_peer_replies
    assert with_kvcodec.text == plain.text
    assert with_kvcodec.cached.storage == 0


def with_next_turn(fresh, messages, characters):
    """A conversation that goes on with a question of so many characters, and the clear answer to it."""
    while True:
        longer = [*messages, {"role": "user", "content": fresh.text()[:characters]}]
        answer, margin = fresh.plain.client.decided(longer, 24)
        if margin >= CLEAR_MARGIN:
            return longer, answer


def test_a_chat_changes_servers_between_turns(fresh):
    messages = []
    for turn in range(4):
        server = (fresh.a, fresh.b)[turn % 2]
        messages, answer = with_next_turn(fresh, messages, 600 if turn else None)
        reply: ChatReply = server.client.chat(messages, 24)
        assert reply.text == answer
        if turn == 1:
            # All whole pages of the first turn but the last token's.
            assert reply.cached.storage >= reply.prompt_tokens // PAGE_TOKENS // 2 * PAGE_TOKENS
        if turn > 1:
            assert reply.cached.device > 0
            assert reply.cached.storage > 0
        assert server.client.wait_published()
        messages.append({"role": "assistant", "content": reply.text})


def test_what_was_fetched_once_stays_in_host_memory(fresh, stored):
    text, answer = stored
    first = ask(fresh.b, text)
    fresh.b.client.flush_cache()
    fetched_bytes = metric(fresh.b, "kvcodec_fetched_bytes_total")
    second = ask(fresh.b, text)
    assert first.text == second.text == answer
    assert first.cached.storage > 0
    assert second.cached.host == first.cached.storage
    assert metric(fresh.b, "kvcodec_fetched_bytes_total") == fetched_bytes


def test_pages_the_peer_has_are_not_sent_again(fresh, stored):
    text, answer = stored
    objects = fresh.stat().objects
    sent = metric(fresh.b, "kvcodec_published_pages_total", outcome="stored")
    assert ask(fresh.b, text).text == answer
    assert fresh.b.client.wait_published()
    assert metric(fresh.b, "kvcodec_published_pages_total", outcome="stored") - sent <= 1
    assert fresh.stat().objects - objects <= 1


def test_two_servers_compute_and_put_the_same_pages_at_once(fresh):
    text, answer = fresh.clear_text()
    replies = {}
    threads = [
        threading.Thread(target=lambda s=server: replies.__setitem__(s.name, ask(s, text)))
        for server in (fresh.a, fresh.b)
    ]
    before = fresh.stat().objects
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: reply.text for name, reply in replies.items()} == {"a": answer, "b": answer}
    for server in (fresh.a, fresh.b):
        assert server.client.wait_published()
    pages = (replies["a"].prompt_tokens + replies["a"].completion_tokens) // PAGE_TOKENS
    assert fresh.stat().objects - before <= pages
    forget(fresh.b)
    again = ask(fresh.b, text)
    assert again.text == answer
    assert again.cached.storage > 0


def test_a_salt_keeps_tenants_apart(fresh, stored):
    text, _ = stored
    salted = ask(fresh.b, text, cache_salt="tenant-1")
    assert salted.cached.storage == 0
    assert fresh.b.client.wait_published()
    forget(fresh.b)
    assert ask(fresh.b, text, cache_salt="tenant-2").cached.storage == 0
    forget(fresh.b)
    assert ask(fresh.b, text, cache_salt="tenant-1").cached.storage > 0


def test_a_held_request_holds_up_nobody(fresh, stored):
    text, answer = stored
    other = fresh.text()[:300]
    # About half a megabyte for the held request: two seconds or more.
    fresh.restart_peer("2Mbps")
    wait_up(fresh.b)
    replies = {}
    held = threading.Thread(target=lambda: replies.__setitem__("held", ask(fresh.b, text)))
    fetched = metric(fresh.b, "kvcodec_fetched_bytes_total")
    held.start()
    wait_for(lambda: metric(fresh.b, "kvcodec_fetched_bytes_total") > fetched, "fetched bytes")
    ask(fresh.b, other)
    assert "held" not in replies, "a short request that came later had to wait"
    held.join()
    assert replies["held"].text == answer
    assert replies["held"].cached.storage > 0
    fresh.restart_peer()


def test_an_aborted_held_request_leaves_nothing_behind(fresh, stored):
    text, answer = stored
    fresh.restart_peer("1Mbps")
    wait_up(fresh.b)
    fetched = metric(fresh.b, "kvcodec_fetched_bytes_total")

    replies = []
    leaver = threading.Thread(target=lambda: replies.append(ask(fresh.b, text)))
    leaver.start()
    wait_for(lambda: metric(fresh.b, "kvcodec_fetched_bytes_total") > fetched, "fetched bytes")
    abort = urllib.request.Request(
        f"{fresh.b.url}/abort_request", json.dumps({"abort_all": True}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(abort, timeout=30).close()
    leaver.join(timeout=60)
    assert replies[0].finish_reason == "abort"
    fresh.restart_peer()
    wait_up(fresh.b)
    # Flushing needs an idle server: no slot may have leaked.
    forget(fresh.b)
    assert ask(fresh.b, text).text == answer
