import itertools

import pytest
from latency.fake_sglang import FakeSGLang

from sglang_kvcodec.latency import sweep as sweep_module
from sglang_kvcodec.latency.experiment import methods_of
from sglang_kvcodec.latency.loads import Load, make_prompt
from sglang_kvcodec.latency.samples import Method
from sglang_kvcodec.latency.sweep import Sweep, SweepPlan
from sglang_kvcodec.latency.texts import fresh_texts
from sglang_kvcodec.testing.sglang_client import SGLangClient


class Steps:
    def __init__(self):
        self.words = []
        self.begun = []

    def begin(self, steps):
        self.begun.append(steps)

    def step(self, words):
        self.words.append(words)


def counted(text):
    return len(text) // 3


def test_texts_have_their_length_and_nothing_in_common():
    texts = list(itertools.islice(fresh_texts(counted, 500), 20))
    assert all(480 < counted(text) < 520 for text in texts)
    assert len({text[:40] for text in texts}) == 20


def test_texts_end_with_a_sentence():
    with pytest.raises(RuntimeError, match="no text of 400000 tokens is left"):
        list(fresh_texts(counted, 400_000))


@pytest.mark.parametrize(("kind", "turns"), [("shared-prefix", 4), ("multi-turn", 2), ("multi-turn", 5)])
def test_what_is_asked_begins_with_what_is_stored(kind, turns):
    load = Load(kind, 800, turns, 4)
    with FakeSGLang(kvcodec=False, answer=lambda prompt: "yes") as server:
        client = SGLangClient(server.url)
        prompt = make_prompt(load, fresh_texts(client.count_tokens, load.text_tokens), client)
    asked = [prompt.asked(number) for number in (1, 2)]
    assert asked[0] != asked[1]
    stored_chars = sum(len(message["content"]) for message in prompt.stored)
    assert 3000 < stored_chars < 3500
    if kind == "multi-turn":
        roles = [message["role"] for message in asked[0]]
        assert roles == ["user", "assistant"] * (turns - 1) + ["user"]
        assert asked[0][: len(prompt.stored)] == prompt.stored
        assert len(server.asked) == turns - 1
    else:
        (stored,), (one,), (other,) = prompt.stored, *asked
        common = stored["content"].rpartition("\n\n")[0]
        assert one["content"].startswith(common)
        assert other["content"].startswith(common)


@pytest.fixture
def no_sleep(monkeypatch):
    slept = []
    monkeypatch.setattr(sweep_module.time, "sleep", slept.append)
    return slept


def test_every_server_is_asked_at_every_bandwidth_in_another_order(no_sleep):
    plan = SweepPlan(Load("shared-prefix", 300, answer_tokens=4), ("unlimited", "10Mbps", "1Gbps"), repeats=2, settle=2)
    steps, shaped = Steps(), []
    methods = methods_of(["exact", "high"], "high")
    assert [method.name for method in methods] == ["prefill", "planner", "exact", "high"]
    servers = [FakeSGLang(kvcodec=method.has_kvcodec) for method in methods]
    with servers[0], servers[1], servers[2], servers[3]:
        clients = {method: SGLangClient(server.url) for method, server in zip(methods, servers, strict=True)}
        sweep = Sweep(plan, 4, steps)
        sweep.run(clients, lambda bandwidth, served: shaped.append((bandwidth, len(served))))
    # The fastest comes last, so that prefixes are stored at it; the warm-up has no other.
    assert [bandwidth for bandwidth, _ in shaped] == [
        *("unlimited",),
        *("1Gbps", "10Mbps", "unlimited"),
        *("10Mbps", "1Gbps", "unlimited"),
    ]
    assert {served for _, served in shaped} == {3}
    assert [len(steps.words)] == steps.begun == [4 * plan.steps]
    found = {(s.method, s.bandwidth, s.repeat): s for s in sweep.samples}
    names = ("prefill", "device", "exact", "high", "planner", "planner_first")
    assert len(found) == len(sweep.samples) == len(names) * 3 * 2
    for (name, _, _), sample in found.items():
        cached = sample.reply.cached
        assert (cached.storage >= 256) == (name not in ("prefill", "device"))
        assert (cached.device >= 256) == (name == "device")
        if cached.storage:
            assert sample.restored_bytes == 4 * sample.fetched_bytes == 400 * cached.storage
            assert sample.reasons == ("fetch_all",)
            assert sample.reply.rid.startswith("rid-")
    # Settling pauses between its questions; nothing else of the sweep does.
    assert no_sleep.count(sweep_module._SETTLE_S) == 7


def test_groups_of_one_get_the_prompts_of_the_first(no_sleep):
    plan = SweepPlan(Load("multi-turn", 300, 3, 4), ("unlimited",), repeats=1, settle=0)
    sweep = Sweep(plan, 2, steps := Steps())
    with FakeSGLang(kvcodec=False) as plain, FakeSGLang() as server:
        sweep.run({Method("prefill"): SGLangClient(plain.url)}, lambda bandwidth, served: None)
        sweep.run({Method("exact", "exact", "always"): SGLangClient(server.url)}, lambda bandwidth, served: None)
    assert plain.asked[-1] == server.asked[-1]
    assert [sample.method for sample in sweep.samples] == ["prefill", "device", "exact"]
    assert server.forgotten == 4
    assert [len(steps.words)] == steps.begun == [2 * plan.steps]
