"""CacheGen's quantisers, with an ideal arithmetic coder behind them.

Two of them: that of the paper (Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast Large Language Model
Serving", SIGCOMM 2024, section 5.2), and that of LMCache, which ships under the name (``cachegen_encoder.py``,
``cachegen_basics.py``). Both code their symbols with a distribution for each channel and layer; here such a coder is
ideal, and its tables cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation.entropy import channel_entropy_bits
from sglang_kvcodec.evaluation.methods import KV, LayerBits, MethodContext, MethodResult
from sglang_kvcodec.format.spec import Side

_GROUP_TOKENS = 10
_BINS = (0.5, 1.0, 1.5)
"""Bin sizes of the first, middle and last third of the layers."""
_ANCHOR_LEVELS = 127
_FIRST_LAYERS = {Side.KEY: 10, Side.VALUE: 2}
"""How many layers LMCache gives the finer levels."""
_SCALE_BYTES = 2
_FLOAT_BYTES = 4


class CacheGen:
    """The paper's: a group of ten tokens is its first one in 8 bits, and differences to that.

    Differences are taken to the restored anchor and divided by bins that grow over the thirds of the layers. The paper
    gives the bins as 0.5, 1 and 1.5 without a unit. Taken as multiples of the standard deviation of the layer's
    differences they come to about 2 bits per value, which is what the paper reports (3.5 to 4.3 times smaller than
    8 bits), so that is how they are read here; ``level`` multiplies all three, as the paper's encoding levels do.
    """

    def __init__(self, level: float) -> None:
        """With bins of ``level`` times their default."""
        self.name = f"cachegen@{level:g}"
        self._level = level

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        restored: KV = {}
        bits: LayerBits = {}
        metadata_bytes = 0
        for side, tensor in kv.items():
            values = tensor.float().flatten(2)
            layers, tokens, _ = values.shape
            anchors = values[:, ::_GROUP_TOKENS]
            scale = (anchors.abs().amax(2, keepdim=True) / _ANCHOR_LEVELS).half().float()
            anchor_codes = (anchors / torch.where(scale > 0, scale, 1.0)).round().clamp(-_ANCHOR_LEVELS, _ANCHOR_LEVELS)
            reference = (anchor_codes * scale).repeat_interleave(_GROUP_TOKENS, 1)[:, :tokens]
            is_delta = torch.arange(tokens) % _GROUP_TOKENS > 0
            deltas = (values - reference)[:, is_delta]
            thirds = torch.tensor([_BINS[3 * layer // layers] for layer in range(layers)])
            spread = deltas.std((1, 2)) if deltas.numel() else torch.zeros(layers)
            step = (self._level * thirds * spread)[:, None, None]
            symbols = (deltas / torch.where(step > 0, step, 1.0)).round()
            whole = reference.clone()
            whole[:, is_delta] += symbols * step
            restored[side] = whole.to(tensor.dtype).reshape(tensor.shape)
            # an anchor's channel has too few symbols for a distribution of its own: one per layer
            anchor_bits = channel_entropy_bits(anchor_codes.flatten(1)[:, :, None]) * anchor_codes[0].numel()
            delta_bits = channel_entropy_bits(symbols) * deltas[0].numel()
            layer_metadata_bytes = anchors.shape[1] * _SCALE_BYTES + _FLOAT_BYTES
            metadata_bytes += layers * layer_metadata_bytes
            bits[side] = tuple(((anchor_bits + delta_bits + 8 * layer_metadata_bytes) / values[0].numel()).tolist())
        return _result(kv, restored, bits, metadata_bytes)


class LMCacheCacheGen:
    """LMCache's: each token's channels scaled by their largest, to 32 levels in the first layers and 16 in the others.

    No differences. The first layers are 0 to 9 for keys and 0 to 1 for values, as LMCache has it for models that it
    does not list.
    """

    def __init__(self, level: float) -> None:
        """With ``level`` times as many levels as LMCache has."""
        self.name = f"lmcache-cachegen@{level:g}"
        self._level = level

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        restored: KV = {}
        bits: LayerBits = {}
        metadata_bytes = 0
        for side, tensor in kv.items():
            values = tensor.float().flatten(2)
            layers, tokens, _ = values.shape
            first = torch.arange(layers) < _FIRST_LAYERS[side]
            levels = torch.where(first, 32 // 2 - 1, 16 // 2 - 1)[:, None, None] * self._level
            largest = values.abs().amax(2, keepdim=True)
            symbols = (values * (levels / torch.where(largest > 0, largest, 1.0))).round()
            restored[side] = (symbols / levels * largest).to(tensor.dtype).reshape(tensor.shape)
            metadata_bytes += layers * tokens * _SCALE_BYTES
            scale_bits = 8 * tokens * _SCALE_BYTES / values[0].numel()
            bits[side] = tuple((channel_entropy_bits(symbols) + scale_bits).tolist())
        return _result(kv, restored, bits, metadata_bytes)


def _result(kv: Mapping[Side, torch.Tensor], restored: KV, bits: LayerBits, metadata_bytes: int) -> MethodResult:
    coded_bits = sum(bit * kv[side][0].numel() for side in kv for bit in bits[side])
    return MethodResult(restored, round(coded_bits / 8), metadata_bytes, bits, bits)


def make_cachegen(context: MethodContext, parameter: str) -> CacheGen:
    """``cachegen``, or ``cachegen@LEVEL``: bins of LEVEL times their default."""
    return CacheGen(_factor("cachegen", parameter))


def make_lmcache_cachegen(context: MethodContext, parameter: str) -> LMCacheCacheGen:
    """``lmcache-cachegen``, or ``lmcache-cachegen@LEVEL``: LEVEL times as many levels, so finer above 1."""
    return LMCacheCacheGen(_factor("lmcache-cachegen", parameter))


def _factor(name: str, parameter: str) -> float:
    try:
        factor = float(parameter or 1)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 100:
        raise ConfigurationError(f"{name}@{parameter} is no method; write a factor of its bins, such as {name}@0.5")
    return factor
