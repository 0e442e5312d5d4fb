"""Ways to code KV: what comes back, and whether the bytes are those that were counted."""

import math
import zlib

import pytest
import torch

from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.evaluation.entropy import channel_entropy_bits
from sglang_kvcodec.evaluation.measures import noise_to_signal
from sglang_kvcodec.evaluation.methods import MethodContext
from sglang_kvcodec.evaluation.page_methods import CompressorMethod
from sglang_kvcodec.evaluation.registry import DEFAULT_METHODS, METHODS, make_methods
from sglang_kvcodec.format.profile import CALIBRATED_TIERS
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.testing.pages import hash_of, new_encoder

RAW_BYTES = 2 * 5 * 48 * 120 * 2
VALUES = RAW_BYTES // 2


@pytest.fixture(scope="module")
def run(spec, kv):
    def run(name):
        (method,) = make_methods([name], MethodContext(spec, {}))
        return method.roundtrip(kv, 0)

    return run


def noise(kv, result):
    return [noise_to_signal(kv[side], result.kv[side]) for side in kv]


@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_every_method_keeps_shapes_and_counts_what_its_layers_take(run, kv, spec, name):
    before = {side: tensor.clone() for side, tensor in kv.items()}
    result = run(name)
    for side, tensor in kv.items():
        assert torch.equal(tensor, before[side])
        assert result.kv[side].shape == tensor.shape
        assert result.kv[side].dtype == tensor.dtype
        assert len(result.bits[side]) == spec.layers
        assert torch.isfinite(result.kv[side]).all()
    by_layer_bytes = sum(sum(result.bits[side]) for side in kv) * 48 * 120 / 8
    assert 0 <= result.metadata_bytes < result.coded_bytes
    # what belongs to no layer is metadata
    assert by_layer_bytes - 1 <= result.coded_bytes <= by_layer_bytes + result.metadata_bytes + 1
    assert max(noise(kv, result)) < 0.6


@pytest.mark.parametrize("name", ["bf16", "exact", "zstd@3", "lz4"])
def test_lossless_is_bit_for_bit(run, kv, name):
    result = run(name)
    for side, tensor in kv.items():
        assert torch.equal(result.kv[side].view(torch.int16), tensor.view(torch.int16))


def test_finer_is_nearer_and_larger(run, kv):
    for names in (("kivi@2", "kivi@3", "kivi@4", "kivi@8"), ("cachegen@2", "cachegen", "cachegen@0.5", "cachegen@0.1")):
        results = [run(name) for name in names]
        noises = [max(noise(kv, result)) for result in results]
        sizes = [result.coded_bytes for result in results]
        assert noises == sorted(noises, reverse=True)
        assert sizes == sorted(sizes)
    coarse, fine = run("lmcache-cachegen"), run("lmcache-cachegen@2")
    assert max(noise(kv, fine)) < max(noise(kv, coarse))
    assert fine.coded_bytes > coarse.coded_bytes


def test_fixed_rates_are_what_they_say(run):
    assert run("bf16").coded_bytes == RAW_BYTES
    assert run("fp8").coded_bytes == VALUES
    assert run("fp8-scaled").coded_bytes == VALUES + 2 * 5 * 4
    assert run("int8").coded_bytes == VALUES + 2 * 5 * 120 * 4
    # keys: 2 groups of tokens (32 + 16) for each of 120 channels; values: 4 groups of channels for each of 48 tokens
    scales = 5 * (2 * 120 + 4 * 48) * 4
    assert run("kivi@4").coded_bytes == VALUES // 2 + scales
    assert run("kivi@4").metadata_bytes == scales


def test_fp8_is_the_cast_and_clamps(run, kv):
    wide = {side: tensor.clone() for side, tensor in kv.items()}
    wide[Side.KEY][0, 0, 0, 0] = 3000.0
    (plain, scaled) = make_methods(["fp8", "fp8-scaled"], MethodContext(KVSpec(5, 3, 40, 16, KVDtype.BFLOAT16), {}))
    restored = plain.roundtrip(wide, 0).kv
    assert restored[Side.KEY][0, 0, 0, 0] == 448.0
    expected = kv[Side.VALUE].to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(restored[Side.VALUE], expected)
    assert scaled.roundtrip(wide, 0).kv[Side.KEY][0, 0, 0, 0] == 3000.0


def test_a_channel_in_8_bits_is_within_half_a_step(run, kv):
    result = run("int8")
    for side, tensor in kv.items():
        wide = tensor.float()
        step = (wide.amax(1, keepdim=True) - wide.amin(1, keepdim=True)) / 255
        error = (result.kv[side].float() - wide).abs()
        # half a step, the rounding of offset and step to fp16 (255 steps of it), and that to bf16
        allowed = step / 2 + wide.abs() * 2**-8 + (step * 255 + wide.abs()) * 2**-10 + 1e-6
        assert (error <= allowed).all()


def test_pictures_of_int8_code_the_same_values(run):
    plain, pictures = run("int8"), run("int8-x265")
    assert all(torch.equal(plain.kv[side], pictures.kv[side]) for side in plain.kv)
    assert pictures.coded_bytes != plain.coded_bytes
    assert pictures.ideal_bits == plain.ideal_bits


def test_profiles_are_counted_as_the_objects_that_a_peer_would_store(run, kv, spec):
    for name, profile in (("exact", "exact"), ("uncalibrated", "high")):
        encoder = new_encoder(bytes(32), spec, profile)
        objects = [
            encoder.encode(
                hash_of(index), {side: tensor[:, index * 16 : index * 16 + 16] for side, tensor in kv.items()}
            )
            for index in range(3)
        ]
        assert run(name).coded_bytes == sum(map(len, objects))
    assert max(noise(kv, run("uncalibrated"))) <= 1e-3


def test_ideal_bits_of_exact_are_the_entropy_of_exponents_and_the_rest_as_it_is(run, kv):
    result = run("exact")
    exponents = (kv[Side.KEY].view(torch.int16).to(torch.int64) >> 7 & 255).flatten(2)
    assert result.ideal_bits[Side.KEY] == pytest.approx((channel_entropy_bits(exponents) + 8).tolist())
    assert all(coded > ideal for coded, ideal in zip(result.bits[Side.KEY], result.ideal_bits[Side.KEY], strict=True))


def test_a_compressor_gets_the_bytes_of_each_page(kv, spec):
    seen = []

    def compress(data):
        seen.append(data)
        return zlib.compress(data)

    result = CompressorMethod("zlib", spec, compress).roundtrip(kv, 32)
    assert len(seen) == 6
    assert seen[0] == kv[Side.KEY][:, :16].contiguous().view(torch.uint8).numpy().tobytes()
    assert result.coded_bytes == sum(len(zlib.compress(data)) for data in seen)


def test_a_constant_costs_nothing_and_comes_back(spec):
    same = {side: torch.full((5, 32, 3, 40), 1.5).bfloat16() for side in (Side.KEY, Side.VALUE)}
    zero = {side: torch.zeros(5, 32, 3, 40).bfloat16() for side in same}
    for method in make_methods(DEFAULT_METHODS, MethodContext(spec, {})):
        assert torch.equal(method.roundtrip(zero, 0).kv[Side.KEY], zero[Side.KEY]), method.name
        restored = method.roundtrip(same, 64).kv[Side.VALUE].float()
        assert ((restored - 1.5).abs() <= 1.5 * 2**-4).all(), method.name


def test_entropy_is_that_of_each_channel():
    fair = torch.arange(8).repeat(4)[None, :, None]
    coin = torch.tensor([0, 1] * 16)[None, :, None] * 1000
    sure = torch.full((1, 32, 1), -7)
    assert channel_entropy_bits(torch.cat([fair, coin, sure], 2)).tolist() == [pytest.approx((3 + 1 + 0) / 3)]
    skewed = torch.tensor([0] * 24 + [5] * 8)[None, :, None]
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert channel_entropy_bits(torch.cat([skewed, fair], 0)).tolist() == pytest.approx([expected, 3.0])
    assert channel_entropy_bits(torch.zeros(2, 0, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("magic", "unknown method 'magic'"),
        ("", "unknown method"),
        ("bf16@3", "takes no parameter"),
        ("kivi@5", "kivi@5 is no method"),
        ("cachegen@fine", "is no method"),
        ("cachegen@0", "is no method"),
        ("lmcache-cachegen@nan", "is no method"),
        ("zstd@99", "levels are"),
    ],
)
def test_what_is_no_method_is_refused(spec, name, words):
    with pytest.raises(ConfigurationError, match=words):
        make_methods([name], MethodContext(spec, {}))


def test_methods_are_made_once_and_a_profile_refuses_what_it_cannot_code(spec):
    names = [method.name for method in make_methods(["fp8", "bf16", "fp8"], MethodContext(spec, {}))]
    assert names == ["fp8", "bf16"]
    fp8_pool = KVSpec(2, 1, 64, 16, KVDtype.FLOAT8_E4M3)
    with pytest.raises(UnsupportedError, match="can't code"):
        make_methods(["uncalibrated"], MethodContext(fp8_pool, {}))
    assert {name.partition("@")[0] for name in DEFAULT_METHODS} == set(METHODS) - set(CALIBRATED_TIERS)
