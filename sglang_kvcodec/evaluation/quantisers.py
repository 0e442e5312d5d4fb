"""How others quantise KV: FP8, 8 bits per channel, 4 bits in groups (KIVI). Bytes counted as they would be stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation.entropy import channel_entropy_bits
from sglang_kvcodec.evaluation.methods import KV, MethodContext, MethodResult, even_bits, refuse_parameter
from sglang_kvcodec.format.spec import KVSpec, Side, layer_groups, picture_geometry
from sglang_kvcodec.transform.layout import to_canvas
from sglang_kvcodec.video import PictureEncoder, open_encoder

_FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)
_HALF_BYTES = 2
_FLOAT_BYTES = 4


class Untouched:
    """KV as it is: the baseline of everything else."""

    name = "bf16"

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        sizes = {side: tensor.numel() * tensor.element_size() for side, tensor in kv.items()}
        return MethodResult(dict(kv), sum(sizes.values()), 0, even_bits(kv, sizes))


class Fp8:
    """An FP8 (e4m3) KV cache.

    Unscaled it is SGLang's ``--kv-cache-dtype fp8_e4m3`` for a checkpoint without KV scales: a cast with scale 1, and
    what lies beyond 448 clamped (``saturate_to_fp8_range`` in ``mem_cache/memory_pool.py``). Scaled, each layer's K and
    V are stretched to the largest e4m3 number.
    """

    def __init__(self, scaled: bool) -> None:
        """With a scale for each layer and side, or with scale 1."""
        self.name = "fp8-scaled" if scaled else "fp8"
        self._scaled = scaled

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        restored: KV = {}
        for side, tensor in kv.items():
            wide = tensor.float()
            scale = wide.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / _FP8_MAX if self._scaled else 1.0
            codes = (wide / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
            restored[side] = (codes.float() * scale).to(tensor.dtype)
        scales = {side: tensor.shape[0] * _FLOAT_BYTES * self._scaled for side, tensor in kv.items()}
        sizes = {side: tensor.numel() + scales[side] for side, tensor in kv.items()}
        return MethodResult(restored, sum(sizes.values()), sum(scales.values()), even_bits(kv, sizes))


class MinMax8:
    """8 bits between each channel's smallest and largest value over all tokens of the call, offset and scale in fp16.

    What a video codec is given if nothing else is done to the KV. Its codes are counted at 8 bits each, or as lossless
    x265 pictures laid out like those of the package's own profiles.
    """

    def __init__(self, spec: KVSpec, encoder: PictureEncoder | None) -> None:
        """Counts pictures of ``encoder``, which stays the caller's; 8 bits per value without one."""
        self.name = "int8-x265" if encoder else "int8"
        self._spec = spec
        self._encoder = encoder

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        restored: KV = {}
        coded: dict[Side, list[float]] = {}
        ideal: dict[Side, tuple[float, ...]] = {}
        scale_bytes, headers_bytes = 0, 0
        for side, tensor in kv.items():
            codes, back = _minmax(tensor.float().flatten(2), 1, 255)
            restored[side] = back.to(tensor.dtype).reshape(tensor.shape)
            layer_scale_bytes = 2 * _HALF_BYTES * codes.shape[2]
            scale_bytes += layer_scale_bytes * codes.shape[0]
            if self._encoder is None:
                layer_bytes: list[float] = [float(codes[0].numel())] * codes.shape[0]
            else:
                layer_bytes, header_bytes = self._picture_bytes(codes.to(torch.uint8), self._encoder)
                headers_bytes += header_bytes
            coded[side] = [size + layer_scale_bytes for size in layer_bytes]
            overhead_bits = 8 * layer_scale_bytes / codes[0].numel()
            ideal[side] = tuple((channel_entropy_bits(codes) + overhead_bits).tolist())
        bits = {side: tuple(8 * size / kv[side][0].numel() for size in coded[side]) for side in kv}
        total = round(sum(sum(sizes) for sizes in coded.values())) + headers_bytes
        return MethodResult(restored, total, scale_bytes + headers_bytes, bits, ideal)

    def _picture_bytes(self, codes: torch.Tensor, encoder: PictureEncoder) -> tuple[list[float], int]:
        """Bytes of each layer of uint8 ``(layers, tokens, channels)``, and those of the parameter sets."""
        pages = torch.stack(torch.split(codes, self._spec.page_tokens, 1))
        geometry = picture_geometry(self._spec)
        sizes: list[float] = []
        header_bytes = 0
        for group in layer_groups(self._spec):
            planes = pages[:, group.first_layer : group.first_layer + group.layers]
            encoded = encoder.encode(to_canvas(planes, geometry).numpy())
            header_bytes = len(encoded.parameter_sets)
            sizes += [sum(map(len, encoded.pictures)) / group.layers] * group.layers
        return sizes, header_bytes


class Kivi:
    """KIVI-style groups: keys per channel in groups of 32 tokens, values per token in groups of 32 channels.

    Asymmetric, with offset and scale of each group in fp16 (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit
    Quantization for KV Cache", arXiv 2402.02750). KIVI also keeps the latest tokens in full precision; here every token
    of the prefix is coded.
    """

    _GROUP = 32

    def __init__(self, bits: int) -> None:
        """With codes of ``bits`` bits."""
        self.name = f"kivi@{bits}"
        self._bits = bits

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        restored: KV = {}
        scales: dict[Side, int] = {}
        sizes: dict[Side, int] = {}
        for side, tensor in kv.items():
            along = 1 if side is Side.KEY else 2
            wide = tensor.float().flatten(2)
            parts = [_minmax(part, along, 2**self._bits - 1)[1] for part in torch.split(wide, self._GROUP, along)]
            restored[side] = torch.cat(parts, along).to(tensor.dtype).reshape(tensor.shape)
            groups = len(parts) * wide.numel() // wide.shape[along]
            scales[side] = 2 * _HALF_BYTES * groups
            sizes[side] = -(-tensor.numel() * self._bits // 8) + scales[side]
        return MethodResult(restored, sum(sizes.values()), sum(scales.values()), even_bits(kv, sizes))


def _minmax(wide: torch.Tensor, along: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to ``levels`` between the extremes along a dimension, and what they restore to; fp16 offset and step."""
    low = wide.amin(along, keepdim=True).half().float()
    step = ((wide.amax(along, keepdim=True) - low) / levels).half().float()
    codes = ((wide - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, levels)
    return codes, low + codes * step


def make_untouched(context: MethodContext, parameter: str) -> Untouched:
    """``bf16``."""
    refuse_parameter("bf16", parameter)
    return Untouched()


def make_fp8(context: MethodContext, parameter: str) -> Fp8:
    """``fp8``."""
    refuse_parameter("fp8", parameter)
    return Fp8(scaled=False)


def make_fp8_scaled(context: MethodContext, parameter: str) -> Fp8:
    """``fp8-scaled``."""
    refuse_parameter("fp8-scaled", parameter)
    return Fp8(scaled=True)


def make_int8(context: MethodContext, parameter: str) -> MinMax8:
    """``int8``."""
    refuse_parameter("int8", parameter)
    return MinMax8(context.spec, None)


def make_int8_x265(context: MethodContext, parameter: str) -> MinMax8:
    """``int8-x265``."""
    refuse_parameter("int8-x265", parameter)
    return MinMax8(context.spec, open_encoder("software"))


def make_kivi(context: MethodContext, parameter: str) -> Kivi:
    """``kivi``, or ``kivi@BITS`` for another size than 4."""
    if parameter not in {"", "2", "3", "4", "8"}:
        raise ConfigurationError(f"kivi@{parameter} is no method; kivi@2, @3, @4 and @8 are")
    return Kivi(int(parameter or 4))
