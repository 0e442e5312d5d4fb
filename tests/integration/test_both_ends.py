"""A server that computes the start of a stored prefix while its end is fetched, over a link about as fast as computing,
or over one that fails in the middle of a fetch.

What is asserted are words and what became of the pages, not times: how fast this machine computes, the server says.
"""

import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import signal
import threading

import pytest
from integration.cluster import MODEL, PAGE_TOKENS, ask, forget, metric, wait_for, wait_up
from integration.test_failures import _bit_flipped, _last_page_hash, _tamper, _unrestorable

from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess
from sglang_kvcodec.testing.shaped_link import ShapedLink, falls, stalls, steady

pytestmark = pytest.mark.sglang

CHUNKED = ["--chunked-prefill-size", "256"]
FACTORS = (1.0, 0.7, 1.5, 0.5, 2.0)
"""Speeds of the link that are tried, as parts of that at which it takes as long as computing."""


@pytest.fixture(scope="module")
def link(cluster):
    with ShapedLink(cluster.remote.removeprefix("grpc://"), steady(1e9)) as link:
        yield link


def start(cluster, link, name, compute="idle", **options):
    extra_args = [*CHUNKED, *options.pop("extra_args", ())]
    server = SGLangProcess(
        name,
        MODEL,
        cluster.work_dir / f"{name}.log",
        KVCodecArgs(link.remote, extra_args=("--kvcodec-compute-while-fetching", compute), plan="auto"),
        extra_args=extra_args,
        **options,
    )
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def server(cluster, link):
    server = start(cluster, link, "both")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def turning(cluster, link):
    """A server that computes only where the link has failed, so that each fetch begins at the front."""
    server = start(cluster, link, "turning", "failing")
    yield server
    server.kill()


def leave(server, text, after_s):
    """A client that asks and goes."""
    body = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 16, "stream": True}
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=after_s)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    with contextlib.suppress(OSError):
        connection.getresponse()
    connection.close()


@dataclasses.dataclass
class Stored:
    """A text of some thirty pages that is stored, the answer to it, and how fast a link takes as long as computing."""

    text: str
    answer: str
    coded_bytes: float
    computed_s: float

    @property
    def bytes_per_s(self):
        return self.coded_bytes / self.computed_s


@pytest.fixture(scope="module")
def long_clear_text(cluster, server):
    """A text of about thirty pages, its answer, and how long it takes to compute."""
    text, answer = cluster.clear_text(pieces=3)
    cluster.plain.client.flush_cache()
    return text, answer, ask(cluster.plain, text).ttft_s


@pytest.fixture(scope="module")
def coded_bytes(cluster, server, link, long_clear_text):
    """Of all pages of the text, which the server publishes and fetches, so that it knows its rates."""
    link.begin(steady(1e9))
    wait_up(server)
    text, answer, _ = long_clear_text
    before = metric(server, "kvcodec_published_bytes_total")
    assert ask(server, text).text == answer
    assert server.client.wait_published()
    for _ in range(3):
        forget(server)
        assert ask(server, text).text == answer
    return metric(server, "kvcodec_published_bytes_total") - before


@pytest.fixture
def stored(fresh, server, link, long_clear_text, coded_bytes):
    """Stored by the server, which has forgotten it."""
    link.begin(steady(1e9))
    wait_up(server)
    text, answer, computed_s = long_clear_text
    assert server.client.wait_published()
    forget(server)
    return Stored(text, answer, coded_bytes, computed_s)


def meetings(server, outcome=None):
    return metric(server, "kvcodec_meetings_total", **({"outcome": outcome} if outcome else {}))


def until_planned(server, link, stored, begin=lambda speed: steady(speed), outcome=None):
    """Asks until both ends are worked on at once, with this outcome if one is given, and gives that reply.

    Every reply has to be right. Not only the plan of a request counts: a fetch that was turned round is worked on at
    both ends as well, and where they have met says only the outcome.
    """
    outcomes = []
    for factor in FACTORS:
        speed = factor * stored.bytes_per_s
        for _ in range(3):
            forget(server)
            planned = metric(server, "kvcodec_plans_total", reason="both_ends")
            before = meetings(server), meetings(server, outcome)
            link.begin(begin(speed))
            reply = ask(server, stored.text)
            link.begin(steady(speed))
            assert reply.text == stored.answer
            is_planned = metric(server, "kvcodec_plans_total", reason="both_ends") > planned
            if is_planned and meetings(server) > before[0] and meetings(server, outcome) > before[1]:
                return reply
            outcomes.append((factor, is_planned, meetings(server) - before[0]))
    raise AssertionError(f"both ends are never worked on at once, or never {outcome}: {outcomes}")


def test_both_ends_meet(fresh, server, link, stored):
    reply = until_planned(server, link, stored, outcome="joined")
    assert reply.cached.storage > 0
    assert reply.cached.storage % PAGE_TOKENS == 0
    assert metric(server, "kvcodec_joined_tokens_total") >= reply.cached.storage
    assert metric(server, "kvcodec_ttft_seconds_count", choice="both") > 0
    # What was restored is in the tree like what was computed, and both are used.
    again = ask(server, stored.text)
    assert again.text == stored.answer
    assert again.cached.device > reply.cached.storage
    # SGLang checks its pools when it is idle, and ends if a slot is lost.
    assert server.client.wait_published()
    forget(server)
    assert server.alive


def until_turned(server, link, stored, is_promised):
    """Asks over a link that is faster than computing and fails, until the fetch goes on from the other end.

    ``is_promised``: until that happens to a request that is in a batch already, which starts a second time.
    """
    names = ["kvcodec_fetches_turned_total", *(["kvcodec_early_admissions_total"] if is_promised else [])]
    shares, factors = (
        ((0.75, 0.85, 0.65, 0.9), (3, 2, 6, 12)) if is_promised else ((0.3, 0.4, 0.5, 0.2), (6, 12, 3, 25))
    )
    # How fast the link has to be so that its failure is noticed before all has come, the machine says.
    for factor, share in itertools.product(factors, shares):
        speed = factor * stored.bytes_per_s
        link.begin(steady(speed))
        forget(server)
        assert ask(server, stored.text).text == stored.answer
        forget(server)
        before = [metric(server, name) for name in names]
        link.begin(falls(speed, int(share * stored.coded_bytes), to=0.15 / factor))
        reply = ask(server, stored.text)
        link.begin(steady(speed))
        assert reply.text == stored.answer
        if all(metric(server, name) > old for name, old in zip(names, before, strict=True)):
            return
    raise AssertionError("no fetch goes on from the other end")


def learn(fresh, server, stored):
    """The server computes a prompt and fetches another, so that it can compare them."""
    wait_up(server)
    ask(server, fresh.text(pieces=3))
    assert server.client.wait_published()
    for _ in range(3):
        forget(server)
        assert ask(server, stored.text).text == stored.answer


@pytest.mark.parametrize("is_promised", [False, True])
def test_a_link_that_fails_in_mid_fetch(fresh, turning, link, stored, is_promised):
    learn(fresh, turning, stored)
    lost = metric(turning, "kvcodec_restore_failures_total", reason="arrival")
    until_turned(turning, link, stored, is_promised)
    if is_promised:
        assert metric(turning, "kvcodec_restore_failures_total", reason="arrival") > lost
    wait_for(lambda: turning.client.wait_published(), "an idle server")
    forget(turning)
    link.begin(steady(1e9))
    assert ask(turning, stored.text).text == stored.answer
    assert turning.alive


def test_a_link_that_stops_is_not_waited_for(fresh, server, link, stored):
    reply = until_planned(server, link, stored, lambda speed: stalls(speed, int(0.15 * speed), 20.0))
    assert reply.text == stored.answer
    link.begin(steady(1e9))
    assert ask(server, stored.text).text == stored.answer


@pytest.mark.parametrize("stop", ["kill", "pause"])
def test_a_peer_that_goes_on_the_way(fresh, server, link, stored, stop):
    until_planned(server, link, stored)
    forget(server)
    planned = metric(server, "kvcodec_plans_total")
    replies = []
    asking = threading.Thread(target=lambda: replies.append(ask(server, stored.text)))
    asking.start()
    wait_for(lambda: metric(server, "kvcodec_plans_total") > planned or not asking.is_alive(), "plan")
    os.kill(fresh.peer.pid, signal.SIGKILL if stop == "kill" else signal.SIGSTOP)
    asking.join()
    assert replies[0].text == stored.answer
    fresh.peer.kill()
    fresh.restart_peer()
    wait_up(server)
    assert ask(server, stored.text).text == stored.answer
    assert server.alive


@pytest.mark.parametrize("damage", [_bit_flipped, _unrestorable])
def test_a_damaged_page_is_computed_and_stored_anew(fresh, server, link, stored, damage):
    until_planned(server, link, stored)
    forget(server)
    last = _last_page_hash(stored.text)
    assert _tamper(fresh, lambda data: damage(data) if PageObject(data).key.page_hash == last else data) > 0
    wait_up(server)
    joined = meetings(server, "joined")
    # Fetched whole or while it is computed: the last page comes first then, and nothing can be behind it.
    assert ask(server, stored.text).text == stored.answer
    assert meetings(server, "joined") == joined
    assert server.client.wait_published()
    forget(server)
    link.begin(steady(1e9))
    assert ask(server, stored.text).text == stored.answer
    fresh.restart_peer()


def test_a_client_that_leaves_and_others_that_come(fresh, server, link, stored):
    until_planned(server, link, stored)
    forget(server)
    left = meetings(server)
    leave(server, stored.text, after_s=0.3)
    # Another begins while a third is on its way.
    replies = []
    asking = [threading.Thread(target=lambda: replies.append(ask(server, stored.text).text)) for _ in range(2)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert replies == [stored.answer] * 2
    wait_for(lambda: server.client.wait_published(), "an idle server")
    forget(server)
    assert server.alive
    assert meetings(server) >= left


@pytest.mark.timeout(900)
@pytest.mark.parametrize("compute", ["idle", "failing"])
def test_two_ranks_meet_at_the_same_page(fresh, link, compute):
    link.begin(steady(1e9))
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    server = start(fresh, link, f"{compute}-tp2", compute, extra_args=["--tp", "2"], env=cores)
    try:
        wait_up(server)
        ask(server, fresh.text(pieces=3))
        assert server.client.wait_published()
        text, answer = fresh.clear_text(pieces=3)
        computed = ask(server, text)
        assert computed.text == answer
        assert server.client.wait_published()
        forget(server)
        before = metric(server, "kvcodec_fetched_bytes_total")
        assert ask(server, text).text == answer
        # By both ranks, which may know nothing yet and then fetch all.
        coded_bytes = metric(server, "kvcodec_fetched_bytes_total") - before
        stored = Stored(text, answer, coded_bytes, computed.ttft_s)
        if compute == "idle":
            reply = until_planned(server, link, stored, outcome="joined")
            assert reply.cached.storage > 0
        else:
            learn(fresh, server, stored)
            until_turned(server, link, stored, is_promised=False)
        link.begin(steady(1e9))
        forget(server)
        assert ask(server, text).text == answer
        assert server.alive
    finally:
        server.kill()
