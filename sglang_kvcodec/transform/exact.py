"""Profile ``exact``: exponents on the canvas, sign and mantissa stored as they are, bit for bit.

The exponents of KV take few values and code well; sign and mantissa are noise and are not worth a coder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.transform.base import PackedSide
from sglang_kvcodec.transform.checks import check_fields, check_values, stack_canvases
from sglang_kvcodec.transform.floats import from_bits, stack_bytes, to_bits, to_bytes
from sglang_kvcodec.transform.layout import from_canvas, to_canvas


class ResidualLayout:
    """Where the residuals of values lie in ``stored``.

    The residual of a value is its sign bit above its mantissa bits: 8 bits for bfloat16, 11 for float16, 4 for e4m3, 3
    for e5m2. ``stored`` holds, each over all values of the group in the order layer, token, head, dim: where a residual
    has eight bits or more its low eight bits as bytes; then each bit that is left, lowest first, as a bit plane, eight
    values to a byte, the first value in the lowest bit, the last byte filled with zeros.

    Attributes:
        has_low_byte: whether there are bytes of low bits.
        bit_planes: the residual's bits that have a plane, in order.
    """

    def __init__(self, dtype: KVDtype) -> None:
        residual_bits = 1 + dtype.mantissa_bits
        self.has_low_byte = residual_bits >= 8
        self.bit_planes = range(8 if self.has_low_byte else 0, residual_bits)

    def stored_bytes(self, values: int) -> int:
        """Bytes of ``stored`` for ``values`` values."""
        return values * self.has_low_byte + -(-values // 8) * len(self.bit_planes)


class ExactTransform:
    """See the module and :class:`ResidualLayout`."""

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        self._geometry = picture_geometry(spec)
        self._layout = ResidualLayout(spec.dtype)

    def pack(self, values: torch.Tensor) -> list[PackedSide]:
        """See ``Transform.pack``."""
        check_values(values, self._spec)
        dtype = self._spec.dtype
        bits = to_bits(values).flatten(3).to(torch.int32) & ((1 << (8 * dtype.item_bytes)) - 1)
        exponents = (bits >> dtype.mantissa_bits) & ((1 << dtype.exponent_bits) - 1)
        canvases = to_canvas(exponents.to(torch.uint8), self._geometry)
        sign = bits >> (dtype.exponent_bits + dtype.mantissa_bits)
        residuals = (sign << dtype.mantissa_bits) | (bits & ((1 << dtype.mantissa_bits) - 1))
        stored = self._pack_residuals(residuals.flatten(1))
        return [PackedSide(canvas=c, stored=to_bytes(s)) for c, s in zip(canvases, stored, strict=True)]

    def restore(self, layers: int, packed: Sequence[PackedSide]) -> torch.Tensor:
        """See ``Transform.restore``."""
        spec, dtype = self._spec, self._spec.dtype
        for side in packed:
            check_fields(side, canvas=True, stored=True)
        exponents = from_canvas(stack_canvases(packed), self._geometry, layers).to(torch.int32)
        values = layers * spec.layer_values
        stored = stack_bytes([side.stored for side in packed], self._layout.stored_bytes(values)).to(exponents.device)
        residuals = self._unpack_residuals(stored, values).reshape(exponents.shape)
        sign = residuals >> dtype.mantissa_bits
        bits = sign << (dtype.exponent_bits + dtype.mantissa_bits)
        bits |= (exponents & ((1 << dtype.exponent_bits) - 1)) << dtype.mantissa_bits
        bits |= residuals & ((1 << dtype.mantissa_bits) - 1)
        narrow = bits.to(torch.uint8 if dtype.item_bytes == 1 else torch.int16)
        shape = (len(packed), layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
        return from_bits(narrow, dtype).reshape(shape)

    def _pack_residuals(self, residuals: torch.Tensor) -> torch.Tensor:
        """``(pages, values)`` int32 to ``(pages, stored bytes)`` uint8."""
        pages, values = residuals.shape
        parts = [(residuals & 0xFF).to(torch.uint8)] if self._layout.has_low_byte else []
        weights = 1 << torch.arange(8, dtype=torch.int32, device=residuals.device)
        padded = torch.nn.functional.pad(residuals, (0, -values % 8)).reshape(pages, -1, 8)
        parts += [((padded >> bit & 1) * weights).sum(-1).to(torch.uint8) for bit in self._layout.bit_planes]
        return torch.cat(parts, dim=1)

    def _unpack_residuals(self, stored: torch.Tensor, values: int) -> torch.Tensor:
        """The inverse of :meth:`_pack_residuals`: int32 ``(pages, values)``."""
        wide = stored.to(torch.int32)
        offset = values if self._layout.has_low_byte else 0
        residuals = wide[:, :values].clone() if self._layout.has_low_byte else wide.new_zeros(len(wide), values)
        shifts = torch.arange(8, dtype=torch.int32, device=stored.device)
        plane_bytes = -(-values // 8)
        for bit in self._layout.bit_planes:
            plane = wide[:, offset : offset + plane_bytes, None] >> shifts & 1
            residuals |= plane.flatten(1)[:, :values] << bit
            offset += plane_bytes
        return residuals
