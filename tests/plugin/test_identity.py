import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.plugin import identity
from sglang_kvcodec.plugin.identity import adapters_digest, config_digest, rope_json, weights_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool]


def model_of(**tensors):
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return model


def tensor_of(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype is torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def flipped(tensor, byte, bit):
    """A copy that differs in one bit."""
    data = tensor.clone().reshape(-1).view(torch.uint8)
    data[byte] ^= 1 << bit
    return data.view(tensor.dtype).reshape(tensor.shape)


def digest_of(**tensors):
    return weights_digest(model_of(**tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 5), (0,)])
def test_equal_weights_have_equal_digests(dtype, shape):
    assert digest_of(w=tensor_of(dtype, *shape)) == digest_of(w=tensor_of(dtype, *shape))


@settings(max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES[:-1]),
    elements=st.integers(1, 40),
    which=st.sampled_from(["a", "b"]),
    chunk_words=st.integers(1, 12),
    data=st.data(),
)
def test_any_bit_of_any_parameter_counts(dtype, elements, which, chunk_words, data):
    tensors = {"a": tensor_of(dtype, elements), "b": tensor_of(torch.int8, 5, seed=1)}
    changed = dict(tensors)
    nbytes = tensors[which].numel() * tensors[which].element_size()
    changed[which] = flipped(tensors[which], data.draw(st.integers(0, nbytes - 1)), data.draw(st.integers(0, 7)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "_CHUNK_WORDS", chunk_words)
        before = digest_of(**tensors)
        assert digest_of(**changed) != before
    # How it is cut into chunks is no part of it.
    assert digest_of(**tensors) == before


@settings(max_examples=100)
@given(
    values=st.lists(st.integers(-128, 127), min_size=2, max_size=64),
    dtype=st.sampled_from([torch.int8, torch.int32, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_two_elements_that_swap_places_count(values, dtype, data):
    i, j = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    swapped = list(values)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    same = digest_of(w=torch.tensor(values).to(dtype)) == digest_of(w=torch.tensor(swapped).to(dtype))
    assert same == (values[i] == values[j])


def test_far_places_swap(monkeypatch):
    monkeypatch.setattr(identity, "_CHUNK_WORDS", 1000)
    weights = torch.zeros(9001)
    weights[17] = 1
    moved = torch.zeros(9001)
    moved[8017] = 1
    assert digest_of(w=weights) != digest_of(w=moved)


def test_name_shape_and_dtype_count():
    zeros = torch.zeros(4, 6, dtype=torch.float16)
    digests = {
        digest_of(w=zeros),
        digest_of(v=zeros),
        digest_of(w=zeros.reshape(6, 4)),
        digest_of(w=zeros.to(torch.bfloat16)),
        digest_of(w=torch.zeros(24, 2, dtype=torch.int8)),
        digest_of(w=torch.zeros(4, 5, dtype=torch.float16)),
        digest_of(w=zeros, v=zeros),
        digest_of(),
    }
    assert len(digests) == 8


def test_two_parameters_that_swap_their_values_count():
    a, b = tensor_of(torch.float32, 3, seed=1), tensor_of(torch.float32, 3, seed=2)
    assert digest_of(x=a, y=b) != digest_of(x=b, y=a)


def test_buffers_count():
    model = model_of(w=torch.zeros(2))
    model.register_buffer("scale", torch.ones(1))
    before = weights_digest(model)
    model.scale += 1
    assert weights_digest(model) != before


def test_only_the_values_count_not_where_they_lie():
    whole = tensor_of(torch.int8, 41)
    assert digest_of(w=whole[3:39]) == digest_of(w=whole[3:39].clone())
    matrix = tensor_of(torch.bfloat16, 5, 7)
    assert digest_of(w=matrix.t()) == digest_of(w=matrix.t().contiguous())
    assert digest_of(w=matrix[1:, 1:]) == digest_of(w=matrix[1:, 1:].clone())


def test_an_update_in_place_counts():
    model = model_of(w=torch.zeros(3))
    before = weights_digest(model)
    with torch.no_grad():
        model.w[1] = -0.0
    assert weights_digest(model) != before


def hf_config(**fields):
    return types.SimpleNamespace(to_dict=lambda: fields)


def test_where_a_model_was_loaded_from_does_not_count_but_its_configuration_does():
    assert config_digest(hf_config(a=1, _name_or_path="x")) == config_digest(hf_config(_name_or_path="y", a=1))
    assert config_digest(hf_config(a=1)) != config_digest(hf_config(a=2))


def test_rope():
    assert rope_json(hf_config(hidden=1)) == ""
    assert rope_json(hf_config(rope_theta=1e4)) != rope_json(hf_config(rope_theta=1e6))
    assert rope_json(hf_config(rope_theta=1, rope_scaling={"b": 1, "a": 2})) == rope_json(
        hf_config(rope_scaling={"a": 2, "b": 1}, rope_theta=1, hidden=3)
    )


def adapter(path, name="one"):
    return types.SimpleNamespace(lora_id=name, lora_path=str(path))


def test_adapters(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", "two")
    assert adapters_digest(None) == adapters_digest([]) == ""
    both = adapters_digest([one, two])
    assert both == adapters_digest([two, one])
    assert len({both, adapters_digest([one]), adapters_digest([two]), ""}) == 4
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"weighty")
    assert adapters_digest([one, two]) != both


def test_an_adapter_that_is_not_a_directory_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="local directories"):
        adapters_digest([adapter(tmp_path / "absent")])
