"""The interface of a restore kernel: packed sides straight into the slots of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from sglang_kvcodec.format.spec import LayerGroup, Side
from sglang_kvcodec.transform import PackedSide

if TYPE_CHECKING:
    # Needs Triton.
    from sglang_kvcodec.kernels.planes import Planes


class KernelRestore(Protocol):
    """Restores pages of one ``KVSpec`` under one profile, bit for bit what ``Transform.restore`` gives. Thread-safe."""

    def restore(
        self,
        packed: Sequence[PackedSide],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        planes: Planes | None = None,
    ) -> None:
        """Writes one side of one layer group of many pages to its slots, and nowhere else.

        What it starts runs on the current stream of the buffers' device and may not have ended on return. Nothing is
        written if it raises.

        Args:
            packed: one per page, one at least; the canvases on any device.
            slots: int64 ``(pages * page_tokens,)`` on the buffers' device, no slot twice.
            buffers: the pool's tensors ``(slots, kv_heads, head_dim)`` of the group's layers, in order. A slot's values
                must lie side by side.
            planes: where the pictures lie, if the sides have no canvas.

        Raises:
            FormatError: packed sides that do not fit the spec.
            ValueError: slots, buffers or planes that do not fit; the caller's mistake.
        """
        ...


class PageRestore(Protocol):
    """The same for pages of any coding, calibrated or not: what ``PageTransform`` is to ``Transform``. Thread-safe."""

    def restore(
        self,
        group: LayerGroup,
        side: Side,
        packed: Sequence[PackedSide],
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        planes: Planes | None = None,
    ) -> None:
        """Writes one side of one layer group of many pages to its slots, and nowhere else.

        Args:
            group: which layers.
            side: which tensor of them.
            packed: see :meth:`KernelRestore.restore`.
            first_positions: of each page's first token; only calibrated tiers use it.
            slots: see there.
            buffers: see there; for calibrated tiers with one stride.
            planes: see there.

        Raises:
            FormatError: packed sides that do not fit the spec.
            ValueError: what does not fit otherwise; the caller's mistake.
        """
        ...


class PagePack(Protocol):
    """Packs pages where they lie in the pool, as ``PageTransform.pack`` packs values. Thread-safe."""

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvases, of a profile with pictures."""
        ...

    def pack(
        self,
        group: LayerGroup,
        side: Side,
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        canvases: torch.Tensor | None = None,
    ) -> list[PackedSide] | None:
        """Packs one side of one layer group of many pages; only reads the slots.

        What it starts runs on the current stream of the buffers' device, after what was put there before, and has
        ended on return.

        Args:
            group: which layers.
            side: which tensor of them.
            first_positions: of each page's first token; only calibrated tiers use it.
            slots: int64 ``(pages * page_tokens,)`` on the buffers' device.
            buffers: the pool's tensors ``(slots, kv_heads, head_dim)`` of the group's layers, in order, with one
                stride. A slot's values must lie side by side.
            canvases: where the pictures are left: uint8 ``(pages, *canvas_shape)``, contiguous, on the buffers'
                device or in host memory, best pinned; None for new ones on the device.

        Returns:
            The packed sides, their canvases part of ``canvases``; or None if there is a page that the coding can't
            code, and then the canvases hold nothing of use.

        Raises:
            ValueError: slots, buffers or canvases that do not fit; the caller's mistake.
        """
        ...
