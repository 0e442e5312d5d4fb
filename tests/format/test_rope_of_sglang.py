"""What is read off a configuration, against the rotations that SGLang builds from it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from sglang_kvcodec.format.rope import rope_spec_from_config
from sglang_kvcodec.format.rope_models import _MODELS
from sglang_kvcodec.transform.rope import rotate, rotation_table

pytestmark = pytest.mark.sglang

HERE = pathlib.Path(__file__).parent
SMALL = {
    "hidden_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 256,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
DEEPSEEK = {"kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": None}
V2 = {"moe_layer_freq": 1, "first_k_dense_replace": 1}
CHATGLM = {
    "num_layers": 1,
    "padded_vocab_size": 128,
    "kv_channels": 96,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 256,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "seq_length": 2048,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "rope_ratio": 5,
    "original_rope": True,
}


def scaled(**parameters):
    return {"rope_parameters": {"rope_theta": 5e5, **parameters}}


CASES = [
    ("apertus", "apertus", "ApertusForCausalLM", {}),
    ("arcee", "arcee", "ArceeForCausalLM", {}),
    ("chatglm", "chatglm", "ChatGLMForCausalLM", CHATGLM),
    ("cohere", "commandr", "CohereForCausalLM", {}),
    ("deepseek_v2", "deepseek_v2", "DeepseekV2ForCausalLM", {**DEEPSEEK, **V2, **scaled(**YARN)}),
    (
        "deepseek_v3",
        "deepseek_v2",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, **scaled(**YARN, mscale=0.7, mscale_all_dim=1.0)},
    ),
    ("ernie4_5", "ernie4", "Ernie4_5_ForCausalLM", {"head_dim": 96}),
    ("ernie4_5_moe", "ernie4", "Ernie4_5_MoeForCausalLM", {}),
    ("gemma", "gemma", "GemmaForCausalLM", {}),
    ("gemma2", "gemma2", "Gemma2ForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
    ("glm4", "glm4", "Glm4ForCausalLM", {}),
    ("glm4_moe", "glm4_moe", "Glm4MoeForCausalLM", {"partial_rotary_factor": 0.25}),
    ("gpt_oss", "gpt_oss", "GptOssForCausalLM", {}),
    ("gptj", "gpt_j", "GPTJForCausalLM", {"n_embd": 384, "n_head": 4, "n_layer": 1, "rotary_dim": 32}),
    ("granite", "granite", "GraniteForCausalLM", scaled(**LLAMA3)),
    ("granitemoe", "granitemoe", "GraniteMoeForCausalLM", {}),
    ("llama", "llama", "LlamaForCausalLM", {}),
    ("llama", "llama", "LlamaForCausalLM", {"head_dim": 80, "rope_theta": 1e6}),
    ("llama", "llama", "LlamaForCausalLM", {"partial_rotary_factor": 0.5}),
    ("llama", "llama", "LlamaForCausalLM", scaled(rope_type="linear", factor=4.0)),
    ("llama", "llama", "LlamaForCausalLM", scaled(rope_type="dynamic", factor=4.0)),
    ("llama", "llama", "LlamaForCausalLM", scaled(rope_type="dynamic", factor=4.0, alpha=1000.0)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**LLAMA3)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**{**LLAMA3, "low_freq_factor": 4.0})),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN, truncate=False, beta_fast=20, beta_slow=2)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN, mscale=0.7, mscale_all_dim=1.0)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN, mscale=0.7, mscale_all_dim=0)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN, mscale=0.7)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN, attention_factor=3.0)),
    ("llama", "llama", "LlamaForCausalLM", scaled(**YARN, attn_factor=3.0, extrapolation_factor=0.5)),
    ("llama", "llama", "LlamaForCausalLM", scaled(rope_type="yarn", factor=4.0)),
    ("ministral3", "ministral3", "Ministral3ForCausalLM", {}),
    ("mistral", "mistral", "MistralForCausalLM", {}),
    ("mixtral", "mixtral", "MixtralForCausalLM", {}),
    ("olmo", "olmo", "OlmoForCausalLM", {}),
    ("olmo2", "olmo2", "Olmo2ForCausalLM", scaled(**YARN)),
    ("olmoe", "olmoe", "OlmoeForCausalLM", scaled(**YARN)),
    ("persimmon", "persimmon", "PersimmonForCausalLM", {}),
    ("phi", "phi", "PhiForCausalLM", {}),
    ("phi3", "llama", "Phi3ForCausalLM", {"partial_rotary_factor": 0.75}),
    ("phimoe", "phimoe", "PhiMoEForCausalLM", {}),
    ("qwen2", "qwen2", "Qwen2ForCausalLM", scaled(**YARN)),
    ("qwen2_moe", "qwen2_moe", "Qwen2MoeForCausalLM", scaled(**YARN)),
    ("qwen3", "qwen3", "Qwen3ForCausalLM", scaled(**YARN)),
    ("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", scaled(**YARN)),
    ("stablelm", "stablelm", "StableLmForCausalLM", {}),
    ("stablelm", "stablelm", "StableLmForCausalLM", {"partial_rotary_factor": 0.5}),
    ("starcoder2", "starcoder2", "Starcoder2ForCausalLM", {}),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    store = tmp_path_factory.mktemp("sglang") / "store"
    wanted = [(*case[:3], {**SMALL, **case[3]}) for case in CASES]
    child = subprocess.run(
        [sys.executable, HERE / "sglang_ropes.py", HERE.parent / "models" / "tiny-code-lm", store],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env={**os.environ, "SGLANG_PLATFORM": "kvcodec_cpu"},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    mark = "rotation: "
    lines = [json.loads(line.removeprefix(mark)) for line in child.stdout.splitlines() if line.startswith(mark)]
    assert len(lines) == len(CASES)
    return lines


def test_every_model_type_is_tried():
    assert {case[0] for case in CASES} == set(_MODELS) - {"gpt_neox"}  # SGLang has none of its own


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: f"{case}-{CASES[case][0]}")
def test_sglang_rotates_as_the_spec_says(built, case):
    found = built[case]
    assert "error" not in found, found["error"]
    is_latent = _MODELS[CASES[case][0]].is_latent
    rope = rope_spec_from_config(found["config"], head_dim=32 if is_latent else None)
    assert (rope.head_dim, rope.rotary_dim) == (found["head_dim"], found["rotary_dim"])
    assert rope.is_interleaved is not found["is_neox_style"]
    positions = torch.tensor(found["positions"])
    tables = [rotation_table(position, 1, rope) for position in found["positions"]]
    # SGLang multiplies positions and frequencies in single precision.
    error = (2e-6 + 8 * positions * 2.0**-24)[:, None]
    table = torch.cat([torch.cat(table, -1) for table in tables])
    assert ((table - torch.tensor(found["table"])).abs() <= error * rope.scale).all()
    k = (torch.arange(positions.numel() * 3 * rope.head_dim) * 29 % 97 / 48 - 1).reshape(-1, 3, rope.head_dim)
    assert ((rotate(k, positions, rope) - torch.tensor(found["k"])).abs() <= 2 * error[:, None] * rope.scale).all()
