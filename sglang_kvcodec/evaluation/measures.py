"""What a model says with restored KV, against what it says with untouched KV."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from sglang_kvcodec.evaluation.text import Question
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.models import CausalLM

_ROWS = 64
"""Positions at once: a large vocabulary in float64 is wide."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far next-token distributions are from those with untouched KV, means over the positions of a continuation.

    Attributes:
        kl_nats: KL divergence of the restored from the untouched.
        loss_nats: of the text's own tokens.
        top1_agreement: share of positions at which the likeliest token is the same.
    """

    kl_nats: float
    loss_nats: float
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        """Of the text's own tokens."""
        return math.exp(self.loss_nats)


def divergence(untouched: torch.Tensor, restored: torch.Tensor, tokens: torch.Tensor) -> Divergence:
    """Compares logits.

    Args:
        untouched: ``(m, vocabulary)`` logits of a continuation, row i for what follows token i.
        restored: likewise.
        tokens: int64 ``(m,)``, the continuation; the last row has no next token in it and counts for the divergence and
            the agreement only.
    """
    kl, loss, agree = 0.0, 0.0, 0
    for start in range(0, len(tokens), _ROWS):
        rows = slice(start, start + _ROWS)
        # float64, for a divergence of 1e-7 is the difference of numbers around 1
        expected, found = untouched[rows].double().log_softmax(-1), restored[rows].double().log_softmax(-1)
        kl += float((expected.exp() * (expected - found)).sum())
        agree += int((expected.argmax(-1) == found.argmax(-1)).sum())
        labels = tokens[start + 1 : start + 1 + _ROWS].to(found.device)
        loss -= float(found[: len(labels)].gather(1, labels[:, None]).sum())
    return Divergence(kl / len(tokens), loss / max(1, len(tokens) - 1), agree / len(tokens))


def greedy_agreement(
    model: CausalLM, kv: Mapping[Side, torch.Tensor], prompt: torch.Tensor, expected: torch.Tensor
) -> int:
    """How many tokens greedy decoding makes before it leaves what it makes with untouched KV.

    Up to its first other token a greedy run has seen just the expected ones. So one pass over them tells, at each
    position, whether the next would still be the same, and nothing has to be generated.

    Args:
        model: the model.
        kv: of all tokens of the prompt but the last.
        prompt: int64 ``(n,)``.
        expected: int64 ``(count,)``, what greedy decoding makes of the prompt with untouched KV.
    """
    fed = torch.cat([prompt[-1:], expected[:-1]])
    made = model.continue_from(kv, prompt[:-1], fed).argmax(-1)
    same = (made == expected.to(made.device)).tolist()
    return same.index(False) if False in same else len(same)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Whether greedy decoding gives the answer, and how likely the model finds it.

    Attributes:
        right: all of its tokens are the likeliest.
        loss_nats: mean over its tokens.
    """

    right: bool
    loss_nats: float


def ask(model: CausalLM, kv: Mapping[Side, torch.Tensor], prefix: torch.Tensor, question: Question) -> Answer:
    """Asks after a prefix of which ``kv`` holds the first tokens; the rest is computed."""
    known = kv[Side.KEY].shape[1]
    asked = torch.cat([prefix[known:], question.question])
    tokens = torch.cat([asked, question.answer])
    logits = model.continue_from(kv, prefix[:known], tokens)[len(asked) - 1 : -1]
    answer = question.answer.to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return Answer(bool((logits.argmax(-1) == answer).all()), float(loss))


@dataclasses.dataclass(frozen=True)
class Recall:
    """Answers with restored KV beside those with untouched KV.

    Attributes:
        asked: how many questions.
        right: answered with restored KV.
        untouched_right: answered with untouched KV: what the model can do at all.
        kept: answered with both.
        added_loss_nats: how much less likely the answers became, mean over the questions.
    """

    asked: int
    right: int
    untouched_right: int
    kept: int
    added_loss_nats: float

    @property
    def kept_share(self) -> float | None:
        """Of what the model answers with untouched KV; None if that is nothing, and so says nothing."""
        return self.kept / self.untouched_right if self.untouched_right else None


def recall(untouched: Sequence[Answer], restored: Sequence[Answer]) -> Recall:
    """Sums up answers to the same questions."""
    pairs = list(zip(untouched, restored, strict=True))
    return Recall(
        len(pairs),
        sum(answer.right for answer in restored),
        sum(answer.right for answer in untouched),
        sum(before.right and after.right for before, after in pairs),
        sum(after.loss_nats - before.loss_nats for before, after in pairs) / max(1, len(pairs)),
    )


def noise_to_signal(original: torch.Tensor, restored: torch.Tensor) -> float:
    """Noise power over the power that is left when each channel's mean over the tokens is taken away, of one side.

    Args:
        original: ``(layers, tokens, kv_heads, head_dim)``.
        restored: likewise.

    Returns:
        The mean over layers.
    """
    wide = original.double()
    noise = (restored.double() - wide).square().sum((1, 2, 3))
    signal = (wide - wide.mean(1, keepdim=True)).square().sum((1, 2, 3))
    return float((noise / signal.clamp_min(1e-300)).mean())


def digest_of(kv: Mapping[Side, torch.Tensor]) -> bytes:
    """Names KV by its bits: equal KV makes the model say equal things, so it need not be asked twice."""
    hashed = hashlib.sha256()
    for side in sorted(kv, key=lambda side: side.value):
        hashed.update(side.value.encode())
        hashed.update(kv[side].contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.digest()
