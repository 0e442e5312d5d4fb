"""While others are answered, a request's pages are restored before it is in their batch. All words are right."""

import threading
import time

import pytest
from integration.cluster import ask, forget, metric, others, wait_up
from integration.test_both_ends import leave
from integration.test_failures import _tamper, _unrestorable

pytestmark = pytest.mark.sglang


def ahead(server, outcome):
    return metric(server, "kvcodec_ahead_restores_total", outcome=outcome)


@pytest.fixture
def other(fresh):
    """Whoever is answered meanwhile: a text, and the first words of the answer."""
    return fresh.clear_text()


def test_pages_are_restored_while_others_are_answered(fresh, stored, other):
    text, answer = stored
    restored = ahead(fresh.b, "restored")
    with others(fresh.b, *other):
        reply = ask(fresh.b, text)
        assert reply.text == answer
        assert reply.cached.storage >= reply.prompt_tokens // 64 * 64 - 64
        assert ahead(fresh.b, "restored") == restored + 1
        again = ask(fresh.b, text)
        assert again.text == answer
        assert again.cached.device >= reply.cached.storage
        # What is on the device already needs no restore.
        assert ahead(fresh.b, "restored") == restored + 1
    # The peer has it, so that it is not published anew.
    assert fresh.b.client.wait_published()
    forget(fresh.b)


def test_a_part_is_on_the_device_and_a_part_in_host_memory(fresh, stored, other):
    text, answer = stored
    longer = text + "\n" + other[0]
    first = ask(fresh.a, longer)
    assert fresh.a.client.wait_published()
    forget(fresh.a)
    assert ask(fresh.b, text).text == answer
    fresh.b.client.flush_cache()
    restored = ahead(fresh.b, "restored")
    with others(fresh.b, *other):
        # Host memory has the start of it, the peer the rest.
        assert ask(fresh.b, longer).text == first.text
        assert ahead(fresh.b, "restored") == restored + 1
    fresh.b.client.flush_cache()
    with others(fresh.b, *other):
        # Now all of it is in host memory.
        reply = ask(fresh.b, longer)
        assert reply.text == first.text
        assert reply.cached.storage == 0
        assert reply.cached.device > first.prompt_tokens - 128
        assert ahead(fresh.b, "restored") == restored + 2
    forget(fresh.b)


def test_several_at_once(fresh, stored, other):
    asked = [stored, *(fresh.clear_text() for _ in range(3))]
    for text, answer in asked:
        assert ask(fresh.a, text).text == answer
    assert fresh.a.client.wait_published()
    forget(fresh.a)
    replies = {}
    with others(fresh.b, *other):
        threads = [
            threading.Thread(target=lambda text=text: replies.update({text: ask(fresh.b, text)})) for text, _ in asked
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {text: reply.text for text, reply in replies.items()} == dict(asked)
    assert all(reply.cached.storage for reply in replies.values())
    forget(fresh.b)


def test_pages_that_can_t_be_restored_are_computed(fresh, stored, other):
    text, answer = stored
    assert _tamper(fresh, _unrestorable) > 0
    for server in (fresh.a, fresh.b):
        wait_up(server)
    failed, bad = ahead(fresh.b, "failed"), metric(fresh.b, "kvcodec_restore_failures_total")
    with others(fresh.b, *other):
        reply = ask(fresh.b, text)
        assert reply.text == answer
        assert reply.cached.storage == 0
        assert ahead(fresh.b, "failed") == failed + 1
        assert metric(fresh.b, "kvcodec_restore_failures_total") == bad + 1
    assert fresh.b.client.wait_published()
    forget(fresh.b)


def test_a_client_that_leaves_meanwhile(fresh, stored, other):
    text, answer = stored
    gone = ahead(fresh.b, "gone")
    with others(fresh.b, *other):
        for wait_s in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
            leave(fresh.b, text, wait_s)
            time.sleep(0.3)
        assert ask(fresh.b, text).text == answer
    # Nothing has leaked: the server would say so, and not flush.
    forget(fresh.b)
    assert ask(fresh.b, text).text == answer
    assert ahead(fresh.b, "gone") >= gone
    forget(fresh.b)
