"""What every transform checks of its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVSpec, picture_geometry
from sglang_kvcodec.transform.base import PackedSide
from sglang_kvcodec.transform.floats import torch_dtype


def check_values(values: torch.Tensor, spec: KVSpec) -> None:
    """Refuses values that are not ``(pages, layers, page_tokens, kv_heads, head_dim)`` of ``spec``.

    Raises:
        ValueError: another shape or type; the caller's mistake.
    """
    expected = (spec.page_tokens, spec.kv_heads, spec.head_dim)
    most_layers = picture_geometry(spec).layers_per_picture
    if values.dim() != 5 or tuple(values.shape[2:]) != expected or not 1 <= values.shape[1] <= most_layers:
        raise ValueError(f"expected values (pages, up to {most_layers} layers, *{expected}), got {values.shape}")
    if values.dtype != torch_dtype(spec.dtype):
        raise ValueError(f"expected {spec.dtype.torch_name} values, got {values.dtype}")


def check_fields(
    packed: PackedSide, *, canvas: bool = False, stored: bool = False, escapes: bool = False, steps: int = 0
) -> None:
    """Refuses a packed side with other fields than its profile has: what is needed, and nothing else.

    Raises:
        FormatError: a field too many or too few; ``escapes`` may be empty.
    """
    if (packed.canvas is not None) != canvas or bool(packed.stored) != stored:
        raise FormatError("a side without the parts of its profile")
    if (packed.escapes and not escapes) or len(packed.steps) != steps:
        raise FormatError("a side with parts or steps that its profile does not have")


def stack_canvases(packed: Sequence[PackedSide]) -> torch.Tensor:
    """The canvases of sides that all have one: uint8 ``(pages, height * 3 // 2, width)``."""
    return torch.stack([side.canvas for side in packed if side.canvas is not None])
