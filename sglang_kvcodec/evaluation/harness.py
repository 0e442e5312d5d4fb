"""Runs every method over the same documents and prompts, and sums up."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from sglang_kvcodec.evaluation.measures import (
    Answer,
    Divergence,
    Recall,
    ask,
    digest_of,
    divergence,
    greedy_agreement,
    noise_to_signal,
    recall,
)
from sglang_kvcodec.evaluation.methods import KV, LayerBits, Method, MethodResult
from sglang_kvcodec.evaluation.text import Conversation, Document, Needle
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.models import CausalLM

_Measured = TypeVar("_Measured")


class Progress(Protocol):
    """Is told how far a run is."""

    def begin(self, steps: int) -> None:
        """There will be ``steps`` steps."""
        ...

    def step(self, words: str) -> None:
        """One of them is done; ``words`` say what it was."""
        ...


class NoProgress:
    """Tells nobody."""

    def begin(self, steps: int) -> None:
        """See ``Progress.begin``."""

    def step(self, words: str) -> None:
        """See ``Progress.step``."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the methods are measured on.

    Attributes:
        documents: of ``prefix_tokens`` and more tokens; those after the prefix are the continuation.
        page_tokens: of a page.
        prefix_tokens: how many tokens are coded, whole pages.
        greedy_tokens: how many tokens greedy runs are compared over, 0 for none.
        needles: prompts that hide a sentence, prefixes of whole pages.
        conversations: conversations in which facts are told.
    """

    documents: Sequence[Document]
    page_tokens: int
    prefix_tokens: int
    greedy_tokens: int = 0
    needles: Sequence[Needle] = ()
    conversations: Sequence[Conversation] = ()


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of one method on one document."""

    document: str
    raw_bytes: int
    coded_bytes: int
    metadata_bytes: int
    bits: LayerBits
    ideal_bits: LayerBits | None
    noise_to_signal: dict[Side, float]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What the model said on one document.

    Attributes:
        divergence: from the untouched.
        greedy_agreement_tokens: how long a greedy run stays the same; None if it was not asked for.
    """

    divergence: Divergence
    greedy_agreement_tokens: int | None


@dataclasses.dataclass(frozen=True)
class MethodReport:
    """All that was measured of a method. ``accuracies`` and what follows are empty or None where only sizes were."""

    method: str
    sizes: tuple[Size, ...]
    accuracies: tuple[Accuracy, ...] = ()
    reference_losses: tuple[float, ...] = ()
    greedy_tokens: int = 0
    needles: Recall | None = None
    conversations: Recall | None = None

    @property
    def ratio(self) -> float:
        """Uncoded bytes over coded bytes, all documents together."""
        return sum(size.raw_bytes for size in self.sizes) / sum(size.coded_bytes for size in self.sizes)

    def side_bits(self, side: Side, ideal: bool = False) -> float | None:
        """Mean bits per value of a side over layers and documents; None where there is no such figure."""
        figures = [size.ideal_bits if ideal else size.bits for size in self.sizes]
        if any(figure is None for figure in figures):
            return None
        return statistics.fmean(bits for figure in figures if figure for bits in figure[side])

    def layer_bits(self, side: Side, ideal: bool = False) -> list[float] | None:
        """Mean bits per value of each layer of a side over documents; None where there is no such figure."""
        figures = [size.ideal_bits if ideal else size.bits for size in self.sizes]
        if any(figure is None for figure in figures):
            return None
        return [
            statistics.fmean(column) for column in zip(*(figure[side] for figure in figures if figure), strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """One flat row, figures with units in their names; what was not measured is left out."""
        raw_bytes = sum(size.raw_bytes for size in self.sizes)
        coded_bytes = sum(size.coded_bytes for size in self.sizes)
        values = raw_bytes / 2
        row: dict[str, Any] = {
            "method": self.method,
            "ratio_to_bf16": self.ratio,
            "bits_per_value": 8 * coded_bytes / values,
            "metadata_bits_per_value": 8 * sum(size.metadata_bytes for size in self.sizes) / values,
        }
        for side in self.sizes[0].bits:
            row[f"{side.value}_bits"] = self.side_bits(side)
            row[f"{side.value}_ideal_bits"] = self.side_bits(side, ideal=True)
            row[f"{side.value}_noise_to_signal"] = statistics.fmean(size.noise_to_signal[side] for size in self.sizes)
        if self.accuracies:
            row |= self._accuracy_row()
        for name, score in (("needle", self.needles), ("multi_turn", self.conversations)):
            if score is not None:
                row |= {
                    f"{name}_right": score.right,
                    f"{name}_untouched_right": score.untouched_right,
                    f"{name}_asked": score.asked,
                    f"{name}_kept_share": score.kept_share,
                    f"{name}_added_loss_nats": score.added_loss_nats,
                }
        return row

    def _accuracy_row(self) -> dict[str, Any]:
        divergences = [accuracy.divergence for accuracy in self.accuracies]
        kls = [figure.kl_nats for figure in divergences]
        loss, untouched_loss = (
            statistics.fmean(d.loss_nats for d in divergences),
            statistics.fmean(self.reference_losses),
        )
        row: dict[str, Any] = {
            "kl_nats": statistics.fmean(kls),
            "kl_standard_error_nats": statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else None,
            "perplexity": math.exp(loss),
            "untouched_perplexity": math.exp(untouched_loss),
            "added_loss_nats": loss - untouched_loss,
            "top1_agreement": statistics.fmean(d.top1_agreement for d in divergences),
        }
        lengths = [a.greedy_agreement_tokens for a in self.accuracies if a.greedy_agreement_tokens is not None]
        if lengths:
            row["greedy_agreement_tokens"] = statistics.fmean(lengths)
            row["greedy_agreement_share"] = statistics.fmean(lengths) / self.greedy_tokens
            row["greedy_identical_share"] = sum(length == self.greedy_tokens for length in lengths) / len(lengths)
        return row


def measure_ratio(
    model: CausalLM, prompts: Prompts, methods: Sequence[Method], progress: Progress | None = None
) -> list[MethodReport]:
    """Bytes of every method on the prefixes of the documents.

    Raises:
        CodecError: a method's encoder or decoder failed.
    """
    progress = progress or NoProgress()
    progress.begin(len(prompts.documents) * len(methods))
    sizes: dict[str, list[Size]] = {method.name: [] for method in methods}
    for document in prompts.documents:
        kv = _prefill(model, document.tokens[: prompts.prefix_tokens])
        for method in methods:
            result = method.roundtrip(kv, 0)
            sizes[method.name].append(_size(document, kv, result))
            progress.step(f"{method.name}: {document.name}")
    return [MethodReport(name, tuple(found)) for name, found in sizes.items()]


def measure_accuracy(
    model: CausalLM, prompts: Prompts, methods: Sequence[Method], progress: Progress | None = None
) -> list[MethodReport]:
    """Bytes of every method, and what the model says with what it restores.

    Raises:
        CodecError: a method's encoder or decoder failed.
    """
    progress = progress or NoProgress()
    items = len(prompts.documents) + len(prompts.needles) + len(prompts.conversations)
    progress.begin(items * len(methods))
    sizes: dict[str, list[Size]] = {method.name: [] for method in methods}
    accuracies: dict[str, list[Accuracy]] = {method.name: [] for method in methods}
    losses: list[float] = []
    for document in prompts.documents:
        measured = _DocumentMeasurement(model, document, prompts)
        losses.append(measured.untouched_loss_nats)
        for method in methods:
            result = method.roundtrip(measured.kv, 0)
            sizes[method.name].append(_size(document, measured.kv, result))
            accuracies[method.name].append(measured.of(result.kv))
            progress.step(f"{method.name}: {document.name}")
    needles = _needle_answers(model, prompts.needles, methods, progress)
    conversations = _conversation_answers(model, prompts, methods, progress)
    return [
        MethodReport(
            method.name,
            tuple(sizes[method.name]),
            tuple(accuracies[method.name]),
            tuple(losses),
            prompts.greedy_tokens,
            recall(needles[""], needles[method.name]) if prompts.needles else None,
            recall(conversations[""], conversations[method.name]) if prompts.conversations else None,
        )
        for method in methods
    ]


class _DocumentMeasurement:
    """One document: what the model says with untouched KV, and how restored KV compares."""

    def __init__(self, model: CausalLM, document: Document, prompts: Prompts) -> None:
        self._model = model
        cut = prompts.prefix_tokens
        self._prefix, self._continuation = document.tokens[:cut], document.tokens[cut:]
        self._prompt = document.tokens[: cut + 1]
        self.kv = _prefill(model, self._prefix)
        self._untouched = model.continue_from(self.kv, self._prefix, self._continuation)
        self.untouched_loss_nats = divergence(self._untouched, self._untouched, self._continuation).loss_nats
        self._greedy = (
            model.generate_greedy(self.kv, self._prompt, prompts.greedy_tokens) if prompts.greedy_tokens else None
        )
        self._known: dict[bytes, Accuracy] = {}

    def of(self, restored: KV) -> Accuracy:
        return _once(self._known, digest_of(restored), lambda: self._measure(restored))

    def _measure(self, restored: KV) -> Accuracy:
        logits = self._model.continue_from(restored, self._prefix, self._continuation)
        agreement = None
        if self._greedy is not None:
            agreement = greedy_agreement(self._model, restored, self._prompt, self._greedy)
        return Accuracy(divergence(self._untouched, logits, self._continuation), agreement)


def _needle_answers(
    model: CausalLM, needles: Sequence[Needle], methods: Sequence[Method], progress: Progress
) -> dict[str, list[Answer]]:
    """Answers by method; those with untouched KV under the empty name."""
    answers: dict[str, list[Answer]] = {name: [] for name in ("", *(method.name for method in methods))}
    for needle in needles:
        kv = _prefill(model, needle.prefix)
        known: dict[bytes, Answer] = {}
        answers[""].append(_ask_once(model, kv, needle, known))
        for method in methods:
            answers[method.name].append(_ask_once(model, method.roundtrip(kv, 0).kv, needle, known))
            progress.step(f"{method.name}: needle in {needle.name}")
    return answers


def _ask_once(model: CausalLM, kv: KV, needle: Needle, known: dict[bytes, Answer]) -> Answer:
    return _once(known, digest_of(kv), lambda: ask(model, kv, needle.prefix, needle.question))


def _conversation_answers(
    model: CausalLM, prompts: Prompts, methods: Sequence[Method], progress: Progress
) -> dict[str, list[Answer]]:
    """Answers by method; those with untouched KV under the empty name."""
    answers: dict[str, list[Answer]] = {name: [] for name in ("", *(method.name for method in methods))}
    page_tokens = prompts.page_tokens
    for conversation in prompts.conversations:
        known: dict[bytes, list[Answer]] = {}
        answers[""] += _converse(model, conversation, None, page_tokens, known)
        for method in methods:
            answers[method.name] += _converse(model, conversation, method, page_tokens, known)
            progress.step(f"{method.name}: {conversation.name}")
    return answers


def _converse(
    model: CausalLM,
    conversation: Conversation,
    method: Method | None,
    page_tokens: int,
    known: dict[bytes, list[Answer]],
) -> list[Answer]:
    """A conversation whose every turn restores what the earlier ones left, computes the rest and codes its full pages.

    So what a later turn computes stands on restored KV, and is coded in its turn, as on a server.
    """
    tokens = torch.cat(conversation.turns)
    kv: KV = {}
    end = 0
    for turn in conversation.turns:
        end += len(turn)
        have = kv[Side.KEY].shape[1] if kv else 0
        full = end // page_tokens * page_tokens
        if full == have:
            continue
        new = _extend(model, kv, tokens[:full])
        if method is not None:
            new = method.roundtrip(new, have).kv
        kv = {side: torch.cat([kv[side], new[side]], 1) if kv else new[side] for side in new}
    if not kv:
        kv = {side: tensor[:, :0] for side, tensor in _prefill(model, tokens[:1]).items()}
    return _once(
        known, digest_of(kv), lambda: [ask(model, kv, tokens, question) for question in conversation.questions]
    )


def _extend(model: CausalLM, kv: KV, tokens: torch.Tensor) -> KV:
    """KV of the tokens behind those that ``kv`` holds."""
    return {side: tensor.cpu() for side, tensor in model.prefill(tokens, kv or None).items()}


def _prefill(model: CausalLM, tokens: torch.Tensor) -> KV:
    return {side: tensor.cpu() for side, tensor in model.prefill(tokens).items()}


def _size(document: Document, kv: KV, result: MethodResult) -> Size:
    return Size(
        document.name,
        sum(tensor.numel() * tensor.element_size() for tensor in kv.values()),
        result.coded_bytes,
        result.metadata_bytes,
        result.bits,
        result.ideal_bits,
        {side: noise_to_signal(tensor, result.kv[side]) for side, tensor in kv.items()},
    )


def _once(known: dict[bytes, _Measured], key: bytes, measure: Callable[[], _Measured]) -> _Measured:
    if key not in known:
        known[key] = measure()
    return known[key]
