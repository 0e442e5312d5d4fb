"""The calibration artifact: what a model's KV looks like, and how finely each tier has to code it.

One artifact serves one shard of one model, in all calibrated tiers and for every page size. It is a safetensors file
(https://huggingface.co/docs/safetensors, "Format") whose metadata holds one JSON text; its SHA-256 names it.
``docs/format.md`` specifies both. ``transform/klt.py`` is what uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from sglang_kvcodec.errors import ForeignPageError, FormatError, UnknownFormatError
from sglang_kvcodec.format.namespace import NAMESPACE_BYTES
from sglang_kvcodec.format.profile import CALIBRATED_TIERS
from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.format.spec import KVSpec, Side

CALIBRATION_VERSION = 2
_METADATA_KEY = "kvcodec"
_HEADER_SIZE_BYTES = 8
_MAX_LAYERS_PER_BLOCK = 12
_MAX_JSON_BYTES = 16 << 20
MAX_LOW_BITS = 15
"""A number of more than 8 + 15 bits has no meaning in fp32."""
GAIN_LOG_OFFSET = 0.1
"""What is added to the magnitude of a scaled component before its logarithm is taken."""


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """The part of a model's KV that one rank holds."""

    layers: int
    kv_heads: int
    head_dim: int
    first_layer: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    sides: tuple[Side, ...] = (Side.KEY, Side.VALUE)

    def __post_init__(self) -> None:
        sizes = (self.layers, self.kv_heads, self.head_dim, self.tp_size)
        if not all(type(size) is int and 1 <= size <= 1 << 16 for size in sizes):
            raise FormatError("a shard with impossible sizes")
        if not 0 <= self.first_layer <= 1 << 16 or not 0 <= self.tp_rank < self.tp_size:
            raise FormatError("a shard that no model has")
        if not self.sides or len(set(self.sides)) != len(self.sides):
            raise FormatError("a shard needs one or two different sides")

    @property
    def channels(self) -> int:
        """Values per token, layer and side."""
        return self.kv_heads * self.head_dim

    def fits(self, spec: KVSpec) -> bool:
        """Whether pages of ``spec`` are of such a shard."""
        return (self.layers, self.kv_heads, self.head_dim, self.sides) == (
            spec.layers,
            spec.kv_heads,
            spec.head_dim,
            spec.sides,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "sides": [side.value for side in self.sides]}

    @classmethod
    def from_dict(cls, fields: Any) -> ShardLayout:
        """Inverse of :meth:`to_dict`; raises what a wrong structure raises."""
        _check_keys(fields, {field.name for field in dataclasses.fields(cls)})
        return cls(**{**fields, "sides": tuple(Side(side) for side in fields["sides"])})


@dataclasses.dataclass(frozen=True)
class Basis:
    """How the values of a block of layers, one token at a time, become components.

    Attributes:
        mean: fp32 ``(layers * channels,)``: of the values, layer after layer, K with its rotation undone.
        synthesis: fp16 ``(components, layers * channels)``: what one unit of each component adds to the values. The
            components are in order of falling variance; those that code to nothing in every tier are left out.
    """

    mean: npt.NDArray[np.float32]
    synthesis: npt.NDArray[np.float16]


@dataclasses.dataclass(frozen=True)
class GainModel:
    """How finely a writer codes a token, seen from its components in one block: a log-linear model of the gain.

    With the scaled components ``z = y / scales``, of the first ones, the binary logarithm of what the token's steps are
    multiplied with is ``bias + z . linear + log(abs(z) + 0.1) . logarithmic``. Readers do not need it.

    Attributes:
        bias: all there is of a model that looks at no component.
        scales: fp32 ``(n,)``, positive, in the units of the components.
        linear: fp32 ``(n,)``.
        logarithmic: fp32 ``(n,)``.
    """

    bias: float = 0.0
    scales: npt.NDArray[np.float32] = dataclasses.field(default_factory=lambda: np.empty(0, np.float32))
    linear: npt.NDArray[np.float32] = dataclasses.field(default_factory=lambda: np.empty(0, np.float32))
    logarithmic: npt.NDArray[np.float32] = dataclasses.field(default_factory=lambda: np.empty(0, np.float32))

    def to_array(self) -> npt.NDArray[np.float32]:
        """fp32 ``(1 + 3 n,)``: the bias, then the others one after another."""
        return np.concatenate([np.array([self.bias], np.float32), self.scales, self.linear, self.logarithmic])

    @classmethod
    def from_array(cls, array: npt.NDArray[np.float32]) -> GainModel:
        """Inverse of :meth:`to_array`.

        Raises:
            FormatError: not such an array.
        """
        if array.ndim != 1 or array.shape[0] % 3 != 1:
            raise FormatError(f"a model of gains of shape {array.shape}")
        _check_array(array, np.float32, array.shape)
        scales, linear, logarithmic = array[1:].reshape(3, -1)
        if not (scales > 0).all():
            raise FormatError("a model of gains with a scale that is none")
        return cls(float(array[0]), scales, linear, logarithmic)


@dataclasses.dataclass(frozen=True)
class Tier:
    """How finely one tier codes.

    Attributes:
        steps: of each side, the quantiser step of each block, in units of its components.
        low_bits: of each side, of each block, uint8 ``(components,)``: how many components are coded, the first ones,
            and how many low bits of each are kept out of the pictures, see ``transform/low_bits.py``.
        rounding: what is added to a magnitude in steps before it is cut to a whole number: 0.5 rounds to nearest, less
            rounds towards zero. A writer's choice, like the gains.
        gains: ``(tokens, gain)`` pairs in rising order of tokens: a token at a position before ``tokens`` is coded with
            steps times ``gain``, a power of two, whatever the model of gains says.
        expected: what calibration measured, for people: ``bits_per_value``, ``divergence``, ….
    """

    steps: Mapping[Side, tuple[float, ...]]
    low_bits: Mapping[Side, tuple[npt.NDArray[np.uint8], ...]]
    rounding: float
    gains: tuple[tuple[int, float], ...]
    expected: Mapping[str, float]

    def components(self, side: Side) -> tuple[int, ...]:
        """How many components of each block are coded."""
        return tuple(len(bits) for bits in self.low_bits[side])

    def gain(self, position: int) -> float | None:
        """What the steps of the token at ``position`` are multiplied with; None to leave it to the model of gains."""
        return next((gain for tokens, gain in self.gains if position < tokens), None)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A checked artifact.

    Attributes:
        model_digest: 32 bytes that name the model and shard, see :func:`model_digest`.
        layout: the shard.
        rope: the rotation that is undone before K is transformed; None keeps K as it is in the pool.
        layers_per_block: layers of a basis; the last block may have fewer.
        bases: of each side, of each block.
        metrics: of each side fp32 ``(layers, kv_heads, head_dim, head_dim)``: symmetric positive definite, how much an
            error of a head's values changes the model's output. A writer needs it, a reader does not.
        gain_models: of each side, of each block. A writer's, too.
        tiers: by name.
        notes: for people: the model, the text, versions; plain JSON.
    """

    model_digest: bytes
    layout: ShardLayout
    rope: RopeSpec | None
    layers_per_block: int
    bases: Mapping[Side, tuple[Basis, ...]]
    metrics: Mapping[Side, npt.NDArray[np.float32]]
    gain_models: Mapping[Side, tuple[GainModel, ...]]
    tiers: Mapping[str, Tier]
    notes: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check(self)

    def blocks(self) -> tuple[tuple[int, int], ...]:
        """``(first layer, layers)`` of each block, counted from the shard's first layer."""
        step, layers = self.layers_per_block, self.layout.layers
        return tuple((first, min(step, layers - first)) for first in range(0, layers, step))

    @functools.cached_property
    def encoded(self) -> bytes:
        """The artifact's bytes; the same for the same calibration."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for side in self.layout.sides:
            tensors[f"{side.value}.metric"] = self.metrics[side]
            for index, basis in enumerate(self.bases[side]):
                tensors[f"{side.value}.{index}.mean"] = basis.mean
                tensors[f"{side.value}.{index}.synthesis"] = basis.synthesis
                tensors[f"{side.value}.{index}.gain"] = self.gain_models[side][index].to_array()
                for name, tier in self.tiers.items():
                    tensors[f"{side.value}.{index}.low_bits.{name}"] = tier.low_bits[side][index]
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        # One entry: safetensors keeps its metadata in a map without an order.
        return safetensors.numpy.save(contiguous, metadata={_METADATA_KEY: self._to_json()})

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that name the artifact."""
        return hashlib.sha256(self.encoded).digest()

    def _to_json(self) -> str:
        fields = {
            "version": CALIBRATION_VERSION,
            "model_digest": self.model_digest.hex(),
            "layout": self.layout.to_dict(),
            "rope": self.rope.to_dict() if self.rope is not None else None,
            "layers_per_block": self.layers_per_block,
            "tiers": {name: _tier_to_dict(tier) for name, tier in self.tiers.items()},
            "notes": self.notes,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_bytes(cls, data: bytes, expected_model: bytes | None = None) -> Calibration:
        """Reads and checks an artifact.

        Args:
            data: its bytes.
            expected_model: the model digest it must have.

        Raises:
            UnknownFormatError: of another version.
            ForeignPageError: of another model or shard than ``expected_model``.
            FormatError: not an artifact, or one that contradicts itself.
        """
        try:
            fields = json.loads(_metadata(data))
            if fields["version"] != CALIBRATION_VERSION:
                raise UnknownFormatError(f"a calibration of version {fields['version']!r}")
            _check_keys(fields, {"version", "model_digest", "layout", "rope", "layers_per_block", "tiers", "notes"})
            tensors = safetensors.numpy.load(data)
            layout = ShardLayout.from_dict(fields["layout"])
            model = bytes.fromhex(fields["model_digest"])
            if expected_model is not None and model != expected_model:
                raise ForeignPageError("a calibration of another model or shard")
            per_block = fields["layers_per_block"]
            if type(per_block) is not int or not 1 <= per_block <= _MAX_LAYERS_PER_BLOCK:
                raise FormatError(f"blocks of {per_block!r} layers")
            blocks = math.ceil(layout.layers / per_block)
            calibration = cls(
                model_digest=model,
                layout=layout,
                rope=RopeSpec.from_dict(fields["rope"]) if fields["rope"] is not None else None,
                layers_per_block=per_block,
                bases={
                    side: tuple(
                        Basis(tensors.pop(f"{side.value}.{i}.mean"), tensors.pop(f"{side.value}.{i}.synthesis"))
                        for i in range(blocks)
                    )
                    for side in layout.sides
                },
                metrics={side: tensors.pop(f"{side.value}.metric") for side in layout.sides},
                gain_models={
                    side: tuple(GainModel.from_array(tensors.pop(f"{side.value}.{i}.gain")) for i in range(blocks))
                    for side in layout.sides
                },
                tiers={
                    name: _tier_from_dict(
                        tier,
                        {
                            side: tuple(tensors.pop(f"{side.value}.{i}.low_bits.{name}") for i in range(blocks))
                            for side in layout.sides
                        },
                    )
                    for name, tier in fields["tiers"].items()
                },
                notes=fields["notes"],
            )
            # Its numbers and its depth are judged by what writes them: NaN is no JSON, though Python reads it.
            is_canonical = calibration.encoded == data
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, RecursionError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"not a calibration: {error}") from error
        if tensors:
            raise UnknownFormatError(f"a calibration with tensors this version does not know: {sorted(tensors)[:3]}")
        if not is_canonical:
            # One calibration has one name: what else could be written is not an artifact.
            raise FormatError("a calibration that is not in its canonical form")
        return calibration


def model_digest(files_digest: str, layout: ShardLayout) -> bytes:
    """The name under which the artifacts of one shard of one model are kept.

    A wrong calibration codes badly, never wrongly: every page object names the one that it needs. So this names the
    model by what is quick to read, see ``files_digest`` of ``format/model_files.py``, not by all of its weights.
    """
    fields = {"files": files_digest, "layout": layout.to_dict()}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"sglang-kvcodec-calibration\0" + text.encode()).digest()


def _metadata(data: bytes) -> str:
    """The JSON text among the metadata, without reading any tensor."""
    header_bytes = int.from_bytes(data[:_HEADER_SIZE_BYTES], "little")
    if len(data) < _HEADER_SIZE_BYTES + header_bytes or header_bytes > _MAX_JSON_BYTES:
        raise FormatError("not a calibration: its header is not all there")
    header = json.loads(data[_HEADER_SIZE_BYTES : _HEADER_SIZE_BYTES + header_bytes])
    text = header["__metadata__"][_METADATA_KEY]
    if not isinstance(text, str):
        raise FormatError("not a calibration")
    return text


def _check_keys(fields: Any, names: set[str]) -> None:
    if not isinstance(fields, dict):
        raise FormatError("a calibration with a field that is no object")
    if set(fields) != names:
        raise UnknownFormatError(f"a calibration whose fields are {sorted(fields)}, not {sorted(names)}")


def _tier_to_dict(tier: Tier) -> dict[str, Any]:
    return {
        "steps": {side.value: list(steps) for side, steps in tier.steps.items()},
        "rounding": tier.rounding,
        "gains": [list(gain) for gain in tier.gains],
        "expected": dict(tier.expected),
    }


def _tier_from_dict(fields: Any, low_bits: Mapping[Side, tuple[npt.NDArray[np.uint8], ...]]) -> Tier:
    _check_keys(fields, {field.name for field in dataclasses.fields(Tier)} - {"low_bits"})
    return Tier(
        steps={Side(side): tuple(steps) for side, steps in fields["steps"].items()},
        low_bits=low_bits,
        rounding=fields["rounding"],
        gains=tuple((tokens, gain) for tokens, gain in fields["gains"]),
        expected=fields["expected"],
    )


def _check(calibration: Calibration) -> None:
    layout = calibration.layout
    if len(calibration.model_digest) != NAMESPACE_BYTES:
        raise FormatError("a model digest of the wrong length")
    if not isinstance(calibration.notes, dict):
        raise FormatError("a calibration whose notes are no object")
    rope = calibration.rope
    if rope is not None and rope.head_dim != layout.head_dim:
        raise FormatError("a rotation of other heads")
    if not 1 <= calibration.layers_per_block <= _MAX_LAYERS_PER_BLOCK:
        raise FormatError(f"blocks of {calibration.layers_per_block} layers")
    blocks = calibration.blocks()
    metric_shape = (layout.layers, layout.kv_heads, layout.head_dim, layout.head_dim)
    for side in layout.sides:
        _check_array(calibration.metrics[side], np.float32, metric_shape)
        if len(calibration.bases[side]) != len(blocks):
            raise FormatError("a basis too many or too few")
        for (_, layers), basis in zip(blocks, calibration.bases[side], strict=True):
            width = layers * layout.channels
            _check_array(basis.mean, np.float32, (width,))
            components = basis.synthesis.shape[0] if basis.synthesis.ndim == 2 else 0
            if not 1 <= components <= width:
                raise FormatError(f"{components} components of {width} values")
            _check_array(basis.synthesis, np.float16, (components, width))
    of_sides: tuple[Mapping[Side, Any], ...] = (calibration.bases, calibration.metrics, calibration.gain_models)
    if any(set(each) != set(layout.sides) for each in of_sides):
        raise FormatError("a side too many or too few")
    if not calibration.tiers or not set(calibration.tiers) <= set(CALIBRATED_TIERS):
        raise UnknownFormatError(f"a calibration for tiers {sorted(calibration.tiers)}")
    for tier in calibration.tiers.values():
        _check_tier(tier, calibration)


def _check_array(array: npt.NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise FormatError(f"expected {np.dtype(dtype).name} {shape} in a calibration, got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise FormatError("a calibration with values that are not finite")


def _check_tier(tier: Tier, calibration: Calibration) -> None:
    sides = set(calibration.layout.sides)
    if set(tier.steps) != sides or set(tier.low_bits) != sides:
        raise FormatError("a tier without steps for a side")
    for side in sides:
        bases = calibration.bases[side]
        if len(calibration.gain_models[side]) != len(bases):
            raise FormatError("a model of gains too many or too few")
        if len(tier.steps[side]) != len(bases) or len(tier.low_bits[side]) != len(bases):
            raise FormatError("a tier with a step too many or too few")
        if not all(type(step) is float and 0 < step < math.inf for step in tier.steps[side]):
            raise FormatError("a step that is none")
        for bits, basis, model in zip(tier.low_bits[side], bases, calibration.gain_models[side], strict=True):
            if bits.dtype != np.uint8 or bits.ndim != 1 or not 1 <= len(bits) <= len(basis.synthesis):
                raise FormatError(f"low bits {bits.shape} for {len(basis.synthesis)} components")
            if bits.max() > MAX_LOW_BITS:
                raise FormatError("a component of which too many bits are kept out of the pictures")
            if len(model.scales) > len(bits):
                raise FormatError("a model of gains that looks at components which are cut")
    if type(tier.rounding) is not float or not 0 < tier.rounding <= 0.5:
        raise FormatError(f"rounding with {tier.rounding!r}")
    tokens = [limit for limit, _ in tier.gains]
    if not all(type(limit) is int and limit > 0 for limit in tokens) or sorted(set(tokens)) != tokens:
        raise FormatError("gains out of order")
    if not all(type(gain) is float and 2**-6 <= gain <= 2 and math.frexp(gain)[0] == 0.5 for _, gain in tier.gains):
        raise FormatError("a gain that is no power of two")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in tier.expected.values()):
        raise FormatError("an expectation that is no number")
