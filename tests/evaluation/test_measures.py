"""Measures: against figures worked out by hand, and against the model itself."""

import math

import pytest
import torch

from sglang_kvcodec.evaluation.measures import (
    Answer,
    ask,
    digest_of,
    divergence,
    greedy_agreement,
    noise_to_signal,
    recall,
)
from sglang_kvcodec.evaluation.text import Question
from sglang_kvcodec.format.spec import Side

TEXT = (
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def move(self, dx):\n"
)


def test_divergence_of_known_distributions():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    untouched, restored = p.log().repeat(3, 1), torch.stack([p.log(), q.log(), q.log()])
    found = divergence(untouched, restored + 7.0, torch.tensor([0, 2, 1]))
    one = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert found.kl_nats == pytest.approx(2 * one / 3)
    # the last position has no next token: labels are 2 under p, 1 under q
    assert found.loss_nats == pytest.approx(-(math.log(0.25) + math.log(0.25)) / 2)
    assert found.perplexity == pytest.approx(4)
    assert found.top1_agreement == pytest.approx(1 / 3)


def test_divergence_resolves_what_float32_does_not():
    logits = torch.randn(131, 977, generator=torch.Generator().manual_seed(1)) * 4
    tokens = torch.zeros(131, dtype=torch.int64)
    assert divergence(logits, logits, tokens).kl_nats == 0
    moved = logits.double() + 1e-5 * torch.randn(131, 977, generator=torch.Generator().manual_seed(2)).double()
    kl = divergence(logits.double(), moved, tokens).kl_nats
    # half the variance of the disturbance under p, about
    assert 1e-11 < kl < 1e-10


def test_greedy_agreement_is_that_of_a_run(model):
    tokens = model.encode(TEXT * 2)[:49]
    kv = model.prefill(tokens[:48])
    expected = model.generate_greedy(kv, tokens, 24)
    assert greedy_agreement(model, kv, tokens, expected) == 24
    disturbed = {side: tensor * 1.2 for side, tensor in kv.items()}
    run = model.generate_greedy(disturbed, tokens, 24)
    differing = (run != expected).nonzero()
    assert len(differing) > 0
    assert greedy_agreement(model, disturbed, tokens, expected) == int(differing[0])


def test_asking_is_greedy_decoding(model):
    tokens = model.encode(TEXT * 2)[:49]
    kv = model.prefill(tokens[:32])
    question = model.encode("\n        return self.")
    said = model.generate_greedy(kv, torch.cat([tokens, question]), 3)
    right = ask(model, kv, tokens, Question(question, said))
    assert right.right
    wrong = ask(model, kv, tokens, Question(question, torch.cat([said[:2], (said[2:] + 1) % 4096])))
    assert not wrong.right
    assert wrong.loss_nats > right.loss_nats > 0


def test_recall_is_relative_to_what_the_model_can_do():
    untouched = [Answer(True, 0.1), Answer(True, 0.2), Answer(False, 5.0), Answer(False, 6.0)]
    restored = [Answer(True, 0.2), Answer(False, 1.2), Answer(True, 4.0), Answer(False, 6.0)]
    found = recall(untouched, restored)
    assert (found.asked, found.right, found.untouched_right, found.kept) == (4, 2, 2, 1)
    assert found.kept_share == 0.5
    assert found.added_loss_nats == pytest.approx(0.025)
    assert recall(untouched[2:], restored[2:]).kept_share is None


def test_noise_leaves_the_mean_out_of_the_signal():
    original = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1) + 100
    assert noise_to_signal(original, original + 0.1) == pytest.approx(0.01, rel=1e-4)
    assert noise_to_signal(original, original) == 0


def test_digests_tell_kv_apart_by_bits_and_side():
    a, b = torch.zeros(1, 2, 1, 3).bfloat16(), torch.ones(1, 2, 1, 3).bfloat16()
    names = {digest_of({Side.KEY: k, Side.VALUE: v}) for k, v in [(a, a), (a, b), (b, a), (-a, a)]}
    assert len(names) == 4
    assert digest_of({Side.VALUE: b, Side.KEY: a}) == digest_of({Side.KEY: a.clone(), Side.VALUE: b})
