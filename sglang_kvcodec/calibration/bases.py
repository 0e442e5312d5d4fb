"""From statistics to bases: the Karhunen-Loève transform in the space in which errors count by their effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.errors import CalibrationError
from sglang_kvcodec.format.spec import Side

SHRINKAGE = 0.05
"""Part of a block's mean sensitivity that every direction gets: what the text did not exercise may matter elsewhere."""
MIN_TOKENS_PER_VALUE = 4
"""Tokens that a covariance needs for each of its rows; with fewer its small eigenvalues are noise."""
_SMALLEST_EIGENVALUE = 1e-12


@dataclasses.dataclass(frozen=True)
class SolvedBlock:
    """The basis of one block of layers with all its components, before it is rounded and cut.

    Attributes:
        mean: fp64 ``(values,)``.
        synthesis: fp64 ``(values, values)``, a component a row.
        variances: fp64 ``(values,)``, of the components, falling.
        unit: the size of an error of one unit of a component in the common space: the step of a tier there, times
            this, is the step here.
    """

    mean: torch.Tensor
    synthesis: torch.Tensor
    variances: torch.Tensor
    unit: float


@dataclasses.dataclass(frozen=True)
class SolvedBases:
    """All bases of a shard.

    Attributes:
        blocks: of each side, of each block.
        metrics: of each side fp64 ``(layers, kv_heads, head_dim, head_dim)``, such that ``S M S^T = 1`` in each block.
        uses_gradients: whether the metric is measured, or stands for noise relative to the signal.
    """

    blocks: Mapping[Side, tuple[SolvedBlock, ...]]
    metrics: Mapping[Side, torch.Tensor]
    uses_gradients: bool


def solve_bases(statistics: KVStatistics) -> SolvedBases:
    """The bases for what was gathered.

    With gradients, the metric of a head is its Fisher information, shrunk towards the identity. Without, errors count
    relative to the power of their layer and side, which is what can be known from KV alone.

    Raises:
        CalibrationError: too few tokens, or values without any spread.
    """
    layout = statistics.layout
    widest = min(statistics.layers_per_block, layout.layers) * layout.channels
    if statistics.tokens < MIN_TOKENS_PER_VALUE * widest:
        raise CalibrationError(
            f"{statistics.tokens} tokens are too few for a basis over {widest} values; "
            f"{MIN_TOKENS_PER_VALUE * widest} are needed"
        )
    uses_gradients = statistics.gradient_tokens > 0
    blocks: dict[Side, tuple[SolvedBlock, ...]] = {}
    metrics: dict[Side, torch.Tensor] = {}
    for side in layout.sides:
        solved = []
        metric = torch.empty(layout.layers, layout.kv_heads, layout.head_dim, layout.head_dim, dtype=torch.float64)
        for index, first in enumerate(range(0, layout.layers, statistics.layers_per_block)):
            layers = min(statistics.layers_per_block, layout.layers - first)
            covariance = statistics.covariance(side, index)
            part = slice(first, first + layers)
            if uses_gradients:
                raw = _shrunk(statistics.fisher(side)[part])
            else:
                raw = _relative_to_power(covariance, layers, layout.kv_heads, layout.head_dim)
            block, metric[part] = _solve(statistics.mean(side, index), covariance, raw)
            solved.append(block)
        blocks[side] = tuple(solved)
        metrics[side] = metric
    return SolvedBases(blocks, metrics, uses_gradients)


def _shrunk(fisher: torch.Tensor) -> torch.Tensor:
    """``(layers, heads, dim, dim)``, positive definite."""
    floor = SHRINKAGE * fisher.diagonal(dim1=-2, dim2=-1).mean()
    if not bool(floor > 0) or not bool(torch.isfinite(floor)):
        raise CalibrationError("the model's output does not depend on its KV")
    return fisher + floor * torch.eye(fisher.shape[-1], dtype=fisher.dtype)


def _relative_to_power(covariance: torch.Tensor, layers: int, heads: int, dim: int) -> torch.Tensor:
    """The identity over the mean variance of each layer."""
    power = covariance.diagonal().view(layers, -1).mean(1)
    if not bool((power > 0).all()):
        raise CalibrationError("KV without any spread")
    return torch.eye(dim, dtype=torch.float64).expand(layers, heads, dim, dim) / power[:, None, None, None]


def _solve(mean: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor) -> tuple[SolvedBlock, torch.Tensor]:
    """The basis of one block, and its metric in the units of that basis."""
    values, vectors = torch.linalg.eigh(metric.flatten(0, 1))
    root = _block_diagonal((vectors * values.sqrt()[:, None]) @ vectors.mT)
    inverse = _block_diagonal((vectors / values.sqrt()[:, None]) @ vectors.mT)
    variances, basis = torch.linalg.eigh(root @ covariance @ root)
    if not bool(variances[-1] > 0):
        raise CalibrationError("KV without any spread")
    synthesis = (basis.T @ inverse).flip(0)
    # Rows of mean square 1 / values keep fp16 away from its smallest numbers.
    unit = float(synthesis.square().sum(1).mean().sqrt())
    block = SolvedBlock(
        mean=mean,
        synthesis=synthesis / unit,
        variances=variances.flip(0).clamp(min=_SMALLEST_EIGENVALUE * float(variances[-1])) * unit**2,
        unit=unit,
    )
    return block, metric * unit**2


def _block_diagonal(heads: torch.Tensor) -> torch.Tensor:
    matrix: torch.Tensor = torch.block_diag(*heads)  # type: ignore[no-untyped-call]
    return matrix
