"""Canvas bytes to the pool's slots: the inverse of ``transform/high.py`` and ``transform/exact.py``, bit for bit.

One launch restores one layer of any number of pages. A program takes a block of a page's tokens and channels; channels
are neighbours on the canvas and in a slot, so both sides are read and written in rows. A block never crosses a fold,
because its width divides the canvas's. What depends on the spec alone is a compile-time constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.kernels.planes import Planes, plane_addresses, planes_to_read
from sglang_kvcodec.kernels.pool_layers import check_slots, writable_layers
from sglang_kvcodec.kernels.upload import upload_together
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.checks import check_fields
from sglang_kvcodec.transform.escapes import escape_places
from sglang_kvcodec.transform.exact import ResidualLayout
from sglang_kvcodec.transform.high import check_high_sides
from sglang_kvcodec.transform.layout import CANVAS_FILL

_BLOCK_TOKENS = 16
_MOST_BLOCK_CHANNELS = 256
_BLOCK_ESCAPES = 256


@triton.jit
def _block(
    slots: tl.tensor,
    slot_count: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> tl.tuple:
    """This program's page, its first channel, its tokens, channels and slots, and which of them exist in the pool."""
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    token_blocks: tl.constexpr = (TOKENS + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    block = tl.program_id(0)
    page = (block // (token_blocks * channel_blocks)).to(tl.int64)
    first_channel = block % channel_blocks * BLOCK_CHANNELS
    token = block // channel_blocks % token_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)[None, :]
    slot = tl.load(slots + page * TOKENS + token, mask=token < TOKENS, other=-1)
    exists = (slot >= 0) & (slot < slot_count) & (channel < CHANNELS)
    return page, first_channel, token, channel, slot, exists


@triton.jit
def _load_canvas(
    luma: tl.tensor,
    chroma: tl.tensor,
    pitch_bytes: tl.tensor,
    page: tl.tensor,
    first_row: tl.tensor,
    first_channel: tl.tensor,
    token: tl.tensor,
    channel: tl.tensor,
    exists: tl.tensor,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
) -> tl.tensor:
    """The block's bytes of the layer that begins at canvas row ``first_row``, as int32."""
    fold = first_channel // WIDTH
    row = first_row + fold * TOKENS + token
    rows = plane_addresses(luma, chroma, page, row, pitch_bytes, HEIGHT)
    return tl.load(rows + (channel - fold * WIDTH), mask=exists, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["slot_count", "first_row", "layer", "layers"])
def _restore_high_layer(
    luma: tl.tensor,
    chroma: tl.tensor,
    steps: tl.tensor,
    slots: tl.tensor,
    pool: tl.tensor,
    slot_stride: tl.tensor,
    slot_count: tl.tensor,
    pitch_bytes: tl.tensor,
    first_row: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    ZERO_CODE: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
) -> None:
    page, first_channel, token, channel, slot, exists = _block(
        slots, slot_count, TOKENS, CHANNELS, BLOCK_TOKENS, BLOCK_CHANNELS
    )
    code = _load_canvas(
        luma, chroma, pitch_bytes, page, first_row, first_channel, token, channel, exists, TOKENS, WIDTH, HEIGHT
    )
    value = (code - ZERO_CODE).to(tl.float32) * tl.load(steps + page * layers + layer)
    if IS_BFLOAT16:
        # Rounded to nearest even by hand, since Triton's interpreter cuts off; a finite step makes no NaN.
        wide = value.to(tl.uint32, bitcast=True)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int16)
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
    tl.store(pool + slot * slot_stride + channel, bits, mask=exists)


@triton.jit(do_not_specialize=["slot_count", "first_row", "layer", "layers"])
def _restore_exact_layer(
    luma: tl.tensor,
    chroma: tl.tensor,
    stored: tl.tensor,
    slots: tl.tensor,
    pool: tl.tensor,
    slot_stride: tl.tensor,
    slot_count: tl.tensor,
    pitch_bytes: tl.tensor,
    stored_bytes: tl.tensor,
    first_row: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    HAS_LOW_BYTE: tl.constexpr,
    FIRST_PLANE: tl.constexpr,
    END_PLANE: tl.constexpr,
) -> None:
    page, first_channel, token, channel, slot, exists = _block(
        slots, slot_count, TOKENS, CHANNELS, BLOCK_TOKENS, BLOCK_CHANNELS
    )
    exponent = _load_canvas(
        luma, chroma, pitch_bytes, page, first_row, first_channel, token, channel, exists, TOKENS, WIDTH, HEIGHT
    )
    index = layer * (TOKENS * CHANNELS) + token * CHANNELS + channel
    page_stored = stored + page * stored_bytes
    residual = tl.zeros_like(exponent)
    if HAS_LOW_BYTE:
        residual = tl.load(page_stored + index, mask=exists, other=0).to(tl.int32)
        page_stored += layers * (TOKENS * CHANNELS)
    plane_bytes = (layers * (TOKENS * CHANNELS) + 7) // 8
    for bit in tl.static_range(FIRST_PLANE, END_PLANE):
        plane = tl.load(page_stored + (bit - FIRST_PLANE) * plane_bytes + index // 8, mask=exists, other=0)
        residual |= (plane.to(tl.int32) >> (index % 8) & 1) << bit
    bits = (residual >> MANTISSA_BITS) << (EXPONENT_BITS + MANTISSA_BITS)
    bits |= (exponent & ((1 << EXPONENT_BITS) - 1)) << MANTISSA_BITS
    bits |= residual & ((1 << MANTISSA_BITS) - 1)
    tl.store(pool + slot * slot_stride + channel, bits.to(pool.dtype.element_ty), mask=exists)


@triton.jit(
    do_not_specialize=["slot_count", "layer", "layers"],
    do_not_specialize_on_alignment=["escapes", "counts", "position_at", "value_at"],
)
def _write_high_escapes(
    escapes: tl.tensor,
    counts: tl.tensor,
    position_at: tl.tensor,
    value_at: tl.tensor,
    slots: tl.tensor,
    pool: tl.tensor,
    slot_stride: tl.tensor,
    slot_count: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The escapes of one layer of each page, out of the bytes of ``transform/escapes.py``."""
    page = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = page * layers + layer
    exists = index < tl.load(counts + here)
    first = tl.load(position_at + here)
    # A layer that lists no positions is whole.
    listed = tl.load((escapes + first).to(tl.pointer_type(tl.int32)) + index, mask=exists & (first >= 0), other=0)
    position = tl.where(first >= 0, listed, index)
    value = tl.load((escapes + tl.load(value_at + here)).to(tl.pointer_type(tl.int16)) + index, mask=exists, other=0)
    slot = tl.load(slots + page * TOKENS + position // CHANNELS, mask=exists, other=-1)
    tl.store(pool + slot * slot_stride + position % CHANNELS, value, mask=(slot >= 0) & (slot < slot_count))


class _LayerLauncher:
    """Starts a kernel once for each layer of a group, one program for each block of each page."""

    def __init__(self, spec: KVSpec) -> None:
        self._geometry = picture_geometry(spec)
        block_channels = math.gcd(self._geometry.width, _MOST_BLOCK_CHANNELS)
        self._blocks_per_page = triton.cdiv(spec.page_tokens, _BLOCK_TOKENS) * triton.cdiv(
            spec.channels, block_channels
        )
        self._constants = {
            "TOKENS": spec.page_tokens,
            "CHANNELS": spec.channels,
            "WIDTH": self._geometry.width,
            "HEIGHT": self._geometry.height,
            "BLOCK_TOKENS": _BLOCK_TOKENS,
            "BLOCK_CHANNELS": block_channels,
        }

    def launch(
        self,
        kernel: Any,
        planes: Planes,
        slots: torch.Tensor,
        layers: Sequence[torch.Tensor],
        **arguments: torch.Tensor | int,
    ) -> None:
        """Starts ``kernel`` on the current stream of the layers' device; all tensors are checked and lie there."""
        grid = (len(planes) * self._blocks_per_page,)
        with torch.cuda.device_of(layers[0]):  # type: ignore[no-untyped-call]
            for index, layer in enumerate(layers):
                kernel[grid](
                    luma=planes.luma,
                    chroma=planes.chroma,
                    pitch_bytes=planes.pitch_bytes,
                    slots=slots,
                    pool=layer,
                    slot_stride=layer.stride(0),
                    slot_count=len(layer),
                    first_row=self._geometry.layer_row_start(index),
                    layer=index,
                    layers=len(layers),
                    **self._constants,
                    **arguments,
                )


class HighRestore:
    """Profile ``high``: codes times their layer's step, then the escapes over them. See ``KernelRestore``."""

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        self._geometry = picture_geometry(spec)
        self._launcher = _LayerLauncher(spec)

    def restore(
        self,
        packed: Sequence[PackedSide],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        planes: Planes | None = None,
    ) -> None:
        """See ``KernelRestore.restore``."""
        layers = writable_layers(self._spec, buffers)
        check_slots(slots, len(packed), self._spec, layers[0])
        check_high_sides(packed, len(layers), canvas=planes is None)
        planes = planes_to_read(packed, planes, self._geometry, slots.device)
        places = escape_places(
            [side.escapes for side in packed], len(layers), self._spec.layer_values, self._spec.dtype
        )
        there = upload_together(
            {
                "steps": np.array([side.steps for side in packed], np.float32),
                "escapes": places.pieces,
                "counts": places.counts,
                "position_at": places.position_at,
                "value_at": places.value_at,
            },
            slots.device,
        )
        steps = there.pop("steps")
        self._launcher.launch(
            _restore_high_layer,
            planes,
            slots,
            layers,
            steps=steps,
            ZERO_CODE=CANVAS_FILL,
            IS_BFLOAT16=self._spec.dtype is KVDtype.BFLOAT16,
        )
        self._write_escapes(places.counts.max(axis=0).tolist(), there, slots, layers)

    def _write_escapes(
        self, most: Sequence[int], there: dict[str, torch.Tensor], slots: torch.Tensor, layers: Sequence[torch.Tensor]
    ) -> None:
        pages = len(there["counts"])
        for index, layer in enumerate(layers):
            if most[index]:
                with torch.cuda.device_of(layer):  # type: ignore[no-untyped-call]
                    _write_high_escapes[triton.cdiv(most[index], _BLOCK_ESCAPES), pages](
                        **there,
                        slots=slots,
                        pool=layer,
                        slot_stride=layer.stride(0),
                        slot_count=len(layer),
                        layer=index,
                        layers=len(layers),
                        TOKENS=self._spec.page_tokens,
                        CHANNELS=self._spec.channels,
                        BLOCK=_BLOCK_ESCAPES,
                    )


class ExactRestore:
    """Profile ``exact``: the float's fields put together again. See ``KernelRestore``."""

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        self._geometry = picture_geometry(spec)
        self._layout = ResidualLayout(spec.dtype)
        self._launcher = _LayerLauncher(spec)

    def restore(
        self,
        packed: Sequence[PackedSide],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        planes: Planes | None = None,
    ) -> None:
        """See ``KernelRestore.restore``."""
        spec = self._spec
        layers = writable_layers(spec, buffers)
        check_slots(slots, len(packed), spec, layers[0])
        for side in packed:
            check_fields(side, canvas=planes is None, stored=True)
        planes = planes_to_read(packed, planes, self._geometry, slots.device)
        stored_bytes = self._layout.stored_bytes(len(layers) * spec.layer_values)
        for side in packed:
            if len(side.stored) != stored_bytes:
                raise FormatError(f"expected {stored_bytes} stored bytes, got {len(side.stored)}")
        self._launcher.launch(
            _restore_exact_layer,
            planes,
            slots,
            layers,
            **upload_together({"stored": [side.stored for side in packed]}, slots.device),
            stored_bytes=stored_bytes,
            EXPONENT_BITS=spec.dtype.exponent_bits,
            MANTISSA_BITS=spec.dtype.mantissa_bits,
            HAS_LOW_BYTE=self._layout.has_low_byte,
            FIRST_PLANE=self._layout.bit_planes.start,
            END_PLANE=self._layout.bit_planes.stop,
        )
