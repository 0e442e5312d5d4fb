import dataclasses
import struct

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.testing.synthetic import kv_like, random_bits
from sglang_kvcodec.transform import get_transform
from sglang_kvcodec.transform.escapes import escape_places, pack_escapes, unpack_escapes, widen_where_dense
from sglang_kvcodec.transform.floats import to_bits
from sglang_kvcodec.transform.high import ordered_sum

DTYPES = (KVDtype.BFLOAT16, KVDtype.FLOAT16)


def spec_for(values):
    return KVSpec(
        values.shape[1],
        values.shape[3],
        values.shape[4],
        values.shape[2],
        KVDtype.from_torch_name(str(values.dtype).removeprefix("torch.")),
    )


def round_trip(values):
    transform = get_transform("high", spec_for(values))
    packed = transform.pack(values)
    return transform.restore(values.shape[1], packed), packed


def assert_promise(values):
    """Noise at most 1e-3 of the signal without channel means, for each page and layer; what is not finite, exact."""
    restored, packed = round_trip(values)
    finite = torch.isfinite(values)
    assert torch.equal(to_bits(restored)[~finite], to_bits(values)[~finite])
    wide = torch.where(finite, values.double(), 0.0)
    noise = ((torch.where(finite, restored.double(), 0.0) - wide) ** 2).sum((2, 3, 4))
    signal = ((wide - wide.mean(2, keepdim=True)) ** 2).sum((2, 3, 4))
    assert (noise <= 1e-3 * signal).all(), (noise / signal, [side.steps for side in packed])
    return noise / signal, packed


def shaped(shape, dtype):
    return lambda flat: flat.reshape(shape).to(getattr(torch, dtype.torch_name))


def ramp(count):
    return torch.arange(count, dtype=torch.float32)


ADVERSARIAL = {
    "zeros": lambda n: torch.zeros(n),
    "negative zeros": lambda n: -torch.zeros(n),
    "constant": lambda n: torch.full((n,), 3.7),
    "one value": lambda n: (ramp(n) == n // 2) * 5.0,
    "two levels": lambda n: (ramp(n) % 2) * 2 - 1,
    "two levels and an offset": lambda n: (ramp(n) % 2) * 0.5 + 100,
    "all between two steps": lambda n: torch.round(ramp(n) % 7 - 3) + 0.5,
    "heavy tails": lambda n: torch.tan(ramp(n) * 0.7) ** 3,
    "one huge": lambda n: torch.where(ramp(n) == 3, 6e4, torch.sin(ramp(n))),
    "huge": lambda n: 6e4 * torch.sin(ramp(n)),
    "tiny": lambda n: 3e-7 * torch.sin(ramp(n)),
    "ramp": ramp,
    "nan": lambda n: torch.full((n,), float("nan")),
    "infinities": lambda n: torch.where(ramp(n) % 2 == 0, float("inf"), float("-inf")),
    "some not finite": lambda n: torch.where(ramp(n) % 5 == 0, float("nan"), torch.sin(ramp(n))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 16, 2, 64), (1, 1, 1, 1, 1), (1, 2, 1, 3, 5), (1, 1, 2, 1, 1), (1, 2, 7, 1, 3)]
)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_promise_holds_for(name, shape, dtype):
    assert_promise(shaped(shape, dtype)(ADVERSARIAL[name](int(np.prod(shape)))))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 3e38])
def test_the_promise_holds_at_every_scale_of_bfloat16(scale):
    values = (torch.randn((1, 2, 16, 1, 64), generator=torch.Generator().manual_seed(0)) * scale).to(torch.bfloat16)
    assert_promise(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_promise_holds_for_any_bits(dtype):
    assert_promise(random_bits(dtype, (2, 3, 16, 2, 64), seed=5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 3.0, 10.0, 100.0, 1000.0])
def test_the_promise_holds_for_channels_far_from_zero(dtype, offset):
    values = torch.randn((1, 3, 64, 1, 64), generator=torch.Generator().manual_seed(0)) + offset
    assert_promise(values.to(getattr(torch, dtype.torch_name)))


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 5),
    channels=st.integers(1, 5),
    data=st.data(),
)
def test_the_promise_holds_for_tiny_pages_of_any_numbers(dtype, tokens, channels, data):
    width = 16 if dtype is KVDtype.FLOAT16 else 32
    numbers = st.lists(st.floats(width=width), min_size=tokens * channels, max_size=tokens * channels)
    values = torch.tensor(data.draw(numbers), dtype=torch.float32).to(getattr(torch, dtype.torch_name))
    assert_promise(values.reshape(1, 1, tokens, 1, channels))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_gets_a_step_near_the_promise_and_few_escapes(dtype):
    spec = KVSpec(3, 4, 64, 64, dtype)
    values = kv_like(spec, 2, 3, seed=2)
    ratio, packed = assert_promise(values)
    assert (ratio > 0.9e-3).all()
    for side in packed:
        assert len(side.steps) == 3
        assert 0 < len(side.escapes) < 0.01 * 3 * spec.layer_values


def test_values_lie_on_the_canvas_as_documented():
    values = torch.randn((1, 1, 16, 1, 64), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values[0, 0, 2, 0, 5] = 1e6
    spec = spec_for(values)
    packed = get_transform("high", spec).pack(values)[0]
    geometry = picture_geometry(spec)
    codes = packed.canvas[:16, :64].float()
    expected = torch.round(values[0, 0, :, 0].float() / packed.steps[0]) + 128
    expected[2, 5] = 128
    assert geometry.folds == 1
    assert torch.equal(codes, expected)
    bits = int(torch.tensor(1e6).to(torch.bfloat16).view(torch.int16))
    assert packed.escapes == struct.pack("<IIh", 1, 2 * 64 + 5, bits)


def test_a_constant_page_is_escaped_whole_and_without_positions():
    values = torch.full((1, 2, 16, 1, 64), 2.5, dtype=torch.bfloat16)
    restored, packed = round_trip(values)
    assert torch.equal(restored, values)
    assert packed[0].steps == (0.0, 0.0)
    assert len(packed[0].escapes) == 2 * 4 + 2 * 16 * 64 * 2


def test_zeros_need_no_escapes():
    values = torch.zeros((1, 2, 16, 1, 64), dtype=torch.float16)
    restored, packed = round_trip(values)
    assert torch.equal(restored, values)
    assert packed[0].escapes == b""


def test_restoring_is_step_times_code_in_fp32_then_the_pools_type():
    spec = KVSpec(1, 1, 64, 16, KVDtype.BFLOAT16)
    transform = get_transform("high", spec)
    packed = transform.pack(kv_like(spec, 1, 1, seed=1))[0]
    canvas = torch.full_like(packed.canvas, 128)
    canvas[:4, :64] = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    step = float(np.float32(0.0371))
    restored = transform.restore(1, [dataclasses.replace(packed, canvas=canvas, escapes=b"", steps=(step,))])
    expected = (np.arange(-128, 128, dtype=np.float32) * np.float32(step)).astype(np.float32)
    assert torch.equal(restored.flatten()[:256], torch.from_numpy(expected).to(torch.bfloat16))


@pytest.mark.parametrize("steps", [(), (1.0,), (1.0, 1.0, 1.0), (1.0, float("nan")), (1.0, -1.0), (float("inf"), 1.0)])
def test_steps_that_are_none_are_refused(steps):
    values = torch.randn((1, 2, 16, 1, 64)).to(torch.bfloat16)
    transform = get_transform("high", spec_for(values))
    packed = transform.pack(values)[0]
    with pytest.raises(FormatError):
        transform.restore(2, [dataclasses.replace(packed, steps=steps)])


LAYER = 50


def escapes_of(*positions_of_layers, dtype=KVDtype.BFLOAT16):
    bits = torch.arange(len(positions_of_layers) * LAYER).to(torch.int16).reshape(-1, LAYER)
    escaped = torch.zeros(bits.shape, dtype=torch.bool)
    for layer, positions in enumerate(positions_of_layers):
        escaped[layer, list(positions)] = True
    return pack_escapes(bits, escaped)


@pytest.mark.parametrize("layers", [([3, 7], [], [0, 49]), (range(50), [1], []), ([], [], range(50)), ([5],)])
def test_escapes_come_back(layers):
    where, bits = unpack_escapes(escapes_of(*layers), len(layers), LAYER, KVDtype.BFLOAT16)
    expected = [layer * LAYER + position for layer, positions in enumerate(layers) for position in positions]
    assert where.tolist() == expected
    assert bits.tolist() == expected


def test_places_of_many_pages_are_those_of_each():
    pages = [escapes_of([3, 7], [], [0, 49]), b"", escapes_of([9], range(50), []), escapes_of([], [], [1])]
    places = escape_places(pages, 3, LAYER, KVDtype.BFLOAT16)
    joined = b"".join(places.pieces)
    assert places.counts.tolist() == [[2, 0, 2], [0, 0, 0], [1, 50, 0], [0, 0, 1]]
    for page, data in enumerate(pages):
        if not data:
            continue
        where, bits = unpack_escapes(data, 3, LAYER, KVDtype.BFLOAT16)
        counts = places.counts[page].tolist()
        found_where, found_bits = [], []
        for layer, count in enumerate(counts):
            at, value_at = int(places.position_at[page, layer]), int(places.value_at[page, layer])
            listed = range(LAYER) if at < 0 else np.frombuffer(joined, "<u4", count, at).tolist()
            assert at % 4 == 0 or at < 0
            found_where += [layer * LAYER + position for position in listed][:count]
            found_bits += np.frombuffer(joined, "<i2", count, value_at).tolist()
        assert found_where == where.tolist()
        assert found_bits == bits.tolist()


def test_escapes_damaged_anywhere_are_refused_or_stay_inside():
    data = escapes_of([3, 7], range(50), [0, 49])
    for size in range(len(data)):
        with pytest.raises(FormatError):
            unpack_escapes(data[:size], 3, LAYER, KVDtype.BFLOAT16)
    with pytest.raises(FormatError):
        unpack_escapes(data + b"\0", 3, LAYER, KVDtype.BFLOAT16)
    for bit in range(8 * (12 + 4 * 4)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            where, _ = unpack_escapes(bytes(damaged), 3, LAYER, KVDtype.BFLOAT16)
        except FormatError:
            continue
        assert where.min() >= 0
        assert where.max() < 3 * LAYER
        assert (np.diff(where) > 0).all()


@pytest.mark.parametrize(
    ("counts", "positions"),
    [
        ((51,), range(51)),
        ((2,), (7, 7)),
        ((2,), (7, 3)),
        ((1,), (50,)),
        ((1,), (2**32 - 1,)),
        ((0,), ()),
        ((2**32 - 1,), ()),
    ],
)
def test_impossible_escapes_are_refused(counts, positions):
    data = struct.pack(f"<{len(counts)}I{len(positions)}I", *counts, *positions) + bytes(2 * len(positions))
    with pytest.raises(FormatError):
        unpack_escapes(data, 1, LAYER, KVDtype.BFLOAT16)


@pytest.mark.parametrize(("count", "whole"), [(0, False), (16, False), (17, True), (50, True)])
def test_a_layer_is_escaped_whole_where_that_is_smaller(count, whole):
    escaped = torch.arange(LAYER)[None] < count
    assert bool(widen_where_dense(escaped, KVDtype.BFLOAT16).all()) is whole


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000, 16384])
def test_ordered_sum_adds_everything_once(count):
    terms = torch.randint(-1000, 1000, (3, count)).float()
    assert torch.equal(ordered_sum(terms), terms.double().sum(-1).float())
