"""The interface of a way to code KV, as the harness sees it: KV in, KV out, and how many bytes it would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.spec import KVSpec, Side

KV = dict[Side, torch.Tensor]
"""Per side ``(layers, tokens, kv_heads, head_dim)`` in the pool's dtype, on the host."""
LayerBits = dict[Side, tuple[float, ...]]
"""Bits per value, for each side one figure per layer."""


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What became of some KV.

    Attributes:
        kv: as it comes back, like what went in.
        coded_bytes: all that would have to be stored or sent for it.
        metadata_bytes: those of them that are no coded values: scales, steps, manifests, parameter sets.
        bits: what each layer's bytes come to, scales and steps included. What belongs to no layer, as a manifest does,
            is left out; what codes several layers at once is shared out evenly.
        ideal_bits: what an ideal entropy coder, which knows each channel's distribution, would need for the same
            symbols, with everything that isn't entropy coded at its size; None where there are no symbols.
    """

    kv: KV
    coded_bytes: int
    metadata_bytes: int
    bits: LayerBits
    ideal_bits: LayerBits | None = None


class Method(Protocol):
    """Codes KV of one model. For one thread at a time."""

    name: str

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """Codes whole pages and restores them.

        Args:
            kv: per side ``(layers, tokens, kv_heads, head_dim)``, ``tokens`` a multiple of the spec's page; keys after
                RoPE. Left as it is.
            first_position: position of the first token, a multiple of the page.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MethodContext:
    """What a method is made for.

    Attributes:
        spec: of the pages it will get.
        config: configuration of the model's text decoder.
        calibrations: of the model, one of each rank; empty for none.
    """

    spec: KVSpec
    config: Mapping[str, Any]
    calibrations: tuple[Calibration, ...] = ()


MethodFactory = Callable[[MethodContext, str], Method]
"""Makes a method; the string is what stands behind ``@`` in its name, or empty.

Raises ConfigurationError or UnsupportedError where it can't."""


def even_bits(kv: Mapping[Side, torch.Tensor], side_bytes: Mapping[Side, int]) -> LayerBits:
    """Bits per value where a side's bytes are of all its layers alike."""
    return {side: (8 * side_bytes[side] / kv[side].numel(),) * kv[side].shape[0] for side in kv}


def refuse_parameter(name: str, parameter: str) -> None:
    """For methods that have none.

    Raises:
        ConfigurationError: one was given.
    """
    if parameter:
        raise ConfigurationError(f"method {name!r} takes no parameter, and {parameter!r} was given")
