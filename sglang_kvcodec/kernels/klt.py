"""Calibrated pages to the pool's slots: the inverse of ``transform/klt.py``, for each side and group in a few launches.

1. **Codes.** Bytes of the canvas, and the low bits beside them, become a matrix of whole numbers in fp16, one row for
   each token of each page and one column for each component (``kernels/basis.py``). It is a pass of its own because the
   product reads every code once for each tile of values: 24 times with a basis over three layers of 8 heads x 128.
   Then escapes are written over it, one of 170 values or so.
2. **Product.** Tiles of the matrix times the synthesis on the tensor cores, accumulated in fp32; then the few escapes
   that are too large for a code, as products of one row; then step, mean, rotation, and the pool's type, into the slots
   of one layer of each tile.

What it restores differs from the reference by the rounding of fp32 sums in another order, and by that alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, component_geometry, layer_groups
from sglang_kvcodec.kernels.basis import DIGIT, HIGH_DIGIT, LOW_DIGIT, GroupBasis, canvas_runs, group_basis, pairing
from sglang_kvcodec.kernels.calibrated_sides import calibrated_sides
from sglang_kvcodec.kernels.floats import narrow_bits
from sglang_kvcodec.kernels.planes import Planes, planes_to_read
from sglang_kvcodec.kernels.pool_layers import check_slots, one_stride, writable_layers
from sglang_kvcodec.kernels.turns import Turns
from sglang_kvcodec.kernels.upload import upload_together
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.component_escapes import ESCAPE_BYTES
from sglang_kvcodec.transform.floats import torch_dtype
from sglang_kvcodec.transform.layout import CANVAS_FILL
from sglang_kvcodec.transform.token_gains import UNIT_LEVEL, gains_of_levels

BLOCK_ROWS = 128
TILE_VALUES = 128
BLOCK_COLUMNS = 64
PRODUCT_WARPS = 8
PRODUCT_STAGES = 3
CODE_TOKENS = 64
CODE_COLUMNS = 32
ESCAPE_BLOCK = 128


@triton.jit
def canvas_pointers(
    luma: tl.tensor,
    chroma: tl.tensor,
    runs: tl.tensor,
    page: tl.tensor,
    value: tl.tensor,
    pitch_bytes: tl.tensor,
    exists: tl.tensor,
) -> tl.tensor:
    """Where the values with numbers ``value`` lie on the canvases of ``page``."""
    run = tl.load(runs + value // 16, mask=exists, other=0)
    inside = value % 16
    is_chroma = run & 1
    row = (run >> 15) + inside // 4
    column = ((run >> 1) & 0x3FFF) + inside % 4 * (1 + is_chroma)
    first = tl.where(is_chroma == 1, tl.load(chroma + page), tl.load(luma + page))
    return (first + (row * pitch_bytes + column)).to(tl.pointer_type(tl.uint8))


@triton.jit
def _canvas_values(
    luma: tl.tensor,
    chroma: tl.tensor,
    runs: tl.tensor,
    page: tl.tensor,
    value: tl.tensor,
    pitch_bytes: tl.tensor,
    exists: tl.tensor,
    ZERO_CODE: tl.constexpr,
) -> tl.tensor:
    """The values with numbers ``value`` on the canvases of ``page``, as int32."""
    pointers = canvas_pointers(luma, chroma, runs, page, value, pitch_bytes, exists)
    return tl.load(pointers, mask=exists, other=0).to(tl.int32) - ZERO_CODE


@triton.jit(do_not_specialize_on_alignment=["stored", "low_at"])
def _read_codes(
    luma: tl.tensor,
    chroma: tl.tensor,
    runs: tl.tensor,
    stored: tl.tensor,
    low_at: tl.tensor,
    column_component: tl.tensor,
    column_bits: tl.tensor,
    column_low_row: tl.tensor,
    column_digit: tl.tensor,
    codes: tl.tensor,
    columns: tl.tensor,
    pitch_bytes: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ZERO_CODE: tl.constexpr,
    DIGIT: tl.constexpr,
    LOW_DIGIT: tl.constexpr,
    HIGH_DIGIT: tl.constexpr,
) -> None:
    token_blocks: tl.constexpr = (TOKENS + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    page = (tl.program_id(0) // token_blocks).to(tl.int64)
    token = tl.program_id(0) % token_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    component = tl.load(column_component + column)[:, None]
    bits = tl.load(column_bits + column)[:, None]
    exists = (component >= 0) & (token < TOKENS)
    high = _canvas_values(
        luma, chroma, runs, page, tl.maximum(component, 0) * TOKENS + token, pitch_bytes, exists, ZERO_CODE
    )
    code = (high << bits) - ((1 << bits) >> 1)
    row_bytes: tl.constexpr = (TOKENS + 7) // 8
    low = stored + tl.load(low_at + page) + tl.load(column_low_row + column)[:, None] * row_bytes
    for bit in range(tl.max(bits)):
        byte = tl.load(low + bit * row_bytes + token // 8, mask=exists & (bit < bits), other=0)
        code += (byte.to(tl.int32) >> (token % 8) & 1) << bit
    digit = tl.load(column_digit + column)[:, None]
    upper = (code + DIGIT // 2) >> 11
    code = tl.where(digit == HIGH_DIGIT, upper, tl.where(digit == LOW_DIGIT, code - upper * DIGIT, code))
    code = tl.where(exists, code, 0)
    row = page * TOKENS + token
    tl.store(codes + row * columns + column[:, None], code.to(tl.float16), mask=token < TOKENS)


@triton.jit(
    do_not_specialize=["components"],
    do_not_specialize_on_alignment=["first_escape_of_page", "escape_position", "escape_number"],
)
def _write_escapes(
    codes: tl.tensor,
    component_bits: tl.tensor,
    component_column: tl.tensor,
    component_digit_column: tl.tensor,
    component_largest: tl.tensor,
    first_escape_of_page: tl.tensor,
    escape_position: tl.tensor,
    escape_number: tl.tensor,
    columns: tl.tensor,
    components: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIGIT: tl.constexpr,
) -> None:
    """The codes of one page's escapes, where they can be held, over what the canvas had in their places."""
    page = tl.program_id(1)
    index = tl.load(first_escape_of_page + page) + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < tl.load(first_escape_of_page + page + 1)
    position = tl.load(escape_position + index, mask=exists, other=0).to(tl.int32)
    component = position % components
    number = tl.load(escape_number + index, mask=exists, other=0)
    exists &= tl.abs(number) <= tl.load(component_largest + component, mask=exists, other=-1)
    row = codes + (page * TOKENS + position // components).to(tl.int64) * columns
    column = row + tl.load(component_column + component, mask=exists, other=0)
    digit_column = tl.load(component_digit_column + component, mask=exists, other=-1)
    is_wide = exists & (digit_column >= 0)
    bits = tl.load(component_bits + component, mask=exists, other=0)
    half = (1 << bits) >> 1
    code = tl.load(column, mask=exists, other=0).to(tl.int32)
    code += tl.load(row + digit_column, mask=is_wide, other=0).to(tl.int32) * DIGIT
    # The low bits are right already.
    code = (number << bits) - half + ((code + half) & ((1 << bits) - 1))
    upper = tl.where(is_wide, (code + DIGIT // 2) >> 11, 0)
    tl.store(column, (code - upper * DIGIT).to(tl.float16), mask=exists)
    tl.store(row + digit_column, upper.to(tl.float16), mask=is_wide)


@triton.jit(
    do_not_specialize=["escapes"],
    do_not_specialize_on_alignment=["escape_row", "escape_component", "escape_number", "excess"],
)
def _read_far_escapes(
    luma: tl.tensor,
    chroma: tl.tensor,
    runs: tl.tensor,
    component_bits: tl.tensor,
    escape_row: tl.tensor,
    escape_component: tl.tensor,
    escape_number: tl.tensor,
    excess: tl.tensor,
    pitch_bytes: tl.tensor,
    escapes: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO_CODE: tl.constexpr,
) -> None:
    """How much each escape exceeds what the canvas holds in its place, in steps."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < escapes
    row = tl.load(escape_row + index, mask=exists, other=0)
    component = tl.load(escape_component + index, mask=exists, other=0)
    value = component * TOKENS + row % TOKENS
    high = _canvas_values(luma, chroma, runs, row // TOKENS, value, pitch_bytes, exists, ZERO_CODE)
    number = tl.load(escape_number + index, mask=exists, other=0)
    bits = tl.load(component_bits + component, mask=exists, other=0)
    tl.store(excess + index, ((number - high) << bits).to(tl.float32), mask=exists)


@triton.jit(
    do_not_specialize=["rows", "slot_count", "blocks"],
    do_not_specialize_on_alignment=[
        "escape_row",
        "escape_column",
        "excess",
        "first_escape",
        "slots",
        "steps",
        "stored",
        "gains_at",
    ],
)
def _restore_klt_tile(
    codes: tl.tensor,
    synthesis: tl.tensor,
    synthesis_start: tl.tensor,
    means: tl.tensor,
    tiles: tl.tensor,
    steps: tl.tensor,
    stored: tl.tensor,
    gains_at: tl.tensor,
    gains: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    first_escape: tl.tensor,
    escape_row: tl.tensor,
    escape_column: tl.tensor,
    excess: tl.tensor,
    slots: tl.tensor,
    layers: tl.tensor,
    columns: tl.tensor,
    slot_stride: tl.tensor,
    slot_count: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    TOKENS: tl.constexpr,
    UNIT_LEVEL: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTARY_PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    DIGIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    TILE_PAIRS: tl.constexpr = TILE_VALUES // 2
    tile = tl.program_id(1)
    fields = tiles + tile * TILE_FIELDS
    first_block = tl.load(fields)
    first_code_block = tl.load(fields + 1)
    end_block = tl.load(fields + 2)
    block = tl.load(fields + 3)
    layer = tl.load(fields + 4)
    first_pair = tl.load(fields + 5) * TILE_PAIRS

    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    inner = tl.arange(0, BLOCK_COLUMNS)
    value = tl.arange(0, TILE_VALUES)
    code_rows = codes + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * columns
    BLOCK_VALUES: tl.constexpr = BLOCK_COLUMNS * TILE_VALUES
    basis = synthesis + tl.load(synthesis_start + tile).to(tl.int64) * BLOCK_VALUES
    code_tile = code_rows + inner[None, :]
    basis_tile = basis + inner[:, None] * TILE_VALUES + value[None, :]
    acc = tl.zeros((BLOCK_ROWS, TILE_VALUES), tl.float32)
    for index in range(first_block, first_code_block):
        a = tl.load(code_tile + index * BLOCK_COLUMNS)
        b = tl.load(basis_tile + (index - first_block) * BLOCK_VALUES)
        acc = tl.dot(a, b, acc)
    acc *= DIGIT
    for index in range(first_code_block, end_block):
        a = tl.load(code_tile + index * BLOCK_COLUMNS)
        b = tl.load(basis_tile + (index - first_block) * BLOCK_VALUES)
        acc = tl.dot(a, b, acc)
    for escape in range(tl.load(first_escape + tl.program_id(0)), tl.load(first_escape + tl.program_id(0) + 1)):
        column = tl.load(escape_column + escape)
        if (column >= first_code_block * BLOCK_COLUMNS) & (column < end_block * BLOCK_COLUMNS):
            b = tl.load(basis + (column - first_block * BLOCK_COLUMNS) * TILE_VALUES + value).to(tl.float32)
            a = tl.where(row == tl.load(escape_row + escape), tl.load(excess + escape), 0.0)
            acc += a[:, None] * b[None, :]

    page = row // TOKENS
    token = row % TOKENS
    page_gains = tl.load(gains_at + page, mask=is_row, other=-1)
    level_at = stored + page_gains + (block * ((TOKENS + 1) // 2) + token // 2)
    both_levels = tl.load(level_at, mask=page_gains >= 0, other=UNIT_LEVEL | UNIT_LEVEL << 4).to(tl.int32)
    gain = tl.load(gains + ((both_levels >> 4 * (token % 2)) & 15))
    step = tl.load(steps + page * blocks + block, mask=is_row, other=0) * gain
    wide = acc * step[:, None] + tl.load(means + tile * TILE_VALUES + value)[None, :]
    a, b = tl.split(tl.reshape(wide, (BLOCK_ROWS, TILE_PAIRS, 2)))
    pair = first_pair + tl.arange(0, TILE_PAIRS)
    head = pair // PAIRS
    pair_in_head = pair % PAIRS
    if ROTARY_PAIRS > 0:
        at = row[:, None] * ROTARY_PAIRS + pair_in_head[None, :]
        is_turned = is_row[:, None] & (pair_in_head < ROTARY_PAIRS)[None, :]
        c = tl.load(cos + at, mask=is_turned, other=1)
        s = tl.load(sin + at, mask=is_turned, other=0)
        a, b = a * c - b * s, b * c + a * s

    address = tl.load(layers + layer)
    if EXPONENT_BITS + MANTISSA_BITS == 7:
        layer_start = address.to(tl.pointer_type(tl.uint8))
    else:
        layer_start = address.to(tl.pointer_type(tl.int16))
    if IS_ALIGNED:
        layer_start = tl.multiple_of(layer_start, 16)
    slot = tl.load(slots + row, mask=is_row, other=-1)
    is_written = (slot >= 0) & (slot < slot_count)
    slot_starts = layer_start + (slot * slot_stride)[:, None]
    if IS_INTERLEAVED and 2 * PAIRS == HEAD_DIM:
        # Neighbours, heads without a gap: the tile is one run of channels.
        both = tl.reshape(tl.join(a, b), (BLOCK_ROWS, TILE_VALUES))
        bits = narrow_bits(both, EXPONENT_BITS, MANTISSA_BITS, LARGEST)
        channel = 2 * first_pair + value
        exists = is_written[:, None] & (channel < HEADS * HEAD_DIM)[None, :]
        tl.store(slot_starts + channel[None, :], bits.to(layer_start.dtype.element_ty), mask=exists)
    else:
        if IS_INTERLEAVED:
            dim_a = 2 * pair_in_head
            dim_b = dim_a + 1
        elif ROTARY_PAIRS == PAIRS:
            # What the compiler sees to be runs: each half is stored in wide words.
            dim_a = pair_in_head
            dim_b = dim_a + PAIRS
        else:
            dim_a = tl.where(pair_in_head < ROTARY_PAIRS, pair_in_head, pair_in_head + ROTARY_PAIRS)
            dim_b = dim_a + tl.where(pair_in_head < ROTARY_PAIRS, ROTARY_PAIRS, PAIRS - ROTARY_PAIRS)
        bits_a = narrow_bits(a, EXPONENT_BITS, MANTISSA_BITS, LARGEST).to(layer_start.dtype.element_ty)
        bits_b = narrow_bits(b, EXPONENT_BITS, MANTISSA_BITS, LARGEST).to(layer_start.dtype.element_ty)
        exists_a = is_written[:, None] & (head < HEADS)[None, :]
        exists_b = exists_a & (dim_b < HEAD_DIM)[None, :]
        channels = slot_starts + (head * HEAD_DIM)[None, :]
        tl.store(channels + dim_a[None, :], bits_a, mask=exists_a)
        tl.store(channels + dim_b[None, :], bits_b, mask=exists_b)


def calibrated_bases(
    spec: KVSpec, calibration: Calibration, tier: str, device: torch.device
) -> dict[tuple[int, Side], GroupBasis]:
    """The tables of each layer group and side, on the device: about as many bytes as the calibration has of bases."""
    return {
        (group.index, side): group_basis(
            spec,
            calibration,
            tier,
            group,
            side,
            tile_values=TILE_VALUES,
            column_block=BLOCK_COLUMNS,
            device=device,
        )
        for group in layer_groups(spec)
        for side in spec.sides
    }


class KltRestore:
    """One tier of one calibration. Thread-safe: what a call makes is on the stream of its thread."""

    def __init__(self, spec: KVSpec, calibration: Calibration, tier: str, device: torch.device | str) -> None:
        """Takes the bases to the device.

        Args:
            spec: of the pages.
            calibration: one that ``KltTransform`` takes for them.
            tier: one of its tiers.
            device: of the pool.
        """
        self._spec = spec
        self._rope = calibration.rope
        self._device = torch.device(device)
        self.bases = calibrated_bases(spec, calibration, tier, self._device)
        self.geometry = component_geometry(spec, max(basis.components for basis in self.bases.values()))
        self._runs = canvas_runs(self.geometry).to(self._device)
        self._gains = gains_of_levels(torch.arange(16, device=self._device))
        self._turns = Turns(calibration.rope, spec.page_tokens, self._device) if calibration.rope is not None else None

    def restore(
        self,
        group: LayerGroup,
        side: Side,
        packed: Sequence[PackedSide],
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        planes: Planes | None = None,
    ) -> None:
        """See ``PageRestore.restore``."""
        spec = self._spec
        layers = writable_layers(spec, buffers)
        stride = one_stride(layers, group.layers)
        check_slots(slots, len(packed), spec, layers[0])
        if len(first_positions) != len(packed):
            raise ValueError("expected a position for each page")
        basis = self.bases[group.index, side]
        sides = calibrated_sides(packed, basis, spec.page_tokens, canvas=planes is None, block_rows=BLOCK_ROWS)
        most_escapes = max(len(page.escapes) for page in packed) // ESCAPE_BYTES
        planes = planes_to_read(packed, planes, self.geometry, slots.device)
        rows = len(packed) * spec.page_tokens
        with torch.cuda.device_of(layers[0]):  # type: ignore[no-untyped-call]
            cos, sin = self._turns_of(side, first_positions)
            sides["layers"] = np.array([layer.data_ptr() for layer in layers], np.int64)
            there = upload_together(sides, slots.device)
            codes = self._codes(basis, planes, there, most_escapes)
            far = self._far_escapes(basis, planes, there)
            item_bytes = spec.dtype.item_bytes
            pairs = pairing(spec.head_dim, self._rope if side is Side.KEY else None)
            grid = (triton.cdiv(rows, BLOCK_ROWS), len(basis.tiles))
            _restore_klt_tile[grid](
                codes=codes,
                synthesis=basis.synthesis,
                synthesis_start=basis.synthesis_start,
                means=basis.means,
                tiles=basis.tiles,
                steps=there["steps"],
                stored=there["stored"],
                gains_at=there["gains_at"],
                gains=self._gains,
                cos=cos,
                sin=sin,
                **far,
                slots=slots,
                layers=there["layers"],
                columns=basis.columns,
                slot_stride=stride,
                slot_count=len(layers[0]),
                rows=rows,
                blocks=basis.blocks,
                TOKENS=spec.page_tokens,
                UNIT_LEVEL=UNIT_LEVEL,
                HEADS=spec.kv_heads,
                HEAD_DIM=spec.head_dim,
                PAIRS=pairs.pairs,
                ROTARY_PAIRS=pairs.rotary_pairs,
                IS_INTERLEAVED=pairs.is_interleaved,
                EXPONENT_BITS=spec.dtype.exponent_bits,
                MANTISSA_BITS=spec.dtype.mantissa_bits,
                LARGEST=float(torch.finfo(torch_dtype(spec.dtype)).max),
                IS_ALIGNED=all(layer.data_ptr() % 16 == 0 for layer in layers) and stride * item_bytes % 16 == 0,
                TILE_FIELDS=basis.tiles.shape[1],
                DIGIT=DIGIT,
                BLOCK_ROWS=BLOCK_ROWS,
                TILE_VALUES=TILE_VALUES,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
                num_warps=PRODUCT_WARPS,
                num_stages=PRODUCT_STAGES,
            )

    def _codes(
        self, basis: GroupBasis, planes: Planes, there: Mapping[str, torch.Tensor], most_escapes: int
    ) -> torch.Tensor:
        """fp16 ``(pages * page_tokens, columns)``."""
        tokens, device = self._spec.page_tokens, planes.luma.device
        codes = torch.empty((len(planes) * tokens, basis.columns), dtype=torch.float16, device=device)
        grid = (len(planes) * triton.cdiv(tokens, CODE_TOKENS), basis.columns // CODE_COLUMNS)
        _read_codes[grid](
            luma=planes.luma,
            chroma=planes.chroma,
            runs=self._runs,
            stored=there["stored"],
            low_at=there["low_at"],
            column_component=basis.column_component,
            column_bits=basis.column_bits,
            column_low_row=basis.column_low_row,
            column_digit=basis.column_digit,
            codes=codes,
            columns=basis.columns,
            pitch_bytes=planes.pitch_bytes,
            TOKENS=tokens,
            BLOCK_TOKENS=CODE_TOKENS,
            BLOCK_COLUMNS=CODE_COLUMNS,
            ZERO_CODE=CANVAS_FILL,
            DIGIT=DIGIT,
            LOW_DIGIT=LOW_DIGIT,
            HIGH_DIGIT=HIGH_DIGIT,
        )
        if most_escapes:
            _write_escapes[triton.cdiv(most_escapes, ESCAPE_BLOCK), len(planes)](
                codes=codes,
                component_bits=basis.bits,
                component_column=basis.component_column,
                component_digit_column=basis.component_digit_column,
                component_largest=basis.component_largest,
                first_escape_of_page=there["first_escape_of_page"],
                escape_position=there["escape_position"],
                escape_number=there["escape_number"],
                columns=basis.columns,
                components=basis.components,
                TOKENS=tokens,
                BLOCK=ESCAPE_BLOCK,
                DIGIT=DIGIT,
            )
        return codes

    def _far_escapes(
        self, basis: GroupBasis, planes: Planes, there: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the product adds of the escapes that no code holds."""
        row, component, number = there["far_row"], there["far_component"], there["far_number"]
        excess = torch.empty(len(row), dtype=torch.float32, device=row.device)
        column = row
        if len(row):
            column = basis.component_column[component]
            _read_far_escapes[(triton.cdiv(len(row), ESCAPE_BLOCK),)](
                luma=planes.luma,
                chroma=planes.chroma,
                runs=self._runs,
                component_bits=basis.bits,
                escape_row=row,
                escape_component=component,
                escape_number=number,
                excess=excess,
                pitch_bytes=planes.pitch_bytes,
                escapes=len(row),
                TOKENS=self._spec.page_tokens,
                BLOCK=ESCAPE_BLOCK,
                ZERO_CODE=CANVAS_FILL,
            )
        return {"first_escape": there["first_far"], "escape_row": row, "escape_column": column, "excess": excess}

    def _turns_of(self, side: Side, first_positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if side is not Side.KEY or self._turns is None:
            nothing = torch.empty(0, dtype=torch.float32, device=self._device)
            return nothing, nothing
        return self._turns.get(first_positions)
