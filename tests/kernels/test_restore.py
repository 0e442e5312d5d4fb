import dataclasses

import pytest
import torch
from kernel_kit import ScatteredPool, assert_only_written, assert_restores, hard_values, inside_more_memory

from sglang_kvcodec.errors import FormatError, UnsupportedError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups, picture_geometry
from sglang_kvcodec.kernels import open_restore
from sglang_kvcodec.transform import get_transform
from sglang_kvcodec.transform.escapes import unpack_escapes
from sglang_kvcodec.transform.floats import to_bits
from sglang_kvcodec.transform.layout import to_canvas

# NumPy, which interprets the kernels, warns where a GPU does not: what is beyond a type's range becomes an infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

CASES = [
    *[("high", dtype) for dtype in (KVDtype.BFLOAT16, KVDtype.FLOAT16)],
    *[("exact", dtype) for dtype in KVDtype],
]
SHAPES = {
    "one_head_of_64": (3, 1, 64, 16, 3, 5),
    "three_heads_of_80_partial_group": (3, 3, 80, 48, 2, 1),
    "heads_of_96": (7, 1, 96, 16, 7, 1),
    "five_heads_of_192_folded": (1, 5, 192, 16, 1, 2),
    "page_of_64": (3, 1, 128, 64, 1, 3),
    "nothing_is_even": (2, 3, 21, 17, 2, 2),
}
"""Layers, heads, head_dim, page_tokens of the spec; layers and pages restored."""


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("profile", "dtype"), CASES)
def test_pool_is_bit_for_bit_the_references(profile, dtype, shape, device):
    *spec, layers, pages = shape
    spec = KVSpec(*spec, dtype)
    assert layers <= picture_geometry(spec).layers_per_picture
    packed = assert_restores(profile, spec, pages, layers, device)
    assert profile == "exact" or packed[0].escapes


def test_shapes_are_as_awkward_as_they_say():
    specs = [KVSpec(*shape[:4], KVDtype.BFLOAT16) for shape in SHAPES.values()]
    assert max(picture_geometry(spec).folds for spec in specs) > 1
    assert any(spec.channels % picture_geometry(spec).width for spec in specs)
    assert any(spec.layer_values % 8 for spec in specs)
    groups = [
        (shape[4], picture_geometry(spec).layers_per_picture)
        for shape, spec in zip(SHAPES.values(), specs, strict=True)
    ]
    assert any(layers < most for layers, most in groups)


@pytest.mark.parametrize("profile", ["high", "exact"])
def test_all_groups_of_a_model_with_a_partial_last_one(profile, device):
    spec = KVSpec(5, 2, 128, 64, KVDtype.BFLOAT16)
    counts = [group.layers for group in layer_groups(spec)]
    assert counts == [3, 2]
    for layers in counts:
        assert_restores(profile, spec, 1, layers, device, seed=layers)


@pytest.mark.parametrize("dtype", KVDtype)
def test_every_bit_pattern_survives(dtype, device):
    count = 1 << (8 * dtype.item_bytes)
    bits = torch.arange(count, dtype=torch.int32).to(torch.uint8 if dtype.item_bytes == 1 else torch.int16)
    shape = (1, 1, 16, 1, 16) if count == 256 else (1, 1, 128, 4, 128)
    values = bits.view(getattr(torch, dtype.torch_name)).reshape(shape)
    spec = KVSpec(1, shape[3], shape[4], shape[2], dtype)
    pool = ScatteredPool(spec, 1, 1, device)
    open_restore("exact", spec).restore(get_transform("exact", spec).pack(values), pool.slots, pool.buffers)
    assert torch.equal(pool.bits(), pool.bits_with(values))


@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT16])
@pytest.mark.parametrize(
    "steps",
    [(0.0, 1 / 3), (1e-40, 3e-8), (1.7e-7, 0.0123), (500.1, 3.3e38), (2.0**-134, 2.0**-25), (1 + 2**-8, 1 + 2**-11)],
)
def test_every_code_is_rounded_as_the_reference_rounds(dtype, steps, device):
    """Steps that make subnormals, ties, and infinities of the pool's type; the code 0, which no encoder makes, too."""
    spec = KVSpec(2, 1, 64, 16, dtype)
    codes = torch.arange(1024).to(torch.uint8).reshape(1, 1, 16, 64).expand(2, 2, 16, 64)
    canvases = to_canvas(codes, picture_geometry(spec))
    transform = get_transform("high", spec)
    packed = transform.pack(torch.zeros((2, 2, 16, 1, 64), dtype=getattr(torch, dtype.torch_name)))
    packed = [
        dataclasses.replace(side, canvas=canvas, steps=order)
        for side, canvas, order in zip(packed, canvases, (steps, steps[::-1]), strict=True)
    ]
    pool = ScatteredPool(spec, 2, 2, device)
    open_restore("high", spec).restore(packed, pool.slots, pool.buffers)
    assert torch.equal(pool.bits(), pool.bits_with(transform.restore(2, packed)))


def test_escapes_of_both_kinds_are_in_the_tests(device):
    spec = KVSpec(3, 1, 64, 16, KVDtype.BFLOAT16)
    packed = assert_restores("high", spec, 2, 3, device)
    listed, whole = (unpack_escapes(side.escapes, 3, spec.layer_values, spec.dtype)[0] for side in packed)
    assert 0 < len(listed) < spec.layer_values
    assert (whole >= 2 * spec.layer_values).sum() == spec.layer_values


def test_slots_of_a_pool_with_gaps_and_of_bytes(device):
    """Slots that are part of wider rows, as in a pool that keeps something beside them; fp8 kept as uint8."""
    for profile, dtype in (("high", KVDtype.FLOAT16), ("exact", KVDtype.FLOAT8_E4M3)):
        spec = KVSpec(1, 2, 32, 16, dtype)
        packed = get_transform(profile, spec).pack(hard_values(profile, spec, 1, 1))
        integers = torch.uint8 if dtype.item_bytes == 1 else torch.int16
        wide = torch.full((40, 3, 32), 77, dtype=integers, device=device)
        layer = wide[:, :2] if dtype.item_bytes == 1 else wide.view(torch.float16)[:, :2]
        slots = torch.arange(38, 6, -2, device=device)
        open_restore(profile, spec).restore(packed, slots, [layer])
        expected = torch.full((40, 3, 32), 77, dtype=integers)
        expected[slots.cpu(), :2] = to_bits(get_transform(profile, spec).restore(1, packed))[0, 0]
        assert torch.equal(wide.cpu(), expected)


@pytest.mark.parametrize("profile", ["high", "exact"])
def test_a_slot_outside_the_layer_is_left_alone(profile, device):
    """The last page is full of escapes for ``high``: those of such a slot are left out as well."""
    spec = KVSpec(2, 2, 64, 16, KVDtype.BFLOAT16)
    packed = get_transform(profile, spec).pack(hard_values(profile, spec, 2, 2))
    pool, whole = inside_more_memory(spec, device)
    slots = pool.slots.clone()
    slots[3], slots[20], slots[31], slots[16] = -1, len(pool.buffers[0]), -(1 << 40), 1 << 40
    open_restore(profile, spec).restore(packed, slots, pool.buffers)
    is_inside = (slots >= 0) & (slots < len(pool.buffers[0]))
    assert_only_written(pool, whole, get_transform(profile, spec).restore(2, packed), is_inside.cpu())


@pytest.mark.parametrize("profile", ["high", "exact"])
def test_what_does_not_fit_is_refused_before_anything_is_written(profile, device):
    spec = KVSpec(2, 2, 64, 16, KVDtype.BFLOAT16)
    good = get_transform(profile, spec).pack(hard_values(profile, spec, 2, 2))
    pool = ScatteredPool(spec, 2, 2, device)
    kernel = open_restore(profile, spec)
    slots, buffers = pool.slots, pool.buffers
    for bad_slots in (slots[:-1], slots.to(torch.int32), slots.reshape(2, -1), slots.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="slot"):
            kernel.restore(good, bad_slots, buffers)
    for bad_buffers in (
        [],
        buffers * 20,
        [buffers[0], buffers[1][:-1]],
        [buffers[0].view(torch.uint8), buffers[1]],
        [buffers[0].to(torch.float32), buffers[1]],
        [buffer.transpose(1, 2).contiguous().transpose(1, 2) for buffer in buffers],
        [buffer[:, :1].expand(-1, 2, -1) for buffer in buffers],
        [buffer[:1].expand(len(buffer), -1, -1) for buffer in buffers],
        [buffer.flatten(1) for buffer in buffers],
    ):
        with pytest.raises(ValueError, match=r"layer|slot"):
            kernel.restore(good, slots, bad_buffers)
    with pytest.raises(ValueError, match="pages"):
        kernel.restore([], slots[:0], buffers)
    changes = [
        {"canvas": None},
        {"canvas": good[1].canvas.to(torch.int16)},
        {"stored": good[1].stored[:-1] or b"\0"},
        {"stored": good[1].stored + b"\0"},
        {"escapes": b"\1"},
        {"steps": (1.0,)},
        {"steps": (1.0, float("nan"))},
        {"steps": (1.0, -1.0)},
    ]
    for change in changes:
        bad = dataclasses.replace(good[1], **change)
        sides = [dataclasses.replace(good[0], **change), bad] if "canvas" in change else [good[0], bad]
        with pytest.raises(FormatError):
            kernel.restore(sides, slots, buffers)
    assert torch.equal(pool.bits(), pool.bits_before())


def test_raw_has_no_kernel_and_high_none_for_fp8():
    assert open_restore("raw", KVSpec(2, 2, 64, 16, KVDtype.BFLOAT16)) is None
    with pytest.raises(UnsupportedError, match="use 'exact'"):
        open_restore("high", KVSpec(2, 2, 64, 16, KVDtype.FLOAT8_E5M2))
