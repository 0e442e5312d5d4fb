"""How SGLang 0.5.23 builds the rotation of each model type: read in ``sglang/srt/models/``, one file per line below.

Only what is in the table is undone. ``tests/format/test_rope_of_sglang.py`` builds the models with SGLang and compares.
"""

from __future__ import annotations

import dataclasses

from sglang_kvcodec.format.rope_scaling import refusal

_PLAIN_KEY = ("partial_rotary_factor",)


@dataclasses.dataclass(frozen=True)
class ModelRope:
    """What SGLang's code of a model type does with its configuration.

    Attributes:
        is_interleaved: GPT-J's pairing, ``is_neox_style=False``.
        reads_parameters: it has RoPE parameters (``rope_parameters``, ``rope_scaling``).
        reads_scaling: they reach ``get_rope``; else the rotation is always ``default``.
        partial_keys: where the share of a head that is rotated is read, beside the RoPE parameters.
        reads_nested_partial: it is read among the RoPE parameters, too.
        default_partial: that share when nothing is said.
        reads_rotary_dim: ``rotary_dim`` says how many dimensions are rotated.
        theta_keys: names of the base beside the RoPE parameters.
        default_theta: the base when nothing is said: transformers' default of this model type.
        reads_ratio: ``rope_ratio`` multiplies the base.
        is_latent: multi-head latent attention.
    """

    is_interleaved: bool = False
    reads_parameters: bool = True
    reads_scaling: bool = True
    partial_keys: tuple[str, ...] = ()
    reads_nested_partial: bool = False
    default_partial: float = 1.0
    reads_rotary_dim: bool = False
    theta_keys: tuple[str, ...] = ("rope_theta",)
    default_theta: float = 10_000.0
    reads_ratio: bool = False
    is_latent: bool = False


_LLAMA = ModelRope(partial_keys=_PLAIN_KEY)
_WHOLE = ModelRope()
_UNSCALED = ModelRope(reads_scaling=False)
_GLM = ModelRope(partial_keys=_PLAIN_KEY, reads_nested_partial=True, default_partial=0.5)
_LATENT = ModelRope(is_interleaved=True, is_latent=True)

_MODELS = {
    "apertus": dataclasses.replace(_LLAMA, default_theta=12_000_000.0),
    "arcee": _LLAMA,
    "chatglm": ModelRope(
        is_interleaved=True, reads_parameters=False, default_partial=0.5, theta_keys=(), reads_ratio=True
    ),
    "cohere": ModelRope(is_interleaved=True, default_theta=500_000.0),  # commandr.py
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,  # deepseek_v2.py
    "ernie4_5": ModelRope(is_interleaved=True, partial_keys=_PLAIN_KEY, default_theta=500_000.0),  # ernie4.py, llama.py
    "ernie4_5_moe": ModelRope(is_interleaved=True, partial_keys=_PLAIN_KEY, default_theta=500_000.0),
    "gemma": _UNSCALED,
    "gemma2": _UNSCALED,
    "glm4": dataclasses.replace(_GLM, is_interleaved=True),
    "glm4_moe": _GLM,
    "gpt_neox": ModelRope(  # SGLang has no code of its own for it and falls back on transformers'
        reads_scaling=False,
        partial_keys=("rotary_pct",),
        reads_nested_partial=True,
        default_partial=0.25,
        theta_keys=("rotary_emb_base",),
    ),
    "gpt_oss": dataclasses.replace(_WHOLE, default_theta=150_000.0),
    "gptj": ModelRope(is_interleaved=True, reads_parameters=False, reads_rotary_dim=True),  # gpt_j.py
    "granite": _WHOLE,
    "granitemoe": _UNSCALED,
    "llama": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,  # llama.py
    "mixtral": dataclasses.replace(_UNSCALED, default_theta=1_000_000.0),
    "olmo": _UNSCALED,
    "olmo2": _WHOLE,
    "olmoe": _WHOLE,
    "persimmon": ModelRope(reads_scaling=False, partial_keys=_PLAIN_KEY, default_partial=0.5),
    "phi": ModelRope(reads_scaling=False, partial_keys=_PLAIN_KEY, default_partial=0.5),
    "phi3": _LLAMA,  # llama.py
    "phimoe": dataclasses.replace(_WHOLE, default_theta=1_000_000.0),
    "qwen2": _WHOLE,
    "qwen2_moe": _WHOLE,
    "qwen3": _WHOLE,
    "qwen3_moe": _WHOLE,
    "stablelm": ModelRope(
        reads_scaling=False, partial_keys=("rope_pct", "partial_rotary_factor"), default_partial=0.25
    ),
    "starcoder2": _UNSCALED,
}

_UNEVEN = {
    "cohere2": "only its sliding-window layers are rotated",
    "exaone4": "its global layers are not rotated",
    "gemma3": "its local and global layers are rotated with different bases",
    "gemma3_text": "its local and global layers are rotated with different bases",
    "gemma4_text": "its local and global layers are rotated in different ways",
    "gpt2": "it has no RoPE",
    "gpt_bigcode": "it has no RoPE",
    "hunyuan_v1_dense": "it normalises K after the rotation",
    "hunyuan_v1_moe": "it normalises K after the rotation",
    "llama4_text": "some of its layers are not rotated",
    "olmo3": "its kinds of layers have RoPE parameters of their own",
    "opt": "it has no RoPE",
    "smollm3": "some of its layers are not rotated",
}
"""Model types that are known, and known not to have one rotation for all of K."""


def model_rope(model_type: str) -> ModelRope:
    """What SGLang does for ``model_type``.

    Raises:
        UnsupportedError: it isn't known, or not one rotation for all layers.
    """
    if model_type not in _MODELS:
        why = _UNEVEN.get(model_type, "how SGLang rotates its K isn't known")
        raise refusal(f"model type {model_type!r}: {why}")
    return _MODELS[model_type]
