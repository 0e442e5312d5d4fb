"""A calibration from KV alone, without running the model: tiers by the noise that they add.

Without gradients nobody knows what an error does to the model's output. So errors count relative to the power of their
layer and side, and a tier is a ratio of noise to signal. It codes less well than what ``kvcodec calibrate`` finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sglang_kvcodec import __version__
from sglang_kvcodec.calibration.bases import MIN_TOKENS_PER_VALUE, solve_bases
from sglang_kvcodec.calibration.statistics import FINEST_START_GAIN_LOG2, START_TOKENS, KVStatistics
from sglang_kvcodec.calibration.tiers import bits_and_noise, build_calibration, make_tier, unrotated_to_components
from sglang_kvcodec.format.calibration import Calibration, ShardLayout
from sglang_kvcodec.format.spec import Side

NOISE_TO_SIGNAL = {"high": 1e-3, "balanced": 4e-3, "compact": 1.6e-2}
"""Tier -> noise power over the variance of its layer and side; that of ``high`` is an FP8 cache's."""
_ROUNDING = 0.5
"""To nearest: nothing says that more noise would pay."""

_START_GAINS = ((START_TOKENS, 2.0**FINEST_START_GAIN_LOG2),)
"""Whether this model parks attention on its first tokens can't be seen from KV. It costs little to suppose so."""

Run = tuple[Mapping[Side, torch.Tensor], int]
"""KV of some tokens that follow each other, as ``KVStatistics.add`` takes it, and the position of the first."""


def tokens_needed(layout: ShardLayout, layers_per_block: int) -> int:
    """Tokens that bases over ``layers_per_block`` layers need at least."""
    return MIN_TOKENS_PER_VALUE * min(layers_per_block, layout.layers) * layout.channels


def calibrate_by_noise(
    statistics: KVStatistics,
    sample: Sequence[Run],
    model_digest: bytes,
    notes: Mapping[str, object],
    noise_to_signal: Mapping[str, float] = NOISE_TO_SIGNAL,
) -> Calibration:
    """The artifact of one rank.

    Args:
        statistics: of its KV, without gradients.
        sample: some of it, to see which components are worth coding.
        model_digest: names the model and shard.
        notes: for people, into the artifact.
        noise_to_signal: of each tier.

    Raises:
        CalibrationError: too few tokens, or KV that no basis can be made of.
    """
    bases = solve_bases(statistics)
    # All at once: a basis is inverted for each call.
    kept = {
        side: torch.cat([statistics.unrotated(side, kv[side], first) for kv, first in sample], dim=1)
        for side in statistics.layout.sides
    }
    components = unrotated_to_components(statistics, bases, kept)
    tiers = {}
    for name, ratio in noise_to_signal.items():
        # Uniform noise within a step has a power of step**2 / 12; components smaller than a step have less.
        step = math.sqrt(12 * ratio)
        bits, noise = bits_and_noise(components, step, _ROUNDING)
        expected = {"bits_per_value": bits, "noise_to_signal": noise}
        tiers[name] = make_tier(bases, components, step, _ROUNDING, _START_GAINS, expected)
    return build_calibration(
        model_digest,
        statistics.layout,
        statistics.rope,
        statistics.layers_per_block,
        bases,
        tiers,
        {**notes, "software_version": __version__, "statistics_tokens": statistics.tokens},
    )
