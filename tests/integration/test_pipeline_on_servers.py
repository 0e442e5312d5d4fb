"""Two stages of a pipeline, each with the KV of its own layers: they schedule alike, whatever comes to one of them."""

import concurrent.futures
import threading

import pytest
from integration.cluster import ask, forget, metric, wait_for, wait_up
from integration.test_both_ends import leave
from integration.test_failures import _bit_flipped, _is_computed, _tamper_at_one, _unrestorable

pytestmark = pytest.mark.sglang

STAGES = 2
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
CHUNKED = ("--chunked-prefill-size", "256")


@pytest.fixture(scope="module")
def server(cluster):
    """Its pool is for four of the texts."""
    few = ("--max-total-tokens", "4096")
    server = cluster.start_server("pp2", extra_args=[*CHUNKED, *few, "--pp-size", str(STAGES)], env=CORES)
    server.wait_ready()
    yield server
    assert server.alive
    server.kill()


@pytest.fixture
def stored(fresh, server):
    """A text whose pages are stored and not in the server, and the answer to it."""
    wait_up(server)
    text, answer = fresh.clear_text()
    assert ask(server, text).text == answer
    assert server.client.wait_published()
    forget(server)
    return text, answer


def test_a_prefix_comes_back_to_all_stages(fresh, server, stored):
    text, answer = stored
    reply = ask(server, text)
    assert reply.text == answer
    assert reply.cached.storage >= reply.prompt_tokens // 64 * 64 - 64
    again = ask(server, text)
    assert again.text == answer
    assert again.cached.device >= reply.cached.storage


def test_each_stage_stores_its_layers(fresh, server):
    wait_up(server)
    before = fresh.stat().objects
    reply = ask(server, fresh.text())
    assert server.client.wait_published()
    assert fresh.stat().objects - before >= STAGES * (reply.prompt_tokens // 64)


def test_pages_come_back_from_host_memory_with_the_network_cut(fresh, server, stored):
    text, answer = stored
    first = ask(server, text)
    server.client.flush_cache()
    fresh.stop_peer()
    wait_for(lambda: metric(server, "kvcodec_peer_up") == 0, "sign of the loss")
    fetched = metric(server, "kvcodec_fetched_bytes_total")
    again = ask(server, text)
    assert again.text == answer
    assert again.cached.host == first.cached.storage
    assert metric(server, "kvcodec_fetched_bytes_total") == fetched
    fresh.start_peer()


def test_many_at_once_with_more_than_the_pool_holds(fresh, server):
    wait_up(server)
    asked = [fresh.clear_text() for _ in range(8)]
    for text, answer in asked[::2]:
        assert ask(server, text).text == answer
    assert server.client.wait_published()
    forget(server)
    leaver = threading.Thread(target=leave, args=(server, fresh.text(), 0.05))
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        leaver.start()
        fetched = list(pool.map(lambda each: ask(server, each[0]), asked))
        # By now the pool has lost most of them, and host memory has not.
        kept = list(pool.map(lambda each: ask(server, each[0]), asked))
    leaver.join()
    for replies in (fetched, kept):
        assert [reply.text for reply in replies] == [answer for _, answer in asked]
    assert sum(reply.cached.storage for reply in fetched) > 0
    assert sum(reply.cached.host for reply in kept) > 0
    wait_for(server.client.wait_published, "an idle server")
    forget(server)


def test_two_stages_of_two_ranks(fresh):
    options = ["--pp-size", "2", "--tp", "2"]
    server = fresh.start_server("pp2-tp2", extra_args=options, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1"})
    try:
        server.wait_ready()
        wait_up(server)
        text, _ = fresh.clear_text()
        first = ask(server, text)
        assert server.client.wait_published()
        forget(server)
        second = ask(server, text)
        assert second.text == first.text
        assert second.cached.storage >= second.prompt_tokens // 64 * 64 - 64
        assert ask(server, text).cached.device >= second.cached.storage
    finally:
        server.kill()


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize(
    ("damage", "is_longer"),
    [(_bit_flipped, False), (_unrestorable, False), (_unrestorable, True)],
    ids=["bit flipped", "unrestorable", "unrestorable start of a longer prompt"],
)
def test_what_is_bad_at_one_stage_is_computed_at_all(fresh, server, stored, stage, damage, is_longer):
    text, answer = stored
    if is_longer:
        # Other chunks of the prompt are on their way through the stages when the load turns out to have failed.
        text, answer = fresh.clear_text(pieces=2, after=text)
    assert _tamper_at_one(fresh, server, STAGES, stage, damage) > 0
    _is_computed(server, text, answer, damage)
    if damage is _bit_flipped:
        healed = ask(server, text)
        assert healed.text == answer
        assert healed.cached.storage > 0
