"""The pool's slots to ``high`` pages: ``HighTransform.pack``, bit for bit, for all layers of a group at once.

1. **Means** of each channel over the page's tokens.
2. **Signal**: squares of what is left without them, summed; from it the step that is tried first.
3. **Noise** of that step, and of the smaller ones where it is too much: a layer's step is settled then.
4. **Codes** on the canvas, with what they can't hold counted.
5. **Escapes**, where there are any, into a list.

Each of 2 and 3 is a launch over all values, which leaves some hundred sums of a layer, and one that adds them up. The
sums are in the reference's order (``ordered_sum.py``): every machine forms the same step, whatever it packs with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, picture_geometry
from sglang_kvcodec.kernels.floats import is_finite_bits, narrow_bits, widen_bits
from sglang_kvcodec.kernels.ordered_sum import folds, tree_sum, tree_terms
from sglang_kvcodec.kernels.planes import plane_addresses, planes_of
from sglang_kvcodec.kernels.pool_layers import check_readable_slots, one_stride, writable_layers
from sglang_kvcodec.kernels.written import device_canvases, to_host
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.escapes import POSITION_BYTES
from sglang_kvcodec.transform.high import (
    LARGEST_CODE,
    MAX_POWER,
    MIN_POWER,
    NOISE_BUDGET,
    NOISE_TO_SIGNAL,
    STEP_FACTORS,
)
from sglang_kvcodec.transform.layout import CANVAS_FILL

_TILE_TERMS = 4096
"""Terms that a program holds, if a page has as many."""
_FEWEST_FOLDS, _MOST_FOLDS = 5, 8
"""Of the launches over all values: the sums they leave are few enough for one program, or a sector of memory apart."""
_MOST_SUMS_LEFT = 2048
_BLOCK_VALUES = 1024
_LARGEST = 3.4028234663852886e38


@triton.jit
def _read(
    slots: tl.tensor,
    layers: tl.tensor,
    layer: tl.tensor,
    page: tl.tensor,
    index: tl.tensor,
    exists: tl.tensor,
    slot_stride: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
) -> tl.tuple:
    """The bits of values with numbers ``index`` of a layer of a page, whether they are finite, and their value or 0."""
    start = tl.load(layers + layer).to(tl.pointer_type(tl.int16))
    token = index // CHANNELS
    slot = tl.load(slots + page * TOKENS + token, mask=exists, other=0)
    at = start + slot * slot_stride + (index - token * CHANNELS)
    bits = tl.load(at, mask=exists, other=0).to(tl.int32)
    is_finite = is_finite_bits(bits, EXPONENT_BITS, MANTISSA_BITS)
    return bits, is_finite, tl.where(is_finite, widen_bits(bits, EXPONENT_BITS, MANTISSA_BITS), 0.0)


@triton.jit
def _apply(
    wide: tl.tensor,
    is_finite: tl.tensor,
    step: tl.tensor,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> tl.tuple:
    """Whole numbers with one step, what is escaped, and the squared error; ``HighTransform._apply``."""
    is_inside = (tl.abs(wide) < (LARGEST_CODE + 0.5) * step) | (wide == 0)
    scaled = tl.div_rn(tl.where(is_inside, wide, 0.0), tl.zeros_like(wide) + tl.where(step > 0, step, 1.0))
    # To the nearest, ties to even: the sum has no bits left behind the point.
    quantised = (scaled + 12582912.0) - 12582912.0
    quantised = tl.minimum(tl.maximum(quantised, -LARGEST_CODE), LARGEST_CODE)
    bits = narrow_bits(quantised * step, EXPONENT_BITS, MANTISSA_BITS, LARGEST)
    is_escaped = (is_finite & is_inside & is_finite_bits(bits, EXPONENT_BITS, MANTISSA_BITS)) == 0
    error = tl.where(is_escaped, 0.0, widen_bits(bits, EXPONENT_BITS, MANTISSA_BITS) - wide)
    return quantised, is_escaped, error * error


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _channel_means(
    slots: tl.tensor,
    layers: tl.tensor,
    means: tl.tensor,
    slot_stride: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    page, layer = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # All of a channel's terms are in its one sum.
    token, exists = tree_terms(tl.zeros((1, BLOCK), tl.int32), tl.arange(0, 1 << LEVELS)[:, None], TOKENS, LEVELS)
    exists &= (channel < CHANNELS)[None, :]
    index = token * CHANNELS + channel[None, :]
    _, _, wide = _read(
        slots, layers, layer, page, index, exists, slot_stride, TOKENS, CHANNELS, EXPONENT_BITS, MANTISSA_BITS
    )
    total = tree_sum(tl.where(exists, wide, 0.0), LEVELS, BLOCK)
    mean = tl.div_rn(total, tl.zeros_like(total) + TOKENS)
    tl.store(means + (page * tl.num_programs(1) + layer) * CHANNELS + channel, mean, mask=channel < CHANNELS)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _signal_sums(
    slots: tl.tensor,
    layers: tl.tensor,
    means: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    slot_stride: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS_LEFT: tl.constexpr,
) -> None:
    """Also counts what a step of zero can't code: all but zeros."""
    page, layer = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = page * tl.num_programs(1) + layer
    sum_ = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index, exists = tree_terms(sum_[None, :], tl.arange(0, 1 << LEVELS)[:, None], TOKENS * CHANNELS, LEVELS)
    _, is_finite, wide = _read(
        slots, layers, layer, page, index, exists, slot_stride, TOKENS, CHANNELS, EXPONENT_BITS, MANTISSA_BITS
    )
    apart = wide - tl.load(means + row * CHANNELS + index % CHANNELS, mask=exists, other=0)
    total = tree_sum(tl.where(exists, apart * apart, 0.0), LEVELS, BLOCK)
    tl.store(sums + row * SUMS_LEFT + sum_, total, mask=sum_ < SUMS_LEFT)
    is_counted = exists & ((is_finite == 0) | (wide != 0))
    count = tl.sum(tl.sum(is_counted.to(tl.int32), axis=1), axis=0)
    tl.store(counts + row * tl.num_programs(0) + tl.program_id(0), count)


@triton.jit
def _all_sums(sums: tl.tensor, LEVELS: tl.constexpr, SUMS_LEFT: tl.constexpr) -> tl.tensor:
    """What is left of ``SUMS_LEFT`` sums that lie there, ``(1,)``."""
    index, exists = tree_terms(tl.zeros((1, 1), tl.int32), tl.arange(0, 1 << LEVELS)[:, None], SUMS_LEFT, LEVELS)
    return tree_sum(tl.load(sums + index, mask=exists, other=0), LEVELS, 1)


@triton.jit
def _all_counts(counts: tl.tensor, COUNTS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    at = tl.arange(0, BLOCK)
    return tl.sum(tl.load(counts + at, mask=at < COUNTS, other=0), axis=0)


@triton.jit
def _first_steps(
    sums: tl.tensor,
    counts: tl.tensor,
    signals: tl.tensor,
    first_steps: tl.tensor,
    steps: tl.tensor,
    escaped: tl.tensor,
    is_open: tl.tensor,
    VALUES: tl.constexpr,
    LEVELS: tl.constexpr,
    SUMS_LEFT: tl.constexpr,
    COUNTS: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    MIN_POWER: tl.constexpr,
    MAX_POWER: tl.constexpr,
    STEP_POWER: tl.constexpr,
) -> None:
    """Of each layer of each page: what its signal is, what to try first, and all as if nothing were good enough."""
    row = tl.program_id(0)
    one = row + tl.arange(0, 1)
    signal = _all_sums(sums + row.to(tl.int64) * SUMS_LEFT, LEVELS, SUMS_LEFT)
    power = tl.div_rn(signal, tl.zeros_like(signal) + VALUES)
    # What is no number is not usable either.
    is_usable = (power >= MIN_POWER) & (power <= MAX_POWER)
    tl.store(signals + one, signal)
    tl.store(first_steps + one, tl.sqrt_rn(tl.where(is_usable, power, 0.0) * STEP_POWER))
    tl.store(steps + one, tl.zeros_like(signal))
    tl.store(is_open + one, is_usable.to(tl.int32))
    tl.store(escaped + row, _all_counts(counts + row * COUNTS, COUNTS, COUNT_BLOCK))


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _noise_sums(
    slots: tl.tensor,
    layers: tl.tensor,
    first_steps: tl.tensor,
    is_open: tl.tensor,
    factors: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    slot_stride: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS_LEFT: tl.constexpr,
    FIRST_TRIAL: tl.constexpr,
    END_TRIAL: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Of layers whose step is open: the noise of each step tried, and how much is escaped then."""
    page, layer = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
    row = page * tl.num_programs(1) + layer
    if tl.load(is_open + row) > 0:
        sum_ = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        index, exists = tree_terms(sum_[None, :], tl.arange(0, 1 << LEVELS)[:, None], TOKENS * CHANNELS, LEVELS)
        _, is_finite, wide = _read(
            slots, layers, layer, page, index, exists, slot_stride, TOKENS, CHANNELS, EXPONENT_BITS, MANTISSA_BITS
        )
        first_step = tl.load(first_steps + row)
        for trial in tl.static_range(FIRST_TRIAL, END_TRIAL):
            step = first_step * tl.load(factors + trial)
            _, is_escaped, noise = _apply(wide, is_finite, step, EXPONENT_BITS, MANTISSA_BITS, LARGEST_CODE, LARGEST)
            total = tree_sum(tl.where(exists, noise, 0.0), LEVELS, BLOCK)
            place = (trial - FIRST_TRIAL) * rows + row
            tl.store(sums + place * SUMS_LEFT + sum_, total, mask=sum_ < SUMS_LEFT)
            count = tl.sum(tl.sum((exists & is_escaped).to(tl.int32), axis=1), axis=0)
            tl.store(counts + place * tl.num_programs(0) + tl.program_id(0), count)


@triton.jit
def _choose_steps(
    sums: tl.tensor,
    counts: tl.tensor,
    signals: tl.tensor,
    first_steps: tl.tensor,
    factors: tl.tensor,
    steps: tl.tensor,
    escaped: tl.tensor,
    is_open: tl.tensor,
    LEVELS: tl.constexpr,
    SUMS_LEFT: tl.constexpr,
    COUNTS: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    FIRST_TRIAL: tl.constexpr,
    END_TRIAL: tl.constexpr,
    NOISE_BUDGET: tl.constexpr,
) -> None:
    """Takes the first step that is good enough."""
    row = tl.program_id(0)
    one = row + tl.arange(0, 1)
    if tl.load(is_open + row) > 0:
        allowed = tl.load(signals + one) * NOISE_BUDGET
        first_step = tl.load(first_steps + one)
        is_left = tl.load(is_open + one)
        for trial in tl.static_range(FIRST_TRIAL, END_TRIAL):
            place = (trial - FIRST_TRIAL) * tl.num_programs(0).to(tl.int64) + row
            noise = _all_sums(sums + place * SUMS_LEFT, LEVELS, SUMS_LEFT)
            is_chosen = (noise <= allowed) & (is_left > 0)
            tl.store(steps + one, first_step * tl.load(factors + trial), mask=is_chosen)
            count = _all_counts(counts + place * COUNTS, COUNTS, COUNT_BLOCK)
            tl.store(escaped + one, tl.zeros_like(one) + count, mask=is_chosen)
            is_left = tl.where(is_chosen, 0, is_left)
        tl.store(is_open + one, is_left)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write_high(
    slots: tl.tensor,
    layers: tl.tensor,
    steps: tl.tensor,
    escaped: tl.tensor,
    luma: tl.tensor,
    chroma: tl.tensor,
    counts: tl.tensor,
    slot_stride: tl.tensor,
    pitch_bytes: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    LUMA_LAYERS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO_CODE: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    page, layer = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = page * tl.num_programs(1) + layer
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < TOKENS * CHANNELS
    _, is_finite, wide = _read(
        slots, layers, layer, page, index, exists, slot_stride, TOKENS, CHANNELS, EXPONENT_BITS, MANTISSA_BITS
    )
    quantised, is_escaped, _ = _apply(
        wide, is_finite, tl.load(steps + row), EXPONENT_BITS, MANTISSA_BITS, LARGEST_CODE, LARGEST
    )
    is_escaped = exists & (is_escaped | (tl.load(escaped + row) == TOKENS * CHANNELS))
    code = tl.where(is_escaped, 0, quantised.to(tl.int32)) + ZERO_CODE
    token = index // CHANNELS
    channel = index - token * CHANNELS
    fold = channel // WIDTH
    first_row = tl.where(layer < LUMA_LAYERS, layer * LAYER_ROWS, HEIGHT + (layer - LUMA_LAYERS) * LAYER_ROWS)
    rows = plane_addresses(luma, chroma, page, first_row + fold * TOKENS + token, pitch_bytes, HEIGHT)
    tl.store(rows + (channel - fold * WIDTH), code.to(tl.uint8), mask=exists)
    tl.store(counts + row * tl.num_programs(0) + tl.program_id(0), tl.sum(is_escaped.to(tl.int32), axis=0))


@triton.jit(do_not_specialize_on_alignment=["slots", "positions", "values"])
def _list_high_escapes(
    slots: tl.tensor,
    layers: tl.tensor,
    steps: tl.tensor,
    escaped: tl.tensor,
    escape_end: tl.tensor,
    positions: tl.tensor,
    values: tl.tensor,
    slot_stride: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    page, layer = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = page * tl.num_programs(1) + layer
    program = row * tl.num_programs(0) + tl.program_id(0)
    end = tl.load(escape_end + program)
    first = tl.load(escape_end + program - 1, mask=program > 0, other=0)
    if first < end:
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        exists = index < TOKENS * CHANNELS
        bits, is_finite, wide = _read(
            slots, layers, layer, page, index, exists, slot_stride, TOKENS, CHANNELS, EXPONENT_BITS, MANTISSA_BITS
        )
        _, is_escaped, _ = _apply(
            wide, is_finite, tl.load(steps + row), EXPONENT_BITS, MANTISSA_BITS, LARGEST_CODE, LARGEST
        )
        is_listed = exists & (is_escaped | (tl.load(escaped + row) == TOKENS * CHANNELS))
        at = first + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        tl.store(positions + at, index, mask=is_listed)
        tl.store(values + at, bits.to(tl.int16), mask=is_listed)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Pages of one call on the device.

    Attributes:
        pages: how many.
        layers: of the group.
        where: the arguments by which every kernel finds a value.
    """

    pages: int
    layers: int
    where: Mapping[str, object]


class HighPack:
    """See the module. Stateless but for constants on the device; thread-safe."""

    def __init__(self, spec: KVSpec, device: torch.device | str) -> None:
        """Takes the factors to the device.

        Args:
            spec: of the pages, of 16-bit values.
            device: of the pool.
        """
        self._spec = spec
        self._geometry = picture_geometry(spec)
        self._factors = torch.tensor(STEP_FACTORS, dtype=torch.float32).to(device)
        self._value_folds = min(
            max(_FEWEST_FOLDS, folds(-(-spec.layer_values // _MOST_SUMS_LEFT))), _MOST_FOLDS, folds(spec.layer_values)
        )
        self._sums_left = -(-spec.layer_values >> self._value_folds)
        self._format = {"EXPONENT_BITS": spec.dtype.exponent_bits, "MANTISSA_BITS": spec.dtype.mantissa_bits}
        self._codes = {"LARGEST_CODE": LARGEST_CODE, "LARGEST": _LARGEST}

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
        spec, pages = self._spec, len(first_positions)
        layers = writable_layers(spec, buffers)
        stride = one_stride(layers, group.layers)
        check_readable_slots(slots, pages, spec, layers[0])
        canvases, written = device_canvases(canvases, pages, self.canvas_shape, slots.device)
        addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64)
        where = {"slots": slots, "layers": addresses.to(slots.device), "slot_stride": stride}
        where |= {"TOKENS": spec.page_tokens, "CHANNELS": spec.channels, **self._format}
        batch = _Batch(pages, group.layers, where)
        with torch.cuda.device_of(layers[0]):  # type: ignore[no-untyped-call]
            steps, escaped = self._settle_steps(batch, slots.device)
            dense = escaped * (POSITION_BYTES + spec.dtype.item_bytes) > spec.layer_values * spec.dtype.item_bytes
            escaped.masked_fill_(dense, spec.layer_values)
            block_counts = self._write(batch, steps, escaped, written)
            if written is not canvases:
                canvases.copy_(written, non_blocking=True)
            # Waits for all of the above.
            host_steps, host_escaped = to_host(steps, escaped)
            escapes = self._escapes(batch, steps, escaped, block_counts, host_escaped)
        return [
            PackedSide(canvas=canvas, escapes=page_escapes, steps=tuple(page_steps))
            for canvas, page_escapes, page_steps in zip(canvases, escapes, host_steps.tolist(), strict=True)
        ]

    def _settle_steps(self, batch: _Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 steps and int32 counts of what is escaped with them, ``(pages, layers)``."""
        spec, rows = self._spec, batch.pages * batch.layers
        token_folds = folds(spec.page_tokens)
        channel_block = max(1, min(triton.next_power_of_2(spec.channels), _TILE_TERMS >> token_folds))
        means = torch.empty((rows, spec.channels), dtype=torch.float32, device=device)
        _channel_means[(triton.cdiv(spec.channels, channel_block), batch.layers, batch.pages)](
            **batch.where, means=means, LEVELS=token_folds, BLOCK=channel_block, enable_fp_fusion=False
        )
        block = max(1, _TILE_TERMS >> self._value_folds)
        programs = triton.cdiv(self._sums_left, block)
        over_values = (programs, batch.layers, batch.pages)
        tile = {"LEVELS": self._value_folds, "BLOCK": block, "SUMS_LEFT": self._sums_left, "enable_fp_fusion": False}
        final = {
            "LEVELS": folds(self._sums_left),
            "SUMS_LEFT": self._sums_left,
            "COUNTS": programs,
            "COUNT_BLOCK": triton.next_power_of_2(programs),
            "enable_fp_fusion": False,
        }

        def scratch(trials: int) -> dict[str, torch.Tensor]:
            return {
                "sums": torch.empty((trials, rows, self._sums_left), dtype=torch.float32, device=device),
                "counts": torch.empty((trials, rows, programs), dtype=torch.int32, device=device),
            }

        state = {name: torch.empty(rows, dtype=torch.float32, device=device) for name in ("signals", "first_steps")}
        settled = {
            "steps": torch.empty(rows, dtype=torch.float32, device=device),
            "escaped": torch.empty(rows, dtype=torch.int32, device=device),
            "is_open": torch.empty(rows, dtype=torch.int32, device=device),
        }
        sums = scratch(1)
        _signal_sums[over_values](**batch.where, means=means, **sums, **tile)
        _first_steps[(rows,)](
            **sums,
            **state,
            **settled,
            VALUES=spec.layer_values,
            MIN_POWER=MIN_POWER,
            MAX_POWER=MAX_POWER,
            STEP_POWER=12 * NOISE_TO_SIGNAL,
            **final,
        )
        # The first step is good enough for nearly all layers: programs of the others have nothing to do then.
        for first, end in ((0, 1), (1, len(STEP_FACTORS))):
            trials = {"FIRST_TRIAL": first, "END_TRIAL": end}
            sums = scratch(end - first)
            _noise_sums[over_values](
                **batch.where,
                first_steps=state["first_steps"],
                is_open=settled["is_open"],
                factors=self._factors,
                **sums,
                **tile,
                **trials,
                **self._codes,
            )
            _choose_steps[(rows,)](
                **sums, **state, **settled, factors=self._factors, NOISE_BUDGET=NOISE_BUDGET, **final, **trials
            )
        shape = (batch.pages, batch.layers)
        return settled["steps"].view(shape), settled["escaped"].view(shape)

    def _write(self, batch: _Batch, steps: torch.Tensor, escaped: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Fills the canvases; int32 ``(pages, layers, programs of a layer)``: what each program escaped."""
        grid = self._code_grid(batch)
        counts = torch.empty(grid[::-1], dtype=torch.int32, device=written.device)
        written.fill_(CANVAS_FILL)
        planes = planes_of(written)
        _write_high[grid](
            **batch.where,
            steps=steps,
            escaped=escaped,
            luma=planes.luma,
            chroma=planes.chroma,
            counts=counts,
            pitch_bytes=planes.pitch_bytes,
            WIDTH=self._geometry.width,
            HEIGHT=self._geometry.height,
            LAYER_ROWS=self._geometry.layer_rows,
            LUMA_LAYERS=self._geometry.layers_per_picture * 2 // 3,
            BLOCK=_BLOCK_VALUES,
            ZERO_CODE=CANVAS_FILL,
            enable_fp_fusion=False,
            **self._codes,
        )
        return counts

    def _escapes(
        self,
        batch: _Batch,
        steps: torch.Tensor,
        escaped: torch.Tensor,
        block_counts: torch.Tensor,
        counts: torch.Tensor,
    ) -> list[bytes]:
        """The escapes of each page as ``pack_escapes`` writes them; ``counts`` is ``escaped`` on the host."""
        total = int(counts.sum())
        if not total:
            return [b""] * batch.pages
        positions = torch.empty(total, dtype=torch.int32, device=steps.device)
        values = torch.empty(total, dtype=torch.int16, device=steps.device)
        _list_high_escapes[self._code_grid(batch)](
            **batch.where,
            steps=steps,
            escaped=escaped,
            escape_end=torch.cumsum(block_counts.flatten(), 0),
            positions=positions,
            values=values,
            BLOCK=_BLOCK_VALUES,
            enable_fp_fusion=False,
            **self._codes,
        )
        positions, values = to_host(positions, values)
        has_positions = counts != self._spec.layer_values
        bounds = np.cumsum(counts.numpy().ravel())[:-1]
        by_layer = np.split(positions.numpy().astype("<u4"), bounds)
        listed = [
            part if is_listed else part[:0] for part, is_listed in zip(by_layer, has_positions.ravel(), strict=True)
        ]
        ends = np.cumsum(counts.sum(1).numpy())[:-1]
        escapes = []
        for page, page_values in enumerate(np.split(values.numpy().astype("<i2"), ends)):
            page_listed = listed[page * batch.layers : (page + 1) * batch.layers]
            parts = [counts[page].numpy().astype("<u4"), *page_listed, page_values]
            escapes.append(b"".join(part.tobytes() for part in parts) if counts[page].any() else b"")
        return escapes

    def _code_grid(self, batch: _Batch) -> tuple[int, int, int]:
        return (triton.cdiv(self._spec.layer_values, _BLOCK_VALUES), batch.layers, batch.pages)
