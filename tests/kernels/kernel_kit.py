"""Pools with a canary in every slot, and what a restore has to make of them."""

import dataclasses

import numpy as np
import torch

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.kernels import open_restore
from sglang_kvcodec.kernels.planes import Planes
from sglang_kvcodec.testing.calibrations import neox_rope
from sglang_kvcodec.testing.synthetic import kv_like, random_bits
from sglang_kvcodec.transform import get_transform
from sglang_kvcodec.transform.floats import to_bits

SPARE_SLOTS = 21
STEP = 0.08
"""Of calibrated pages."""


def gptj_rope(head_dim, rotary_dim=None):
    return dataclasses.replace(neox_rope(head_dim, rotary_dim), is_interleaved=True)


SHAPES = {
    "three_layers_a_basis": (KVSpec(4, 1, 64, 16, KVDtype.BFLOAT16), 3, neox_rope(64), 3),
    "one_layer_a_basis": (KVSpec(3, 2, 64, 16, KVDtype.FLOAT16), 1, neox_rope(64), 2),
    "nothing_is_even": (KVSpec(2, 3, 21, 17, KVDtype.BFLOAT16), 3, neox_rope(21, 6, 1.3), 2),
    "partial_rotary_of_80": (KVSpec(1, 1, 80, 13, KVDtype.FLOAT16), 1, neox_rope(80, 32), 5),
    "neighbours": (KVSpec(1, 2, 96, 16, KVDtype.FLOAT8_E4M3), 1, gptj_rope(96), 3),
    "neighbours_partial_odd": (KVSpec(2, 3, 9, 7, KVDtype.FLOAT8_E5M2), 1, gptj_rope(9, 4), 4),
    "head_of_192": (KVSpec(1, 1, 192, 11, KVDtype.BFLOAT16), 1, neox_rope(192), 1),
    "head_of_256": (KVSpec(1, 1, 256, 5, KVDtype.FLOAT16), 1, neox_rope(256), 3),
    "head_of_128_page_of_64": (KVSpec(1, 1, 128, 64, KVDtype.BFLOAT16), 1, neox_rope(128), 2),
    "not_rotated": (KVSpec(1, 1, 33, 16, KVDtype.FLOAT16), 1, None, 1),
    "latent": (KVSpec(1, 1, 576, 3, KVDtype.BFLOAT16, (Side.LATENT,)), 1, None, 1),
}
"""Spec, layers of a basis, rotation, pages."""


def with_wide_components(calibration):
    """Low bits as wide components have them, up to the most there can be, in no order; some components cut."""
    generator = np.random.default_rng(1)

    def bits(count):
        result = generator.integers(0, 4, count).astype(np.uint8)
        result[generator.integers(0, count, 3)] = [4, 9, 15]
        return result[: max(1, count - 3)]

    def changed(tier):
        return dataclasses.replace(
            tier, low_bits={side: tuple(bits(len(each)) for each in low) for side, low in tier.low_bits.items()}
        )

    return dataclasses.replace(calibration, tiers={name: changed(tier) for name, tier in calibration.tiers.items()})


class ScatteredPool:
    """One side of a layer group's pool, full of random bits, and slots of some pages at shuffled places in it."""

    def __init__(self, spec, pages, layers, device, seed=0):
        slots = pages * spec.page_tokens + SPARE_SLOTS
        shape = (slots, spec.kv_heads, spec.head_dim)
        self.before = [random_bits(spec.dtype, shape, 100 + seed + layer) for layer in range(layers)]
        self.buffers = [buffer.to(device, copy=True) for buffer in self.before]
        order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
        self.slots = order[: pages * spec.page_tokens].to(device)

    def bits(self):
        return torch.stack([to_bits(buffer.cpu()) for buffer in self.buffers])

    def bits_before(self):
        return torch.stack([to_bits(buffer) for buffer in self.before])

    def bits_with(self, values):
        """What the pool must hold once pages ``(pages, layers, page_tokens, kv_heads, head_dim)`` are in it."""
        expected = self.bits_before()
        rows = to_bits(values).transpose(0, 1).flatten(1, 2)
        expected[:, self.slots.cpu()] = rows
        return expected


def inside_more_memory(spec, device, pages=2, layers=2):
    """A ``ScatteredPool`` whose layers lie in the middle of other memory, and that memory, layer by layer."""
    pool = ScatteredPool(spec, pages, layers, device)
    whole = [torch.cat([buffer.flip(0), buffer, buffer.flip(0)]) for buffer in pool.buffers]
    slots = len(pool.buffers[0])
    pool.buffers = [each[slots : 2 * slots] for each in whole]
    return pool, whole


def assert_only_written(pool, whole, values, is_inside):
    """Of ``values``, the tokens that are inside are in their slots, and all other memory is as it was."""
    expected = pool.bits_before()
    inside = pool.slots.cpu()[is_inside]
    expected[:, inside] = to_bits(values).transpose(0, 1).flatten(1, 2)[:, is_inside]
    assert torch.equal(pool.bits(), expected)
    for each, before in zip(whole, pool.before, strict=True):
        around = to_bits(before.flip(0))
        assert torch.equal(to_bits(each.cpu())[: len(before)], around)
        assert torch.equal(to_bits(each.cpu())[-len(before) :], around)


def pool_with(spec, values, device, seed=0):
    """A pool of random bits in whose slots the pages ``values`` lie."""
    pool = ScatteredPool(spec, len(values), values.shape[1], device, seed)
    for layer, buffer in enumerate(pool.buffers):
        rows = to_bits(values[:, layer]).flatten(0, 1)
        buffer.view(rows.dtype)[pool.slots] = rows.to(device)
    return pool


def hard_values(profile, spec, pages, layers, seed=0):
    """For ``exact`` any bit pattern; for ``high`` KV with escapes: NaN, infinities, -0, and a layer full of them."""
    shape = (pages, layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
    if profile == "exact":
        return random_bits(spec.dtype, shape, seed)
    values = kv_like(spec, pages, layers, seed)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e4], dtype=values.dtype)
    flat = values.view(pages, -1)
    places = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed))[: len(special)]
    flat[0, places] = special[: len(places)]
    if pages > 1:
        values[-1, -1] = random_bits(spec.dtype, shape[2:], seed + 1)
    return values


def assert_restores(profile, spec, pages, layers, device, seed=0):
    """The kernel writes what the reference gives, bit for bit, and touches nothing else."""
    packed = get_transform(profile, spec).pack(hard_values(profile, spec, pages, layers, seed))
    pool = ScatteredPool(spec, pages, layers, device, seed)
    open_restore(profile, spec).restore(packed, pool.slots, pool.buffers)
    assert torch.equal(pool.bits(), pool.bits_with(get_transform(profile, spec).restore(layers, packed)))
    return packed


def surfaces(canvases, pitch, device):
    """Canvases as a decoder leaves them: each plane anywhere, rows ``pitch`` bytes apart, something else between."""
    pages, rows, width = canvases.shape
    height = rows * 2 // 3
    memory = torch.full((pages, 2, height + 3, pitch), 77, dtype=torch.uint8, device=device)
    memory[:, 1, :height, :width] = canvases[:, :height].to(device)
    memory[:, 0, 1 : 1 + rows - height, :width] = canvases[:, height:].to(device)
    page = torch.arange(pages, device=device) * memory.stride(0) + memory.data_ptr()
    return Planes(page + memory.stride(1), page + pitch, pitch, memory, pitch % 4 == 0)
