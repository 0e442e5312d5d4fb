"""Calibrates a model by running it: gathers statistics, solves bases, and searches the steps that keep each promise."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sglang_kvcodec import __version__
from sglang_kvcodec.calibration.bases import SolvedBases, solve_bases
from sglang_kvcodec.calibration.statistics import START_TOKENS, KVStatistics
from sglang_kvcodec.calibration.tiers import (
    TARGET_MARGIN,
    Components,
    best_rounding,
    bits_and_noise,
    build_calibration,
    concatenated,
    make_tier,
    search_step,
    to_components,
)
from sglang_kvcodec.calibration.token_gains import (
    GainModels,
    fit_gain_models,
    gains_of,
    over_gains,
    token_sample,
    usual_tokens,
)
from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.evaluation.harness import NoProgress, Progress
from sglang_kvcodec.evaluation.measures import divergence
from sglang_kvcodec.evaluation.methods import KV, MethodContext
from sglang_kvcodec.evaluation.registry import make_methods
from sglang_kvcodec.evaluation.text import Document
from sglang_kvcodec.format.calibration import Calibration, ShardLayout, Tier, model_digest
from sglang_kvcodec.format.profile import CALIBRATED_TIERS
from sglang_kvcodec.format.rope import RopeSpec, rope_spec_from_config
from sglang_kvcodec.format.spec import KVSpec, Side, layer_groups
from sglang_kvcodec.models import CausalLM
from sglang_kvcodec.transform.klt import KltTransform

PROMISES = {"high": ("fp8", 1.0), "balanced": ("kivi@4", 1.0), "compact": ("kivi@4", 4.0)}
"""Tier -> the method whose divergence it must not exceed, and how many times over."""
_PAGE_TOKENS = 64
"""Of the pages in the search. The artifact serves every page size."""
_TYPICAL_BITS = 2.0
"""Per value, where models of gains are judged."""


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """How much is run.

    Attributes:
        prefix_tokens: tokens of each document whose KV is looked at, whole pages of 64.
        continuation_tokens: tokens behind them, whose distribution is compared.
        search_documents: how many documents, the first ones, are kept for the search of the steps.
        gradient_documents: for how many of the others gradients are taken, the first ones.
        gradient_samples: draws of labels for each of them.
        layers_per_block: layers that share a basis: 3 codes smallest, 1 restores fastest.
        tp_size: how many ranks share the KV heads; each gets an artifact of its own.
        tiers: to search the steps of.
    """

    prefix_tokens: int = 1024
    continuation_tokens: int = 512
    search_documents: int = 8
    gradient_documents: int = 16
    gradient_samples: int = 2
    layers_per_block: int = 3
    tp_size: int = 1
    tiers: tuple[str, ...] = CALIBRATED_TIERS

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "tiers" and getattr(self, field.name) < 1:
                raise ConfigurationError(f"{field.name} must be at least 1")
        if not self.tiers or not set(self.tiers) <= set(CALIBRATED_TIERS):
            raise ConfigurationError(f"there are the tiers {', '.join(CALIBRATED_TIERS)}, not {', '.join(self.tiers)}")
        if self.prefix_tokens % _PAGE_TOKENS:
            raise ConfigurationError(f"{self.prefix_tokens} tokens are no whole number of pages of {_PAGE_TOKENS}")

    @property
    def document_tokens(self) -> int:
        """Tokens that each document must have."""
        return self.prefix_tokens + self.continuation_tokens


@dataclasses.dataclass(frozen=True)
class _Differentiated:
    """A document that gradients were taken of, in the model's 16-bit type."""

    kv: KV
    gradients: Sequence[KV]


@dataclasses.dataclass(frozen=True)
class _Rank:
    """What is solved of one rank.

    Attributes:
        statistics: of the rank.
        bases: from them.
        gain_models: for these.
        components: of the searched documents, without their first tokens, over the gains.
    """

    statistics: KVStatistics
    bases: SolvedBases
    gain_models: GainModels
    components: Components


@dataclasses.dataclass(frozen=True)
class _Searched:
    """A document that steps are searched on."""

    kv: KV
    prefix: torch.Tensor
    continuation: torch.Tensor
    untouched: torch.Tensor


def rope_of(model: CausalLM) -> tuple[RopeSpec | None, str]:
    """The rotation of a model's K, or None and why K is kept as it is."""
    try:
        return rope_spec_from_config(model.config), ""
    except UnsupportedError as error:
        return None, str(error)


def calibrate(
    model: CausalLM,
    files_digest: str,
    documents: Sequence[Document],
    plan: CalibrationPlan,
    notes: Mapping[str, object],
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> list[Calibration]:
    """The artifacts of a model, one for each rank.

    Args:
        model: to run.
        files_digest: of its files, see ``format/model_files.py``.
        documents: of ``plan.document_tokens`` tokens each.
        plan: how much to run.
        notes: for people, into the artifact.
        progress: is told how far it is.
        generator: draws labels; on the model's device.

    Raises:
        ConfigurationError: too few documents, or ranks that the KV heads do not divide among.
        CalibrationError: too few tokens, or KV that no basis can be made of.
    """
    progress = progress or NoProgress()
    spec = model.kv_spec(_PAGE_TOKENS)
    if spec.kv_heads % plan.tp_size:
        raise ConfigurationError(f"{spec.kv_heads} KV heads can't be shared by {plan.tp_size} ranks")
    if len(documents) <= plan.search_documents:
        raise ConfigurationError(f"{len(documents)} documents are too few: {plan.search_documents} are for the search")
    # The first documents are of all kinds of text, see ``cut_documents``.
    kept, gathered = documents[: plan.search_documents], documents[plan.search_documents :]
    rope, rope_note = rope_of(model)
    layouts = [
        ShardLayout(spec.layers, spec.kv_heads // plan.tp_size, spec.head_dim, tp_rank=rank, tp_size=plan.tp_size)
        for rank in range(plan.tp_size)
    ]
    rivals = tuple(dict.fromkeys(PROMISES[name][0] for name in plan.tiers))
    progress.begin(len(documents) + plan.tp_size + len(rivals) + len(plan.tiers))
    shards = [KVStatistics(layout, rope, plan.layers_per_block) for layout in layouts]
    generator = generator or torch.Generator(model.device).manual_seed(0)
    differentiated = []
    for index, document in enumerate(gathered):
        samples = plan.gradient_samples if index < plan.gradient_documents else 0
        kv, gradients = _gather(model, document, shards, plan, samples, generator)
        if samples:
            differentiated.append(_Differentiated({side: values.cpu() for side, values in kv.items()}, gradients))
        progress.step(f"statistics: {document.name}")
    searched = []
    for document in kept:
        searched.append(_searched(model, document, plan))
        progress.step(f"reference: {document.name}")
    ranks = []
    for shard in shards:
        ranks.append(_solve_rank(shard, plan, differentiated, searched))
        progress.step("bases")
    search = _Search(model, spec, plan, ranks, searched, files_digest)
    allowed = {}
    for rival in rivals:
        allowed[rival] = search.divergence_of(rival)
        progress.step(f"{rival} diverges by {allowed[rival]:.2e} nats")
    tiers: dict[str, list[Tier]] = {}
    for name in plan.tiers:
        rival, factor = PROMISES[name]
        tiers[name] = search.tier(name, allowed[rival] * factor)
        progress.step(f"tier {name}")
    all_notes = {
        **notes,
        "software_version": __version__,
        "rope_kept": rope_note,
        "statistics_tokens": shards[0].tokens,
        "gradient_tokens": shards[0].gradient_tokens,
        "divergence_nats_of": allowed,
    }
    return [
        build_calibration(
            model_digest(files_digest, layouts[rank]),
            layouts[rank],
            rope,
            plan.layers_per_block,
            ranks[rank].bases,
            {name: of_ranks[rank] for name, of_ranks in tiers.items()},
            all_notes,
            ranks[rank].gain_models,
        )
        for rank in range(plan.tp_size)
    ]


def _gather(
    model: CausalLM,
    document: Document,
    shards: Sequence[KVStatistics],
    plan: CalibrationPlan,
    gradient_samples: int,
    generator: torch.Generator,
) -> tuple[KV, list[KV]]:
    """Adds a document to the statistics; its KV, and its gradients on the CPU."""
    prefix, continuation = _split(document, plan)
    kv = model.prefill(prefix)
    for shard in shards:
        shard.add(shard.own(kv))
    kept: list[KV] = []
    if gradient_samples:
        for gradients in model.kv_gradients(kv, continuation, gradient_samples, generator):
            for shard in shards:
                shard.add_gradients(shard.own(gradients))
            # Which tokens matter is seen in the space of the bases, which come later. bfloat16 has the range for it.
            kept.append({side: values.to("cpu", torch.bfloat16) for side, values in gradients.items()})
    return kv, kept


def _solve_rank(
    shard: KVStatistics,
    plan: CalibrationPlan,
    differentiated: Sequence[_Differentiated],
    searched: Sequence[_Searched],
) -> _Rank:
    bases = solve_bases(shard)
    samples = [
        token_sample(
            shard,
            bases,
            to_components(shard, bases, shard.own(item.kv)),
            [shard.own(gradients) for gradients in item.gradients],
        )
        for item in differentiated
    ]
    components = [usual_tokens(to_components(shard, bases, shard.own(item.kv))) for item in searched]
    models = fit_gain_models(bases, samples, _typical_step(concatenated(components)))
    even = [over_gains(each, gains_of(bases, models, each)) for each in components]
    return _Rank(shard, bases, models, concatenated(even))


def _typical_step(components: Components) -> float:
    """A step at which components take about two bits per value."""
    step = float(np.mean([float(b.std()) for blocks in components.values.values() for b in blocks]))
    for _ in range(20):
        if bits_and_noise(components, step, 0.5)[0] > _TYPICAL_BITS:
            break
        step *= 0.7
    return step


def _searched(model: CausalLM, document: Document, plan: CalibrationPlan) -> _Searched:
    prefix, continuation = _split(document, plan)
    kv = model.prefill(prefix)
    return _Searched(kv, prefix, continuation, model.continue_from(kv, prefix, continuation))


def _split(document: Document, plan: CalibrationPlan) -> tuple[torch.Tensor, torch.Tensor]:
    if len(document.tokens) < plan.document_tokens:
        raise ConfigurationError(f"document {document.name} has {len(document.tokens)} tokens, not enough")
    return document.tokens[: plan.prefix_tokens], document.tokens[plan.prefix_tokens : plan.document_tokens]


class _Search:
    """Searches the steps of all ranks at once: it is their noise together that the promise is about."""

    def __init__(
        self,
        model: CausalLM,
        spec: KVSpec,
        plan: CalibrationPlan,
        ranks: Sequence[_Rank],
        searched: Sequence[_Searched],
        files_digest: str,
    ) -> None:
        self._model = model
        self._spec = spec
        self._rank_spec = dataclasses.replace(spec, kv_heads=spec.kv_heads // plan.tp_size)
        self._plan = plan
        self._ranks = ranks
        self._searched = searched
        self._files_digest = files_digest
        gain = min(rank.statistics.start_gain() for rank in ranks)
        self._gains: tuple[tuple[int, float], ...] = ((START_TOKENS, gain),) if gain < 1 else ()

    def divergence_of(self, method_name: str) -> float:
        """Mean divergence of a method on the searched documents, nats."""
        method = make_methods([method_name], MethodContext(self._spec, self._model.config))[0]
        return self._divergence(lambda kv: method.roundtrip(kv, 0).kv)

    def tier(self, name: str, allowed: float) -> list[Tier]:
        """A tier of each rank whose divergence is below what is allowed, by a margin."""
        aim = allowed * TARGET_MARGIN
        first = self._predicted_step(aim)
        rounding = best_rounding(self._ranks[0].components, first)

        def tiers(step: float) -> list[Tier]:
            return [
                make_tier(rank.bases, rank.components, step, rounding, self._gains, gain_models=rank.gain_models)
                for rank in self._ranks
            ]

        step, found = search_step(lambda trial: self._divergence_of_tiers(name, tiers(trial)), aim, first)
        bits = statistics.fmean(bits_and_noise(rank.components, step, rounding)[0] for rank in self._ranks)
        expected = {"bits_per_value": bits, "divergence_nats": found, "allowed_divergence_nats": allowed}
        return [dataclasses.replace(tier, expected=expected) for tier in tiers(step)]

    def _predicted_step(self, aim: float) -> float:
        """The step whose noise, ``step**2 / 12`` per component, gives a divergence of ``aim`` to second order."""
        widths = sum(len(b.mean) for r in self._ranks for blocks in r.bases.blocks.values() for b in blocks)
        return math.sqrt(24 * aim * self._plan.continuation_tokens / (self._plan.prefix_tokens * widths))

    def _divergence_of_tiers(self, name: str, tiers: Sequence[Tier]) -> float:
        transforms = []
        for rank, tier in zip(self._ranks, tiers, strict=True):
            shard = rank.statistics
            calibration = build_calibration(
                model_digest(self._files_digest, shard.layout),
                shard.layout,
                shard.rope,
                shard.layers_per_block,
                rank.bases,
                {name: tier},
                {},
                rank.gain_models,
            )
            transforms.append(KltTransform(self._rank_spec, calibration, name))

        def restored(kv: KV) -> KV:
            parts = [
                _through(transform, self._rank_spec, rank.statistics.own(kv))
                for rank, transform in zip(self._ranks, transforms, strict=True)
            ]
            return {side: torch.cat([part[side] for part in parts], dim=2) for side in kv}

        return self._divergence(restored)

    def _divergence(self, restored: Callable[[KV], KV]) -> float:
        found = []
        for item in self._searched:
            logits = self._model.continue_from(restored(item.kv), item.prefix, item.continuation)
            found.append(divergence(item.untouched, logits, item.continuation).kl_nats)
        return statistics.fmean(found)


def _through(transform: KltTransform, spec: KVSpec, kv: Mapping[Side, torch.Tensor]) -> KV:
    """KV as it comes back from a tier, without coding the pictures: they are lossless."""
    result: KV = {}
    for side, values in kv.items():
        pages = torch.stack(torch.split(values.cpu(), spec.page_tokens, dim=1))
        positions = [index * spec.page_tokens for index in range(len(pages))]
        groups = []
        for group in layer_groups(spec):
            part = pages[:, group.first_layer : group.first_layer + group.layers]
            packed = transform.pack(group, side, part, positions)
            # A page that can't be coded is stored exact.
            groups.append(part if packed is None else transform.restore(group, side, packed, positions))
        result[side] = torch.cat(groups, dim=1).transpose(0, 1).flatten(1, 2)
    return result
