"""The bases of one side of one layer group as the kernels want them: in tiles, on the device, made once.

The product of codes and synthesis runs over *columns* of a scratch matrix. A component is one column, or two where it
gives up so many low bits that its codes are not all whole numbers of fp16 (``WIDE_BITS``): then ``code = high * 2048 +
low`` with both digits exact in fp16, and the accumulator is multiplied with 2048 between the high digits and the rest.
So the codes enter the product exactly, at the price of a column more for a wide component. tf32 would be exact up to
2048 as well, with half the tensor cores' rate and twice the bytes; three bf16 products would split the fp16 synthesis
too.

What comes out are *pairs* of values that are rotated together, first and second side by side, so that both are in the
same thread. The values of a layer fill whole tiles: no tile crosses a layer.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.format.spec import ComponentGeometry, KVSpec, LayerGroup, Side
from sglang_kvcodec.transform.components import component_layout

WIDE_BITS = 4
"""Low bits from which on a component has two columns: with 3, codes are at most 128 * 8 + 4, with 4 beyond 2048."""
DIGIT = 2048
"""Ratio of the two columns of a wide component."""
PLAIN, LOW_DIGIT, HIGH_DIGIT = 0, 1, 2
"""What a column holds of its component's code."""
TILE_FIELDS = 6
"""Of a tile: first column, first column that is no high digit, column behind the last, all three in units of a column
block; block; layer in the group; number of the tile in the layer. Units tell the compiler what divides them."""
_RUN = 16
"""Values of a canvas that follow each other in a 4 x 4 group of one plane."""


@dataclasses.dataclass(frozen=True)
class GroupBasis:
    """Tables of one side of one group. All int32 unless said otherwise.

    Attributes:
        column_component: place of each column's component on the canvas, ``-1`` for a column that fills up.
        column_bits: low bits of the component.
        column_low_row: its first row of stored bits.
        column_digit: ``PLAIN``, ``LOW_DIGIT`` or ``HIGH_DIGIT``.
        component_column: for each component, its column of weight one.
        component_digit_column: the column of its high digit, ``-1`` where it has none.
        component_largest: the largest number, of either sign, that an escape of it may have to be held by its codes.
        largest_in_place: the same in host memory.
        low_rows: rows of stored bits in a page.
        blocks: number of bases, each with a step.
        tiles: ``(tiles, TILE_FIELDS)``.
        synthesis_start: where a tile's part of ``synthesis`` begins, in units of ``column_block * tile_values``.
        synthesis: fp16, for each tile ``(columns of its block, tile_values)``.
        means: fp32 ``(tiles, tile_values)``.
        bits: low bits of each component in order.
    """

    column_component: torch.Tensor
    column_bits: torch.Tensor
    column_low_row: torch.Tensor
    column_digit: torch.Tensor
    component_column: torch.Tensor
    component_digit_column: torch.Tensor
    component_largest: torch.Tensor
    largest_in_place: npt.NDArray[np.int32]
    low_rows: int
    blocks: int
    tiles: torch.Tensor
    synthesis_start: torch.Tensor
    synthesis: torch.Tensor
    means: torch.Tensor
    bits: torch.Tensor

    @property
    def columns(self) -> int:
        """Of the scratch matrix."""
        return len(self.column_component)

    @property
    def components(self) -> int:
        """On the canvas."""
        return len(self.bits)


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which dimensions of a head form pairs.

    Attributes:
        rotary_pairs: the first pairs, which are rotated.
        pairs: of a head; where ``head_dim`` is odd the last one has no second.
        is_interleaved: pairs are neighbours; else the halves of the rotated part, then the halves of the rest.
    """

    rotary_pairs: int
    pairs: int
    is_interleaved: bool

    def dims(self, head_dim: int) -> npt.NDArray[np.int64]:
        """``(pairs, 2)``: the dimensions of each pair, ``head_dim`` or more for one that is not there."""
        pair = np.arange(self.pairs)
        if self.is_interleaved:
            return np.stack([2 * pair, 2 * pair + 1], axis=1)
        rest = pair + self.rotary_pairs
        turned = np.stack([pair, pair + self.rotary_pairs], axis=1)
        others = np.stack([rest, rest + self.pairs - self.rotary_pairs], axis=1)
        return np.where((pair < self.rotary_pairs)[:, None], turned, others)


def pairing(head_dim: int, rope: RopeSpec | None) -> Pairing:
    """The pairs of a rotation; of none, neighbours, which are written side by side."""
    if rope is None:
        return Pairing(0, -(-head_dim // 2), is_interleaved=True)
    rotary_pairs = rope.rotary_dim // 2
    return Pairing(rotary_pairs, rotary_pairs + -(-(head_dim - rope.rotary_dim) // 2), rope.is_interleaved)


def group_basis(
    spec: KVSpec,
    calibration: Calibration,
    tier: str,
    group: LayerGroup,
    side: Side,
    *,
    tile_values: int,
    column_block: int,
    device: torch.device,
) -> GroupBasis:
    """Makes the tables.

    Args:
        spec: of the pages.
        calibration: one that ``KltTransform`` takes for them.
        tier: one of its tiers.
        group: which layers.
        side: which tensor of them.
        tile_values: values of a tile, even.
        column_block: columns of a block of high digits, and of the others, are filled up to a multiple of this.
        device: where the tables go.
    """
    members = [
        (index, first - group.first_layer, layers)
        for index, (first, layers) in enumerate(calibration.blocks())
        if group.first_layer <= first < group.first_layer + group.layers
    ]
    low_bits = [calibration.tiers[tier].low_bits[side][index].astype(np.int64) for index, _, _ in members]
    places = _places_on_canvas([len(bits) for bits in low_bits])
    run_bits = np.zeros(sum(len(bits) for bits in low_bits), np.int64)
    for place, bits in zip(places, low_bits, strict=True):
        run_bits[place] = bits
    low_row = np.cumsum(run_bits) - run_bits
    component_column = np.zeros_like(run_bits)
    digit_column = np.full_like(run_bits, -1)
    columns: list[npt.NDArray[np.int64]] = []
    tiles: list[tuple[int, ...]] = []
    synthesis: list[npt.NDArray[np.float16]] = []
    means: list[npt.NDArray[np.float32]] = []
    values = _layer_values(spec, pairing(spec.head_dim, calibration.rope if side is Side.KEY else None), tile_values)
    first_column = 0
    for block, ((index, first_layer, layers), bits, place) in enumerate(zip(members, low_bits, places, strict=True)):
        basis = calibration.bases[side][index]
        is_wide = bits >= WIDE_BITS
        digits = _filled_up(np.flatnonzero(is_wide), column_block)
        codes = _filled_up(np.arange(len(bits)), column_block)
        component_column[place] = first_column + len(digits) + np.arange(len(bits))
        digit_column[place[is_wide]] = first_column + np.arange(int(is_wide.sum()))
        rank = np.concatenate([digits, codes])
        kind = np.concatenate(
            [np.full(len(digits), HIGH_DIGIT), np.where(is_wide[np.maximum(codes, 0)], LOW_DIGIT, PLAIN)]
        )
        component = np.where(rank >= 0, place[np.maximum(rank, 0)], -1)
        columns.append(np.stack([component, run_bits[component], low_row[component], kind]))
        rows = np.where(rank[:, None] >= 0, basis.synthesis[np.maximum(rank, 0)], np.float16(0))
        bounds = [at // column_block for at in (first_column, first_column + len(digits), first_column + len(rank))]
        for layer in range(layers):
            for tile, channel in enumerate(values):
                there = channel >= 0
                at = layer * spec.channels + np.maximum(channel, 0)
                tiles.append((*bounds, block, first_layer + layer, tile))
                synthesis.append(np.where(there, rows[:, at], np.float16(0)))
                means.append(np.where(there, basis.mean[at], np.float32(0)))
        first_column += len(rank)
    starts = np.cumsum([0, *(part.size for part in synthesis)])[:-1]
    component, bits_of, low_row_of, kind_of = np.concatenate(columns, axis=1)

    # A code is at most ``(|number| + 1) << bits``; fp16 holds whole numbers up to 2048, two digits their product.
    largest = ((np.where(digit_column >= 0, DIGIT * (DIGIT - 1), DIGIT) >> run_bits) - 1).clip(-1).astype(np.int32)

    def ints(array: npt.ArrayLike) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.int32)).to(device)

    return GroupBasis(
        column_component=ints(component),
        column_bits=ints(bits_of),
        column_low_row=ints(low_row_of),
        column_digit=ints(kind_of),
        component_column=ints(component_column),
        component_digit_column=ints(digit_column),
        component_largest=ints(largest),
        largest_in_place=largest,
        low_rows=int(run_bits.sum()),
        blocks=len(members),
        tiles=ints(tiles),
        synthesis_start=ints(starts // (column_block * tile_values)),
        synthesis=torch.from_numpy(np.concatenate([part.ravel() for part in synthesis])).to(device),
        means=torch.from_numpy(np.stack(means)).to(device),
        bits=ints(run_bits),
    )


def canvas_runs(geometry: ComponentGeometry) -> torch.Tensor:
    """Where each run of 16 values lies on a canvas: ``row << 15 | byte of the row << 1 | is chroma``, int32.

    Row and byte are those of the run's first value, in its plane; value ``i`` of a run is ``i // 4`` rows below and
    ``i % 4`` samples to the right, and a sample of chroma takes two bytes.

    Raises:
        AssertionError: the layout is not made of such runs.
    """
    order = component_layout(geometry).flatten().numpy()
    luma_bytes = geometry.height * geometry.width
    first = order[::_RUN]
    is_chroma = first >= luma_bytes
    row, column = np.divmod(first - is_chroma * luma_bytes, geometry.width)
    inside = np.arange(_RUN)
    at = (row[:, None] + inside // 4) * geometry.width + column[:, None] + inside % 4 * (1 + is_chroma[:, None])
    if not np.array_equal((at + is_chroma[:, None] * luma_bytes).ravel()[: len(order)], order):
        raise AssertionError("a canvas whose values do not lie in runs of 16")
    return torch.from_numpy((row << 15 | column << 1 | is_chroma).astype(np.int32))


def whole_canvas_runs(geometry: ComponentGeometry) -> torch.Tensor:
    """As :func:`canvas_runs`, for all bytes of a canvas: behind the components come those that hold nothing."""
    return canvas_runs(dataclasses.replace(geometry, page_tokens=1, components=geometry.picture_bytes))


def _places_on_canvas(counts: list[int]) -> list[npt.NDArray[np.int64]]:
    """For each block, where its components lie among those of the group: by rank, then by block."""
    ranks = np.concatenate([np.arange(count) for count in counts])
    place = np.empty(len(ranks), np.int64)
    place[np.argsort(ranks, kind="stable")] = np.arange(len(ranks))
    return np.split(place, np.cumsum(counts)[:-1])


def _filled_up(ranks: npt.NDArray[np.int64], multiple: int) -> npt.NDArray[np.int64]:
    return np.pad(ranks, (0, -len(ranks) % multiple), constant_values=-1)


def _layer_values(spec: KVSpec, pairs: Pairing, tile_values: int) -> npt.NDArray[np.int64]:
    """``(tiles, tile_values)``: the channel of each value of the tiles of a layer, -1 where there is none."""
    dims = pairs.dims(spec.head_dim)
    channel = np.arange(spec.kv_heads)[:, None, None] * spec.head_dim + dims
    flat = np.where(dims < spec.head_dim, channel, -1).ravel()
    return _filled_up(flat, tile_values).reshape(-1, tile_values)
