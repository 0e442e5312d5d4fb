"""What calibration gathers of a model's KV: means, covariances, and how much errors matter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sglang_kvcodec.format.calibration import ShardLayout
from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.transform.rope import unrotate

START_TOKENS = 4
"""The tokens at the start of a prompt on which attention parks (Xiao et al., ICLR 2024, find four)."""
FINEST_START_GAIN_LOG2 = -6


class KVStatistics:
    """Sums over tokens, on the CPU. For one thread at a time.

    K is taken with its rotation undone. A gradient with respect to a rotated K turns back with the same rotation, since
    ``g . dK = (R^T g) . (R^T dK)``; with YaRN's factor ``s`` it is multiplied by it instead of divided.
    """

    def __init__(self, layout: ShardLayout, rope: RopeSpec | None, layers_per_block: int) -> None:
        """Nothing gathered yet.

        Args:
            layout: of the KV that will come.
            rope: the rotation of K to undo; None to take K as it is.
            layers_per_block: layers that share a basis.
        """
        self.layout = layout
        self.rope = rope
        self.layers_per_block = layers_per_block
        self.tokens = 0
        self.gradient_tokens = 0
        layers, heads, dim = layout.layers, layout.kv_heads, layout.head_dim
        self._sums = {side: torch.zeros(layers, layout.channels, dtype=torch.float64) for side in layout.sides}
        self._products = {
            side: [torch.zeros(2 * [count * layout.channels], dtype=torch.float64) for _, count in self._blocks()]
            for side in layout.sides
        }
        self._sensitivity = torch.zeros(0, dtype=torch.float64)
        self._gradient_products = {
            side: torch.zeros(layers, heads, dim, dim, dtype=torch.float64) for side in layout.sides
        }

    def _blocks(self) -> list[tuple[int, int]]:
        step, layers = self.layers_per_block, self.layout.layers
        return [(first, min(step, layers - first)) for first in range(0, layers, step)]

    def own(self, kv: Mapping[Side, torch.Tensor]) -> dict[Side, torch.Tensor]:
        """This rank's heads of the whole model's KV ``(layers, tokens, kv_heads, head_dim)``; views."""
        heads = self.layout.kv_heads
        first = self.layout.tp_rank * heads
        return {side: values[:, :, first : first + heads] for side, values in kv.items()}

    def add(self, kv: Mapping[Side, torch.Tensor], first_position: int = 0) -> None:
        """Adds the KV of a run of tokens.

        Args:
            kv: per side ``(layers, tokens, kv_heads, head_dim)``, K after RoPE, in any float dtype. Tokens with values
                that are not finite are left out.
            first_position: position of the first token.
        """
        finite = torch.stack([torch.isfinite(kv[side]).all(-1).all(-1).all(0) for side in self.layout.sides]).all(0)
        for side in self.layout.sides:
            values = self.unrotated(side, kv[side], first_position)[:, finite].flatten(2)
            self._sums[side] += values.sum(1, dtype=torch.float64)
            for (first, count), total in zip(self._blocks(), self._products[side], strict=True):
                block = values[first : first + count].transpose(0, 1).flatten(1)
                total += block.T @ block
        self.tokens += int(finite.sum())

    def add_gradients(self, gradients: Mapping[Side, torch.Tensor], first_position: int = 0) -> None:
        """Adds gradients of the log-likelihood of labels drawn from the model itself, shaped as the KV of :meth:`add`.

        Their mean outer product is the Fisher information: to second order an error ``e`` in the KV of one token moves
        the distribution of the tokens that follow by a Kullback-Leibler divergence of ``e^T F e / 2`` in all.

        Models that park attention on their first tokens depend on these hundreds of times more than on others, and in
        other directions. They are left out of the mean: a gain is for them.
        """
        tokens = next(iter(gradients.values())).shape[1]
        skipped = START_TOKENS if first_position == 0 and tokens > START_TOKENS else 0
        shares = torch.zeros(tokens, dtype=torch.float64)
        for side, total in self._gradient_products.items():
            turned = self.unrotated_gradients(side, gradients[side], first_position)
            power = turned.square().sum((2, 3), dtype=torch.float64)
            shares += (power / power.mean(1, keepdim=True).clamp(min=1e-300)).mean(0)
            by_head = turned[:, skipped:].transpose(1, 2)
            total += by_head.transpose(2, 3) @ by_head
        if first_position == 0:
            missing = max(0, tokens - len(self._sensitivity))
            self._sensitivity = torch.nn.functional.pad(self._sensitivity, (0, missing))
            self._sensitivity[:tokens] += shares
        self.gradient_tokens += tokens - skipped

    def start_gain(self) -> float:
        """How much finer each of the first :data:`START_TOKENS` should be coded: a power of two, 2**-6 to 1.

        The best step falls with the square root of what an error costs; the costliest of them counts.
        """
        if len(self._sensitivity) <= START_TOKENS:
            return 1.0
        ratio = float(self._sensitivity[:START_TOKENS].max() / self._sensitivity[START_TOKENS:].mean())
        return 2.0 ** min(0, max(FINEST_START_GAIN_LOG2, math.floor(-math.log2(max(ratio, 1e-9)) / 2)))

    def mean(self, side: Side, block: int) -> torch.Tensor:
        """fp64 ``(values of the block,)``."""
        first, count = self._blocks()[block]
        return self._sums[side][first : first + count].flatten() / self.tokens

    def covariance(self, side: Side, block: int) -> torch.Tensor:
        """fp64, square, of the values of one token in a block."""
        mean = self.mean(side, block)
        return self._products[side][block] / self.tokens - torch.outer(mean, mean)

    def fisher(self, side: Side) -> torch.Tensor:
        """fp64 ``(layers, kv_heads, head_dim, head_dim)``: mean outer products of the gradients, of each head alone."""
        return self._gradient_products[side] / max(self.gradient_tokens, 1)

    def unrotated(self, side: Side, values: torch.Tensor, first_position: int) -> torch.Tensor:
        """Values ``(layers, tokens, kv_heads, head_dim)`` in fp32 on the CPU, K as before its rotation; a copy."""
        wide = values.to("cpu", torch.float32)
        if side is Side.KEY and self.rope is not None:
            positions = torch.arange(first_position, first_position + wide.shape[1])
            return unrotate(wide, positions, self.rope)
        return wide.clone()

    def unrotated_gradients(self, side: Side, gradients: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """Gradients with respect to what :meth:`unrotated` gives, from those with respect to what it takes; a copy."""
        turned = self.unrotated(side, gradients, first_position)
        if side is Side.KEY and self.rope is not None:
            turned[..., : self.rope.rotary_dim] *= self.rope.scale**2
        return turned
