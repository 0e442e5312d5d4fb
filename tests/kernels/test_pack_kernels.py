"""What is packed out of a pool: the reference's to the bit for ``exact``, to rounding for calibrated pages."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from kernel_kit import SHAPES, STEP, hard_values, pool_with, with_wide_components

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels import PagePacks, ReferencePack, check_pack
from sglang_kvcodec.kernels.check_pack import differences
from sglang_kvcodec.kernels.exact_pack import ExactPack
from sglang_kvcodec.kernels.floats import is_finite_bits, widen_bits
from sglang_kvcodec.kernels.high_pack import HighPack
from sglang_kvcodec.kernels.klt import KltRestore
from sglang_kvcodec.kernels.klt_pack import KltPack
from sglang_kvcodec.kernels.ordered_sum import folds, tree_sum, tree_terms
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform import PackedSide, PageTransforms, get_transform
from sglang_kvcodec.transform.component_escapes import unpack_component_escapes
from sglang_kvcodec.transform.floats import to_bits, torch_dtype
from sglang_kvcodec.transform.high import ordered_sum
from sglang_kvcodec.transform.klt import KltTransform

# NumPy, which interprets the kernels, warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)


def calibrated(spec, per_block, rope):
    return with_wide_components(
        random_calibration(spec, layers_per_block=per_block, step=STEP, rope=rope, gain_components=2)
    )


def small(dtype=KVDtype.BFLOAT16, layers=2, tokens=17):
    spec = KVSpec(layers, 1, 48, tokens, dtype)
    calibration = random_calibration(
        spec, layers_per_block=1, step=STEP, rope=neox_rope(48), kept=0.9, gain_components=3
    )
    return spec, calibration, layer_groups(spec)[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_calibrated_pages_are_the_references_to_rounding(shape, device):
    spec, per_block, rope, pages = shape
    calibration = calibrated(spec, per_block, rope)
    transform, kernel = KltTransform(spec, calibration, "high"), KltPack(spec, calibration, "high", device)
    pages = min(pages, 2)
    positions = [(7 * page + 1) * spec.page_tokens for page in range(pages)][::-1]
    for group in layer_groups(spec):
        values = kv_like(spec, pages, group.layers, seed=group.index)
        for side in spec.sides:
            pool = pool_with(spec, values, device)
            before = pool.bits()
            got = kernel.pack(group, side, positions, pool.slots, pool.buffers)
            want = transform.pack(group, side, values, positions)
            assert differences(transform, group, side, values, positions, got, want) == []
            assert torch.equal(pool.bits(), before)


def test_first_tokens_have_their_gains_and_what_is_left_of_a_canvas_is_128(device):
    spec, calibration, group = small()
    transform, kernel = KltTransform(spec, calibration, "high"), KltPack(spec, calibration, "high", device)
    values = kv_like(spec, 2, group.layers, seed=5)
    pool = pool_with(spec, values, device)
    canvases = torch.full((2, *kernel.canvas_shape), 3, dtype=torch.uint8, device=device)
    got = kernel.pack(group, Side.KEY, [0, 17], pool.slots, pool.buffers, canvases)
    want = transform.pack(group, Side.KEY, values, [0, 17])
    assert [page.stored[:3] for page in got] == [page.stored[:3] for page in want]
    assert got[0].canvas.data_ptr() == canvases.data_ptr()
    for ours, theirs in zip(got, want, strict=True):
        where = transform._layout[: transform.components(group, Side.KEY)].flatten()
        left = torch.ones(theirs.canvas.numel(), dtype=torch.bool)
        left[where] = False
        assert bool((ours.canvas.cpu().flatten()[left] == 128).all())
    assert differences(transform, group, Side.KEY, values, [0, 17], got, want) == []


def test_escapes_are_listed_in_order_and_page_by_page(device):
    spec, calibration, group = small(tokens=70)
    transform, kernel = KltTransform(spec, calibration, "high"), KltPack(spec, calibration, "high", device)
    values = kv_like(spec, 3, group.layers, seed=2)
    values[0, :, [4, 69]] *= 40
    values[2, :, [0, 16, 65]] *= 60
    pool = pool_with(spec, values, device)
    got = kernel.pack(group, Side.VALUE, [70, 0, 210], pool.slots, pool.buffers)
    want = transform.pack(group, Side.VALUE, values, [70, 0, 210])
    assert differences(transform, group, Side.VALUE, values, [70, 0, 210], got, want) == []
    for ours, theirs in zip(got, want, strict=True):
        assert bool(ours.escapes) == bool(theirs.escapes)
        if ours.escapes:
            count = 70 * transform.components(group, Side.VALUE)
            mine, wanted = (unpack_component_escapes(page.escapes, count)[0] for page in (ours, theirs))
            assert len(set(mine) ^ set(wanted)) <= 0.05 * len(wanted)


@pytest.mark.parametrize("special", [float("nan"), -float("inf"), 3e38])
def test_what_a_tier_cant_code_is_told(special, device):
    spec, calibration, group = small(layers=1, tokens=5)
    kernel = KltPack(spec, calibration, "high", device)
    values = kv_like(spec, 2, 1, seed=0)
    assert kernel.pack(group, Side.KEY, [0, 5], *slots_and_buffers(spec, values, device)) is not None
    values[1, 0, -1, 0, -1] = special
    assert KltTransform(spec, calibration, "high").pack(group, Side.KEY, values, [0, 5]) is None
    assert kernel.pack(group, Side.KEY, [0, 5], *slots_and_buffers(spec, values, device)) is None


def slots_and_buffers(spec, values, device):
    pool = pool_with(spec, values, device)
    return pool.slots, pool.buffers


@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize("shape", [(2, 3, 21, 17), (5, 1, 9, 3), (4, 2, 64, 16), (1, 1, 576, 16)])
def test_exact_pages_are_the_references_bit_for_bit(shape, dtype, device):
    spec = KVSpec(*shape, dtype)
    for group in layer_groups(spec):
        values = hard_values("exact", spec, 3, group.layers, seed=group.index)
        got = ExactPack(spec).pack(group, Side.VALUE, [0, 0, 0], *slots_and_buffers(spec, values, device))
        assert_same(got, get_transform("exact", spec).pack(values))


@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT16])
@pytest.mark.parametrize("shape", [(2, 3, 21, 17), (5, 1, 9, 3), (4, 2, 64, 16), (1, 1, 576, 16), (1, 1, 64, 1)])
def test_high_pages_are_the_references_bit_for_bit(shape, dtype, device):
    """Steps, codes and escapes: NaN, infinities, and layers of noise whose escapes are the whole layer."""
    spec = KVSpec(*shape, dtype)
    for group in layer_groups(spec):
        values = hard_values("high", spec, 3, group.layers, seed=group.index)
        got = HighPack(spec, device).pack(group, Side.VALUE, [0, 0, 0], *slots_and_buffers(spec, values, device))
        assert_same(got, get_transform("high", spec).pack(values))


def test_each_step_that_can_be_taken_is_taken_as_the_reference_takes_it(device):
    """Layers that need the first, a later or no step: noise, two values badly placed, zeros, one value, far powers."""
    spec = KVSpec(6, 1, 64, 16, KVDtype.BFLOAT16)
    (group,) = layer_groups(spec)
    values = kv_like(spec, 2, 6, seed=7)
    generator = torch.Generator().manual_seed(1)
    values[:, 1] = torch.tensor([1.0, -1.0]).repeat(8)[:, None, None]
    values[:, 2] = 100 + torch.randn(values[:, 2].shape, generator=generator).to(values.dtype)
    values[:, 3] = 0
    values[0, 4] = 5
    values[1, 4] *= 1e-38
    values[:, 5] *= 1e30
    want = get_transform("high", spec).pack(values)
    signal = (values.float() - values.float().mean(2, keepdim=True)).square().flatten(2).mean(2)
    factors = torch.tensor([page.steps for page in want]) / (12e-3 * signal).sqrt()
    taken = {round(float(factor), 2) for factor in factors.flatten() if 0 < factor < 1}
    assert len(taken) >= 2
    assert any(step == 0 for page in want for step in page.steps)
    assert_same(HighPack(spec, device).pack(group, Side.KEY, [0, 0], *slots_and_buffers(spec, values, device)), want)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 27, 64, 1071, 5000])
def test_sums_are_those_of_the_reference_bit_for_bit(count, device):
    """In one program, and in programs whose sums another one adds up."""
    terms = torch.randn(count, generator=torch.Generator().manual_seed(count)).square() * 10
    want = ordered_sum(terms)
    for levels in {0, min(3, folds(count)), folds(count)}:
        left = -(-count >> levels)
        block = min(8, triton.next_power_of_2(left))
        sums = torch.full((left,), 7.0, device=device)
        fold_all[(triton.cdiv(left, block),)](
            terms.to(device), sums, count, levels, block, left, enable_fp_fusion=False
        )
        assert torch.equal(ordered_sum(sums.cpu()), want)


@triton.jit
def fold_all(terms, sums, COUNT: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, LEFT: tl.constexpr):
    sum_ = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index, exists = tree_terms(sum_[None, :], tl.arange(0, 1 << LEVELS)[:, None], COUNT, LEVELS)
    found = tl.load(terms + index, mask=exists, other=0)
    tl.store(sums + sum_, tree_sum(found, LEVELS, BLOCK), mask=sum_ < LEFT)


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.canvas.cpu(), theirs.canvas)
        assert (ours.stored, ours.escapes, ours.steps) == (theirs.stored, theirs.escapes, theirs.steps)


@pytest.mark.parametrize("profile", ["exact", "high", "raw"])
def test_the_reference_packs_the_same_out_of_a_pool(profile, device):
    spec = KVSpec(2, 3, 21, 17, KVDtype.BFLOAT16)
    group = layer_groups(spec)[0]
    values = hard_values(profile, spec, 2, 2) if profile != "raw" else kv_like(spec, 2, 2, 0)
    pack = PagePacks(PageTransforms(spec, profile), device, use_kernels=False).get(profile)
    assert isinstance(pack, ReferencePack)
    got = pack.pack(group, Side.KEY, [0, 0], *slots_and_buffers(spec, values, device))
    for ours, theirs in zip(got, get_transform(profile, spec).pack(values), strict=True):
        assert (ours.canvas is None) == (theirs.canvas is None)
        assert ours.canvas is None or torch.equal(ours.canvas.cpu(), theirs.canvas)
        assert (ours.stored, ours.escapes, ours.steps) == (theirs.stored, theirs.escapes, theirs.steps)


def test_each_coding_has_its_pack_and_tables_are_shared(device):
    spec, calibration, group = small()
    packs = PagePacks(PageTransforms(spec, "high", [calibration], device), device)
    restore = KltRestore(spec, calibration, "high", device)
    pack = packs.get("high", calibration.digest, restore)
    assert isinstance(pack, KltPack)
    assert packs.get("high", calibration.digest) is pack
    assert isinstance(packs.get("exact"), ExactPack)
    assert isinstance(packs.get("high"), HighPack)
    assert isinstance(PagePacks(PageTransforms(spec, "raw"), device).get("raw"), ReferencePack)
    assert pack.bases[group.index, Side.KEY].synthesis is restore.bases[group.index, Side.KEY].synthesis


def test_pictures_go_where_they_are_wanted(device):
    spec = KVSpec(2, 1, 64, 16, KVDtype.BFLOAT16)
    group = layer_groups(spec)[0]
    values = kv_like(spec, 2, 2, seed=4)
    packs = PagePacks(PageTransforms(spec, "exact"), device)
    want = get_transform("exact", spec).pack(values)
    for use_kernels in (True, False):
        packs = PagePacks(PageTransforms(spec, "exact"), device, use_kernels=use_kernels)
        wanted = torch.zeros((2, *packs.get("exact").canvas_shape), dtype=torch.uint8)
        got = packs.get("exact").pack(group, Side.KEY, [0, 0], *slots_and_buffers(spec, values, device), wanted)
        assert torch.equal(wanted, torch.stack([page.canvas for page in want]))
        assert [page.canvas.data_ptr() for page in got] == [canvas.data_ptr() for canvas in wanted]


def test_what_does_not_fit_is_refused(device):
    spec, calibration, group = small()
    values = kv_like(spec, 2, group.layers, seed=0)
    slots, buffers = slots_and_buffers(spec, values, device)
    for pack in (KltPack(spec, calibration, "high", device), ExactPack(spec), HighPack(spec, device)):
        right = torch.empty((2, *pack.canvas_shape), dtype=torch.uint8, device=device)
        for positions, bad_slots, bad_buffers, canvases in (
            ([0], slots, buffers, None),
            ([0, 17], slots[:-1], buffers, None),
            ([0, 17], slots + len(buffers[0]), buffers, None),
            ([0, 17], slots, buffers[:1], None),
            ([0, 17], slots, [buffers[0], buffers[1].to(torch.float16)[:-1]], None),
            ([0, 17], slots, buffers, right[:1]),
            ([0, 17], slots, buffers, right.to(torch.int16)),
            ([0, 17], slots, buffers, right.transpose(1, 2)),
        ):
            with pytest.raises(ValueError, match=r"slot|layer|canvas"):
                pack.pack(group, Side.KEY, positions, bad_slots, bad_buffers, canvases)
    with pytest.raises(ValueError, match="position"):
        KltPack(spec, calibration, "high", device).pack(group, Side.KEY, [0, -17], slots, buffers)


@pytest.mark.parametrize("dtype", KVDtype)
def test_every_bit_pattern_is_widened_as_torch_widens(dtype, device):
    count = 1 << (8 * dtype.item_bytes)
    bits = torch.arange(count, dtype=torch.int32)
    narrow = bits.to(torch.uint8 if dtype.item_bytes == 1 else torch.int16)
    want = narrow.view(torch_dtype(dtype)).float()
    # As a kernel loads them: 16 bits come with their sign.
    loaded = narrow.to(torch.int32).to(device)
    wide, finite = torch.empty(count, device=device), torch.empty(count, dtype=torch.int32, device=device)
    widen_all[(count // 256,)](loaded, wide, finite, dtype.exponent_bits, dtype.mantissa_bits, 256)
    assert torch.equal(finite.cpu() != 0, torch.isfinite(want))
    good = torch.isfinite(want)
    assert torch.equal(wide.cpu()[good].view(torch.int32), want[good].view(torch.int32))


@triton.jit
def widen_all(bits, wide, finite, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    each = tl.load(bits + at)
    tl.store(wide + at, widen_bits(each, EXPONENT_BITS, MANTISSA_BITS))
    tl.store(finite + at, is_finite_bits(each, EXPONENT_BITS, MANTISSA_BITS).to(tl.int32))


@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT8_E4M3])
def test_the_packs_pass_their_check(dtype, device):
    spec, calibration, _ = small(dtype, layers=3, tokens=7)
    transforms = PageTransforms(spec, "high", [calibration], device)
    packs = PagePacks(transforms, device)
    check_pack(packs.get("exact"), transforms.get("exact"), spec, torch.device(device))
    if dtype is KVDtype.BFLOAT16:
        check_pack(packs.get("high"), transforms.get("high"), spec, torch.device(device))
    tier = transforms.get("high", calibration.digest)
    check_pack(packs.get("high", calibration.digest), tier, spec, torch.device(device), calibration, "high")


class Spoiled:
    """A reference whose result is changed on one side."""

    def __init__(self, pack, change, side):
        self._pack, self._change, self._side = pack, change, side

    def pack(self, group, side, first_positions, slots, buffers, canvases=None):
        packed = self._pack.pack(group, side, first_positions, slots, buffers, canvases)
        return packed if side is not self._side else self._change(packed)


def with_canvas(page, change):
    canvas = page.canvas.clone()
    change(canvas)
    return dataclasses.replace(page, canvas=canvas)


def far_code(packed):
    return [*packed[:-1], with_canvas(packed[-1], lambda canvas: canvas.view(-1)[5].add_(5))]


def many_codes(packed):
    return [with_canvas(page, lambda canvas: canvas[:8].add_(1)) for page in packed]


def other_low_bits(packed):
    return [dataclasses.replace(page, stored=page.stored[:-9] + b"\x05" + page.stored[-8:]) for page in packed]


@pytest.mark.parametrize("side", [Side.KEY, Side.VALUE])
@pytest.mark.parametrize("change", [far_code, many_codes, lambda packed: packed[:-1], lambda packed: None])
def test_other_codes_are_refused(change, side, device):
    spec, calibration, _ = small(layers=1, tokens=7)
    transforms = PageTransforms(spec, "high", [calibration], device)
    tier = transforms.get("high", calibration.digest)
    spoiled = Spoiled(ReferencePack(spec, tier), change, side)
    with pytest.raises(ConfigurationError, match="packed wrongly"):
        check_pack(spoiled, tier, spec, torch.device(device), calibration, "high")


@pytest.mark.parametrize("change", [far_code, other_low_bits])
def test_other_bits_of_exact_pages_are_refused(change, device):
    spec, _, _ = small(layers=1, tokens=7)
    reference = PageTransforms(spec, "exact").get("exact")
    spoiled = Spoiled(ReferencePack(spec, reference), change, Side.VALUE)
    with pytest.raises(ConfigurationError, match="packed wrongly"):
        check_pack(spoiled, reference, spec, torch.device(device))


def test_a_side_of_its_own_is_no_canvas(device):
    """What packing returns is whole: restored without the canvases it was given, it is the values."""
    spec, _, group = small()
    values = hard_values("exact", spec, 1, group.layers)
    (page,) = ExactPack(spec).pack(group, Side.KEY, [0], *slots_and_buffers(spec, values, device))
    alone = PackedSide(page.canvas.cpu().clone(), page.stored)
    assert torch.equal(to_bits(get_transform("exact", spec).restore(group.layers, [alone])), to_bits(values))
