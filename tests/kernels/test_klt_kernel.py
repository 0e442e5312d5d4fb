"""Calibrated pages: what the kernels restore is the reference's to the rounding of fp32 sums, and lies in its slots."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_kit import (
    SHAPES,
    STEP,
    ScatteredPool,
    assert_only_written,
    gptj_rope,
    hard_values,
    inside_more_memory,
    surfaces,
    with_wide_components,
)

from sglang_kvcodec.errors import ConfigurationError, FormatError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels import check_calibrated, open_restore
from sglang_kvcodec.kernels.floats import narrow_bits
from sglang_kvcodec.kernels.klt import KltRestore, calibrated_bases
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform import get_transform
from sglang_kvcodec.transform.component_escapes import LARGEST_ESCAPE
from sglang_kvcodec.transform.floats import from_bits, to_bits, torch_dtype
from sglang_kvcodec.transform.klt import KltTransform

# NumPy, which interprets the kernels, warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SUM_BOUND = 0.005
"""Largest difference of the kernel and the reference, in steps, before both are rounded to the pool's type."""


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
    calibration = with_wide_components(
        random_calibration(spec, layers_per_block=per_block, step=STEP, rope=rope, gain_components=3)
    )
    positions = [(7 * page + 3) * spec.page_tokens for page in range(pages)][::-1]
    for group in layer_groups(spec):
        values = kv_like(spec, pages, group.layers, seed=group.index)
        for side in spec.sides:
            pool, expected, _ = restore_both(spec, calibration, group, side, values, positions, device)
            assert_close(pool, expected, spec, SUM_BOUND * STEP)


def small(dtype=KVDtype.BFLOAT16, layers=2, tokens=17):
    spec = KVSpec(layers, 1, 48, tokens, dtype)
    return (
        spec,
        random_calibration(spec, layers_per_block=1, step=STEP, rope=neox_rope(48), gain_components=3),
        layer_groups(spec)[0],
    )


def test_escapes_come_back_over_whatever_the_canvas_holds(device):
    spec, calibration, group = small()
    values = kv_like(spec, 3, group.layers, seed=2)
    values[0, :, 4] *= 40
    values[2, :, [0, 16]] *= 60

    def spoil(packed):
        canvases = [torch.where(page.canvas == 128, 131, page.canvas).to(torch.uint8) for page in packed]
        return [dataclasses.replace(page, canvas=canvas) for page, canvas in zip(packed, canvases, strict=True)]

    for change in (lambda packed: packed, spoil):
        pool, expected, packed = restore_both(spec, calibration, group, Side.KEY, values, [17, 0, 34], device, change)
        assert packed[0].escapes
        assert packed[2].escapes
        assert_close(pool, expected, spec, 40 * SUM_BOUND * STEP)


def test_escapes_of_every_size_on_components_of_either_kind(device):
    """Some are codes of the product, some too large for one; of one column and of two; neighbours, first and last."""
    spec, calibration, group = small(tokens=16)
    calibration = with_wide_components(calibration)
    basis = calibrated_bases(spec, calibration, "high", torch.device("cpu"))[group.index, Side.KEY]
    largest = basis.largest_in_place
    is_wide = (basis.component_digit_column >= 0).numpy()
    assert is_wide.any()
    assert not is_wide.all()
    count = len(largest)
    generator = np.random.default_rng(0)
    # Around what fits, in both directions, on every component; the largest there is; and small ones.
    sizes = np.stack([largest - 1, largest, largest + 1, 2 * largest, largest * 0 + 200, largest * 0 + 300])
    numbers = np.concatenate([sizes, -sizes, [[LARGEST_ESCAPE >> 6] * count]])
    tokens = generator.permutation(16)[: len(numbers)]
    positions = (np.sort(tokens)[:, None] * count + np.arange(count)).ravel()
    escapes = positions.astype("<u4").tobytes() + numbers.ravel().astype("<i4").tobytes()

    def change(packed):
        return [packed[0], dataclasses.replace(packed[1], escapes=escapes), packed[2]]

    values = kv_like(spec, 3, group.layers, seed=2)
    for side in spec.sides:
        pool, expected, _ = restore_both(spec, calibration, group, side, values, [16, 0, 32], device, change)
        # Sums of large numbers round to more: in proportion to the largest of a token.
        bound = 1e-6 * float(expected.float().abs().amax())
        assert_close(pool, expected, spec, bound + SUM_BOUND * STEP)


def test_pictures_are_read_where_a_decoder_leaves_them(device):
    spec, calibration, group = small()
    values = kv_like(spec, 2, group.layers, seed=3)
    transform = KltTransform(spec, calibration, "high")
    packed = transform.pack(group, Side.VALUE, values, [0, 17])
    kernel = KltRestore(spec, calibration, "high", device)
    planes = surfaces(torch.stack([page.canvas for page in packed]), transform.geometry.width + 37, device)
    bare = [dataclasses.replace(page, canvas=None) for page in packed]
    pools = [ScatteredPool(spec, 2, group.layers, device) for _ in range(2)]
    kernel.restore(group, Side.VALUE, packed, [0, 17], pools[0].slots, pools[0].buffers)
    kernel.restore(group, Side.VALUE, bare, [0, 17], pools[1].slots, pools[1].buffers, planes)
    assert torch.equal(pools[0].bits(), pools[1].bits())


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_so_are_those_of_profiles_without_a_calibration(profile, device):
    spec = KVSpec(2, 2, 64, 16, KVDtype.BFLOAT16)
    packed = get_transform(profile, spec).pack(hard_values(profile, spec, 2, 2))
    planes = surfaces(torch.stack([page.canvas for page in packed]), 333, device)
    pool = ScatteredPool(spec, 2, 2, device)
    bare = [dataclasses.replace(page, canvas=None) for page in packed]
    open_restore(profile, spec).restore(bare, pool.slots, pool.buffers, planes)
    assert torch.equal(pool.bits(), pool.bits_with(get_transform(profile, spec).restore(2, packed)))


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_slot_outside_the_layer_is_left_alone(is_interleaved, device):
    spec, calibration, group = small()
    if is_interleaved:
        calibration = random_calibration(spec, layers_per_block=1, step=STEP, rope=gptj_rope(48))
    packed = KltTransform(spec, calibration, "high").pack(group, Side.KEY, kv_like(spec, 2, group.layers, 0), [0, 17])
    kernel = KltRestore(spec, calibration, "high", device)
    whole_pool = ScatteredPool(spec, 2, group.layers, device)
    kernel.restore(group, Side.KEY, packed, [0, 17], whole_pool.slots, whole_pool.buffers)
    # One side, so the pool is the same as above but for where its layers lie.
    pool, whole = inside_more_memory(spec, device, 2, group.layers)
    slots = pool.slots.clone()
    slots[3], slots[20], slots[-1] = -1, len(pool.buffers[0]), 1 << 40
    kernel.restore(group, Side.KEY, packed, [0, 17], slots, pool.buffers)
    is_inside = ((slots >= 0) & (slots < len(pool.buffers[0]))).cpu()
    rows = torch.stack([buffer[pool.slots] for buffer in whole_pool.buffers]).cpu()
    values = rows.view(group.layers, 2, spec.page_tokens, *rows.shape[2:]).transpose(0, 1)
    assert_only_written(pool, whole, values, is_inside)


def test_what_does_not_fit_is_refused_before_anything_is_written(device):
    spec, calibration, group = small()
    positions = [0, 17]
    good = KltTransform(spec, calibration, "high").pack(group, Side.KEY, kv_like(spec, 2, group.layers, 0), positions)
    kernel = KltRestore(spec, calibration, "high", device)
    pool = ScatteredPool(spec, 2, group.layers, device)
    slots, buffers = pool.slots, pool.buffers
    gap = torch.zeros((len(buffers[1]), 2, 48), dtype=torch.bfloat16, device=device)[:, :1]
    for bad_slots, bad_buffers, bad_positions in (
        (slots[:-1], buffers, positions),
        (slots, buffers[:1], positions),
        (slots, [buffers[0], gap], positions),
        (slots, buffers, [0]),
        (slots, buffers, [0, -17]),
    ):
        with pytest.raises(ValueError, match=r"slot|layer|position"):
            kernel.restore(group, Side.KEY, good, bad_positions, bad_slots, bad_buffers)
    for change in (
        {"canvas": None},
        {"canvas": good[1].canvas.to(torch.int16)},
        {"stored": good[1].stored[:-1]},
        {"stored": good[1].stored + b"\0"},
        {"escapes": b"\1"},
        {"escapes": struct.pack("<Ii", 17 * 96, 5)},
        {"steps": (1.0,)},
        {"steps": (1.0, float("nan"))},
        {"steps": (1.0, 0.0)},
    ):
        sides = [dataclasses.replace(good[0], **change) if "canvas" in change else good[0]]
        sides.append(dataclasses.replace(good[1], **change))
        with pytest.raises(FormatError):
            kernel.restore(group, Side.KEY, sides, positions, slots, buffers)
    assert torch.equal(pool.bits(), pool.bits_before())


@pytest.mark.parametrize("dtype", KVDtype)
def test_every_value_is_rounded_as_torch_rounds(dtype, device):
    """All values of the type, their neighbours in fp32, all ties between them, and what is beyond its range."""
    count = 1 << (8 * dtype.item_bytes)
    bits = torch.arange(count, dtype=torch.int32).to(torch.uint8 if dtype.item_bytes == 1 else torch.int16)
    values = bits.view(torch_dtype(dtype)).float()
    values = values[torch.isfinite(values)].unique()
    ties = ((values[:-1].double() + values[1:].double()) / 2).float()
    near = torch.cat([values, ties])
    near = torch.cat([near, torch.nextafter(near, near + 1e30), torch.nextafter(near, near - 1e30), values[-1:] * 1.5])
    near = near[torch.isfinite(near)]
    near = torch.nn.functional.pad(near, (0, -len(near) % 1024))
    got = torch.empty(len(near), dtype=torch.int32, device=device)
    largest = float(torch.finfo(torch_dtype(dtype)).max)
    narrow_all[(len(near) // 1024,)](near.to(device), got, dtype.exponent_bits, dtype.mantissa_bits, largest, 1024)
    expected = to_bits(near.clamp(-largest, largest).to(torch_dtype(dtype))).to(torch.int32)
    mask = count - 1
    assert torch.equal(got.cpu() & mask, expected & mask)


@triton.jit
def narrow_all(values, out, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip # noqa: E501
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, narrow_bits(tl.load(values + at), EXPONENT_BITS, MANTISSA_BITS, LARGEST))


@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT8_E5M2])
def test_the_kernel_passes_its_check(dtype, device):
    spec, calibration, _ = small(dtype, layers=3, tokens=7)
    transform = KltTransform(spec, calibration, "high", device)
    kernel = KltRestore(spec, calibration, "high", device)
    check_calibrated(kernel, transform, calibration, "high", torch.device(device))


class Spoiled:
    def __init__(self, kernel, where, side):
        self._kernel, self._where, self._side = kernel, where, side

    def restore(self, group, side, packed, first_positions, slots, buffers):
        self._kernel.restore(group, side, packed, first_positions, slots, buffers)
        if side is self._side:
            slot = {"page": slots[3], "beside": -1}[self._where]
            buffers[-1][slot, -1, -1] += 0.1 * buffers[-1].float().abs().max() + 0.1


@pytest.mark.parametrize("where", ["page", "beside"])
@pytest.mark.parametrize("side", [Side.KEY, Side.VALUE])
def test_one_wrong_value_is_refused(where, side, device):
    spec, calibration, _ = small(layers=1, tokens=7)
    kernel = Spoiled(KltRestore(spec, calibration, "high", device), where, side)
    transform = KltTransform(spec, calibration, "high", device)
    with pytest.raises(ConfigurationError, match="restores wrong values"):
        check_calibrated(kernel, transform, calibration, "high", torch.device(device))
