"""The families of RoPE frequencies, with the formulas of SGLang 0.5.23 (``sglang/srt/layers/rotary_embedding/``).

Where transformers computes something else from the same configuration, SGLang counts: its K is what is coded.

- ``dynamic``: SGLang has one set of frequencies for all lengths, that of the longest sequence: the base times
  ``(factor**2 - factor + 1) ** (d / (d - 2))``, or times ``alpha ** (d / (d - 2))`` (``rope_variant.py``). transformers
  changes them while a sequence grows.
- ``yarn``: SGLang never reads ``attention_factor`` (``factory.py`` hands on ``attn_factor`` only), and takes ``mscale``
  and ``mscale_all_dim`` as given when they are zero (``yarn.py``).

Everything is computed in double precision.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from sglang_kvcodec.errors import UnsupportedError

_HARMLESS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
}
_YARN = {
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attn_factor",
    "extrapolation_factor",
    "attention_factor",
}
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", "alpha"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    # What is not YaRN's: a note of how the model was trained, and a factor of the queries alone.
    "yarn": _YARN | {"truncate", "finetuned", "llama_4_scaling_beta"},
    "deepseek_yarn": _YARN | {"apply_yarn_scaling"},
}
"""Rope type -> the parameters that are understood, besides ``_HARMLESS``."""
_KNOWN_OTHERS = {
    "longrope": "picks its frequencies by the length of the sequence",
    "su": "picks its frequencies by the length of the sequence",
    "proportional": "pairs dimensions across the whole head while it rotates only some",
    "mrope": "has positions with sections for time, height and width",
}


def refusal(why: str) -> UnsupportedError:
    """The error to raise for a rotation that isn't understood, ``why`` being the rest of its sentence."""
    return UnsupportedError(f"K is coded with its rotation left in: {why}")


def float32(value: float) -> float:
    """``value`` rounded to single precision, as SGLang and kernels hold it: the same on every machine.

    Raises:
        OverflowError: it is too large.
    """
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def scaled_frequencies(
    rope_type: object, parameters: Mapping[str, Any], rotary_dim: int, theta: object, original_length: object
) -> tuple[list[float], float]:
    """The frequencies of a family.

    Args:
        rope_type: the family.
        parameters: what the configuration says about it.
        rotary_dim: dimensions that are rotated.
        theta: the base of the frequencies.
        original_length: tokens that the model was trained on before its context was extended.

    Returns:
        ``rotary_dim / 2`` radians per token, and the factor of cos and sin.

    Raises:
        UnsupportedError: an unknown family or parameter, or a value that makes no sense.
    """
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        why = _KNOWN_OTHERS.get(str(rope_type), "is not known")
        raise refusal(f"rope type {rope_type!r} {why}")
    unknown = sorted(set(parameters) - _KEYS[rope_type] - _HARMLESS)
    if unknown:
        raise refusal(f"rope type {rope_type!r} has a parameter {unknown[0]!r}, which isn't known")
    base = _number("rope_theta", theta, 1.0, 1e15)
    if base == 1:
        raise refusal("its rope_theta is 1")
    if rope_type == "dynamic":
        base *= _dynamic_growth(parameters, rotary_dim)
    plain = [base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    if rope_type == "linear":
        factor = _factor(parameters)
        return [f / factor for f in plain], 1.0
    if rope_type == "llama3":
        return _llama3(plain, parameters, _length(original_length)), 1.0
    if rope_type in ("yarn", "deepseek_yarn"):
        is_deepseek = rope_type == "deepseek_yarn"
        frequencies = _yarn(plain, parameters, base, _length(original_length))
        return frequencies, _yarn_scale(parameters, is_deepseek=is_deepseek)
    return plain, 1.0


def _dynamic_growth(parameters: Mapping[str, Any], rotary_dim: int) -> float:
    """What the base is multiplied by: ``DynamicNTKScalingRotaryEmbedding`` and ``DynamicNTKAlphaRotaryEmbedding``."""
    if rotary_dim == 2:
        raise refusal("rope type 'dynamic' needs more than one pair of dimensions")
    if "alpha" in parameters:
        growth = _number("alpha", parameters["alpha"], 1e-6, 1e6)
    else:
        factor = _factor(parameters)
        growth = factor * factor - (factor - 1)
    return float(growth ** (rotary_dim / (rotary_dim - 2)))


def _llama3(plain: list[float], parameters: Mapping[str, Any], length: int) -> list[float]:
    """``Llama3RotaryEmbedding``: long waves are stretched, short ones kept, those between are blended."""
    factor = _factor(parameters)
    low = _number("low_freq_factor", parameters.get("low_freq_factor"), 1e-6, 1e6)
    high = _number("high_freq_factor", parameters.get("high_freq_factor"), 1e-6, 1e6)
    frequencies = []
    for f in plain:
        turns = length * f / (2 * math.pi)
        if turns > high:
            frequencies.append(f)
        elif turns < low:
            frequencies.append(f / factor)
        else:
            blend = (turns - low) / (high - low) if high != low else 0.0
            frequencies.append((1 - blend) * f / factor + blend * f)
    return frequencies


def _yarn(plain: list[float], parameters: Mapping[str, Any], base: float, length: int) -> list[float]:
    """``YaRNScalingRotaryEmbedding``: Peng et al., "YaRN" (arXiv 2309.00071)."""
    factor = _factor(parameters)
    dims = 2 * len(plain)

    def dimension_of(turns: float) -> float:
        """The dimension that turns so often in the original length."""
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension_of(_number("beta_fast", parameters.get("beta_fast", 32), 1e-6, 1e6))
    high = dimension_of(_number("beta_slow", parameters.get("beta_slow", 1), 1e-6, 1e6))
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise refusal(f"its truncate is {truncate!r}")
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    kept = _number("extrapolation_factor", parameters.get("extrapolation_factor", 1), 0.0, 1.0)
    frequencies = []
    for i, f in enumerate(plain):
        share = (1 - min(max((i - low) / (high - low), 0.0), 1.0)) * kept
        frequencies.append(f / factor * (1 - share) + f * share)
    return frequencies


def _yarn_scale(parameters: Mapping[str, Any], *, is_deepseek: bool) -> float:
    """YaRN's attention factor: the quotient of two ``mscale`` if both are given; always so in DeepSeek's variant."""
    factor = _factor(parameters)

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    upper, lower = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if is_deepseek or (upper is not None and lower is not None):
        above = _number("mscale", 1 if upper is None else upper, 0.0, 1e3)
        below = _number("mscale_all_dim", 0 if lower is None else lower, 0.0, 1e3)
        scale = growth(above) / growth(below)
    else:
        scale = growth(1.0)
    return scale * _number("attn_factor", parameters.get("attn_factor", 1), 1e-3, 1e3)


def _factor(parameters: Mapping[str, Any]) -> float:
    return _number("factor", parameters.get("factor"), 1e-3, 1e6)


def _length(value: object) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 40:
        raise refusal(f"its original_max_position_embeddings is {value!r}")
    return value


def _number(name: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise refusal(f"its {name} is {value!r}")
    return float(value)
