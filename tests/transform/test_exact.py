import dataclasses

import pytest
import torch

from sglang_kvcodec.errors import FormatError, UnknownFormatError, UnsupportedError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.testing.synthetic import random_bits
from sglang_kvcodec.transform import PackedSide, get_transform
from sglang_kvcodec.transform.floats import to_bits
from sglang_kvcodec.transform.layout import from_canvas

BIT_EXACT = ("raw", "exact")


def every_bit_pattern(dtype):
    """A group of one layer in which each bit pattern of the type occurs."""
    if dtype.item_bytes == 1:
        bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        return bits.view(getattr(torch, dtype.torch_name)).reshape(1, 1, 16, 1, 16)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(getattr(torch, dtype.torch_name)).reshape(1, 1, 256, 2, 128)


def spec_for(values, dtype):
    return KVSpec(values.shape[1], values.shape[3], values.shape[4], values.shape[2], dtype)


@pytest.mark.parametrize("profile", BIT_EXACT)
@pytest.mark.parametrize("dtype", KVDtype)
def test_every_bit_pattern_survives(profile, dtype):
    values = every_bit_pattern(dtype)
    transform = get_transform(profile, spec_for(values, dtype))
    assert torch.equal(to_bits(transform.restore(1, transform.pack(values))), to_bits(values))


@pytest.mark.parametrize("profile", BIT_EXACT)
@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize("shape", [(4, 3, 17, 3, 80), (1, 1, 16, 1, 64), (2, 2, 33, 1, 65)])
def test_pages_do_not_mix(profile, dtype, shape):
    values = random_bits(dtype, shape, seed=3)
    transform = get_transform(profile, spec_for(values, dtype))
    packed = transform.pack(values)
    order = list(range(len(packed)))[::-1]
    restored = transform.restore(shape[1], [packed[index] for index in order])
    assert restored.shape == shape
    assert torch.equal(to_bits(restored), to_bits(values[order]))


@pytest.mark.parametrize(
    ("dtype", "value", "exponent", "residual"),
    [
        (KVDtype.BFLOAT16, -1.5, 127, 0xC0),
        (KVDtype.FLOAT16, -1.5, 15, 0x600),
        (KVDtype.FLOAT8_E4M3, -1.5, 7, 0xC),
        (KVDtype.FLOAT8_E5M2, -1.5, 15, 0x6),
    ],
)
def test_where_the_fields_of_a_float_go(dtype, value, exponent, residual):
    values = torch.full((1, 1, 16, 1, 64), value).to(getattr(torch, dtype.torch_name))
    values[0, 0, 0, 0, 1] = 0.0
    spec = spec_for(values, dtype)
    packed = get_transform("exact", spec).pack(values)[0]
    plane = from_canvas(packed.canvas[None], picture_geometry(spec), 1).flatten()
    assert plane[0] == exponent
    assert plane[1] == 0
    bits = 1 + dtype.mantissa_bits
    low = bytes([residual & 0xFF, 0]) + bytes([residual & 0xFF]) * 1022 if bits >= 8 else b""
    # Bit planes: the second value's bit, bit 1 of the first byte, is clear.
    high = b"".join(
        bytes([0xFD]) + b"\xff" * 127 if residual >> bit & 1 else bytes(128) for bit in range(8 * (bits >= 8), bits)
    )
    assert packed.stored == low + high


def test_raw_is_the_little_endian_bytes():
    values = torch.tensor([1.0, -2.0], dtype=torch.bfloat16).reshape(1, 1, 1, 1, 2)
    assert get_transform("raw", spec_for(values, KVDtype.BFLOAT16)).pack(values)[0].stored == b"\x80\x3f\x00\xc0"


@pytest.mark.parametrize("profile", BIT_EXACT)
def test_side_bytes_that_do_not_fit_are_refused(profile):
    values = random_bits(KVDtype.FLOAT16, (1, 2, 16, 1, 64), seed=1)
    transform = get_transform(profile, spec_for(values, KVDtype.FLOAT16))
    good = transform.pack(values)[0]
    canvas = torch.zeros((288, 192), dtype=torch.uint8) if good.canvas is None else None
    for bad in (
        dataclasses.replace(good, stored=good.stored[:-1]),
        dataclasses.replace(good, stored=good.stored + b"\0"),
        dataclasses.replace(good, stored=b""),
        dataclasses.replace(good, escapes=b"\0"),
        dataclasses.replace(good, steps=(1.0, 1.0)),
        dataclasses.replace(good, canvas=canvas),
        PackedSide(),
    ):
        with pytest.raises(FormatError):
            transform.restore(2, [good, bad])


def test_values_of_another_shape_or_type_are_the_callers_mistake():
    spec = KVSpec(3, 2, 128, 64, KVDtype.BFLOAT16)
    for profile in ("raw", "exact", "high"):
        transform = get_transform(profile, spec)
        for bad in (
            torch.zeros((1, 3, 64, 2, 128), dtype=torch.float16),
            torch.zeros((1, 4, 64, 2, 128), dtype=torch.bfloat16),
            torch.zeros((1, 3, 64, 128, 2), dtype=torch.bfloat16),
            torch.zeros((3, 64, 2, 128), dtype=torch.bfloat16),
        ):
            with pytest.raises(ValueError, match="expected"):
                transform.pack(bad)


def test_unknown_profiles_and_pools_are_refused():
    with pytest.raises(UnknownFormatError, match="there are raw, exact, high"):
        get_transform("best", KVSpec(3, 2, 128, 64, KVDtype.BFLOAT16))
    for dtype in (KVDtype.FLOAT8_E4M3, KVDtype.FLOAT8_E5M2):
        with pytest.raises(UnsupportedError, match="use 'exact'"):
            get_transform("high", KVSpec(3, 2, 128, 64, dtype))
