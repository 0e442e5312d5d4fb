"""Small random models of kinds that the trained test model is not: latent attention, sliding windows.

Their weights are drawn, so their words mean nothing, but they hang on all of the prompt: attention is made to look at
few tokens, and only a few words can be said, so that the likeliest stands out from the rounding of a prefill.
"""

import pathlib
import shutil
import warnings

import torch
from integration.cluster import MODEL

WORDS = 48
"""Tokens that can be said: those from :data:`FIRST_WORD` on; the head knows no others."""
FIRST_WORD = 300
_VOCABULARY = 4096
_QUERY_GAIN = 3.0
_COMMON = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def latent(directory: pathlib.Path) -> str:
    """DeepSeek-V2 without experts: 5 layers, latents of 96 + 32 values."""
    from transformers import DeepseekV2Config

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    config = DeepseekV2Config(
        **_COMMON,
        num_hidden_layers=5,
        first_k_dense_replace=5,
        moe_layer_freq=1,  # SGLang reads it
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        q_lora_rank=None,
        kv_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=48,
        rope_parameters={**yarn, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1},
    )
    return _made(config, directory)


def sliding(directory: pathlib.Path) -> str:
    """Mellum without experts: 7 layers, 5 with a window of 100 tokens, and another base of their rotation."""
    from transformers import MellumConfig

    config = MellumConfig(
        **_COMMON,
        num_hidden_layers=7,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=100,
        layer_types=[("full" if i in (2, 6) else "sliding") + "_attention" for i in range(7)],
        mlp_layer_types=["dense"] * 7,
    )
    return _made(config, directory)


def _made(config, directory: pathlib.Path) -> str:
    """Draws the weights and writes a directory that SGLang and transformers read."""
    import transformers

    config.dtype = "float16"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
    drawn = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() < 2:
                continue
            gain = _QUERY_GAIN if ".q_" in name else 1.0
            fan_in = 1 if "embed_tokens" in name else weight.shape[1]
            weight.copy_(torch.randn(weight.shape, generator=drawn) * gain / fan_in**0.5)
        head = model.lm_head.weight
        silent = torch.ones(len(head), dtype=torch.bool)
        silent[FIRST_WORD : FIRST_WORD + WORDS] = False
        head[silent] = 0
    directory.mkdir(parents=True)
    model.to(torch.float16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(pathlib.Path(MODEL) / name, directory)
    return str(directory)
