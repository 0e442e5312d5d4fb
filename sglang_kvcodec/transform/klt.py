"""The calibrated tiers: rotation of K undone, mean taken away, a basis over heads and layers, uniform steps.

The Karhunen-Loève transform makes components that are uncorrelated over the calibration text, which is when coding each
alone with one uniform step is best (Goyal, "Theoretical foundations of transform coding", IEEE SP Magazine 2001). It is
taken in a space in which errors count by what they do to the model's output: with the metric ``M`` of a head, an error
``e`` changes the distribution of the next token by ``e^T M e``, up to a factor. One step for all components, layers and
sides then spends every bit where it saves most of that (reverse water-filling).

Writing: components ``y = (x - mean) M S^T``, ``q = y / (step * gain)`` rounded, with the gain of the token; one byte
each on the canvas and, of the few wide ones, low bits beside it. Reading: ``x = mean + step * gain * (q S)``, which
is all that a GPU has to do: a product of small whole numbers with the fp16 matrix ``S`` that accumulates in fp32,
then one multiplication and addition, then the rotation. ``S M S^T = 1``, so writing inverts reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sglang_kvcodec.errors import ForeignPageError
from sglang_kvcodec.format.calibration import Basis, Calibration, GainModel
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, component_geometry, layer_groups, picture_geometry
from sglang_kvcodec.transform.base import PackedSide
from sglang_kvcodec.transform.checks import check_fields, stack_canvases
from sglang_kvcodec.transform.component_escapes import LARGEST_ESCAPE, pack_component_escapes, unpack_component_escapes
from sglang_kvcodec.transform.components import component_layout, components_from_canvas, components_to_canvas
from sglang_kvcodec.transform.floats import stack_bytes, to_bytes, torch_dtype
from sglang_kvcodec.transform.layout import CANVAS_FILL
from sglang_kvcodec.transform.low_bits import join_low_bits, low_bits_bytes, split_low_bits
from sglang_kvcodec.transform.rope import rotate, unrotate
from sglang_kvcodec.transform.token_gains import (
    gains_of_levels,
    pack_levels,
    stored_low_bits,
    token_steps,
    written_levels,
)

LARGEST_CODE = 127
"""The largest magnitude that the canvas holds."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """The basis of some layers of a group, as tensors on one device.

    Attributes:
        start: first of its values among the group's, of one token.
        stop: behind the last.
        mean: fp32 ``(values,)``.
        analysis: fp32 ``(values, components)``.
        synthesis: fp32 ``(components, values)``, whole fp16 numbers.
        low_bits: int32 ``(components,)``.
        step: of the tier.
        gain_model: predicts the gains of tokens.
    """

    start: int
    stop: int
    mean: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor
    low_bits: torch.Tensor
    step: float
    gain_model: GainModel


class KltTransform:
    """Packs and restores pages of one ``KVSpec`` in one tier of one calibration. Thread-safe; the format's reference.

    Restored values agree between machines to the rounding of fp32 sums, not to the bit: what is stored is exact, the
    product with the basis is not. That is far below the step.
    """

    def __init__(self, spec: KVSpec, calibration: Calibration, tier: str, device: torch.device | str = "cpu") -> None:
        """Takes the bases to the device.

        Args:
            spec: of the pages.
            calibration: of their model and shard.
            tier: one of the calibration's.
            device: where pages are packed and restored.

        Raises:
            ForeignPageError: the calibration is of another shape, has no such tier, or its blocks do not fit the
                pictures of such pages.
        """
        layout = calibration.layout
        if not layout.fits(spec):
            raise ForeignPageError(f"a calibration for {layout} can't code pages of {spec}")
        if tier not in calibration.tiers:
            raise ForeignPageError(f"the calibration has no tier {tier!r}; it has {', '.join(calibration.tiers)}")
        layers_per_picture = picture_geometry(spec).layers_per_picture
        if layers_per_picture % calibration.layers_per_block:
            raise ForeignPageError(
                f"blocks of {calibration.layers_per_block} layers do not fit pictures of {layers_per_picture}"
            )
        self._spec = spec
        self._tier = calibration.tiers[tier]
        self._rope = calibration.rope
        self._device = torch.device(device)
        self._blocks = {
            (group.index, side): self._group_blocks(calibration, group, side)
            for group in layer_groups(spec)
            for side in spec.sides
        }
        most = max(sum(len(block.synthesis) for block in blocks) for blocks in self._blocks.values())
        self.geometry = component_geometry(spec, most)
        self._layout = component_layout(self.geometry).to(self._device)
        self._low_bits = {
            place: _interleave([block.low_bits for block in blocks]) for place, blocks in self._blocks.items()
        }

    @property
    def spec(self) -> KVSpec:
        """Of the pages."""
        return self._spec

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvases."""
        return self.geometry.canvas_shape

    def components(self, group: LayerGroup, side: Side) -> int:
        """Components per token that the pictures of a group hold."""
        return sum(len(block.synthesis) for block in self._blocks[group.index, side])

    def pack(
        self, group: LayerGroup, side: Side, values: torch.Tensor, first_positions: Sequence[int]
    ) -> list[PackedSide] | None:
        """Packs one side of one layer group of many pages.

        Args:
            group: which layers.
            side: which tensor of them.
            values: ``(pages, group.layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype.
            first_positions: position of the first token of each page.

        Returns:
            The packed sides, or None if there is a page that these tiers can't code: NaN, infinity, or values beyond
            all proportion.

        Raises:
            ValueError: values of another shape or type; the caller's mistake.
        """
        spec = self._spec
        expected = (len(first_positions), group.layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
        if tuple(values.shape) != expected or values.dtype != torch_dtype(spec.dtype):
            raise ValueError(f"expected {spec.dtype.torch_name} {expected}, got {values.dtype} {values.shape}")
        wide = values.to(self._device, torch.float32)
        if not bool(torch.isfinite(wide).all()):
            return None
        if side is Side.KEY and self._rope is not None:
            positions = self._positions(first_positions)[:, None].expand(-1, group.layers, -1)
            wide = unrotate(wide, positions, self._rope)
        tokens = wide.transpose(1, 2).flatten(2)
        blocks = self._blocks[group.index, side]
        components = [(tokens[..., block.start : block.stop] - block.mean) @ block.analysis for block in blocks]
        levels = written_levels(components, [block.gain_model for block in blocks], self._tier, first_positions)
        steps = torch.tensor([block.step for block in blocks], dtype=torch.float32, device=self._device)
        sizes = steps[:, None] * gains_of_levels(levels)
        codes = _interleave(
            [self._quantise(part, size) for part, size in zip(components, sizes.unbind(1), strict=True)]
        )
        if not bool((codes.abs() <= LARGEST_ESCAPE).all()):
            return None
        high, low = split_low_bits(codes.to(torch.int32), self._low_bits[group.index, side])
        escaped = high.abs() > LARGEST_CODE
        bytes_ = (torch.where(escaped, 0, high) + CANVAS_FILL).to(torch.uint8)
        canvases = components_to_canvas(bytes_, self.geometry, self._layout)
        return [
            PackedSide(
                canvas,
                pack_levels(levels[index]) + to_bytes(low[index]),
                pack_component_escapes(high[index], escaped[index]),
                tuple(steps.tolist()),
            )
            for index, canvas in enumerate(canvases)
        ]

    def restore(
        self, group: LayerGroup, side: Side, packed: Sequence[PackedSide], first_positions: Sequence[int]
    ) -> torch.Tensor:
        """The inverse of :meth:`pack`.

        Returns:
            ``(pages, group.layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype, on the transform's device.

        Raises:
            FormatError: side bytes that do not fit the spec. Never writes or reads outside its own tensors.
        """
        spec = self._spec
        blocks = self._blocks[group.index, side]
        codes = self.codes(group, side, packed).to(torch.float32)
        steps = self.steps(group, side, packed)
        counts = [len(block.synthesis) for block in blocks]
        tokens = torch.cat(
            [
                part @ block.synthesis * steps[:, index, :, None] + block.mean
                for index, (part, block) in enumerate(zip(_deinterleave(codes, counts), blocks, strict=True))
            ],
            dim=-1,
        )
        shape = (len(packed), spec.page_tokens, group.layers, spec.kv_heads, spec.head_dim)
        wide = tokens.reshape(shape).transpose(1, 2)
        if side is Side.KEY and self._rope is not None:
            positions = self._positions(first_positions)[:, None].expand(-1, group.layers, -1)
            wide = rotate(wide, positions, self._rope)
        dtype = torch_dtype(spec.dtype)
        # What was coded lay inside the type; the rounding of the basis must not push its largest values out.
        return wide.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)

    def codes(self, group: LayerGroup, side: Side, packed: Sequence[PackedSide]) -> torch.Tensor:
        """The quantised components of packed sides: int32 ``(pages, page_tokens, components)``, whole steps.

        Raises:
            FormatError: side bytes that do not fit the spec. Never writes or reads outside its own tensors.
        """
        spec = self._spec
        low_bits = self._low_bits[group.index, side]
        low_bytes = low_bits_bytes(low_bits, spec.page_tokens)
        for page in packed:
            check_fields(page, canvas=True, stored=bool(page.stored), escapes=True, steps=len(page.steps))
        count = self.components(group, side)
        canvases = stack_canvases(packed).to(self._device)
        codes = components_from_canvas(canvases, self.geometry, self._layout, count)
        high = codes.to(torch.int32).contiguous() - CANVAS_FILL
        for index, page in enumerate(packed):
            if page.escapes:
                where, numbers = unpack_component_escapes(page.escapes, spec.page_tokens * count)
                places = torch.from_numpy(where).to(self._device)
                high[index].view(-1)[places] = torch.from_numpy(numbers).to(self._device)
        stored = stack_bytes(stored_low_bits(packed, low_bytes), low_bytes)
        return join_low_bits(high, stored.to(self._device), low_bits)

    def steps(self, group: LayerGroup, side: Side, packed: Sequence[PackedSide]) -> torch.Tensor:
        """What the whole numbers of packed sides are multiplied with: fp32 ``(pages, blocks, page_tokens)``.

        Raises:
            FormatError: side bytes that do not fit the spec.
        """
        tokens = self._spec.page_tokens
        low_bytes = low_bits_bytes(self._low_bits[group.index, side], tokens)
        return token_steps(packed, len(self._blocks[group.index, side]), tokens, low_bytes).to(self._device)

    def _quantise(self, components: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """fp32 ``(pages, page_tokens, components)`` in steps ``(pages, page_tokens)``, whole numbers."""
        scaled = components / steps[..., None]
        return torch.sign(scaled) * torch.floor(scaled.abs() + self._tier.rounding)

    def _positions(self, first_positions: Sequence[int]) -> torch.Tensor:
        """int64 ``(pages, page_tokens)``, on the CPU."""
        return torch.tensor(first_positions, dtype=torch.int64)[:, None] + torch.arange(self._spec.page_tokens)

    def _group_blocks(self, calibration: Calibration, group: LayerGroup, side: Side) -> list[_Block]:
        channels = self._spec.channels
        blocks = []
        for index, (first_layer, layers) in enumerate(calibration.blocks()):
            if not group.first_layer <= first_layer < group.first_layer + group.layers:
                continue
            low_bits = self._tier.low_bits[side][index]
            start = (first_layer - group.first_layer) * channels
            metric = torch.from_numpy(calibration.metrics[side][first_layer : first_layer + layers])
            mean, synthesis = _tensors(calibration.bases[side][index], len(low_bits))
            analysis = analysis_matrix(metric, synthesis)
            blocks.append(
                _Block(
                    start=start,
                    stop=start + layers * channels,
                    mean=mean.to(self._device),
                    analysis=analysis.to(self._device),
                    synthesis=synthesis.to(self._device),
                    low_bits=torch.from_numpy(low_bits).to(self._device, torch.int32),
                    step=self._tier.steps[side][index],
                    gain_model=calibration.gain_models[side][index],
                )
            )
        return blocks


def analysis_matrix(metric: torch.Tensor, synthesis: torch.Tensor) -> torch.Tensor:
    """What takes values to components: ``M S^T``.

    Args:
        metric: fp32 ``(layers, kv_heads, head_dim, head_dim)``.
        synthesis: fp32 ``(components, layers * kv_heads * head_dim)``.

    Returns:
        fp32 ``(layers * kv_heads * head_dim, components)``.
    """
    heads = metric.flatten(0, 1)
    by_head = synthesis.view(len(synthesis), len(heads), -1).permute(1, 2, 0)
    return (heads @ by_head).flatten(0, 1)


def _tensors(basis: Basis, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(basis.mean), torch.from_numpy(basis.synthesis[:components]).to(torch.float32)


def _interleave(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Components of the blocks of a group ``(..., n)`` as one run: the first of each, then the second of each, …."""
    if len(blocks) == 1:
        return blocks[0]
    order = _interleaved_order([block.shape[-1] for block in blocks]).to(blocks[0].device)
    return torch.cat(list(blocks), dim=-1)[..., order]


def _deinterleave(codes: torch.Tensor, counts: Sequence[int]) -> Sequence[torch.Tensor]:
    """The inverse of :func:`_interleave`."""
    if len(counts) == 1:
        return [codes]
    order = _interleaved_order(counts).to(codes.device)
    ranked = codes[..., torch.argsort(order)]
    parts: Sequence[torch.Tensor] = torch.split(ranked, list(counts), dim=-1)
    return parts


def _interleaved_order(counts: Sequence[int]) -> torch.Tensor:
    """Where the i-th component of the run lies among the blocks side by side: by rank, then by block."""
    ranks = torch.cat([torch.arange(count) for count in counts])
    return torch.argsort(ranks, stable=True)
