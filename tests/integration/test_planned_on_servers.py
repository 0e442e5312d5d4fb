"""A server that plans its fetches, on links of different speed. What is asserted are its decisions, not its times."""

import json

import pytest
from integration.cluster import ask, forget, metric, wait_for, wait_up

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def planner(cluster):
    server = cluster.start_server(
        "planner",
        plan="auto",
        kvcodec_args=["--kvcodec-trace", str(cluster.work_dir / "trace.json")],
        extra_args=["--chunked-prefill-size", "256"],
    )
    server.wait_ready()
    yield server
    server.kill()


@pytest.fixture
def stored_for_planner(fresh, planner):
    """A stored text that the planner does not hold, and the answer to it; the planner knows its prefill rate."""
    wait_up(planner)
    for _ in range(2):
        ask(planner, fresh.text())
    assert planner.client.wait_published()
    text, answer = fresh.clear_text()
    assert ask(fresh.a, text).text == answer
    assert fresh.a.client.wait_published()
    forget(planner)
    return text, answer


def plans(server, reason=None):
    return metric(server, "kvcodec_plans_total", **({"reason": reason} if reason else {}))


def predicted(server, name, choice):
    return metric(server, f"kvcodec_{name}_sum", choice=choice), metric(server, f"kvcodec_{name}_count", choice=choice)


def test_a_very_slow_link_is_not_waited_for(fresh, planner, stored_for_planner):
    text, answer = stored_for_planner
    # Some 20 kB/s, and a prefix of half a megabyte.
    fresh.restart_peer("160Kbps")
    wait_up(planner)
    # The first takes the link for what it was, or does not know it. Computing overtakes the fetch.
    assert ask(planner, text).text == answer
    forget(planner)
    slow, restored = plans(planner, "link_too_slow"), metric(planner, "kvcodec_restored_tokens_total")
    for _ in range(2):
        reply = ask(planner, text)
        assert reply.text == answer
        assert reply.cached.storage == 0
        forget(planner)
    assert plans(planner, "link_too_slow") == slow + 2
    assert metric(planner, "kvcodec_restored_tokens_total") == restored
    assert metric(planner, "kvcodec_link_bytes_per_second") < 60_000
    sum_s, count = predicted(planner, "ttft_predicted_seconds", "prefill")
    assert count >= 2
    assert sum_s > 0
    assert predicted(planner, "ttft_seconds", "prefill")[1] == count
    fresh.restart_peer()


def test_a_fast_link_is_used_as_the_rates_say(fresh, planner, stored_for_planner):
    text, answer = stored_for_planner
    before = {reason: plans(planner, reason) for reason in ("whole_prefix", "part", "learning")}
    for _ in range(3):
        forget(planner)
        reply = ask(planner, text)
        assert reply.text == answer
    taken = sum(plans(planner, reason) - count for reason, count in before.items())
    refused = plans(planner, "restore_too_slow") + plans(planner, "link_too_slow")
    assert taken + refused >= 3
    if taken:
        assert metric(planner, "kvcodec_restored_tokens_total") > 0
    assert metric(planner, "kvcodec_prefill_tokens_per_second") > 0


def spans(path):
    """The events of a trace that is still being written, those of each request by its id."""
    requests = {}
    for line in path.read_text().splitlines():
        # The last line may be half there.
        text = line.lstrip("[").rstrip(",")
        if text.endswith("}"):
            event = json.loads(text)
            if event["ph"] in "be":
                requests.setdefault(event["id"], []).append(event)
    return requests


def test_every_request_is_in_the_trace(fresh, planner, stored_for_planner):
    text, answer = stored_for_planner
    path = fresh.work_dir / "trace.json"
    before = set(spans(path))
    assert ask(planner, text).text == answer

    def new():
        requests = {rid: events for rid, events in spans(path).items() if rid not in before}
        return [events for events in requests.values() if any(event["name"] == "first token" for event in events)]

    wait_for(new, "trace of the request")
    (events,) = new()
    begun = {event["name"]: event for event in events if event["ph"] == "b"}
    ended = {event["name"]: event for event in events if event["ph"] == "e"}
    assert set(begun) >= {"lookup queue", "lookup", "plan", "held", "forward", "first token"}
    assert set(begun) == set(ended)
    assert all(ended[name]["ts"] >= begun[name]["ts"] for name in begun)
    plan = begun["plan"]["args"]
    assert plan["words"]
    if plan["pages"]:
        assert begun["wire"]["args"]["bytes"] > 0
        assert "restore" in begun


def test_two_ranks_plan_for_themselves_and_agree(fresh):
    server = fresh.start_server(
        "tp2-planner", plan="auto", extra_args=["--tp", "2"], env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    )
    try:
        server.wait_ready()
        wait_up(server)
        text, _ = fresh.clear_text()
        first = ask(server, text)
        assert server.client.wait_published()
        for bandwidth in (None, "160Kbps"):
            if bandwidth:
                fresh.restart_peer(bandwidth)
                wait_up(server)
            for _ in range(2):
                forget(server)
                before = plans(server)
                assert ask(server, text).text == first.text
                # A rank may be given up on before it has planned.
                cuts = metric(server, "kvcodec_fetch_cuts_total", phase="lookup")
                assert plans(server) - before + cuts >= 2
        assert server.alive
    finally:
        server.kill()
        fresh.restart_peer()
