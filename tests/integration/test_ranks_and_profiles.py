"""Tensor parallelism, the lossy profile and retraction, each with a server of its own."""

import concurrent.futures
import pathlib
import sys

import pytest
from integration.cluster import MODEL, ask, forget, metric, others, wait_for, wait_up
from integration.test_failures import _bit_flipped, _is_computed, _tamper_at_one, _unrestorable

from benchmarks.deeper import deepened
from sglang_kvcodec.testing.processes import SGLangProcess

pytestmark = pytest.mark.sglang
TWO_RANKS = ("--tp", "2", "--chunked-prefill-size", "256")
DEEP_LAYERS = 24
DRAWS = 8


def _store_forget_and_ask_again(server: SGLangProcess, text: str):
    wait_up(server)
    first = ask(server, text)
    assert first.cached.storage == 0
    assert server.client.wait_published()
    forget(server)
    return first, ask(server, text)


@pytest.fixture(scope="module")
def two_ranks(cluster):
    server = cluster.start_server("tp2", extra_args=TWO_RANKS, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    server.wait_ready()
    yield server
    assert server.alive
    server.kill()


def test_two_ranks_agree(fresh, two_ranks):
    text, answer = fresh.clear_text()
    before = fresh.stat().objects
    first, second = _store_forget_and_ask_again(two_ranks, text)
    assert first.text == second.text == answer
    assert second.cached.storage >= 512
    # Each rank stores its own heads.
    assert fresh.stat().objects - before >= 2 * second.cached.storage // 64
    forget(two_ranks)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("damage", [_bit_flipped, _unrestorable], ids=["bit flipped", "unrestorable"])
def test_what_is_bad_at_one_rank_is_computed_at_both(fresh, two_ranks, rank, damage):
    text, answer = fresh.clear_text()
    wait_up(two_ranks)
    assert ask(two_ranks, text).text == answer
    assert two_ranks.client.wait_published()
    forget(two_ranks)
    assert _tamper_at_one(fresh, two_ranks, 2, rank, damage) > 0
    _is_computed(two_ranks, text, answer, damage)


def test_two_ranks_fetch_what_several_ask_for_once(fresh, two_ranks):
    text, answer = fresh.clear_text(pieces=2)
    _store_forget_and_ask_again(two_ranks, text)
    forget(two_ranks)
    following = metric(two_ranks, "kvcodec_following_requests_total")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: ask(two_ranks, text), range(4)))
    assert [reply.text for reply in replies] == [answer] * 4
    assert metric(two_ranks, "kvcodec_following_requests_total") > following
    forget(two_ranks)


@pytest.mark.parametrize("damage", [_bit_flipped, _unrestorable], ids=["bit flipped", "unrestorable"])
def test_what_is_bad_at_one_rank_while_several_ask_for_it(fresh, two_ranks, damage):
    """One fetches and the others wait for it, whatever only one of the ranks finds wrong."""
    text, answer = fresh.clear_text(pieces=2)
    wait_up(two_ranks)
    assert ask(two_ranks, text).text == answer
    assert two_ranks.client.wait_published()
    forget(two_ranks)
    assert _tamper_at_one(fresh, two_ranks, 2, 1, damage) > 0
    wait_up(two_ranks)
    following = metric(two_ranks, "kvcodec_following_requests_total")
    for _ in range(2):
        # The second time what was bad has been found, and was computed and stored anew or not.
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: ask(two_ranks, text), range(4)))
        assert [reply.text for reply in replies] == [answer] * 4
        assert two_ranks.client.wait_published()
        forget(two_ranks)
    assert metric(two_ranks, "kvcodec_following_requests_total") > following
    assert two_ranks.alive


@pytest.fixture
def two_deep_ranks(cluster, tmp_path):
    """Of a model with several layer groups even where each rank has half of the heads: its restores overlap fetches."""
    model = deepened(pathlib.Path(MODEL), DEEP_LAYERS, tmp_path / "deep")
    server = cluster.start_server(
        "deep-tp2", model=str(model), extra_args=TWO_RANKS, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    )
    server.wait_ready()
    yield server
    assert server.alive
    server.kill()


def test_a_peer_that_goes_after_two_ranks_were_promised_pages(fresh, two_deep_ranks):
    server = two_deep_ranks
    text = fresh.text(pieces=2)
    # All that is computed is computed in the same chunks, so it is the same answer whatever the model is worth.
    answer = _store_forget_and_ask_again(server, text)[0].text
    for _ in range(2):
        forget(server)
        ask(server, text)
    failed = metric(server, "kvcodec_restore_failures_total")
    outcomes = []
    for _ in range(DRAWS):
        forget(server)
        fresh.stop_peer()
        wait_for(lambda: metric(server, "kvcodec_peer_up") == 0, "sign of the loss")
        fresh.start_peer("100Mbps")
        wait_up(server)
        early = metric(server, "kvcodec_early_admissions_total")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, server, text)
            # One rank may have all of its pages before it is promised any.
            wait_for(
                lambda early=early, asking=asking: (
                    metric(server, "kvcodec_early_admissions_total") > early or asking.done()
                ),
                "early admission",
            )
            fresh.peer.kill()
            reply = asking.result()
        outcomes.append((reply.cached.storage, metric(server, "kvcodec_restore_failures_total") - failed))
        if metric(server, "kvcodec_restore_failures_total") > failed:
            assert reply.text == answer
            assert reply.cached.storage == 0
            break
    else:
        pytest.fail(f"no restore was under way when the peer went: {outcomes}")
    fresh.start_peer()
    wait_up(server)
    assert server.client.wait_published()
    forget(server)
    assert ask(server, text).cached.storage > 0


@pytest.mark.parametrize("damage", [None, _unrestorable], ids=["sound", "unrestorable"])
def test_two_ranks_restore_while_others_are_answered(fresh, two_ranks, damage):
    text, answer = fresh.clear_text()
    wait_up(two_ranks)
    assert ask(two_ranks, text).text == answer
    assert two_ranks.client.wait_published()
    forget(two_ranks)
    if damage is not None:
        assert _tamper_at_one(fresh, two_ranks, 2, 1, damage) > 0
        wait_up(two_ranks)
    outcome = "restored" if damage is None else "failed"
    before = metric(two_ranks, "kvcodec_ahead_restores_total", outcome=outcome)
    with others(two_ranks, *fresh.clear_text()):
        reply = ask(two_ranks, text)
    assert reply.text == answer
    assert (reply.cached.storage > 0) == (damage is None)
    # Of each rank.
    assert metric(two_ranks, "kvcodec_ahead_restores_total", outcome=outcome) == before + 2
    assert two_ranks.client.wait_published()
    forget(two_ranks)


def test_the_lossy_profile_and_retraction(fresh, stored):
    text, answer = stored
    server = fresh.start_server(
        "high",
        profile="high",
        extra_args=["--chunked-prefill-size", "256"],
        env={"SGLANG_TEST_RETRACT": "true"},
        launcher=[str(pathlib.Path(sys.executable).with_name("sglang")), "serve"],
    )
    try:
        server.wait_ready()
        # Pages of another profile are another namespace.
        first, second = _store_forget_and_ask_again(server, text)
        assert first.text == answer
        assert second.cached.storage >= 512
        assert second.completion_tokens == first.completion_tokens
        stored_bytes = metric(server, "kvcodec_published_bytes_total")
        assert metric(server, "kvcodec_published_kv_bytes_total") > 2 * stored_bytes
        assert metric(server, "sglang:num_retracted_requests_total") > 0 or "Testing retraction" in server.log_text()
        forget(server)
    finally:
        server.kill()
