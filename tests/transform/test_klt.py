import dataclasses
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.errors import ForeignPageError, FormatError
from sglang_kvcodec.format.calibration import GainModel
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform.floats import torch_dtype
from sglang_kvcodec.transform.klt import KltTransform, analysis_matrix
from sglang_kvcodec.transform.rope import rotate

SPEC = KVSpec(layers=7, kv_heads=2, head_dim=16, page_tokens=16, dtype=KVDtype.BFLOAT16)


def round_trip(spec, calibration, values, group, side, positions, tier="high"):
    transform = KltTransform(spec, calibration, tier)
    packed = transform.pack(group, side, values, positions)
    return transform.restore(group, side, packed, positions), packed


@settings(max_examples=25)
@given(data=st.data())
def test_what_is_restored_is_within_the_steps_on_any_shape(data):
    spec = KVSpec(
        layers=data.draw(st.integers(1, 7), "layers"),
        kv_heads=data.draw(st.sampled_from([1, 2, 3]), "heads"),
        head_dim=data.draw(st.sampled_from([8, 20, 64]), "head_dim"),
        page_tokens=data.draw(st.sampled_from([16, 17, 64]), "page_tokens"),
        dtype=data.draw(st.sampled_from(list(KVDtype)), "dtype"),
    )
    rope = data.draw(st.sampled_from([None, neox_rope(spec.head_dim), neox_rope(spec.head_dim, 4, 1.3)]), "rope")
    per_block = data.draw(st.sampled_from([1, 3]), "layers_per_block")
    calibration = random_calibration(spec, layers_per_block=per_block, step=0.01, rope=rope, gain_components=3)
    group = data.draw(st.sampled_from(layer_groups(spec)), "group")
    side = data.draw(st.sampled_from(spec.sides), "side")
    pages = data.draw(st.integers(1, 3), "pages")
    positions = [page * spec.page_tokens for page in data.draw(st.permutations(range(100)))[:pages]]
    values = kv_like(spec, pages, group.layers, seed=3)
    restored, packed = round_trip(spec, calibration, values, group, side, positions)
    assert restored.shape == values.shape
    assert restored.dtype == values.dtype
    # Half a step, doubled by the largest gain, in each component, through the widest row of the basis; and the type's
    # own rounding.
    width = group.layers * spec.channels
    bound = 2 * 0.01 * (0.5 * width**0.5) * 4 + 2.0**-spec.dtype.mantissa_bits * values.float().abs()
    assert bool(((restored.float() - values.float()).abs() <= bound).all())
    assert all(side.canvas.shape == KltTransform(spec, calibration, "high").canvas_shape for side in packed)


def test_the_noise_is_that_of_the_steps():
    """Half-step rounding of independent components: step**2 / 12 for each, measured with the metric."""
    spec = dataclasses.replace(SPEC, page_tokens=64, dtype=KVDtype.FLOAT16)
    calibration = random_calibration(spec, step=0.05)
    group = layer_groups(spec)[0]
    values = kv_like(spec, 4, group.layers, seed=1)
    restored, packed = round_trip(spec, calibration, values, group, Side.VALUE, [64, 128, 192, 256])
    error = (restored.float() - values.float()).transpose(1, 2).flatten(2)
    layers = calibration.layers_per_block * spec.channels
    metric = torch.block_diag(*torch.from_numpy(calibration.metrics[Side.VALUE][:3]).flatten(0, 1))
    block = error[..., :layers]
    noise = float(((block @ metric) * block).sum(-1).mean()) / layers
    assert noise == pytest.approx(0.05**2 / 12, rel=0.1)
    assert packed[0].steps == (pytest.approx(0.05),) * len(packed[0].steps)


def test_k_is_transformed_with_its_rotation_undone():
    """A key that is the same in every token before its rotation codes to the same components in every token."""
    spec = dataclasses.replace(SPEC, dtype=KVDtype.FLOAT16)
    rope = neox_rope(spec.head_dim)
    group = layer_groups(spec)[0]
    transform = KltTransform(spec, random_calibration(spec, rope=rope, step=0.1), "high")
    generator = torch.Generator().manual_seed(1)
    key = torch.randn((1, group.layers, 1, spec.kv_heads, spec.head_dim), generator=generator)
    still = key.expand(-1, -1, spec.page_tokens, -1, -1)
    turned = rotate(still.contiguous(), torch.arange(1040, 1040 + spec.page_tokens), rope).to(torch.float16)

    def spread(side):
        codes = transform.codes(group, side, transform.pack(group, side, turned, [1040]))
        return int((codes.amax(1) - codes.amin(1)).max())

    assert spread(Side.KEY) <= 1
    assert spread(Side.VALUE) > 3


def test_first_tokens_are_coded_finer_where_the_calibration_says_so():
    calibration = random_calibration(SPEC, step=0.04)
    group = layer_groups(SPEC)[0]
    values = kv_like(SPEC, 2, group.layers, seed=5)
    transform = KltTransform(SPEC, calibration, "high")
    packed = transform.pack(group, Side.KEY, values, [0, 16])
    steps = transform.steps(group, Side.KEY, packed)
    assert steps[0, :, :6].tolist() == [pytest.approx([0.01] * 3 + [0.02] * 2 + [0.04])] * steps.shape[1]
    assert steps[1].unique().tolist() == pytest.approx([0.04])


def test_tokens_that_look_important_are_coded_finer():
    """A model that looks at the widest component: a token with a large one has an error as much smaller."""
    spec = dataclasses.replace(SPEC, layers=3, page_tokens=64, dtype=KVDtype.FLOAT16)
    plain = random_calibration(spec, step=0.05)
    steep = GainModel(1.0, *(np.array([number], np.float32) for number in (1.0, 0.0, -1.0)))
    calibration = dataclasses.replace(plain, gain_models=dict.fromkeys(spec.sides, (steep,)))
    group = layer_groups(spec)[0]
    values = kv_like(spec, 2, 3, seed=5)
    direction = torch.from_numpy(plain.bases[Side.VALUE][0].synthesis[0]).view(3, 1, 2, 16)
    values[:, :, 7:8] += 50 * direction
    restored, packed = round_trip(spec, calibration, values, group, Side.VALUE, [64, 128])
    steps = KltTransform(spec, calibration, "high").steps(group, Side.VALUE, packed)
    assert float(steps[:, 0, 7].max()) < 0.3 * float(steps.median())
    error = (restored.float() - values.float()).square().mean((0, 1, 3, 4))
    assert float(error[7]) < 0.3 * float(error.median())


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"\xcc" + data])
def test_stored_bytes_of_another_length_are_refused(change):
    transform = KltTransform(SPEC, random_calibration(SPEC), "high")
    group = layer_groups(SPEC)[0]
    page = transform.pack(group, Side.KEY, kv_like(SPEC, 1, group.layers, seed=1), [0])[0]
    with pytest.raises(FormatError):
        transform.restore(group, Side.KEY, [dataclasses.replace(page, stored=change(page.stored))], [0])


def test_values_beyond_the_canvas_are_escaped_exactly():
    calibration = random_calibration(SPEC, step=0.001)
    group = layer_groups(SPEC)[0]
    values = kv_like(SPEC, 3, group.layers, seed=2)
    restored, packed = round_trip(SPEC, calibration, values, group, Side.KEY, [0, 16, 32])
    assert all(page.escapes for page in packed)
    assert float((restored.float() - values.float()).abs().max()) <= 0.01 + 2**-7 * float(values.float().abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_page_that_can_not_be_coded_says_so(bad):
    calibration = random_calibration(SPEC, step=0.001)
    group = layer_groups(SPEC)[0]
    values = kv_like(SPEC, 2, group.layers, seed=2)
    values[1, 1, 3, 1, 2] = bad
    assert KltTransform(SPEC, calibration, "high").pack(group, Side.KEY, values, [0, 16]) is None


@pytest.mark.parametrize("dtype", [KVDtype.FLOAT16, KVDtype.FLOAT8_E4M3, KVDtype.FLOAT8_E5M2])
def test_the_largest_values_of_a_type_stay_finite(dtype):
    spec = dataclasses.replace(SPEC, dtype=dtype)
    calibration = random_calibration(spec, step=0.5)
    group = layer_groups(spec)[0]
    values = kv_like(spec, 1, group.layers, seed=2)
    values[0, :, 3] = torch.finfo(torch_dtype(dtype)).max
    restored, _ = round_trip(spec, calibration, values, group, Side.VALUE, [16])
    assert bool(torch.isfinite(restored.float()).all())


def test_cut_components_leave_the_rest_as_it_is():
    group = layer_groups(SPEC)[0]
    values = kv_like(SPEC, 1, group.layers, seed=7)
    whole, cut = random_calibration(SPEC, kept=1.0), random_calibration(SPEC, kept=0.6)
    packed_whole = KltTransform(SPEC, whole, "high").pack(group, Side.KEY, values, [16])[0]
    transform = KltTransform(SPEC, cut, "high")
    packed_cut = transform.pack(group, Side.KEY, values, [16])[0]
    assert transform.components(group, Side.KEY) < group.layers * SPEC.channels
    assert int((packed_cut.canvas != 128).sum()) < int((packed_whole.canvas != 128).sum())
    assert transform.restore(group, Side.KEY, [packed_cut], [16]).shape == values.shape


def test_the_analysis_inverts_the_synthesis():
    calibration = random_calibration(SPEC)
    metric = torch.from_numpy(calibration.metrics[Side.KEY][:3])
    synthesis = torch.from_numpy(calibration.bases[Side.KEY][0].synthesis).float()
    product = synthesis @ analysis_matrix(metric, synthesis)
    assert float((product - torch.eye(len(product))).abs().max()) < 5e-3


@pytest.mark.parametrize(
    "escapes",
    [
        struct.pack("<I", 1),
        struct.pack("<Ii", 1 << 30, 200),
        struct.pack("<IIii", 5, 5, 200, 200),
        struct.pack("<IIii", 9, 5, 200, 200),
        struct.pack("<IiI", 1, 2, 3),
    ],
)
def test_escapes_that_are_none_are_refused(escapes):
    calibration = random_calibration(SPEC)
    group = layer_groups(SPEC)[0]
    transform = KltTransform(SPEC, calibration, "high")
    page = transform.pack(group, Side.KEY, kv_like(SPEC, 1, group.layers, seed=1), [0])[0]
    with pytest.raises(FormatError):
        transform.restore(group, Side.KEY, [dataclasses.replace(page, escapes=escapes)], [0])


@pytest.mark.parametrize("steps", [(), (0.0,) * 3, (float("nan"),) * 3, (1.0,), (-1.0,) * 3])
def test_steps_that_are_none_are_refused(steps):
    calibration = random_calibration(SPEC)
    group = layer_groups(SPEC)[0]
    transform = KltTransform(SPEC, calibration, "high")
    page = transform.pack(group, Side.KEY, kv_like(SPEC, 1, group.layers, seed=1), [0])[0]
    with pytest.raises(FormatError):
        transform.restore(group, Side.KEY, [dataclasses.replace(page, steps=steps)], [0])


def test_a_calibration_of_another_shape_is_refused():
    with pytest.raises(ForeignPageError):
        KltTransform(dataclasses.replace(SPEC, kv_heads=3), random_calibration(SPEC), "high")
    with pytest.raises(ForeignPageError):
        KltTransform(SPEC, random_calibration(SPEC, layers_per_block=5), "high")
    with pytest.raises(ForeignPageError):
        KltTransform(SPEC, random_calibration(SPEC), "exact")
