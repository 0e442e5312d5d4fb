import json
import math

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sglang_kvcodec.errors import FormatError, UnsupportedError
from sglang_kvcodec.format.rope import RopeSpec, rope_spec_from_config
from sglang_kvcodec.format.rope_models import _MODELS, _UNEVEN

SPEC = RopeSpec(24, 10, (1.0, 0.1, 1 / 3, 1e-7, 0.0), True, 1.2079441541679836)
CONFIG = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
FAMILIES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3 steep": {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 2.5},
    "yarn": YARN,
    "yarn not truncated": {**YARN, "truncate": False, "beta_fast": 24.0, "beta_slow": 1.5},
    "yarn mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn mscale alone": {**YARN, "mscale": 0.707},
    "yarn without a ramp": {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 4.0},
    "yarn that shrinks": {**YARN, "factor": 0.5},
}
"""Those that SGLang and transformers compute alike, ``dynamic`` at its longest sequence."""


def plain(**more):
    return {**CONFIG, **more}


def llama_config(parameters, theta=10_000.0, **more):
    """A transformers configuration, and what a server would see of it."""
    config = transformers.LlamaConfig(
        **{name: value for name, value in CONFIG.items() if name != "model_type"},
        rope_parameters={**parameters, "rope_theta": theta},
        **more,
    )
    return config, config.to_dict()


def frequencies_of_transformers(config, rope_type):
    """Frequencies and scale, of transformers' own code."""
    if rope_type == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    longest = {"seq_len": 4 * config.max_position_embeddings} if rope_type == "dynamic" else {}
    return ROPE_INIT_FUNCTIONS[rope_type](config, **longest)


@pytest.mark.parametrize("theta", [10_000.0, 5e6])
@pytest.mark.parametrize("head_dim", [64, 96, 14])
@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_are_those_of_transformers(family, head_dim, theta):
    parameters = FAMILIES[family]
    config, fields = llama_config(parameters, theta, head_dim=head_dim)
    expected, scale = frequencies_of_transformers(config, parameters["rope_type"])
    spec = rope_spec_from_config(fields)
    assert (spec.head_dim, spec.rotary_dim, spec.is_interleaved) == (head_dim, head_dim, False)
    torch.testing.assert_close(torch.tensor(spec.inverse_frequencies), expected, rtol=3e-6, atol=0)
    assert spec.scale == pytest.approx(scale, rel=1e-7)


def test_frequencies_are_single_precision():
    spec = rope_spec_from_config(llama_config(FAMILIES["yarn"])[1])
    assert torch.tensor(spec.inverse_frequencies, dtype=torch.float64).float().double().tolist() == list(
        spec.inverse_frequencies
    )
    assert torch.tensor(spec.scale, dtype=torch.float64).float().item() == spec.scale


@pytest.mark.parametrize("family", FAMILIES)
def test_the_old_style_says_the_same(family):
    scaling = {("type" if name == "rope_type" else name): value for name, value in FAMILIES[family].items()}
    old = plain(rope_theta=7e4, rope_scaling=scaling)
    assert rope_spec_from_config(old) == rope_spec_from_config(llama_config(FAMILIES[family], 7e4)[1])


def test_no_scaling_at_all():
    expected = rope_spec_from_config(plain(rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    assert rope_spec_from_config(plain(rope_theta=1e6, rope_scaling=None)) == expected
    assert rope_spec_from_config(plain(rope_theta=1e6, rope_parameters={})) == expected
    assert rope_spec_from_config(plain(rope_theta=1e6)) == expected
    assert rope_spec_from_config(plain()) != expected


def test_the_length_before_an_extension_is_found_where_transformers_finds_it():
    long = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    expected = rope_spec_from_config(plain(rope_scaling={**YARN, "original_max_position_embeddings": 700}))
    assert rope_spec_from_config(plain(rope_scaling=long, original_max_position_embeddings=700)) == expected
    assert rope_spec_from_config({**plain(rope_scaling=long), "max_position_embeddings": 700}) == expected
    assert rope_spec_from_config(plain(rope_scaling=long)) != expected


def test_dynamic_scaling_is_sglangs_not_transformers():
    dims, factor = 64, 4.0
    spec = rope_spec_from_config(plain(rope_scaling={"type": "dynamic", "factor": factor}))
    base = 10_000 * (factor**2 - factor + 1) ** (dims / (dims - 2))
    assert spec.inverse_frequencies[-1] == pytest.approx(base ** (-62 / 64), rel=1e-7)
    spec = rope_spec_from_config(plain(rope_scaling={"type": "dynamic", "factor": factor, "alpha": 1000.0}))
    assert spec.inverse_frequencies[5] == pytest.approx((10_000 * 1000 ** (64 / 62)) ** (-10 / 64), rel=1e-7)


def test_yarns_attention_factor_is_sglangs_not_transformers():
    implied = 0.1 * math.log(4) + 1
    assert rope_spec_from_config(plain(rope_scaling=YARN)).scale == pytest.approx(implied)
    given = rope_spec_from_config(plain(rope_scaling={**YARN, "attention_factor": 3.0}))
    assert given == rope_spec_from_config(plain(rope_scaling=YARN))
    read = rope_spec_from_config(plain(rope_scaling={**YARN, "attn_factor": 3.0}))
    assert read.scale == pytest.approx(3 * implied)
    zero = rope_spec_from_config(plain(rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0}))
    assert zero.scale == pytest.approx(implied)


@pytest.mark.parametrize(
    ("config", "rotary_dim"),
    [
        (plain(partial_rotary_factor=0.5), 32),
        (plain(partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 0.5}), 32),
        (plain(partial_rotary_factor=1), 64),
        (plain(partial_rotary_factor=0.4), 24 if int(64 * 0.4) == 24 else None),
        (plain(model_type="phi"), 32),
        (plain(model_type="phi", partial_rotary_factor=0.4375), 28),
        (plain(model_type="glm4_moe", rope_parameters={"partial_rotary_factor": 0.25}), 16),
        (plain(model_type="stablelm"), 16),
        (plain(model_type="stablelm", rope_pct=0.5), 32),
        (plain(model_type="gpt_neox", rotary_pct=0.5), 32),
        (plain(model_type="gpt_neox", rope_parameters={"partial_rotary_factor": 0.5}), 32),
        (plain(model_type="gpt_neox"), 16),
        (plain(model_type="qwen3", partial_rotary_factor=1.0), 64),
        (plain(model_type="chatglm"), 32),
        ({"model_type": "gptj", "n_embd": 60, "n_head": 3, "rotary_dim": 14}, 14),
    ],
)
def test_partial_rotation(config, rotary_dim):
    if rotary_dim is None:
        with pytest.raises(UnsupportedError, match="in pairs"):
            rope_spec_from_config(config)
        return
    spec = rope_spec_from_config(config)
    assert spec.rotary_dim == rotary_dim
    assert spec.inverse_frequencies[1] == pytest.approx(10_000 ** (-2 / rotary_dim), rel=1e-7)


def test_gpt_neox_names_its_base_otherwise():
    expected = rope_spec_from_config(plain(model_type="gpt_neox", rope_parameters={"rope_theta": 25_000}))
    assert rope_spec_from_config(plain(model_type="gpt_neox", rotary_emb_base=25_000)) == expected


def test_chatglm_multiplies_its_base():
    spec = rope_spec_from_config(plain(model_type="chatglm", rope_ratio=500))
    assert spec.inverse_frequencies[1] == pytest.approx(5e6 ** (-2 / 32), rel=1e-7)


def test_gpt_j_pairing_is_for_those_that_have_it():
    interleaved = {
        name
        for name, model in _MODELS.items()
        if not model.is_latent
        and rope_spec_from_config(plain(model_type=name, rotary_dim=32 if name == "gptj" else None)).is_interleaved
    }
    assert interleaved == {"chatglm", "cohere", "ernie4_5", "ernie4_5_moe", "glm4", "gptj"}


@pytest.mark.parametrize("name", sorted(set(_MODELS) - {"chatglm"}))
def test_the_default_base_is_that_of_transformers(name):
    parameters = {} if name == "gptj" else {"rope_parameters": {"rope_type": "default"}}
    fields = transformers.AutoConfig.for_model(name, hidden_size=256, num_attention_heads=4, **parameters).to_dict()
    head_dim = fields["qk_rope_head_dim"] if _MODELS[name].is_latent else None
    spec = rope_spec_from_config(fields, head_dim=head_dim)
    if name != "gptj":
        assert fields["rope_parameters"].pop("rope_theta")
    assert rope_spec_from_config(fields, head_dim=head_dim) == spec


class TestLatentAttention:
    FIELDS = plain(
        model_type="deepseek_v3",
        kv_lora_rank=512,
        qk_rope_head_dim=32,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    )

    def test_the_rotated_part_is_asked_for_by_its_size(self):
        spec = rope_spec_from_config(self.FIELDS, head_dim=32)
        assert (spec.head_dim, spec.rotary_dim, spec.is_interleaved) == (32, 32, True)
        assert spec.scale == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1), rel=1e-7)

    def test_deepseek_has_its_own_defaults(self):
        scaling = {name: value for name, value in self.FIELDS["rope_scaling"].items() if "mscale" not in name}
        spec = rope_spec_from_config({**self.FIELDS, "rope_scaling": scaling}, head_dim=32)
        assert spec.scale == pytest.approx(0.1 * math.log(40) + 1, rel=1e-7)
        one_sided = {**scaling, "mscale_all_dim": 1.0}
        spec = rope_spec_from_config({**self.FIELDS, "rope_scaling": one_sided}, head_dim=32)
        assert spec.scale == 1

    @pytest.mark.parametrize("head_dim", [None, 64, 544])
    def test_nothing_else_is_understood(self, head_dim):
        with pytest.raises(UnsupportedError, match="latent attention"):
            rope_spec_from_config(self.FIELDS, head_dim=head_dim)


NESTED = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
REFUSALS = [
    ({"hidden_size": 64, "num_attention_heads": 1}, "names no model_type"),
    (plain(model_type="unheard_of"), "'unheard_of': how SGLang rotates its K isn't known"),
    (plain(model_type="llama4_text"), "some of its layers are not rotated"),
    (plain(model_type="gemma3_text"), "local and global layers"),
    (plain(model_type="gpt2"), "has no RoPE"),
    (plain(model_type="cohere2"), "only its sliding-window layers"),
    (plain(model_type="hunyuan_v1_dense"), "normalises K after the rotation"),
    (plain(rope_parameters=NESTED), "kinds of layers have RoPE parameters of their own"),
    (plain(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}), "time, height and width"),
    (plain(rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24]}), "time, height and width"),
    (plain(rope_scaling={"type": "mrope"}), "time, height and width"),
    (plain(rope_scaling={"type": "longrope", "factor": 4.0}), "'longrope' picks its frequencies by the length"),
    (plain(rope_scaling={"type": "su"}), "by the length"),
    (plain(rope_parameters={"rope_type": "proportional"}), "across the whole head"),
    (plain(rope_scaling={"type": "spiral"}), "'spiral' is not known"),
    (plain(rope_scaling={"type": ""}), "rope type '' is not known"),
    (plain(model_type="chatglm", rope_parameters={"rope_theta": 1e6}), "RoPE parameters, which SGLang does not read"),
    (plain(model_type="gptj", rotary_dim=32, rope_scaling=YARN), "RoPE parameters, which SGLang does not read"),
    (plain(rope_scaling={"type": 3}), "rope type 3 is not known"),
    (plain(rope_scaling={"type": ["yarn"]}), "rope type ['yarn'] is not known"),
    (plain(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}), "two things about its rope type"),
    (plain(rope_parameters={"use_fope": True}), "parameter 'use_fope', which isn't known"),
    (plain(rope_parameters={"factor": 2.0}), "'default' has a parameter 'factor'"),
    (plain(rope_parameters=[1.0]), "no object of named fields"),
    (plain(no_rope_layers=[1, 1, 0]), "not rotated (no_rope_layers)"),
    (plain(no_rope_layer_interval=4), "not rotated (no_rope_layer_interval)"),
    (plain(rope_local_base_freq=1e4), "different bases"),
    (plain(layer_rope_theta=[1e4, None]), "different bases"),
    (plain(dual_chunk_attention_config={"chunk_size": 8192}), "within a chunk"),
    (plain(alibi=True), "other than RoPE"),
    (plain(position_embedding_type="nope"), "other than RoPE"),
    (plain(attn_use_rope=False), "its K is not rotated"),
    (plain(rope_is_neox_style=False), "another pairing"),
    (plain(model_type="cohere", rope_is_neox_style=True), "another pairing"),
    (plain(rope_interleave=True), "another pairing"),
    (plain(rope_theta=1e4, rope_parameters={"rope_theta": 1e6}), "two things about its rope_theta"),
    (plain(rope_scaling=YARN, rope_parameters=LLAMA3), "two things about its RoPE parameters"),
    (plain(rope_theta=None), "its rope_theta is null"),
    (plain(rope_parameters={"rope_theta": None}), "its rope_theta is null"),
    (plain(rope_theta=1), "its rope_theta is 1"),
    (plain(rope_theta="1e4"), "its rope_theta is '1e4'"),
    (plain(rope_theta=math.inf), "its rope_theta is inf"),
    (plain(rope_theta=math.nan), "its rope_theta is nan"),
    (plain(rope_ratio=2.0), "rope_ratio of 2.0, which SGLang does not read"),
    (plain(rope_scaling={"type": "linear"}), "its factor is None"),
    (plain(rope_scaling={"type": "linear", "factor": 0}), "its factor is 0"),
    (plain(rope_scaling={"type": "linear", "factor": True}), "its factor is True"),
    (plain(rope_scaling={**LLAMA3, "low_freq_factor": None}), "its low_freq_factor is None"),
    (plain(rope_scaling={**YARN, "truncate": 1}), "its truncate is 1"),
    (plain(rope_scaling={**YARN, "original_max_position_embeddings": 0.5}), "original_max_position_embeddings is 0.5"),
    (plain(rope_scaling=YARN, original_max_position_embeddings=5), "two things about its original_max"),
    (plain(rope_scaling={"type": "dynamic", "factor": 2.0}, head_dim=2), "more than one pair"),
    (plain(model_type="mixtral", rope_scaling=YARN), "mixtral without the 'yarn' scaling"),
    (plain(model_type="qwen3", partial_rotary_factor=0.5), "0.5, which SGLang does not read"),
    (plain(rope_parameters={"partial_rotary_factor": 0.5}), "0.5, which SGLang does not read"),
    (plain(partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 0.25}), "0.25, which SGLang"),
    (plain(rotary_pct=0.25), "0.25, which SGLang does not read"),
    (plain(rotary_dim=32), "rotary_dim of 32, which SGLang does not read"),
    (plain(partial_rotary_factor=1.5), "its partial rotary factor is 1.5"),
    (plain(partial_rotary_factor=0.0), "its partial rotary factor is 0.0"),
    (plain(partial_rotary_factor="half"), "its partial rotary factor is 'half'"),
    (plain(head_dim=65), "65 of the 65 dimensions"),
    (plain(model_type="gptj"), "None of the 64 dimensions"),
    (plain(model_type="gptj", rotary_dim=66), "66 of the 64 dimensions"),
    (plain(head_dim="64"), "its head_dim is '64'"),
    (plain(num_attention_heads=3), "nor whole heads"),
    (plain(num_attention_heads=0), "nor whole heads"),
    ({"model_type": "llama"}, "nor whole heads"),
    (plain(kv_lora_rank=512), "which its model type does not tell"),
    (plain(model_type="deepseek_v2", qk_rope_head_dim=32), "latent attention"),
]


@pytest.mark.parametrize(("config", "why"), REFUSALS, ids=[why for _, why in REFUSALS])
def test_what_is_not_understood_is_refused_in_one_sentence(config, why):
    with pytest.raises(UnsupportedError) as caught:
        rope_spec_from_config(config)
    sentence = str(caught.value)
    assert why in sentence
    assert sentence.startswith("K is coded with its rotation left in: ")
    assert "\n" not in sentence


def test_the_pools_head_dim_must_agree():
    assert rope_spec_from_config(plain(), head_dim=64) == rope_spec_from_config(plain())
    with pytest.raises(UnsupportedError, match="64 dimensions, those in the pool 128"):
        rope_spec_from_config(plain(), head_dim=128)


def test_latent_attention_with_other_scaling_is_refused():
    fields = {**TestLatentAttention.FIELDS, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(UnsupportedError, match="takes for YaRN"):
        rope_spec_from_config(fields, head_dim=32)


def test_no_model_type_is_both_understood_and_not():
    assert not set(_MODELS) & set(_UNEVEN)


WORDS = st.sampled_from(["", "yarn", "1", "mrope_section"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.just(10**400)
JSON_LIKE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4
)
CONFIG_KEYS = sorted(
    {name for config, _ in REFUSALS for name in config} | {"rope_theta", "rope_scaling", "qk_rope_head_dim", "n_head"}
)
PARAMETER_KEYS = sorted(
    {name for family in FAMILIES.values() for name in family}
    | {"rope_theta", "alpha", "attn_factor", "extrapolation_factor"}
)


@hypothesis.given(
    st.sampled_from(sorted(_MODELS)),
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON_LIKE, max_size=2),
    st.dictionaries(st.sampled_from(PARAMETER_KEYS), JSON_LIKE, max_size=2),
    st.none() | st.integers(-1, 300),
)
def test_any_configuration_is_understood_or_refused(model_type, family, damage, parameter_damage, head_dim):
    parameters = {**FAMILIES[family], **parameter_damage}
    config = plain(model_type=model_type, rope_parameters=parameters)
    try:
        spec = rope_spec_from_config({**config, **damage}, head_dim=head_dim)
    except UnsupportedError:
        return
    assert all(math.isfinite(f) for f in spec.inverse_frequencies)
    assert RopeSpec.from_dict(spec.to_dict()) == spec


@st.composite
def specs(draw):
    pairs = draw(st.integers(1, 9))
    frequencies = draw(st.lists(st.floats(0, 6.28), min_size=pairs, max_size=pairs))
    return RopeSpec(
        2 * pairs + draw(st.integers(0, 5)),
        2 * pairs,
        tuple(frequencies),
        draw(st.booleans()),
        draw(st.floats(2**-16, 2**16)),
    )


@hypothesis.given(specs())
def test_a_spec_survives_json_bit_for_bit(spec):
    text = json.dumps(spec.to_dict())
    back = RopeSpec.from_dict(json.loads(text))
    assert back == spec
    assert [f.hex() for f in back.inverse_frequencies] == [f.hex() for f in spec.inverse_frequencies]
    assert json.dumps(back.to_dict()) == text


def test_the_json_never_changes_by_itself():
    assert json.dumps(RopeSpec(6, 4, (1.0, 0.01), False, 1.0).to_dict()) == (
        '{"head_dim": 6, "rotary_dim": 4, "inverse_frequencies": [1.0, 0.01], "is_interleaved": false, "scale": 1.0}'
    )


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 8},
        {"head_dim": 24.0},
        {"head_dim": True},
        {"head_dim": 1 << 17},
        {"rotary_dim": 0},
        {"rotary_dim": 9},
        {"rotary_dim": 12},
        {"rotary_dim": None},
        {"inverse_frequencies": [1.0, 0.1, 0.01, 0.001]},
        {"inverse_frequencies": [1.0, 0.1, math.nan, 1e-7, 0.0]},
        {"inverse_frequencies": [1.0, 0.1, math.inf, 1e-7, 0.0]},
        {"inverse_frequencies": [1.0, 0.1, -0.1, 1e-7, 0.0]},
        {"inverse_frequencies": [1.0, 0.1, 7.0, 1e-7, 0.0]},
        {"inverse_frequencies": [1, 0.1, 0.1, 1e-7, 0.0]},
        {"inverse_frequencies": ["1", 0.1, 0.1, 1e-7, 0.0]},
        {"inverse_frequencies": (1.0, 0.1, 0.1, 1e-7, 0.0)},
        {"inverse_frequencies": "12345"},
        {"is_interleaved": 1},
        {"is_interleaved": None},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": 1},
        {"scale": math.nan},
        {"scale": math.inf},
        {"scale": "1.0"},
        {"base": 10_000.0},
    ],
    ids=str,
)
def test_a_damaged_spec_is_refused(change):
    with pytest.raises(FormatError):
        RopeSpec.from_dict({**SPEC.to_dict(), **change})


@pytest.mark.parametrize("name", SPEC.to_dict())
def test_every_field_is_needed(name):
    with pytest.raises(FormatError, match="too many or too few"):
        RopeSpec.from_dict({key: value for key, value in SPEC.to_dict().items() if key != name})


@hypothesis.given(JSON_LIKE | st.dictionaries(st.sampled_from(list(SPEC.to_dict())), JSON_LIKE, min_size=5))
def test_from_dict_gives_a_spec_or_a_format_error(fields):
    try:
        spec = RopeSpec.from_dict(fields)
    except FormatError:
        return
    assert spec.to_dict() == fields


@hypothesis.given(st.dictionaries(st.sampled_from(list(SPEC.to_dict())), JSON_LIKE, min_size=1, max_size=2))
def test_a_spec_with_damaged_fields_too(damage):
    fields = {**SPEC.to_dict(), **damage}
    try:
        spec = RopeSpec.from_dict(fields)
    except FormatError:
        return
    assert spec.to_dict() == fields
