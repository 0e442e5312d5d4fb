"""The pool's slots to ``exact`` pages: ``ExactTransform.pack``, bit for bit, in one launch for each side and group.

A program takes a run of a page's values in the order in which their residuals are stored, whatever layer and token they
are of: eight of them make a byte of a bit plane, which may cross a row or a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, picture_geometry
from sglang_kvcodec.kernels.planes import plane_addresses, planes_of
from sglang_kvcodec.kernels.pool_layers import check_readable_slots, one_stride, writable_layers
from sglang_kvcodec.kernels.written import device_canvases, to_host
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.exact import ResidualLayout
from sglang_kvcodec.transform.floats import to_bytes
from sglang_kvcodec.transform.layout import CANVAS_FILL

_BLOCK_VALUES = 1024


@triton.jit(do_not_specialize=["layer_count", "stored_bytes"], do_not_specialize_on_alignment=["stored", "slots"])
def _pack_exact(
    slots: tl.tensor,
    layers: tl.tensor,
    luma: tl.tensor,
    chroma: tl.tensor,
    stored: tl.tensor,
    slot_stride: tl.tensor,
    pitch_bytes: tl.tensor,
    layer_count: tl.tensor,
    stored_bytes: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    LUMA_LAYERS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    HAS_LOW_BYTE: tl.constexpr,
    FIRST_PLANE: tl.constexpr,
    END_PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    page = tl.program_id(1).to(tl.int64)
    values = layer_count * (TOKENS * CHANNELS)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < values
    channel = index % CHANNELS
    token = index // CHANNELS % TOKENS
    layer = index // (TOKENS * CHANNELS)
    address = tl.load(layers + layer, mask=exists, other=0)
    if EXPONENT_BITS + MANTISSA_BITS == 7:
        layer_start = address.to(tl.pointer_type(tl.uint8))
    else:
        layer_start = address.to(tl.pointer_type(tl.int16))
    slot = tl.load(slots + page * TOKENS + token, mask=exists, other=0)
    bits = tl.load(layer_start + slot * slot_stride + channel, mask=exists, other=0).to(tl.int32)
    exponent = bits >> MANTISSA_BITS & ((1 << EXPONENT_BITS) - 1)
    sign = bits >> (EXPONENT_BITS + MANTISSA_BITS) & 1
    residual = sign << MANTISSA_BITS | bits & ((1 << MANTISSA_BITS) - 1)

    in_chroma = layer >= LUMA_LAYERS
    first_row = tl.where(in_chroma, HEIGHT + (layer - LUMA_LAYERS) * LAYER_ROWS, layer * LAYER_ROWS)
    fold = channel // WIDTH
    rows = plane_addresses(luma, chroma, page, first_row + fold * TOKENS + token, pitch_bytes, HEIGHT)
    tl.store(rows + (channel - fold * WIDTH), exponent.to(tl.uint8), mask=exists)

    page_stored = stored + page * stored_bytes
    planes_at = 0
    if HAS_LOW_BYTE:
        tl.store(page_stored + index, residual.to(tl.uint8), mask=exists)
        planes_at = values
    plane_bytes = (values + 7) // 8
    byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    weight = 1 << tl.arange(0, 8)
    for plane in tl.static_range(FIRST_PLANE, END_PLANE):
        eights = tl.reshape(tl.where(exists, residual >> plane & 1, 0), (BLOCK // 8, 8))
        packed = tl.sum(eights * weight[None, :], axis=1)
        at = page_stored + planes_at + (plane - FIRST_PLANE) * plane_bytes + byte
        tl.store(at, packed.to(tl.uint8), mask=byte < plane_bytes)


class ExactPack:
    """See the module. Stateless, thread-safe."""

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        self._geometry = picture_geometry(spec)
        self._layout = ResidualLayout(spec.dtype)

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvases."""
        return self._geometry.canvas_shape

    def pack(
        self,
        group: LayerGroup,
        side: Side,
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        canvases: torch.Tensor | None = None,
    ) -> list[PackedSide] | None:
        """See ``PagePack.pack``. There is nothing that it can't code."""
        spec, geometry, pages = self._spec, self._geometry, len(first_positions)
        layers = writable_layers(spec, buffers)
        stride = one_stride(layers, group.layers)
        check_readable_slots(slots, pages, spec, layers[0])
        canvases, written = device_canvases(canvases, pages, self.canvas_shape, slots.device)
        values = group.layers * spec.layer_values
        addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64)
        stored = torch.empty((pages, self._layout.stored_bytes(values)), dtype=torch.uint8, device=slots.device)
        with torch.cuda.device_of(layers[0]):  # type: ignore[no-untyped-call]
            written.fill_(CANVAS_FILL)
            planes = planes_of(written)
            _pack_exact[(triton.cdiv(values, _BLOCK_VALUES), pages)](
                slots=slots,
                layers=addresses.to(slots.device),
                luma=planes.luma,
                chroma=planes.chroma,
                stored=stored,
                slot_stride=stride,
                pitch_bytes=planes.pitch_bytes,
                layer_count=group.layers,
                stored_bytes=stored.shape[1],
                TOKENS=spec.page_tokens,
                CHANNELS=spec.channels,
                WIDTH=geometry.width,
                HEIGHT=geometry.height,
                LAYER_ROWS=geometry.layer_rows,
                LUMA_LAYERS=geometry.layers_per_picture * 2 // 3,
                EXPONENT_BITS=spec.dtype.exponent_bits,
                MANTISSA_BITS=spec.dtype.mantissa_bits,
                HAS_LOW_BYTE=self._layout.has_low_byte,
                FIRST_PLANE=self._layout.bit_planes.start,
                END_PLANE=self._layout.bit_planes.stop,
                BLOCK=_BLOCK_VALUES,
            )
            if written is not canvases:
                canvases.copy_(written, non_blocking=True)
            # Waits for all of the above.
            (rows,) = to_host(stored)
        return [PackedSide(canvas=canvas, stored=to_bytes(row)) for canvas, row in zip(canvases, rows, strict=True)]
