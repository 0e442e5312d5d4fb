"""The interface of a transform: the KV of one side of one layer group to canvas and side bytes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class PackedSide:
    """One side of one layer group of one page, packed.

    Attributes:
        canvas: uint8 ``(height * 3 // 2, width)``, or None for a profile without pictures.
        stored: bytes that are kept as they are.
        escapes: positions and exact values of what the canvas can't hold.
        steps: quantiser step of each layer of the group, empty for a profile that does not quantise.
    """

    canvas: torch.Tensor | None = None
    stored: bytes = b""
    escapes: bytes = b""
    steps: tuple[float, ...] = ()


class Transform(Protocol):
    """Packs and restores pages of one ``KVSpec`` under one profile. Stateless, thread-safe, the format's reference."""

    def pack(self, values: torch.Tensor) -> list[PackedSide]:
        """Packs one side of one layer group of many pages.

        Args:
            values: ``(pages, layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype, ``layers`` at most
                ``layers_per_picture``.
        """
        ...

    def restore(self, layers: int, packed: Sequence[PackedSide]) -> torch.Tensor:
        """The inverse of :meth:`pack`: ``(pages, layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype.

        Raises:
            FormatError: side bytes that do not fit the spec. Never writes or reads outside its own tensors.
        """
        ...
