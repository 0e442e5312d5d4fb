"""The harness: every method on the same documents, sums that add up, and conversations that stand on restored KV."""

import dataclasses

import pytest
import torch

from sglang_kvcodec.evaluation.harness import Prompts, measure_accuracy, measure_ratio
from sglang_kvcodec.evaluation.methods import MethodContext, MethodResult, even_bits
from sglang_kvcodec.evaluation.registry import make_methods
from sglang_kvcodec.evaluation.text import cut_documents, make_conversations, make_needles, shipped_texts
from sglang_kvcodec.format.spec import Side

PAGE_TOKENS = 16
PREFIX_TOKENS = 128


class Recorder:
    """A method that adds noise and remembers what it was given."""

    def __init__(self, name, noise):
        self.name = name
        self.noise = noise
        self.calls = []

    def roundtrip(self, kv, first_position):
        self.calls.append((first_position, kv[Side.KEY].shape[1], kv[Side.KEY].clone()))
        generator = torch.Generator().manual_seed(first_position)
        restored = {
            side: tensor + self.noise * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
            for side, tensor in kv.items()
        }
        restored = {side: tensor.bfloat16() for side, tensor in restored.items()}
        sizes = {side: tensor.numel() for side, tensor in kv.items()}
        return MethodResult(restored, sum(sizes.values()), 0, even_bits(kv, sizes))


class Steps:
    def __init__(self):
        self.expected, self.words = None, []

    def begin(self, steps):
        self.expected = steps

    def step(self, words):
        self.words.append(words)


@pytest.fixture(scope="module")
def prompts(model):
    texts = shipped_texts("evaluation", ["code", "chat"])
    return Prompts(
        cut_documents(texts, model.encode, PREFIX_TOKENS + 33, 2),
        PAGE_TOKENS,
        PREFIX_TOKENS,
        17,
        make_needles(texts, model.encode, PREFIX_TOKENS, 2),
        make_conversations([texts[1]], model.encode, 250, 1),
    )


def test_more_noise_costs_more_and_none_costs_nothing(model, prompts):
    methods = [Recorder("none", 0.0), Recorder("some", 0.05), Recorder("much", 0.5), Recorder("again", 0.0)]
    steps = Steps()
    reports = measure_accuracy(model, prompts, methods, steps)
    assert len(steps.words) == steps.expected == 4 * (2 + 2 + 1)
    none, some, much, again = (report.summary() for report in reports)
    assert none["kl_nats"] == 0
    assert none["top1_agreement"] == 1
    assert none["greedy_agreement_tokens"] == 17
    assert none["greedy_identical_share"] == 1
    assert none["perplexity"] == none["untouched_perplexity"]
    assert none["needle_right"] == none["needle_untouched_right"]
    assert none["multi_turn_asked"] == 6
    assert none["multi_turn_added_loss_nats"] == 0
    assert {**again, "method": "none"} == none
    assert 0 < some["kl_nats"] < much["kl_nats"]
    assert 0 < some["key_noise_to_signal"] < much["key_noise_to_signal"]
    assert much["top1_agreement"] < some["top1_agreement"] <= 1
    assert much["greedy_agreement_tokens"] < 17
    assert some["ratio_to_bf16"] == 2
    assert some["bits_per_value"] == 8
    assert some["multi_turn_added_loss_nats"] != 0


def test_turns_are_coded_page_by_page_and_stand_on_what_was_restored(model, prompts):
    few = dataclasses.replace(prompts, documents=prompts.documents[:1], needles=(), greedy_tokens=0)
    noisy, clean = Recorder("noisy", 0.3), Recorder("clean", 0.0)
    measure_accuracy(model, few, [noisy, clean])
    for method in (noisy, clean):
        del method.calls[0]  # the document; the others are the conversation
        starts = [start for start, _, _ in method.calls]
        ends = [start + tokens for start, tokens, _ in method.calls]
        assert len(starts) >= 5
        assert starts == [0, *ends[:-1]]
        assert all(end % PAGE_TOKENS == 0 for end in ends)
    # the first turn is computed from nothing, the second from what came back of the first
    assert torch.equal(noisy.calls[0][2], clean.calls[0][2])
    assert not torch.equal(noisy.calls[1][2], clean.calls[1][2])


def test_ratio_measures_sizes_only(model, prompts):
    spec = model.kv_spec(PAGE_TOKENS)
    methods = make_methods(["exact", "uncalibrated", "kivi@4"], MethodContext(spec, model.config))
    exact, high, kivi = measure_ratio(model, prompts, methods)
    assert exact.ratio == pytest.approx(16 / exact.summary()["bits_per_value"])
    assert 1.2 < exact.ratio < high.ratio < kivi.ratio
    row = high.summary()
    assert "kl_nats" not in row
    assert row["key_ideal_bits"] < row["key_bits"]
    assert row["key_bits"] == pytest.approx(sum(high.layer_bits(Side.KEY)) / 6)
    assert len(high.layer_bits(Side.VALUE, ideal=True)) == 6
    assert kivi.summary()["key_ideal_bits"] is None
    # page objects as a whole: what belongs to no layer is in the metadata
    assert row["bits_per_value"] == pytest.approx(
        (row["key_bits"] + row["value_bits"]) / 2 + row["metadata_bits_per_value"]
    )
