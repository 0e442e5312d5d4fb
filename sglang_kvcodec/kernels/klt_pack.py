"""The pool's slots to calibrated pages: ``KltTransform.pack`` in up to four launches for each side and group.

1. **Values.** Slots are gathered, rotation undone, the mean taken away, each head multiplied with its metric.
2. **Product** with the transposed synthesis: components in fp32.
3. **Codes.** Components in steps of their token; low bits apart, the rest on the canvas, of which all is written.
4. **Escapes**, where there are any: what did not fit the canvas, counted before, goes into a list.

The reference multiplies with ``M S^T``, in fp32; here ``(x - mean) M`` comes first. So the kernel reads the fp16 ``S``
that restoring has on the device anyway, where ``M S^T`` would take twice its bytes, and ``S`` is exact in tf32: two
products of tf32 (the upper bits of the left side, and what they leave) are good to 2**-20, where two fp32 factors need
three. What comes out differs from the reference by rounding: a component close to a tie may be coded as its neighbour,
and a gain as the next, which readers are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, component_geometry, layer_groups
from sglang_kvcodec.kernels.basis import GroupBasis, Pairing, pairing, whole_canvas_runs
from sglang_kvcodec.kernels.floats import is_finite_bits, widen_bits
from sglang_kvcodec.kernels.klt import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    CODE_COLUMNS,
    CODE_TOKENS,
    TILE_VALUES,
    calibrated_bases,
    canvas_pointers,
)
from sglang_kvcodec.kernels.planes import Planes, planes_of
from sglang_kvcodec.kernels.pool_layers import check_readable_slots, one_stride, writable_layers
from sglang_kvcodec.kernels.written import device_canvases, to_host
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.component_escapes import LARGEST_ESCAPE
from sglang_kvcodec.transform.floats import to_bytes
from sglang_kvcodec.transform.klt import LARGEST_CODE
from sglang_kvcodec.transform.layout import CANVAS_FILL
from sglang_kvcodec.transform.rope import rotation_table
from sglang_kvcodec.transform.token_gains import gains_of_levels, pack_levels, written_levels

METRIC_VALUES = 32
"""Values of a head that one step of the product with its metric takes."""
SYNTHESIS_VALUES = 32
"""Values of a tile that one step of the product with the synthesis takes."""
VALUE_WARPS = 8
VALUE_STAGES = 2
PRODUCT_WARPS = 8
PRODUCT_STAGES = 3
CODE_VALUES = CODE_TOKENS * CODE_COLUMNS
"""Codes of a program: of 64 tokens, or of all tokens of a shorter page and so many more components."""
_TOO_LARGE = -1
"""In the place of a count of escapes: a component that no page can hold."""


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots"])
def _read_values(
    slots: tl.tensor,
    layers: tl.tensor,
    tiles: tl.tensor,
    means: tl.tensor,
    metrics: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    values: tl.tensor,
    is_bad: tl.tensor,
    columns: tl.tensor,
    slot_stride: tl.tensor,
    rows: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTARY_PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
) -> None:
    HEAD_VALUES: tl.constexpr = 2 * PAIRS
    BLOCK_PAIRS: tl.constexpr = BLOCK_VALUES // 2
    tile = tl.program_id(1)
    layer = tl.load(tiles + tile * TILE_FIELDS + 4)
    number = tl.load(tiles + tile * TILE_FIELDS + 5)
    layer_means = means + (tile - number) * TILE_VALUES
    layer_metrics = metrics + (layer * HEADS).to(tl.int64) * (HEAD_VALUES * HEAD_VALUES)
    address = tl.load(layers + layer)
    if EXPONENT_BITS + MANTISSA_BITS == 7:
        layer_start = address.to(tl.pointer_type(tl.uint8))
    else:
        layer_start = address.to(tl.pointer_type(tl.int16))

    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    slot_starts = layer_start + (tl.load(slots + row, mask=is_row, other=0) * slot_stride)[:, None]
    out = number * TILE_VALUES + tl.arange(0, TILE_VALUES)
    out_head = out // HEAD_VALUES
    acc = tl.zeros((BLOCK_ROWS, TILE_VALUES), tl.float32)
    bad = tl.zeros((BLOCK_ROWS, BLOCK_PAIRS), tl.int32)
    # The heads of which the tile has values, whole: a metric takes all values of its head.
    first_head = number * TILE_VALUES // HEAD_VALUES
    end_head = tl.minimum(((number + 1) * TILE_VALUES + HEAD_VALUES - 1) // HEAD_VALUES, HEADS)
    for start in range(first_head * HEAD_VALUES, end_head * HEAD_VALUES, BLOCK_VALUES):
        pair = start // 2 + tl.arange(0, BLOCK_PAIRS)
        head = pair // PAIRS
        pair_in_head = pair % PAIRS
        if IS_INTERLEAVED:
            dim_a = 2 * pair_in_head
            dim_b = dim_a + 1
        else:
            dim_a = tl.where(pair_in_head < ROTARY_PAIRS, pair_in_head, pair_in_head + ROTARY_PAIRS)
            dim_b = dim_a + tl.where(pair_in_head < ROTARY_PAIRS, ROTARY_PAIRS, PAIRS - ROTARY_PAIRS)
        is_a = is_row[:, None] & (head < end_head)[None, :]
        is_b = is_a & (dim_b < HEAD_DIM)[None, :]
        channels = slot_starts + (head * HEAD_DIM)[None, :]
        bits_a = tl.load(channels + dim_a[None, :], mask=is_a, other=0).to(tl.int32)
        bits_b = tl.load(channels + dim_b[None, :], mask=is_b, other=0).to(tl.int32)
        is_good = is_finite_bits(bits_a, EXPONENT_BITS, MANTISSA_BITS) & is_finite_bits(
            bits_b, EXPONENT_BITS, MANTISSA_BITS
        )
        bad += tl.where(is_good, 0, 1)
        a = tl.where(is_good, widen_bits(bits_a, EXPONENT_BITS, MANTISSA_BITS), 0.0)
        b = tl.where(is_good, widen_bits(bits_b, EXPONENT_BITS, MANTISSA_BITS), 0.0)
        if ROTARY_PAIRS > 0:
            at = row[:, None] * ROTARY_PAIRS + pair_in_head[None, :]
            is_turned = is_a & (pair_in_head < ROTARY_PAIRS)[None, :]
            c = tl.load(cos + at, mask=is_turned, other=1)
            s = tl.load(sin + at, mask=is_turned, other=0)
            a, b = a * c - b * s, b * c + a * s
        value = start + tl.arange(0, BLOCK_VALUES)
        is_value = value < end_head * HEAD_VALUES
        x = tl.reshape(tl.join(a, b), (BLOCK_ROWS, BLOCK_VALUES))
        x -= tl.load(layer_means + value, mask=is_value, other=0)[None, :]
        is_same = is_value[:, None] & ((value // HEAD_VALUES)[:, None] == out_head[None, :])
        metric_at = (value * HEAD_VALUES)[:, None] + (out % HEAD_VALUES)[None, :]
        metric = tl.load(layer_metrics + metric_at, mask=is_same, other=0)
        acc = tl.dot(x, metric, acc, input_precision="tf32x3")
    at = row.to(tl.int64)[:, None] * columns + (tile * TILE_VALUES + tl.arange(0, TILE_VALUES))[None, :]
    tl.store(values + at, acc, mask=is_row[:, None])
    tl.store(is_bad + tl.program_id(0) * tl.num_programs(1) + tile, tl.max(tl.max(bad, axis=1), axis=0))


@triton.jit(do_not_specialize=["rows"])
def _analyse(
    values: tl.tensor,
    synthesis: tl.tensor,
    synthesis_start: tl.tensor,
    column_blocks: tl.tensor,
    components: tl.tensor,
    value_columns: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
) -> None:
    BLOCK_SIZE: tl.constexpr = BLOCK_COLUMNS * TILE_VALUES
    STEPS: tl.constexpr = TILE_VALUES // BLOCK_VALUES
    fields = column_blocks + tl.program_id(1) * FIELDS
    column_block = tl.load(fields)
    in_block = tl.load(fields + 1)
    first_tile = tl.load(fields + 2)
    end_tile = tl.load(fields + 3)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_VALUES)
    left = values + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * value_columns + inner[None, :]
    right = synthesis + in_block * BLOCK_SIZE + column[None, :] * TILE_VALUES + inner[:, None]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for tile in range(first_tile, end_tile):
        tile_right = right + tl.load(synthesis_start + tile).to(tl.int64) * BLOCK_SIZE
        for step in range(STEPS):
            a = tl.load(left + (tile * TILE_VALUES + step * BLOCK_VALUES))
            b = tl.load(tile_right + step * BLOCK_VALUES).to(tl.float32)
            # As much as tf32 holds, and the rest: each product of the two with a number of fp16 is as good as exact.
            upper = (a.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
            acc = tl.dot(upper, b, acc, input_precision="tf32")
            acc = tl.dot(a - upper, b, acc, input_precision="tf32")
    at = row.to(tl.int64)[:, None] * columns + (column_block * BLOCK_COLUMNS + column)[None, :]
    tl.store(components + at, acc, mask=(row < rows)[:, None])


@triton.jit
def _quantise(
    components: tl.tensor,
    sizes: tl.tensor,
    place_column: tl.tensor,
    place_block: tl.tensor,
    place_bits: tl.tensor,
    rounding: tl.tensor,
    page: tl.tensor,
    place: tl.tensor,
    token: tl.tensor,
    places: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
) -> tl.tuple:
    """Codes of places ``(n, 1)`` and tokens ``(1, m)`` of a page.

    Returns:
        Codes with half a high part added; their high parts; which are beyond all that a page holds. Where there is no
        component or token, those of a code of 0.
    """
    exists = (place < places) & (token < TOKENS)
    row = page * TOKENS + token
    column = tl.load(place_column + place, mask=place < places, other=0)
    block = tl.load(place_block + place, mask=place < places, other=0).to(tl.int64)
    bits = tl.load(place_bits + place, mask=place < places, other=0)
    component = tl.load(components + row * columns + column, mask=exists, other=0)
    size = tl.load(sizes + block * rows + row, mask=exists, other=1)
    scaled = tl.div_rn(component, size)
    magnitude = tl.abs(scaled) + rounding
    # Written so that what is no number is too large.
    is_coded = magnitude < LIMIT
    whole = tl.where(is_coded, magnitude, 0.0).to(tl.int32)
    shifted = tl.where(scaled < 0, -whole, whole) + ((1 << bits) >> 1)
    return shifted, shifted >> bits, exists & (is_coded == 0)


@triton.jit(do_not_specialize=["stored_bytes", "rounding", "rows", "places"], do_not_specialize_on_alignment=["stored"])
def _write_codes(
    components: tl.tensor,
    sizes: tl.tensor,
    place_column: tl.tensor,
    place_block: tl.tensor,
    place_bits: tl.tensor,
    place_low_row: tl.tensor,
    runs: tl.tensor,
    luma: tl.tensor,
    chroma: tl.tensor,
    stored: tl.tensor,
    escapes: tl.tensor,
    rounding: tl.tensor,
    pitch_bytes: tl.tensor,
    stored_bytes: tl.tensor,
    places: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    TOKENS: tl.constexpr,
    PICTURE_BYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    ZERO_CODE: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LIMIT: tl.constexpr,
    TOO_LARGE: tl.constexpr,
) -> None:
    token_blocks: tl.constexpr = (TOKENS + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    row_bytes: tl.constexpr = (TOKENS + 7) // 8
    page = (tl.program_id(0) // token_blocks).to(tl.int64)
    first_token = tl.program_id(0) % token_blocks * BLOCK_TOKENS
    token = first_token + tl.arange(0, BLOCK_TOKENS)[None, :]
    place = tl.program_id(1) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    shifted, high, is_too_large = _quantise(
        components, sizes, place_column, place_block, place_bits, rounding, page, place[:, None], token, places,
        columns, rows, TOKENS, LIMIT,
    )  # fmt: skip
    is_code = (place < places)[:, None] & (token < TOKENS)
    is_escaped = is_code & (tl.abs(high) > LARGEST_CODE)
    code = tl.where(is_code & (is_escaped == 0), high, 0) + ZERO_CODE
    value = place[:, None] * TOKENS + token
    exists = (token < TOKENS) & (value < PICTURE_BYTES)
    pointers = canvas_pointers(luma, chroma, runs, page, value, pitch_bytes, exists)
    tl.store(pointers, code.to(tl.uint8), mask=exists)

    bits = tl.load(place_bits + place, mask=place < places, other=0)
    low_row = tl.load(place_low_row + place, mask=place < places, other=0)
    byte = first_token // 8 + tl.arange(0, BLOCK_TOKENS // 8)[None, :]
    is_byte = (byte < row_bytes) & (place < places)[:, None]
    low = stored + page * stored_bytes + low_row[:, None] * row_bytes + byte
    weight = 1 << tl.arange(0, 8)
    for bit in range(tl.max(bits)):
        row_of_bits = tl.where(token < TOKENS, shifted >> bit & 1, 0)
        eights = tl.reshape(row_of_bits, (BLOCK_PLACES, BLOCK_TOKENS // 8, 8))
        packed = tl.sum(eights * weight[None, None, :], axis=2)
        tl.store(low + bit * row_bytes, packed.to(tl.uint8), mask=is_byte & (bit < bits)[:, None])

    count = tl.sum(tl.sum(is_escaped.to(tl.int32), axis=1), axis=0)
    is_any_too_large = tl.max(tl.max(is_too_large.to(tl.int32), axis=1), axis=0)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(escapes + at, tl.where(is_any_too_large > 0, TOO_LARGE, count))


@triton.jit(do_not_specialize=["rounding", "rows", "places"], do_not_specialize_on_alignment=["escape_at", "numbers"])
def _list_escapes(
    components: tl.tensor,
    sizes: tl.tensor,
    place_column: tl.tensor,
    place_block: tl.tensor,
    place_bits: tl.tensor,
    escape_end: tl.tensor,
    escape_at: tl.tensor,
    numbers: tl.tensor,
    rounding: tl.tensor,
    places: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    token_blocks: tl.constexpr = (TOKENS + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    end = tl.load(escape_end + program)
    first = tl.load(escape_end + program - 1, mask=program > 0, other=0)
    if first < end:
        page = (tl.program_id(0) // token_blocks).to(tl.int64)
        token = tl.program_id(0) % token_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
        place = (tl.program_id(1) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES))[:, None]
        _, high, _ = _quantise(
            components, sizes, place_column, place_block, place_bits, rounding, page, place, token, places, columns,
            rows, TOKENS, LIMIT,
        )  # fmt: skip
        is_escaped = (place < places) & (token < TOKENS) & (tl.abs(high) > LARGEST_CODE)
        size: tl.constexpr = BLOCK_PLACES * BLOCK_TOKENS
        is_listed = tl.reshape(is_escaped.to(tl.int32), (size,))
        at = first + tl.cumsum(is_listed, axis=0) - 1
        where = (page * TOKENS + token) * places + place
        tl.store(escape_at + at, tl.reshape(where, (size,)), mask=is_listed > 0)
        tl.store(numbers + at, tl.reshape(high, (size,)), mask=is_listed > 0)


class PackTables:
    """What packing needs of one side of one group beside ``GroupBasis``, on the device.

    Attributes:
        metrics: fp32 ``(layers, kv_heads, n, n)``: of each head, its values in the order of the tiles.
        column_blocks: int32 ``(blocks of columns that are no high digits, 4)``: which one; which of its basis; first
            tile of the basis; tile behind its last.
        block_columns: of each basis its first component's column, and how many there are.
        place_block: int32 ``(components,)``: the basis of each component on the canvas.
        place_low_row: int32 ``(components,)``: its first row of stored bits.
    """

    def __init__(
        self, basis: GroupBasis, metrics: npt.NDArray[np.float32], pairs: Pairing, counts: Sequence[int]
    ) -> None:
        """Makes them from a basis and the metrics ``(layers, kv_heads, head_dim, head_dim)`` of its layers."""
        device = basis.tiles.device
        head_dim = metrics.shape[-1]
        dims = pairs.dims(head_dim).ravel()
        there, inside = dims < head_dim, np.minimum(dims, head_dim - 1)
        ordered = np.where(there[:, None] & there, metrics[..., inside[:, None], inside], np.float32(0))
        self.metrics = torch.from_numpy(np.ascontiguousarray(ordered, np.float32)).to(device)
        tiles = basis.tiles.cpu().numpy()
        column_blocks = []
        self.block_columns = []
        for block, count in enumerate(counts):
            members = np.flatnonzero(tiles[:, 3] == block)
            first, first_code, end = tiles[members[0], :3]
            column_blocks += [
                (column, column - first, members[0], members[-1] + 1) for column in range(first_code, end)
            ]
            self.block_columns.append((int(first_code) * BLOCK_COLUMNS, count))
        self.column_blocks = torch.tensor(np.array(column_blocks, np.int32), device=device)
        ends = torch.tensor([first + count for first, count in self.block_columns], dtype=torch.int32, device=device)
        self.place_block = torch.searchsorted(ends, basis.component_column, right=True).to(torch.int32)
        self.place_low_row = (torch.cumsum(basis.bits, 0) - basis.bits).to(torch.int32)


class KltPack:
    """One tier of one calibration. Thread-safe: what a call makes is on the stream of its thread."""

    def __init__(
        self,
        spec: KVSpec,
        calibration: Calibration,
        tier: str,
        device: torch.device | str,
        bases: Mapping[tuple[int, Side], GroupBasis] | None = None,
    ) -> None:
        """Takes the metrics to the device, and the bases if they are not there.

        Args:
            spec: of the pages.
            calibration: one that ``KltTransform`` takes for them.
            tier: one of its tiers.
            device: of the pool.
            bases: those of ``KltRestore`` for the same.
        """
        self._spec = spec
        self._rope = calibration.rope
        self._tier = calibration.tiers[tier]
        self._device = torch.device(device)
        self.bases = calibrated_bases(spec, calibration, tier, self._device) if bases is None else bases
        self._members = {
            group.index: [
                index
                for index, (first, _) in enumerate(calibration.blocks())
                if group.first_layer <= first < group.first_layer + group.layers
            ]
            for group in layer_groups(spec)
        }
        self._gain_models = calibration.gain_models
        self.tables = {
            (group.index, side): PackTables(
                self.bases[group.index, side],
                calibration.metrics[side][group.first_layer : group.first_layer + group.layers],
                self._pairs(side),
                [len(self._tier.low_bits[side][index]) for index in self._members[group.index]],
            )
            for group in layer_groups(spec)
            for side in spec.sides
        }
        self.geometry = component_geometry(spec, max(basis.components for basis in self.bases.values()))
        self._runs = whole_canvas_runs(self.geometry).to(self._device)
        self._code_tokens = min(CODE_TOKENS, max(8, triton.next_power_of_2(spec.page_tokens)))

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvases."""
        return self.geometry.canvas_shape

    def pack(
        self,
        group: LayerGroup,
        side: Side,
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        canvases: torch.Tensor | None = None,
    ) -> list[PackedSide] | None:
        """See ``PagePack.pack``."""
        spec, pages = self._spec, len(first_positions)
        layers = writable_layers(spec, buffers)
        stride = one_stride(layers, group.layers)
        check_readable_slots(slots, pages, spec, layers[0])
        canvases, written = device_canvases(canvases, pages, self.canvas_shape, slots.device)
        basis, tables = self.bases[group.index, side], self.tables[group.index, side]
        with torch.cuda.device_of(layers[0]):  # type: ignore[no-untyped-call]
            values, is_bad = self._read_values(basis, tables, side, first_positions, slots, layers, stride)
            components = self._analyse(basis, tables, values)
            levels = self._levels(tables, group, side, components, first_positions)
            steps = torch.tensor([self._tier.steps[side][index] for index in self._members[group.index]])
            sizes = steps.to(slots.device)[:, None, None] * gains_of_levels(levels).transpose(0, 1)
            arguments = {
                "components": components,
                "sizes": sizes.contiguous(),
                "place_column": basis.component_column,
                "place_block": tables.place_block,
                "place_bits": basis.bits,
                "rounding": self._tier.rounding,
                "places": basis.components,
                "columns": basis.columns,
                "rows": len(components),
                "TOKENS": spec.page_tokens,
                "BLOCK_TOKENS": self._code_tokens,
                "BLOCK_PLACES": CODE_VALUES // self._code_tokens,
                "LARGEST_CODE": LARGEST_CODE,
                "LIMIT": float(LARGEST_ESCAPE + 1),
            }
            stored, counts = self._write_codes(arguments, basis, tables, planes_of(written))
            if written is not canvases:
                canvases.copy_(written, non_blocking=True)
            # Waits for all of the above.
            counted, bad, rows, gains = to_host(counts, is_bad.any(), stored, levels)
            if bool((counted == _TOO_LARGE).any()) or bool(bad):
                return None
            escapes = self._escapes(arguments, basis, counted)
        return [
            PackedSide(
                canvases[page],
                pack_levels(gains[page]) + to_bytes(rows[page]),
                escapes[page],
                tuple(steps.tolist()),
            )
            for page in range(pages)
        ]

    def _pairs(self, side: Side) -> Pairing:
        return pairing(self._spec.head_dim, self._rope if side is Side.KEY else None)

    def _read_values(
        self,
        basis: GroupBasis,
        tables: PackTables,
        side: Side,
        first_positions: Sequence[int],
        slots: torch.Tensor,
        layers: Sequence[torch.Tensor],
        stride: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 ``(pages * page_tokens, tiles * TILE_VALUES)``, and int32: not zero where there is NaN or infinity."""
        spec, device, rows = self._spec, slots.device, len(slots)
        pairs = self._pairs(side)
        nothing = torch.empty(0, dtype=torch.float32, device=device)
        cos, sin = nothing, nothing
        if pairs.rotary_pairs:
            assert self._rope is not None, "nothing else is rotated"
            made = [rotation_table(first, spec.page_tokens, self._rope, inverse=True) for first in first_positions]
            cos, sin = (torch.cat(halves).to(device) for halves in zip(*made, strict=True))
        grid = (triton.cdiv(rows, BLOCK_ROWS), len(basis.tiles))
        columns = len(basis.tiles) * TILE_VALUES
        values = torch.empty((rows, columns), dtype=torch.float32, device=device)
        is_bad = torch.empty(grid, dtype=torch.int32, device=device)
        addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64)
        _read_values[grid](
            slots=slots,
            layers=addresses.to(device),
            tiles=basis.tiles,
            means=basis.means,
            metrics=tables.metrics,
            cos=cos,
            sin=sin,
            values=values,
            is_bad=is_bad,
            columns=columns,
            slot_stride=stride,
            rows=rows,
            HEADS=spec.kv_heads,
            HEAD_DIM=spec.head_dim,
            PAIRS=pairs.pairs,
            ROTARY_PAIRS=pairs.rotary_pairs,
            IS_INTERLEAVED=pairs.is_interleaved,
            EXPONENT_BITS=spec.dtype.exponent_bits,
            MANTISSA_BITS=spec.dtype.mantissa_bits,
            TILE_FIELDS=basis.tiles.shape[1],
            BLOCK_ROWS=BLOCK_ROWS,
            TILE_VALUES=TILE_VALUES,
            BLOCK_VALUES=METRIC_VALUES,
            num_warps=VALUE_WARPS,
            num_stages=VALUE_STAGES,
        )
        return values, is_bad

    def _analyse(self, basis: GroupBasis, tables: PackTables, values: torch.Tensor) -> torch.Tensor:
        """fp32 ``(pages * page_tokens, columns)``; columns of high digits are left as they come."""
        components = torch.empty((len(values), basis.columns), dtype=torch.float32, device=values.device)
        _analyse[(triton.cdiv(len(values), BLOCK_ROWS), len(tables.column_blocks))](
            values=values,
            synthesis=basis.synthesis,
            synthesis_start=basis.synthesis_start,
            column_blocks=tables.column_blocks,
            components=components,
            value_columns=values.shape[1],
            columns=basis.columns,
            rows=len(values),
            FIELDS=tables.column_blocks.shape[1],
            BLOCK_ROWS=BLOCK_ROWS,
            TILE_VALUES=TILE_VALUES,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            BLOCK_VALUES=SYNTHESIS_VALUES,
            num_warps=PRODUCT_WARPS,
            num_stages=PRODUCT_STAGES,
        )
        return components

    def _levels(
        self,
        tables: PackTables,
        group: LayerGroup,
        side: Side,
        components: torch.Tensor,
        first_positions: Sequence[int],
    ) -> torch.Tensor:
        """uint8 ``(pages, blocks, page_tokens)``, by the reference's own function on the components' device."""
        by_page = components.view(len(first_positions), self._spec.page_tokens, -1)
        return written_levels(
            [by_page[..., first : first + count] for first, count in tables.block_columns],
            [self._gain_models[side][index] for index in self._members[group.index]],
            self._tier,
            first_positions,
        )

    def _write_codes(
        self, arguments: Mapping[str, object], basis: GroupBasis, tables: PackTables, planes: Planes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Low bits, uint8 ``(pages, bytes)``; and how many escapes each program found, int32."""
        tokens, device = self._spec.page_tokens, planes.luma.device
        grid = (
            len(planes) * triton.cdiv(tokens, self._code_tokens),
            triton.cdiv(triton.cdiv(self.geometry.picture_bytes, tokens), CODE_VALUES // self._code_tokens),
        )
        low_bytes = basis.low_rows * triton.cdiv(tokens, 8)
        stored = torch.empty((len(planes), low_bytes), dtype=torch.uint8, device=device)
        counts = torch.empty(grid, dtype=torch.int32, device=device)
        _write_codes[grid](
            **arguments,
            place_low_row=tables.place_low_row,
            runs=self._runs,
            luma=planes.luma,
            chroma=planes.chroma,
            stored=stored,
            escapes=counts,
            pitch_bytes=planes.pitch_bytes,
            stored_bytes=low_bytes,
            PICTURE_BYTES=self.geometry.picture_bytes,
            ZERO_CODE=CANVAS_FILL,
            TOO_LARGE=_TOO_LARGE,
        )
        return stored, counts

    def _escapes(self, arguments: Mapping[str, object], basis: GroupBasis, counts: torch.Tensor) -> list[bytes]:
        """The escapes of each page as ``pack_component_escapes`` writes them."""
        page_values = self._spec.page_tokens * basis.components
        blocks_of_page = triton.cdiv(self._spec.page_tokens, self._code_tokens)
        pages = len(counts) // blocks_of_page
        total = int(counts.sum())
        if not total:
            return [b""] * pages
        ends = torch.cumsum(counts.flatten(), 0)
        where = torch.empty(total, dtype=torch.int64, device=self._device)
        numbers = torch.empty(total, dtype=torch.int32, device=self._device)
        _list_escapes[tuple(counts.shape)](
            **arguments, escape_end=ends.to(self._device), escape_at=where, numbers=numbers
        )
        found, number = (each.numpy() for each in to_host(where, numbers))
        order = np.argsort(found)
        found, number = found[order], number[order]
        bounds = np.searchsorted(found, np.arange(1, pages) * page_values)
        return [
            (at - page * page_values).astype("<u4").tobytes() + values.astype("<i4").tobytes()
            for page, (at, values) in enumerate(zip(np.split(found, bounds), np.split(number, bounds), strict=True))
        ]
