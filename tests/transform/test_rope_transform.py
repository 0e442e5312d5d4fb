import json
import pathlib

import hypothesis
import mpmath
import pytest
import torch
import transformers
from hypothesis import strategies as st
from transformers.models.cohere import modeling_cohere
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi
from transformers.models.stablelm import modeling_stablelm

from sglang_kvcodec.format.rope import RopeSpec, rope_spec_from_config
from sglang_kvcodec.transform.rope import rotate, rotation_table, unrotate

MODEL = pathlib.Path(__file__).parents[1] / "models" / "tiny-code-lm"
TOKENS = 41
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
}
PARTIAL_MODELS = {
    "phi": (modeling_phi, modeling_phi.PhiRotaryEmbedding),
    "stablelm": (modeling_stablelm, modeling_stablelm.StableLmRotaryEmbedding),
    "gpt_neox": (modeling_gpt_neox, modeling_gpt_neox.GPTNeoXRotaryEmbedding),
}
INTERLEAVED_MODELS = {
    "cohere": (modeling_cohere, modeling_cohere.CohereRotaryEmbedding),
    "glm4": (modeling_glm4, modeling_glm4.Glm4RotaryEmbedding),
    "ernie4_5": (modeling_ernie4_5, modeling_ernie4_5.Ernie4_5RotaryEmbedding),
}


def spec_of(rotary_dim=10, head_dim=13, *, is_interleaved=False, scale=1.0, base=10_000.0):
    frequencies = tuple(base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))
    return RopeSpec(head_dim, rotary_dim, frequencies, is_interleaved, scale)


def keys(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angle_error(position):
    """What single precision may lose of an angle, in radians: transformers multiplies in it."""
    return 2e-6 + 4 * position * 2.0**-24


def by_transformers(module, rotary, values, positions):
    """``values`` ``(tokens, heads, head_dim)`` rotated by a model's own code, which has heads before tokens."""
    k = values.transpose(0, 1)[None]
    cos, sin = rotary(k, positions[None])
    dims = cos.shape[-1]
    if module in (modeling_glm4, modeling_gpt_neox):  # these split the head themselves
        return module.apply_rotary_pos_emb(k, k, cos, sin)[1][0].transpose(0, 1)
    turned = module.apply_rotary_pos_emb(k[..., :dims], k[..., :dims], cos, sin)[1]
    return torch.cat((turned, k[..., dims:]), -1)[0].transpose(0, 1)


@pytest.mark.parametrize("first", [0, 1, 2039])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_family_is_that_of_transformers(scaling, kv_heads, first):
    config = transformers.LlamaConfig(
        hidden_size=96,
        num_attention_heads=3,
        max_position_embeddings=4096,
        rope_parameters={**SCALINGS[scaling], "rope_theta": 10_000.0},
    )
    rope = rope_spec_from_config(config.to_dict())
    values, positions = keys(TOKENS, kv_heads, 32), torch.arange(first, first + TOKENS)
    expected = by_transformers(modeling_llama, modeling_llama.LlamaRotaryEmbedding(config), values, positions)
    atol = 5 * angle_error(first + TOKENS)
    torch.testing.assert_close(rotate(values, positions, rope), expected, rtol=0, atol=atol)
    torch.testing.assert_close(unrotate(expected, positions, rope), values, rtol=0, atol=atol)


@pytest.mark.parametrize("length", [4 * 512, 512])
def test_dynamic_scaling_is_that_of_transformers_at_its_longest_sequence_only(length):
    config = transformers.LlamaConfig(
        hidden_size=96,
        num_attention_heads=3,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
    )
    rope = rope_spec_from_config(config.to_dict())
    values, positions = keys(length, 1, 32), torch.arange(length)
    expected = by_transformers(modeling_llama, modeling_llama.LlamaRotaryEmbedding(config), values, positions)
    error = (rotate(values, positions, rope) - expected).abs().max().item()
    assert (error < 5 * angle_error(length)) == (length == 4 * 512)


@pytest.mark.parametrize("model_type", [*PARTIAL_MODELS, *INTERLEAVED_MODELS])
def test_partial_and_interleaved_rotation_are_those_of_transformers(model_type):
    module, rotary = {**PARTIAL_MODELS, **INTERLEAVED_MODELS}[model_type]
    shape = {} if model_type in ("phi", "gpt_neox") else {"num_key_value_heads": 1}
    dims = {"head_dim": 64} if model_type in ("glm4", "ernie4_5") else {}
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=192, num_attention_heads=3, pad_token_id=0, **shape, **dims
    )
    rope = rope_spec_from_config(config.to_dict())
    assert rope.is_interleaved == (model_type in INTERLEAVED_MODELS)
    assert (rope.rotary_dim < 64) == (model_type in PARTIAL_MODELS or model_type == "glm4")
    values, positions = keys(TOKENS, 3, 64), torch.arange(7, 7 + TOKENS)
    expected = by_transformers(module, rotary(config), values, positions)
    atol = 5 * angle_error(7 + TOKENS)
    turned = rotate(values, positions, rope)
    torch.testing.assert_close(turned, expected, rtol=0, atol=atol)
    assert torch.equal(turned[..., rope.rotary_dim :], values[..., rope.rotary_dim :])


def test_gpt_js_rotation_is_that_of_transformers():
    fields = transformers.GPTJConfig(n_embd=60, n_head=3, rotary_dim=14).to_dict()
    rope = rope_spec_from_config(fields)
    values, positions = keys(TOKENS, 3, 20), torch.arange(TOKENS)
    sin, cos = modeling_gptj.create_sinusoidal_positions(TOKENS, 14)[None].chunk(2, -1)
    turned = modeling_gptj.apply_rotary_pos_emb(values[None, ..., :14], sin, cos)[0]
    expected = torch.cat((turned, values[..., 14:]), -1)
    torch.testing.assert_close(rotate(values, positions, rope), expected, rtol=0, atol=5 * angle_error(TOKENS))


@pytest.mark.parametrize("position", [0, 1, 4095, 131_071, 1_048_573, 1 << 20])
@pytest.mark.parametrize("inverse", [False, True])
def test_angles_are_exact_at_every_position(position, inverse):
    rope = spec_of(scale=1.25)
    table = rotation_table(position, 1, rope, inverse=inverse)
    with mpmath.workdps(50):
        angles = [mpmath.mpf(f) * position for f in rope.inverse_frequencies]
        factors = (mpmath.mpf("0.8"), mpmath.mpf("-0.8")) if inverse else (mpmath.mpf("1.25"), mpmath.mpf("1.25"))
        cos = [float(factors[0] * mpmath.cos(angle)) for angle in angles]
        sin = [float(factors[1] * mpmath.sin(angle)) for angle in angles]
    for half, exact in zip(table, (cos, sin), strict=True):
        # Half a unit in the last place of fp32, and what double precision loses of an angle of a million.
        expected = torch.tensor([exact], dtype=torch.float64)
        torch.testing.assert_close(half.double(), expected, rtol=2.0**-24, atol=1e-9)


@hypothesis.given(
    pages=st.integers(1, 2),
    tokens=st.integers(1, 11),
    kv_heads=st.integers(1, 5),
    pairs=st.integers(1, 6),
    rest=st.integers(0, 3),
    is_interleaved=st.booleans(),
    scale=st.floats(0.25, 4.0),
    first=st.integers(0, 1 << 20),
    seed=st.integers(0, 1 << 16),
)
def test_unrotate_undoes_rotate(pages, tokens, kv_heads, pairs, rest, is_interleaved, scale, first, seed):
    rope = spec_of(2 * pairs, 2 * pairs + rest, is_interleaved=is_interleaved, scale=scale)
    values, positions = keys(pages, tokens, kv_heads, rope.head_dim, seed=seed), torch.arange(first, first + tokens)
    turned = rotate(values, positions, rope)
    torch.testing.assert_close(unrotate(turned, positions, rope), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(unrotate(values, positions, rope), positions, rope), values, rtol=0, atol=1e-5)
    lengths = turned[..., : rope.rotary_dim].norm(dim=-1) / values[..., : rope.rotary_dim].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, scale), rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_position_zero_only_scales(is_interleaved):
    values, positions = keys(1, 3, 13), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(rotate(values, positions, spec_of(is_interleaved=is_interleaved)), values)
    turned = rotate(values, positions, spec_of(is_interleaved=is_interleaved, scale=2.0))
    assert torch.equal(turned, torch.cat((2 * values[..., :10], values[..., 10:]), -1))


def test_pairs_lie_where_the_spec_says():
    """The first pair turns by a quarter, the second stays."""
    quarter = float(torch.pi / 2)
    values, positions = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), torch.ones(1, dtype=torch.int64)
    apart = rotate(values, positions, RopeSpec(5, 4, (quarter, 0.0), False, 1.0))
    torch.testing.assert_close(apart, torch.tensor([[[-3.0, 2.0, 1.0, 4.0, 5.0]]]))
    together = rotate(values, positions, RopeSpec(5, 4, (quarter, 0.0), True, 1.0))
    torch.testing.assert_close(together, torch.tensor([[[-2.0, 1.0, 3.0, 4.0, 5.0]]]))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 43, 600])
def test_a_kernel_gets_the_same_bits_from_the_table(tokens, is_interleaved, inverse):
    """The arithmetic that ``rotation_table`` promises, pair by pair."""
    rope = spec_of(is_interleaved=is_interleaved, scale=1.1)
    values, positions = keys(tokens, 3, 13), torch.arange(64, 64 + tokens)
    cos, sin = rotation_table(64, tokens, rope, inverse=inverse)
    assert cos.shape == sin.shape == (tokens, 5)
    assert cos.dtype == sin.dtype == torch.float32
    expected = values.clone()
    for i in range(5):
        first, second = (2 * i, 2 * i + 1) if is_interleaved else (i, i + 5)
        a, b = values[..., first], values[..., second]
        expected[..., first] = a * cos[:, i, None] - b * sin[:, i, None]
        expected[..., second] = b * cos[:, i, None] + a * sin[:, i, None]
    assert torch.equal((unrotate if inverse else rotate)(values, positions, rope), expected)


@pytest.mark.parametrize("tokens", [5, 700])
def test_a_table_is_the_callers_own(tokens):
    rope = spec_of()
    first = rotation_table(3, tokens, rope)
    wanted = [half.clone() for half in first]
    for half in first:
        half.zero_()
    assert all(map(torch.equal, rotation_table(3, tokens, rope), wanted))


def test_rows_do_not_depend_on_what_else_is_in_the_table():
    rope = spec_of(64, 64)
    long = rotation_table(1000, 513, rope)
    assert all(torch.equal(half[100:107], row) for half, row in zip(long, rotation_table(1100, 7, rope), strict=True))


def test_pages_with_positions_of_their_own():
    rope = spec_of(is_interleaved=True)
    values = keys(2, 3, 7, 2, 13)  # pages, layers, tokens, heads
    positions = torch.stack((torch.arange(14, 21), torch.arange(700, 707)))[:, None]
    together = rotate(values, positions, rope)
    for page in range(2):
        assert torch.equal(together[page], rotate(values[page], positions[page, 0], rope))
    assert torch.equal(unrotate(together, positions, rope)[1], unrotate(together[1], positions[1, 0], rope))


def test_positions_in_any_order():
    rope = spec_of()
    values, order = keys(11, 2, 13), torch.randperm(11, generator=torch.Generator().manual_seed(3))
    turned = rotate(values, torch.arange(11), rope)
    assert torch.equal(rotate(values[order], order, rope), turned[order])


def test_no_tokens():
    empty = torch.empty(0, 3, 13)
    assert rotate(empty, torch.empty(0, dtype=torch.int64), spec_of()).shape == empty.shape
    assert rotation_table(5, 0, spec_of())[0].shape == (0, 5)


def test_the_input_is_left_alone():
    values, positions = keys(7, 2, 13), torch.arange(7)
    before = values.clone()
    rotate(values, positions, spec_of())
    unrotate(values, positions, spec_of())
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    ("values", "positions"),
    [
        (keys(7, 2, 13).double(), torch.arange(7)),
        (keys(7, 2, 13).bfloat16(), torch.arange(7)),
        (keys(7, 2, 12), torch.arange(7)),
        (keys(7, 13), torch.arange(7)),
        (keys(7, 2, 13), torch.arange(6)),
        (keys(7, 2, 13), torch.arange(7, dtype=torch.int32)),
        (keys(7, 2, 13), torch.arange(7.0)),
        (keys(7, 2, 13), torch.tensor(7)),
        (keys(7, 2, 13), torch.arange(7)[None]),
        (keys(2, 7, 2, 13), torch.arange(21).reshape(3, 7)),
        (keys(1, 7, 2, 13), torch.arange(14).reshape(2, 7)),
        (keys(7, 2, 13), torch.arange(-1, 6)),
    ],
)
def test_a_callers_mistake_is_named(values, positions):
    for turn in (rotate, unrotate):
        with pytest.raises(ValueError, match=r"expected|negative"):
            turn(values, positions, spec_of())


@pytest.mark.parametrize(("first", "tokens"), [(-1, 4), (0, -1)])
def test_a_table_of_what_is_not_there(first, tokens):
    with pytest.raises(ValueError, match="there are no"):
        rotation_table(first, tokens, spec_of())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 5000])
def test_k_of_a_real_model_is_what_it_was_before_its_rotation(dtype, first):
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    rope = rope_spec_from_config(json.loads((MODEL / "config.json").read_text()))
    normed = []
    hooks = [
        layer.self_attn.k_norm.register_forward_hook(lambda module, args, output: normed.append(output[0].float()))
        for layer in model.model.layers
    ]
    tokens = torch.randint(0, 4096, (1, 97), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(first, first + 97)
    with torch.inference_mode():
        cache = model(tokens, position_ids=positions[None], use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    assert len(normed) == len(cache.layers) == 6
    # bf16 rounds the table, each product and the sum: by 2**-9 of the longer member of a pair, a few times.
    relative = 4 * 2.0**-8 if dtype == torch.bfloat16 else 2 * angle_error(first + 97)
    for before, layer in zip(normed, cache.layers, strict=True):
        after = layer.keys[0].transpose(0, 1).float()
        undone = unrotate(after, positions, rope)
        pairs = (before[..., :64] ** 2 + before[..., 64:] ** 2).sqrt()
        bound = relative * torch.cat((pairs, pairs), -1) + 1e-6
        assert ((undone - before).abs() <= bound).all()
        # And it was rotated in between.
        assert (after - before).norm() > 0.5 * before.norm()
