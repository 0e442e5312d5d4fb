"""Calibrations made up on the spot: random but valid bases, metrics and steps for any layout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.format.calibration import Basis, Calibration, GainModel, ShardLayout, Tier
from sglang_kvcodec.format.profile import CALIBRATED_TIERS
from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.format.spec import KVSpec

MODEL_DIGEST = bytes(range(32))


def neox_rope(head_dim: int, rotary_dim: int | None = None, scale: float = 1.0) -> RopeSpec:
    """The usual rotation, theta 10 000."""
    rotary_dim = rotary_dim or head_dim
    frequencies = tuple(float(10_000.0 ** (-2 * i / rotary_dim)) for i in range(rotary_dim // 2))
    return RopeSpec(head_dim, rotary_dim, frequencies, is_interleaved=False, scale=scale)


def random_calibration(
    spec: KVSpec,
    seed: int = 0,
    *,
    layers_per_block: int = 3,
    kept: float = 1.0,
    step: float = 0.02,
    rope: RopeSpec | None = None,
    gain_components: int = 0,
    model_digest: bytes = MODEL_DIGEST,
) -> Calibration:
    """A calibration for pages of ``spec`` whose transform loses nothing but what steps and cut components lose.

    Args:
        spec: of the pages; all their layers are the shard.
        seed: the same seed makes the same calibration.
        layers_per_block: layers of a basis.
        kept: part of the components that the tiers code.
        step: of the finest tier, in a component's units; each tier doubles it.
        rope: the rotation to undo.
        gain_components: how many components tell the gains of tokens that are not among the first.
        model_digest: of the model that it is for.
    """
    generator = np.random.default_rng(seed)
    layout = ShardLayout(spec.layers, spec.kv_heads, spec.head_dim, sides=spec.sides)
    widths = [
        min(layers_per_block, spec.layers - first) * spec.channels for first in range(0, spec.layers, layers_per_block)
    ]
    metrics, bases = {}, {}
    for side in spec.sides:
        metric = _random_metric(generator, layout)
        metrics[side] = metric.astype(np.float32)
        bases[side] = tuple(
            _random_basis(generator, metric[index * layers_per_block : (index + 1) * layers_per_block], width)
            for index, width in enumerate(widths)
        )
    counts = [max(1, int(kept * width)) for width in widths]
    tiers = {
        name: Tier(
            steps={side: tuple(step * 2.0**rank for _ in widths) for side in spec.sides},
            low_bits={
                side: tuple(generator.integers(0, 4, count).astype(np.uint8) for count in counts) for side in spec.sides
            },
            rounding=0.5,
            gains=((3, 0.25), (5, 0.5)),
            expected={},
        )
        for rank, name in enumerate(CALIBRATED_TIERS)
    }
    gain_models = {
        side: tuple(_random_gain_model(generator, min(gain_components, count)) for count in counts)
        for side in spec.sides
    }
    return Calibration(model_digest, layout, rope, layers_per_block, bases, metrics, gain_models, tiers, {"seed": seed})


def _random_metric(generator: np.random.Generator, layout: ShardLayout) -> npt.NDArray[np.float64]:
    dim = layout.head_dim
    roots = generator.normal(size=(layout.layers, layout.kv_heads, dim, dim)) / np.sqrt(dim)
    metric: npt.NDArray[np.float64] = roots @ np.swapaxes(roots, -1, -2) + 0.3 * np.eye(dim)
    return metric


def _random_gain_model(generator: np.random.Generator, count: int) -> GainModel:
    if not count:
        return GainModel()
    linear, logarithmic = (generator.normal(size=count).astype(np.float32) / np.float32(count**0.5) for _ in range(2))
    return GainModel(-0.5, generator.uniform(0.5, 2, count).astype(np.float32), linear, logarithmic)


def _random_basis(generator: np.random.Generator, metric: npt.NDArray[np.float64], width: int) -> Basis:
    orthonormal = np.linalg.qr(generator.normal(size=(width, width)))[0]
    values, vectors = np.linalg.eigh(metric)
    roots = (vectors / np.sqrt(values)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    heads = roots.reshape(-1, *roots.shape[-2:])
    dim = heads.shape[-1]
    synthesis = np.concatenate([orthonormal[:, i * dim : (i + 1) * dim] @ head for i, head in enumerate(heads)], axis=1)
    return Basis(generator.normal(size=width).astype(np.float32), synthesis.astype(np.float16))
