"""From bases to tiers: how finely each tier has to code so that the model's output keeps its promise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sglang_kvcodec.calibration.bases import SolvedBases
from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.format.calibration import Basis, Calibration, GainModel, ShardLayout, Tier
from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.transform.klt import analysis_matrix
from sglang_kvcodec.transform.low_bits import low_bit_counts

ROUNDINGS = (0.5, 0.45, 0.4, 0.35)
"""Tried: towards zero costs a little noise and saves more bits, where most components are small."""
TARGET_MARGIN = 0.9
"""Part of the allowed divergence that is aimed for: other text diverges more or less."""
_CUT_SHARE = 1e-3
"""A component is cut if less than this share of its values, and of all behind it, codes to anything but zero."""
_SEARCH_TOLERANCE = 0.12
_MAX_TRIALS = 6
_LONGEST_STRIDE = 4096.0
FINEST_STEP, COARSEST_STEP = 2.0**-40, 2.0**40


@dataclasses.dataclass(frozen=True)
class Components:
    """What values become in a basis: the material that rates are measured on.

    Attributes:
        values: of each side, of each block, fp32 ``(tokens, components)`` in the common space of all blocks.
    """

    values: Mapping[Side, Sequence[torch.Tensor]]

    @property
    def count(self) -> int:
        """Values in all."""
        return sum(block.numel() for blocks in self.values.values() for block in blocks)


def to_components(
    statistics: KVStatistics, bases: SolvedBases, kv: Mapping[Side, torch.Tensor], first_position: int = 0
) -> Components:
    """The components of the KV of a run of tokens, as ``KVStatistics.add`` takes it."""
    unrotated = {side: statistics.unrotated(side, kv[side], first_position) for side in bases.blocks}
    return unrotated_to_components(statistics, bases, unrotated)


def unrotated_to_components(
    statistics: KVStatistics, bases: SolvedBases, kv: Mapping[Side, torch.Tensor]
) -> Components:
    """The components of the KV of any tokens, whose K is as ``KVStatistics.unrotated`` gives it."""
    result: dict[Side, list[torch.Tensor]] = {}
    for side, blocks in bases.blocks.items():
        values = kv[side].flatten(2)
        result[side] = []
        first = 0
        for block in blocks:
            layers = len(block.mean) // statistics.layout.channels
            tokens = values[first : first + layers].transpose(0, 1).flatten(1).double() - block.mean
            analysis = analysis_matrix(bases.metrics[side][first : first + layers], block.synthesis)
            result[side].append((tokens @ analysis / block.unit).float())
            first += layers
    return Components(result)


def concatenated(parts: Sequence[Components]) -> Components:
    """The components of several runs of tokens, of the same bases, as one."""
    return Components(
        {
            side: [torch.cat([part.values[side][index] for part in parts]) for index in range(len(blocks))]
            for side, blocks in parts[0].values.items()
        }
    )


def bits_and_noise(components: Components, step: float, rounding: float) -> tuple[float, float]:
    """The ideal bits per value and the noise per value in the common space, of uniform steps."""
    bits = noise = 0.0
    for blocks in components.values.values():
        for block in blocks:
            codes = _codes(block, step, rounding)
            bits += ideal_bits(codes)
            noise += float((codes * step - block).square().sum(dtype=torch.float64))
    return bits / components.count, noise / components.count


def ideal_bits(codes: torch.Tensor) -> float:
    """Bits of whole numbers ``(tokens, components)`` coded with the entropy of each component alone."""
    total = 0.0
    tokens = len(codes)
    for column in codes.to(torch.int64).T.contiguous().numpy():
        counts = np.unique(column, return_counts=True)[1]
        total -= float((counts * np.log2(counts / tokens)).sum())
    return total


def best_rounding(components: Components, step: float) -> float:
    """Which of :data:`ROUNDINGS` takes the fewest bits for the same noise, around a step."""
    _, allowed = bits_and_noise(components, step, 0.5)
    bits = {}
    for rounding in ROUNDINGS:
        finer, finer_noise = bits_and_noise(components, step * 0.8, rounding)
        coarser, coarser_noise = bits_and_noise(components, step, rounding)
        slope = (coarser - finer) / (math.log(coarser_noise) - math.log(finer_noise))
        bits[rounding] = coarser + slope * (math.log(allowed) - math.log(coarser_noise))
    return min(bits, key=bits.__getitem__)


def coded_components(block: torch.Tensor, step: float, rounding: float, at_least: int = 1) -> torch.Tensor:
    """How many components of a block, the first ones, are worth coding at a step, and the low bits of each: int32."""
    codes = _codes(block, step, rounding)
    worth_it = ((codes != 0).float().mean(0) >= _CUT_SHARE).nonzero()
    count = max(int(worth_it.max()) + 1 if worth_it.numel() else 0, at_least)
    return low_bit_counts(codes[:, :count].square().mean(0).sqrt())


def _codes(block: torch.Tensor, step: float, rounding: float) -> torch.Tensor:
    return torch.sign(block) * torch.floor(block.abs() / step + rounding)


def search_step(divergence: Callable[[float], float], allowed: float, first: float) -> tuple[float, float]:
    """The coarsest step whose divergence is what is allowed, within a few per cent below.

    The divergence grows about with the square of the step, so a secant in logarithms finds it in two or three trials.

    Args:
        divergence: of a step; costs a run of the model.
        allowed: the largest divergence.
        first: the step to try first.

    Returns:
        The step and its divergence; the finest step tried if none was good.
    """
    tried: dict[float, float] = {}
    step = first
    for _ in range(_MAX_TRIALS):
        step = min(max(step, FINEST_STEP), COARSEST_STEP)
        tried[step] = max(divergence(step), 1e-15)
        if allowed * (1 - _SEARCH_TOLERANCE) <= tried[step] <= allowed:
            return step, tried[step]
        step = _next_step(tried, allowed * (1 - _SEARCH_TOLERANCE / 2))
    good = [each for each, value in tried.items() if value <= allowed]
    best = max(good) if good else min(tried)
    return best, tried[best]


def _next_step(tried: Mapping[float, float], aim: float) -> float:
    below = [step for step, value in tried.items() if value <= aim]
    above = [step for step, value in tried.items() if value > aim]
    if below and above:
        low, high = max(below), min(above)
        slope = math.log(tried[high] / tried[low]) / math.log(high / low) if high > low else 0.0
        if 0.2 < slope < 10:
            step = low * math.exp(math.log(aim / tried[low]) / slope)
            if low * 1.001 < step < high * 0.999:
                return step
        return math.sqrt(low * high)
    # The outermost, not the one nearest to the aim: with few documents the curve is bumpy.
    outermost = max(tried) if below else min(tried)
    return outermost * min(_LONGEST_STRIDE, max(1 / _LONGEST_STRIDE, math.sqrt(aim / tried[outermost])))


def make_tier(
    bases: SolvedBases,
    components: Components,
    step: float,
    rounding: float,
    gains: tuple[tuple[int, float], ...] = (),
    expected: Mapping[str, float] | None = None,
    gain_models: Mapping[Side, Sequence[GainModel]] | None = None,
) -> Tier:
    """A tier that codes with one step in the common space.

    Args:
        bases: of the components.
        components: of tokens that are not among the first, over their gains.
        step: in the common space.
        rounding: of the tier.
        gains: of the first tokens.
        expected: of the tier.
        gain_models: look at components, which are not cut then.
    """
    looked_at = {
        side: [len(model.scales) for model in gain_models[side]] if gain_models else [0] * len(blocks)
        for side, blocks in bases.blocks.items()
    }
    return Tier(
        steps={side: tuple(step * block.unit for block in blocks) for side, blocks in bases.blocks.items()},
        low_bits={
            side: tuple(
                coded_components(block, step, rounding, max(1, least)).numpy().astype(np.uint8)
                for block, least in zip(blocks, looked_at[side], strict=True)
            )
            for side, blocks in components.values.items()
        },
        rounding=rounding,
        gains=gains,
        expected=dict(expected or {}),
    )


def build_calibration(
    model_digest: bytes,
    layout: ShardLayout,
    rope: RopeSpec | None,
    layers_per_block: int,
    bases: SolvedBases,
    tiers: Mapping[str, Tier],
    notes: Mapping[str, object],
    gain_models: Mapping[Side, tuple[GainModel, ...]] | None = None,
) -> Calibration:
    """The artifact, with the components that some tier codes; without models of gains, tokens have none."""
    return Calibration(
        model_digest=model_digest,
        layout=layout,
        rope=rope,
        layers_per_block=layers_per_block,
        bases={
            side: tuple(
                Basis(
                    block.mean.numpy().astype(np.float32),
                    block.synthesis[: max(tier.components(side)[index] for tier in tiers.values())]
                    .numpy()
                    .astype(np.float16),
                )
                for index, block in enumerate(blocks)
            )
            for side, blocks in bases.blocks.items()
        },
        metrics={side: metric.numpy().astype(np.float32) for side, metric in bases.metrics.items()},
        gain_models=gain_models or {side: (GainModel(),) * len(blocks) for side, blocks in bases.blocks.items()},
        tiers=tiers,
        notes=notes,
    )
