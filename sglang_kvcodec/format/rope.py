"""Rotary position embedding of K: what must be known to undo it and to do it again.

Su et al., "RoFormer" (arXiv 2104.09864): each pair of dimensions of a head is turned by ``position * frequency``. A
:class:`RopeSpec` holds the outcome of whatever family made the frequencies. :func:`rope_spec_from_config` makes one
from a model's configuration, so that it agrees with what SGLang 0.5.23 writes into its KV pool, or refuses.

A wrong spec could never give wrong data: whatever it says is undone and redone exactly. It would only code badly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.rope_models import ModelRope, model_rope
from sglang_kvcodec.format.rope_scaling import float32, refusal, scaled_frequencies

_LARGEST_HEAD_DIM = 1 << 16
_LARGEST_FREQUENCY = 2 * math.pi
"""Radians per token; models use at most 1."""
_SCALES = (2.0**-16, 2.0**16)
_PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct", "rope_pct")


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """A rotation of the first ``rotary_dim`` dimensions of each head; the others are left alone.

    Attributes:
        head_dim: dimensions of a head.
        rotary_dim: dimensions that are rotated: even, at most ``head_dim``.
        inverse_frequencies: radians per token of each of the ``rotary_dim / 2`` pairs.
        is_interleaved: pair ``i`` is dimensions ``(2i, 2i + 1)``, as in GPT-J, or else ``(i, i + rotary_dim / 2)``, as
            in GPT-NeoX.
        scale: multiplies cos and sin: YaRN's attention factor, 1 elsewhere.

    Raises:
        FormatError: values that no rotation has.
    """

    head_dim: int
    rotary_dim: int
    inverse_frequencies: tuple[float, ...]
    is_interleaved: bool
    scale: float

    def __post_init__(self) -> None:
        if type(self.head_dim) is not int or type(self.rotary_dim) is not int:
            raise FormatError("head_dim and rotary_dim of a rotation are integers")
        if not 2 <= self.rotary_dim <= self.head_dim <= _LARGEST_HEAD_DIM or self.rotary_dim % 2:
            raise FormatError(f"a head of {self.head_dim} dimensions can't have {self.rotary_dim} of them rotated")
        if type(self.is_interleaved) is not bool:
            raise FormatError("is_interleaved is true or false")
        frequencies = self.inverse_frequencies
        if type(frequencies) is not tuple or len(frequencies) != self.rotary_dim // 2:
            raise FormatError(f"a rotation of {self.rotary_dim} dimensions has half as many frequencies")
        if not all(type(f) is float and 0 <= f <= _LARGEST_FREQUENCY for f in frequencies):
            raise FormatError("a frequency that is none")
        if type(self.scale) is not float or not _SCALES[0] <= self.scale <= _SCALES[1]:
            raise FormatError("a scale that is none")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; Python's ``json`` keeps every bit of the floats."""
        return {**dataclasses.asdict(self), "inverse_frequencies": list(self.inverse_frequencies)}

    @classmethod
    def from_dict(cls, fields: object) -> RopeSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            FormatError: anything else than what :meth:`to_dict` gives.
        """
        if not isinstance(fields, Mapping):
            raise FormatError("a rotation is an object of named fields")
        if set(fields) != {field.name for field in dataclasses.fields(cls)}:
            raise FormatError("a rotation with a field too many or too few")
        frequencies = fields["inverse_frequencies"]
        if not isinstance(frequencies, list):
            raise FormatError("the frequencies of a rotation are a list")
        return cls(**{**fields, "inverse_frequencies": tuple(frequencies)})


def rope_spec_from_config(config: Mapping[str, Any], *, head_dim: int | None = None) -> RopeSpec:
    """The rotation that SGLang 0.5.23 applies to K of a model in all its layers.

    Args:
        config: the Hugging Face configuration of the text model, in the style of transformers 5 (``rope_parameters``)
            or before (``rope_theta``, ``rope_scaling``, ``partial_rotary_factor``, ...).
        head_dim: dimensions of the heads in the pool, if known: what the configuration says must agree. For multi-head
            latent attention it must be given, as ``qk_rope_head_dim``: the spec is that of this part alone.

    Raises:
        UnsupportedError: a rotation that isn't understood in full, in one sentence that says why. Nothing is guessed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise refusal("the configuration names no model_type")
    parameters = _rope_parameters(config)
    _refuse_uneven_layers(config, parameters)
    model = model_rope(model_type)
    if parameters and not model.reads_parameters:
        raise refusal(f"a {model_type} with RoPE parameters, which SGLang does not read")
    _refuse_other_pairing(config, model)
    dim = _head_dim(config, model, head_dim)
    rotary_dim = _rotary_dim(config, parameters, model, dim)
    rope_type = _agreed("rope type", parameters.get("rope_type"), parameters.get("type"))
    if rope_type is None:
        rope_type = "default"
    if model.is_latent and rope_type != "default":
        if rope_type not in ("yarn", "deepseek_yarn"):
            raise refusal(f"a {model_type} with {rope_type!r} scaling, which SGLang takes for YaRN")
        rope_type = "deepseek_yarn"
    if not model.reads_scaling and rope_type != "default":
        raise refusal(f"SGLang builds a {model_type} without the {rope_type!r} scaling that its configuration asks for")
    length = _agreed(
        "original_max_position_embeddings",
        config.get("original_max_position_embeddings"),
        parameters.get("original_max_position_embeddings"),
    )
    frequencies, scale = scaled_frequencies(
        rope_type,
        parameters,
        rotary_dim,
        _theta(config, parameters, model),
        config.get("max_position_embeddings") if length is None else length,
    )
    try:
        return RopeSpec(
            head_dim=dim,
            rotary_dim=rotary_dim,
            inverse_frequencies=tuple(float32(f) for f in frequencies),
            is_interleaved=model.is_interleaved,
            scale=float32(scale),
        )
    except (FormatError, OverflowError) as error:
        raise refusal(f"its parameters give {error}") from None


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of either style, without those that are null."""
    styles = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    given = [style for style in styles if style is not None and style != {}]
    if not all(isinstance(style, Mapping) for style in given):
        raise refusal("its RoPE parameters are no object of named fields")
    parameters = _agreed("RoPE parameters", *given) or {}
    if "rope_theta" in parameters and parameters["rope_theta"] is None:
        raise refusal("its rope_theta is null")
    return {str(name): value for name, value in parameters.items() if value is not None}


def _refuse_uneven_layers(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuses what makes the rotation differ between layers, between tokens of one position, or be absent.

    Raises:
        UnsupportedError: see :func:`rope_spec_from_config`.
    """
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise refusal("its kinds of layers have RoPE parameters of their own")
    if any("mrope" in name for name in parameters) or parameters.get("type") == "mrope":
        raise refusal("its positions have sections for time, height and width (mrope)")
    for name in ("no_rope_layers", "no_rope_layer_interval", "nope_layer_interval"):
        if config.get(name):
            raise refusal(f"some of its layers are not rotated ({name})")
    for name in ("rope_local_base_freq", "local_rope_theta", "layer_rope_theta"):
        if config.get(name) is not None:
            raise refusal(f"its layers are rotated with different bases ({name})")
    if config.get("dual_chunk_attention_config") is not None:
        raise refusal("dual chunk attention rotates K by its position within a chunk")
    if config.get("alibi") or config.get("position_embedding_type") not in (None, "rope", "rotary"):
        raise refusal("it has position embeddings other than RoPE")
    for name in ("attn_use_rope", "use_rope", "rotary"):
        if config.get(name) is False:
            raise refusal(f"its K is not rotated ({name} is false)")


def _refuse_other_pairing(config: Mapping[str, Any], model: ModelRope) -> None:
    """Refuses a configuration that asks for the pairing its model does not have.

    Raises:
        UnsupportedError: see :func:`rope_spec_from_config`.
    """
    asked = config.get("rope_is_neox_style")
    if asked is not None and asked is not (not model.is_interleaved):
        raise refusal("its configuration asks for another pairing (rope_is_neox_style) than the model has")
    interleave = config.get("rope_interleave")
    if interleave is not None and interleave is not model.is_interleaved:
        raise refusal("its configuration asks for another pairing (rope_interleave) than the model has")


def _head_dim(config: Mapping[str, Any], model: ModelRope, given: int | None) -> int:
    if model.is_latent:
        if given is None or given != config.get("qk_rope_head_dim"):
            raise refusal("it has latent attention, of which only the last qk_rope_head_dim dimensions are rotated")
        return given
    if config.get("kv_lora_rank") is not None:
        raise refusal("it has latent attention, which its model type does not tell")
    dim = config.get("head_dim")
    if dim is None:
        width = _agreed("width", config.get("hidden_size"), config.get("n_embd"))
        heads = _agreed("number of heads", config.get("num_attention_heads"), config.get("n_head"))
        if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
            raise refusal("its configuration has no head_dim, nor whole heads")
        dim = width // heads
    if type(dim) is not int or not 2 <= dim <= _LARGEST_HEAD_DIM:
        raise refusal(f"its head_dim is {dim!r}")
    if given is not None and given != dim:
        raise refusal(f"its heads have {dim} dimensions, those in the pool {given}")
    return dim


def _rotary_dim(config: Mapping[str, Any], parameters: Mapping[str, Any], model: ModelRope, head_dim: int) -> int:
    """How much of a head is rotated, if all that the configuration says is what SGLang reads."""
    at_top = {name: config[name] for name in _PARTIAL_KEYS if config.get(name) is not None}
    nested = parameters.get("partial_rotary_factor")
    reads = [at_top.get(name) for name in model.partial_keys]
    factor = _agreed("partial rotary factor", *reads, nested if model.reads_nested_partial else None)
    if factor is None:
        factor = model.default_partial
    for said in [*at_top.values(), nested]:
        if said is not None and said != factor:
            raise refusal(f"its configuration has a partial rotary factor of {said!r}, which SGLang does not read")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise refusal(f"its partial rotary factor is {factor!r}")
    said = config.get("rotary_dim")
    rotary_dim = said if model.reads_rotary_dim else int(head_dim * factor)
    if said is not None and said != rotary_dim:
        raise refusal(f"its configuration has a rotary_dim of {said!r}, which SGLang does not read")
    if type(rotary_dim) is not int or not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise refusal(f"{rotary_dim!r} of the {head_dim} dimensions of a head can't be rotated in pairs")
    return rotary_dim


def _theta(config: Mapping[str, Any], parameters: Mapping[str, Any], model: ModelRope) -> object:
    """The base of the frequencies, unchecked."""
    if "rope_theta" in config and config["rope_theta"] is None:
        raise refusal("its rope_theta is null")
    said = [config.get(name) for name in model.theta_keys]
    theta = _agreed("rope_theta", *said, parameters.get("rope_theta"))
    if theta is None:
        theta = model.default_theta
    ratio = config.get("rope_ratio")
    if ratio is None:
        return theta
    if not model.reads_ratio or isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise refusal(f"its configuration has a rope_ratio of {ratio!r}, which SGLang does not read")
    return theta * ratio


def _agreed(name: str, *values: Any) -> Any:
    """The one value among ``values`` that is not None; None if there is none.

    Raises:
        UnsupportedError: they differ.
    """
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given[1:]):
        raise refusal(f"its configuration says two things about its {name}")
    return given[0] if given else None
