"""Profile ``high``: one uniform step per layer, side and page; 8-bit values on the canvas, the rest escaped exactly.

The promise, held for every layer of every page: the sum of squared errors of the restored values, after their rounding
to the pool's type, is at most 1e-3 of the sum of squares that is left when each channel's mean over the page's tokens
is taken away. NaN, infinities and whatever lies outside 127 steps are restored bit for bit.

How the promise is kept: a step with ``step**2 / 12`` just below the allowed noise per value is tried, the error it
would make is computed, and where that is too much a smaller step is taken. At a quarter of the first step the promise
holds whatever the values are: quantising errs by at most half a step, and rounding to the pool's type at most doubles
that, because the original is itself a value of that type; so the squared error is at most ``step**2``, 12/16 of what is
allowed. All of it is fp32 elementwise arithmetic and sums in a fixed order, so every machine forms the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVSpec, picture_geometry
from sglang_kvcodec.transform.base import PackedSide
from sglang_kvcodec.transform.checks import check_fields, check_values, stack_canvases
from sglang_kvcodec.transform.escapes import pack_escapes, unpack_escapes, widen_where_dense
from sglang_kvcodec.transform.floats import from_bits, to_bits, torch_dtype
from sglang_kvcodec.transform.layout import CANVAS_FILL, from_canvas, to_canvas

NOISE_TO_SIGNAL = 1e-3
"""The promise: largest noise power over signal power."""
NOISE_BUDGET = 0.999 * NOISE_TO_SIGNAL
"""A little less, for the rounding of the sums that check it."""
STEP_FACTORS = (31 / 32, 7 / 8, 3 / 4, 1 / 2, 1 / 4)
"""Tried in this order. The first leaves the rounding to the pool's type and chance 6 % of the noise."""
LARGEST_CODE = 127
"""The largest magnitude on the canvas."""
MIN_POWER, MAX_POWER = 2.0**-80, 2.0**80
"""Signal powers for which no square over- or underflows in fp32 in a way that matters."""


class HighTransform:
    """See the module."""

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        self._geometry = picture_geometry(spec)

    def pack(self, values: torch.Tensor) -> list[PackedSide]:
        """See ``Transform.pack``."""
        check_values(values, self._spec)
        layers = values.flatten(3)
        steps, quantised, escaped = self._quantise(layers)
        codes = torch.where(escaped, 0, quantised) + CANVAS_FILL
        canvases = to_canvas(codes.to(torch.uint8), self._geometry)
        bits = to_bits(layers).flatten(2)
        escaped = escaped.flatten(2)
        return [
            PackedSide(canvas=canvas, escapes=pack_escapes(b, e), steps=tuple(s))
            for canvas, b, e, s in zip(canvases, bits, escaped, steps.tolist(), strict=True)
        ]

    def restore(self, layers: int, packed: Sequence[PackedSide]) -> torch.Tensor:
        """See ``Transform.restore``."""
        spec = self._spec
        check_high_sides(packed, layers)
        codes = from_canvas(stack_canvases(packed), self._geometry, layers)
        steps = torch.tensor([side.steps for side in packed], dtype=torch.float32, device=codes.device)
        values = self._dequantise(codes.to(torch.float32) - CANVAS_FILL, steps)
        bits = to_bits(values).flatten(1)
        for page, side in enumerate(packed):
            if side.escapes:
                where, escaped = unpack_escapes(side.escapes, layers, spec.layer_values, spec.dtype)
                bits[page, torch.from_numpy(where).to(bits.device)] = torch.from_numpy(escaped).to(bits.device)
        return from_bits(bits, spec.dtype).reshape(len(packed), layers, spec.page_tokens, spec.kv_heads, spec.head_dim)

    def _dequantise(self, quantised: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """fp32 ``(pages, layers, page_tokens, channels)`` times steps ``(pages, layers)``, in the pool's type."""
        return (quantised * steps[:, :, None, None]).to(torch_dtype(self._spec.dtype))

    def _quantise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Picks the steps.

        Args:
            values: ``(pages, layers, page_tokens, channels)``.

        Returns:
            fp32 steps ``(pages, layers)``, fp32 whole numbers, and a bool of what is escaped, like ``values``.
        """
        finite = torch.isfinite(values)
        wide = torch.where(finite, values.to(torch.float32), 0.0)
        count = self._spec.layer_values
        mean = ordered_sum(wide.transpose(2, 3)) / self._spec.page_tokens
        signal = ordered_sum(((wide - mean[:, :, None]) ** 2).flatten(2))
        power = signal / count
        usable = torch.isfinite(power) & (power >= MIN_POWER) & (power <= MAX_POWER)
        # In fp32, the library that torch calls on a CPU rounds some roots to the second nearest; from fp64 none.
        wide_root = torch.sqrt((torch.where(usable, power, 0.0) * (12 * NOISE_TO_SIGNAL)).to(torch.float64))
        first_step = wide_root.to(torch.float32)
        steps = torch.zeros_like(first_step)
        quantised, escaped = self._apply(values, wide, finite, steps)[:2]
        open_ = usable
        for factor in STEP_FACTORS:
            if not bool(open_.any()):
                break
            trial = first_step * factor
            trial_quantised, trial_escaped, noise = self._apply(values, wide, finite, trial)
            good = open_ & (noise <= signal * NOISE_BUDGET)
            steps = torch.where(good, trial, steps)
            quantised = torch.where(good[:, :, None, None], trial_quantised, quantised)
            escaped = torch.where(good[:, :, None, None], trial_escaped, escaped)
            open_ = open_ & ~good
        dense = widen_where_dense(escaped.flatten(2), self._spec.dtype)
        return steps, quantised, dense.reshape(escaped.shape)

    def _apply(
        self, values: torch.Tensor, wide: torch.Tensor, finite: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantises with given steps; a step of zero codes zeros as 0 and escapes everything else.

        Returns:
            Whole numbers, what is escaped, and the noise sum per page and layer.
        """
        divisor = torch.where(steps > 0, steps, 1.0)[:, :, None, None]
        inside = (wide.abs() < (LARGEST_CODE + 0.5) * steps[:, :, None, None]) | (wide == 0)
        quantised = torch.where(inside, torch.round(wide / divisor), 0.0).clamp(-LARGEST_CODE, LARGEST_CODE)
        restored = self._dequantise(quantised, steps).to(torch.float32)
        escaped = ~finite | ~inside | ~torch.isfinite(restored)
        error = torch.where(escaped, 0.0, restored - wide)
        return quantised, escaped, ordered_sum((error**2).flatten(2))


def check_high_sides(packed: Sequence[PackedSide], layers: int, *, canvas: bool = True) -> None:
    """Refuses sides without a canvas and a finite step for each layer, or with what the profile does not have.

    Args:
        packed: the sides.
        layers: of the group.
        canvas: False for sides whose pictures lie elsewhere.

    Raises:
        FormatError: such a side. Its escapes are not looked into.
    """
    for side in packed:
        check_fields(side, canvas=canvas, escapes=True, steps=layers)
        if not all(math.isfinite(step) and step >= 0 for step in side.steps):
            raise FormatError("a quantiser step that is none")


def ordered_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension as a balanced tree of elementwise additions: the same bits on every machine."""
    while terms.shape[-1] > 1:
        half = -(-terms.shape[-1] // 2)
        head, tail = terms[..., :half], terms[..., half:]
        terms = head + torch.nn.functional.pad(tail, (0, half - tail.shape[-1]))
    return terms[..., 0]
