"""Which tokens matter more than others, learned from gradients: the models of gains of a calibration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sglang_kvcodec.calibration.bases import SolvedBases
from sglang_kvcodec.calibration.statistics import START_TOKENS, KVStatistics
from sglang_kvcodec.calibration.tiers import Components, bits_and_noise
from sglang_kvcodec.errors import CalibrationError
from sglang_kvcodec.format.calibration import GAIN_LOG_OFFSET, GainModel
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.transform.token_gains import gains_of_levels, predicted_levels

GainModels = Mapping[Side, tuple[GainModel, ...]]

STRENGTHS = (0.0, 0.5, 0.75, 1.0)
"""Tried: how far to follow the prediction, which is one of averages over few tokens."""
_LOOKED_AT = 32
"""Components that a model looks at, the widest ones."""
_PENALTY = 1e-2
"""On squared coefficients of normalised features."""
_LAST_TOKENS = 128
"""Left out of the samples: they matter to what follows at once, wherever a text is cut."""
_FEWEST_TOKENS = 2 * _LOOKED_AT
"""With fewer than there are features a fit says nothing."""
_LEAST_SHARE = 1e-6
"""Of the mean sensitivity of the block that matters most. Layers with a short window see nothing of sampled tokens."""
_ITERATIONS = 80


@dataclasses.dataclass(frozen=True)
class TokenSample:
    """Some tokens of one document.

    Attributes:
        components: in the common space.
        sensitivity: of each side and block, fp32 ``(tokens,)``: what an error of one unit in a component of the token
            costs, up to one factor for all tokens, blocks and sides.
    """

    components: Components
    sensitivity: Mapping[Side, Sequence[torch.Tensor]]

    @property
    def tokens(self) -> int:
        """How many."""
        return len(next(iter(self.components.values.values()))[0])


def usual_tokens(components: Components) -> Components:
    """The components of a document without its first tokens, which have a gain of their own."""
    return Components({side: [b[START_TOKENS:] for b in blocks] for side, blocks in components.values.items()})


def token_sample(
    statistics: KVStatistics,
    bases: SolvedBases,
    components: Components,
    gradients: Sequence[Mapping[Side, torch.Tensor]],
) -> TokenSample:
    """What a document tells about its tokens.

    Args:
        statistics: whose rotation is undone.
        bases: of the components.
        components: of the whole document, from position 0 on.
        gradients: score vectors as ``KVStatistics.add_gradients`` takes them.
    """
    tokens = len(components.values[statistics.layout.sides[0]][0])
    part = slice(START_TOKENS, max(tokens - _LAST_TOKENS, START_TOKENS + 1))
    sensitivity: dict[Side, list[torch.Tensor]] = {}
    for side, blocks in bases.blocks.items():
        totals = [torch.zeros(tokens) for _ in blocks]
        for each in gradients:
            turned = statistics.unrotated_gradients(side, each[side]).flatten(2)
            first = 0
            for block, total in zip(blocks, totals, strict=True):
                layers = len(block.mean) // statistics.layout.channels
                of_tokens = turned[first : first + layers].transpose(0, 1).flatten(1)
                by_component = of_tokens @ block.synthesis.T.float() * block.unit
                total += by_component.square().mean(1) / len(gradients)
                first += layers
        sensitivity[side] = [total[part] for total in totals]
    usual = {side: [block[part] for block in blocks] for side, blocks in components.values.items()}
    return TokenSample(Components(usual), sensitivity)


def fit_gain_models(bases: SolvedBases, samples: Sequence[TokenSample], step: float) -> GainModels:
    """The models that save the most bits on documents they were not fitted to, or models of no gain at all.

    Args:
        bases: of the components.
        samples: of two documents at least, with some tokens each; with fewer there is nothing to learn or judge by.
        step: in the common space, around which bits are counted.
    """
    judged, learned = samples[::3], [sample for index, sample in enumerate(samples) if index % 3]
    if sum(sample.tokens for sample in learned) < _FEWEST_TOKENS:
        return {side: tuple(GainModel() for _ in blocks) for side, blocks in bases.blocks.items()}
    fitted = _fit(bases, learned)
    costs = {strength: _bits_at_equal_cost(bases, _weakened(fitted, strength), judged, step) for strength in STRENGTHS}
    return _weakened(_fit(bases, samples), min(costs, key=costs.__getitem__))


def gains_of(bases: SolvedBases, models: GainModels, components: Components) -> Mapping[Side, Sequence[torch.Tensor]]:
    """The gains that models predict: of each side and block, fp32 ``(tokens,)``."""
    return {
        side: [
            gains_of_levels(predicted_levels(values * block.unit, model))
            for values, block, model in zip(components.values[side], blocks, models[side], strict=True)
        ]
        for side, blocks in bases.blocks.items()
    }


def over_gains(components: Components, gains: Mapping[Side, Sequence[torch.Tensor]]) -> Components:
    """Components in the space in which all tokens count alike: each token's over its gain."""
    return Components(
        {
            side: [block / gain[:, None] for block, gain in zip(blocks, gains[side], strict=True)]
            for side, blocks in components.values.items()
        }
    )


def _bits_at_equal_cost(bases: SolvedBases, models: GainModels, samples: Sequence[TokenSample], step: float) -> float:
    """Bits per value for the cost that ``step`` has without any gain; what the gains themselves take is counted."""
    without = [
        {side: [torch.ones(len(block)) for block in blocks] for side, blocks in sample.components.values.items()}
        for sample in samples
    ]
    allowed = _bits_and_cost(samples, without, step)[1]
    gains = [gains_of(bases, models, sample.components) for sample in samples]
    finer, coarser = (_bits_and_cost(samples, gains, factor * step) for factor in (0.8, 1.0))
    slope = (coarser[0] - finer[0]) / (math.log(coarser[1]) - math.log(finer[1]))
    has_gains = any(bool((gain != 1).any()) for each in gains for blocks in each.values() for gain in blocks)
    widths = [block.shape[1] for blocks in samples[0].components.values.values() for block in blocks]
    spent = 4 * len(widths) / sum(widths) if has_gains else 0.0
    return coarser[0] + slope * (math.log(allowed) - math.log(coarser[1])) + spent


def _bits_and_cost(
    samples: Sequence[TokenSample], gains: Sequence[Mapping[Side, Sequence[torch.Tensor]]], step: float
) -> tuple[float, float]:
    bits, cost = 0.0, 0.0
    for sample, gain in zip(samples, gains, strict=True):
        scaled = over_gains(sample.components, gain)
        bits += bits_and_noise(scaled, step, 0.5)[0]
        for side, blocks in scaled.values.items():
            for index, block in enumerate(blocks):
                noise = (block - torch.round(block / step) * step).square().sum(1) * gain[side][index].square()
                cost += float((noise * sample.sensitivity[side][index]).sum(dtype=torch.float64))
    return bits / len(samples), cost


def _fit(bases: SolvedBases, samples: Sequence[TokenSample]) -> GainModels:
    """Fitted models, shifted by one number so that the mean gain of all samples, in the logarithm, is one.

    What is common to all gains belongs to the steps, which are searched; so it is the usual token whose gain is one. A
    block of which the samples tell nothing has no gains.
    """
    sensitivities = {
        side: [torch.cat([sample.sensitivity[side][index] for sample in samples]) for index in range(len(blocks))]
        for side, blocks in bases.blocks.items()
    }
    least = _LEAST_SHARE * max(float(block.mean()) for blocks in sensitivities.values() for block in blocks)
    models: dict[Side, list[GainModel | None]] = {}
    log2_gains = []
    for side, blocks in bases.blocks.items():
        models[side] = []
        for index, (block, sensitivity) in enumerate(zip(blocks, sensitivities[side], strict=True)):
            if float(sensitivity.mean()) <= least:
                models[side].append(None)
                continue
            components = torch.cat([sample.components.values[side][index] for sample in samples])
            model, mean_log2_gain = _fit_block(components * block.unit, sensitivity)
            models[side].append(model)
            log2_gains.append(mean_log2_gain)
    shift = sum(log2_gains) / max(len(log2_gains), 1)
    return {
        side: tuple(
            GainModel() if model is None else dataclasses.replace(model, bias=float(np.float32(model.bias - shift)))
            for model in of_side
        )
        for side, of_side in models.items()
    }


def _fit_block(components: torch.Tensor, sensitivity: torch.Tensor) -> tuple[GainModel, float]:
    """A model, and the mean binary logarithm of its gains.

    A gamma regression with a logarithmic link: what the mean of ``sensitivity`` is, seen from the components. It
    minimises the mean of ``s / w + log w``, so that coding with gains ``w ** -0.5`` costs least at a given rate.
    """
    count = min(_LOOKED_AT, components.shape[1])
    scales = components[:, :count].square().mean(0).sqrt().clamp(min=1e-20)
    scaled = components[:, :count] / scales
    features = torch.cat([scaled, (scaled.abs() + GAIN_LOG_OFFSET).log()], 1)
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    normal = (features - mean) / deviation
    weights = torch.zeros(2 * count, requires_grad=True)
    bias = sensitivity.mean().clamp(min=1e-20).log().clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        predicted = normal @ weights + bias
        value = (sensitivity * (-predicted).exp() + predicted).mean() + _PENALTY * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    # The gain is the sensitivity to the power -1/2; natural to binary logarithm.
    plain = (weights / deviation).detach() / (-2 * math.log(2))
    offset = float((bias - (weights * mean / deviation).sum()).detach()) / (-2 * math.log(2))
    linear, logarithmic = plain.numpy().astype(np.float32).reshape(2, count)
    mean_log2_gain = float((normal @ weights + bias).detach().mean()) / (-2 * math.log(2))
    if not math.isfinite(mean_log2_gain + offset) or not np.isfinite(plain.numpy()).all():
        raise CalibrationError("gradients from which no gains can be learned")
    return GainModel(offset, scales.numpy().astype(np.float32), linear, logarithmic), mean_log2_gain


def _weakened(models: GainModels, strength: float) -> GainModels:
    """Models whose gains are those of ``models`` to the power of ``strength``."""
    if not strength:
        return {side: tuple(GainModel() for _ in of_side) for side, of_side in models.items()}
    return {
        side: tuple(
            dataclasses.replace(
                model,
                bias=float(np.float32(strength * model.bias)),
                linear=np.float32(strength) * model.linear,
                logarithmic=np.float32(strength) * model.logarithmic,
            )
            for model in of_side
        )
        for side, of_side in models.items()
    }
