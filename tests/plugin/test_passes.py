import types

import pytest
from prometheus_client import REGISTRY
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.planner import FetchPlan
from sglang_kvcodec.flow.prefill_meter import PrefillMeter
from sglang_kvcodec.plugin import passes as passes_module
from sglang_kvcodec.plugin.passes import PassObserver


class Passes:
    """An observer, and SGLang's account of prefill time."""

    def __init__(self):
        self.meter = PrefillMeter()
        self.observer = PassObserver(self.meter)
        self.busy_us = 0
        self.number = 0

    def run(
        self, new=(), prefix=(), seconds=0.0, mode=ForwardMode.EXTEND, reqs=(), waited_s=0.0, restored=0, on_cpu=False
    ):
        self.number += 1
        if restored:
            self.observer.loaded(self.number, waited_s, restored)
        if on_cpu:
            self.observer.ran(self.number, seconds)
        if mode.is_extend():
            self.busy_us += round(seconds * 1e6)
        batch = types.SimpleNamespace(
            forward_iter=self.number,
            forward_mode=mode,
            extend_lens=list(new),
            prefix_lens=list(prefix),
            reqs=list(reqs),
        )
        self.observer.ended(batch, self.busy_us)

    def seconds(self, new):
        model = self.meter.model()
        return None if model is None else model.seconds(new, 0)


@pytest.fixture
def passes():
    return Passes()


def test_prefill_is_learnt_from_prefill_passes_alone(passes):
    passes.run(mode=ForwardMode.DECODE, seconds=9)
    assert passes.seconds(100) is None
    passes.run([100], [0], 0.5)
    passes.run(mode=ForwardMode.DECODE, seconds=9)
    passes.run([60, 40], [0, 0], 0.5)
    assert passes.seconds(100) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_what_a_pass_waited_for_its_layers_is_not_prefill(passes, on_cpu):
    passes.run([100], [0], 9.0, waited_s=8.9, restored=64, on_cpu=on_cpu)
    assert passes.seconds(100) is None
    passes.run([100], [0], 0.8, waited_s=0.3, restored=64, on_cpu=on_cpu)
    assert passes.seconds(100) == pytest.approx(0.5, rel=0.01)


def test_a_pass_takes_longer_beside_its_restore(passes):
    for size in (50, 100, 200):
        passes.run([size], [0], size / 200, on_cpu=True)
    assert passes.meter.model().restored_s == 0
    for restored in (64, 128, 256):
        passes.run([100], [0], 0.7 + restored / 1000, waited_s=0.2, restored=restored, on_cpu=True)
    assert passes.seconds(100) == pytest.approx(0.5, rel=0.05)
    assert passes.meter.model().restored_s == pytest.approx(1 / 1000, rel=0.1)


def test_how_long_a_pass_has_waited_on_a_device_nobody_knows(passes):
    passes.run([100], [0], 0.5)
    for _ in range(5):
        passes.run([100], [0], 5.0, restored=64)
    assert passes.seconds(100) == pytest.approx(0.5, rel=0.01)
    assert passes.meter.model().restored_s == 0


def stage(name):
    return tuple(REGISTRY.get_sample_value(f"kvcodec_{name}_seconds_{what}") for what in ("count", "sum"))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_prefill_passes_and_their_waits_for_layers_are_shown(passes, on_cpu):
    forward, wait = stage("forward"), stage("layer_wait")
    passes.run([100], [0], 0.5, on_cpu=on_cpu)
    passes.run([100], [64], 0.8, waited_s=0.3, restored=64, on_cpu=on_cpu)
    passes.run([100], [64], 0.2, waited_s=0.0, restored=64, on_cpu=on_cpu)
    passes.run(mode=ForwardMode.DECODE, seconds=9, on_cpu=on_cpu)
    # Not accounted for.
    passes.run([100], [0], 0.0)
    assert stage("forward") == (forward[0] + 3, pytest.approx(forward[1] + 1.5))
    assert stage("layer_wait") == (wait[0] + 2, pytest.approx(wait[1] + 0.3))


def test_a_pass_that_was_not_accounted_for_says_nothing(passes):
    passes.run([100], [0], 0.0)
    assert passes.seconds(100) is None
    assert not passes.meter.is_known


def request(rid, output_ids=()):
    return types.SimpleNamespace(rid=rid, output_ids=list(output_ids))


def ticket(pages, ttft_s, monkeypatch, start_s=100.0):
    monkeypatch.setattr(passes_module.time, "monotonic", lambda: start_s)
    made = FetchTicket([bytes(32)])
    made.plan = FetchPlan(pages, "whole_prefix", "", ttft_s, 2.0, 0.1)
    return made


def total(name, choice):
    return REGISTRY.get_sample_value(f"kvcodec_{name}_sum", {"choice": choice}) or 0.0


@pytest.mark.parametrize(("pages", "choice"), [(3, "fetch"), (0, "prefill")])
def test_a_first_token_is_compared_with_what_was_expected(passes, monkeypatch, pages, choice):
    before = total("ttft_seconds", choice), total("ttft_predicted_seconds", choice)
    passes.observer.expect("r", ticket(pages, 0.5, monkeypatch))
    monkeypatch.setattr(passes_module.time, "monotonic", lambda: 100.75)
    # A chunk in the middle, and another request.
    passes.run([10], [0], 0.1, reqs=[request("r"), request("s", [1])])
    assert total("ttft_seconds", choice) == before[0]
    passes.run([10], [0], 0.1, reqs=[request("r", [7])])
    passes.run([10], [0], 0.1, reqs=[request("r", [7, 8])])
    assert total("ttft_seconds", choice) - before[0] == pytest.approx(0.75)
    assert total("ttft_predicted_seconds", choice) - before[1] == pytest.approx(0.5)


def test_a_request_that_is_gone_or_was_not_predicted_is_not_compared(passes, monkeypatch):
    before = total("ttft_seconds", "fetch")
    passes.observer.expect("gone", ticket(3, 0.5, monkeypatch))
    passes.observer.forget("gone")
    passes.observer.expect("blind", ticket(3, None, monkeypatch))
    passes.run([10], [0], 0.1, reqs=[request("gone", [7]), request("blind", [7])])
    assert total("ttft_seconds", "fetch") == before


def test_expectations_are_bounded(passes, monkeypatch):
    monkeypatch.setattr(passes_module, "MAX_EXPECTED", 2)
    before = total("ttft_seconds", "fetch")
    for rid in "abc":
        passes.observer.expect(rid, ticket(3, 0.5, monkeypatch))
    passes.run([10], [0], 0.1, reqs=[request(rid, [7]) for rid in "abc"])
    assert total("ttft_seconds", "fetch") == before
    assert not passes.observer._expected
