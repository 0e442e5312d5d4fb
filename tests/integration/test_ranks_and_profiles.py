"""Tensor parallelism, the lossy profile and retraction, each with a server of its own."""

import pathlib
import sys

import pytest
from integration.cluster import ask, forget, metric, wait_up

from sglang_kvcodec.testing.processes import SGLangProcess

pytestmark = pytest.mark.sglang


def _store_forget_and_ask_again(server: SGLangProcess, text: str):
    wait_up(server)
    first = ask(server, text)
    assert first.cached.storage == 0
    assert server.client.wait_published()
    forget(server)
    return first, ask(server, text)


def test_two_ranks_agree(fresh):
    server = fresh.start_server("tp2", extra_args=["--tp", "2"], env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    try:
        server.wait_ready()
        text, _ = fresh.clear_text()
        before = fresh.stat().objects
        first, second = _store_forget_and_ask_again(server, text)
        assert second.text == first.text
        assert second.cached.storage >= 512
        # Each rank stores its own heads.
        assert fresh.stat().objects - before >= 2 * second.cached.storage // 64
    finally:
        server.kill()


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
