"""Calibrated pages: what the kernels restore is the reference's to the rounding of fp32 sums, and lies in its slots."""

import dataclasses

import numpy as np
import pytest
import torch
from kernel_kit import ScatteredPool

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels.klt import KltRestore
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform.floats import from_bits
from sglang_kvcodec.transform.klt import KltTransform

STEP = 0.02
SUM_BOUND = 0.01
"""Largest difference of the kernel and the reference, in steps, before both are rounded to the pool's type."""


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


def assert_close(pool, expected, spec, bound):
    """All that is not one of the pages' slots is untouched; what is differs by the rounding of the pool's type at most.

    The reference is rounded to the type too: one unit in the last place where ``bound`` lies across a tie.
    """
    got, want = pool.bits(), pool.bits_with(expected)
    is_page = torch.zeros(got.shape[1], dtype=torch.bool)
    is_page[pool.slots.cpu()] = True
    assert torch.equal(got[:, ~is_page], want[:, ~is_page])
    got_values, want_values = (from_bits(bits[:, is_page], spec.dtype).float() for bits in (got, want))
    assert bool(torch.isfinite(got_values).all())
    unit = 2.0**-spec.dtype.mantissa_bits * want_values.abs() + 2.0 ** -(
        2 ** (spec.dtype.exponent_bits - 1) - 2 + spec.dtype.mantissa_bits
    )
    difference = (got_values - want_values).abs()
    assert bool((difference <= bound + unit).all()), float((difference - unit).max())
    # Across a tie is rare: nearly all are the same to the bit.
    assert float((difference != 0).float().mean()) < 0.02


def restore_both(spec, calibration, group, side, values, positions, device, change=lambda packed: packed):
    transform = KltTransform(spec, calibration, "high")
    packed = change(transform.pack(group, side, values, positions))
    pool = ScatteredPool(spec, len(positions), group.layers, device)
    KltRestore(spec, calibration, "high", device).restore(group, side, packed, positions, pool.slots, pool.buffers)
    return pool, transform.restore(group, side, packed, positions), packed


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_pool_is_the_references_to_rounding(shape, device):
    spec, per_block, rope, pages = shape
    calibration = with_wide_components(random_calibration(spec, layers_per_block=per_block, step=STEP, rope=rope))
    positions = [(7 * page + 3) * spec.page_tokens for page in range(pages)][::-1]
    for group in layer_groups(spec):
        values = kv_like(spec, pages, group.layers, seed=group.index)
        for side in spec.sides:
            pool, expected, _ = restore_both(spec, calibration, group, side, values, positions, device)
            assert_close(pool, expected, spec, SUM_BOUND * STEP)
