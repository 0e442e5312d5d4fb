"""The interface of a restore kernel: packed sides straight into the slots of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_kvcodec.transform import PackedSide


class KernelRestore(Protocol):
    """Restores pages of one ``KVSpec`` under one profile, bit for bit what ``Transform.restore`` gives. Thread-safe."""

    def restore(self, packed: Sequence[PackedSide], slots: torch.Tensor, buffers: Sequence[torch.Tensor]) -> None:
        """Writes one side of one layer group of many pages to its slots, and nowhere else.

        What it starts runs on the current stream of the buffers' device and may not have ended on return. Nothing is
        written if it raises.

        Args:
            packed: one per page, one at least; the canvases on any device.
            slots: int64 ``(pages * page_tokens,)`` on the buffers' device, no slot twice.
            buffers: the pool's tensors ``(slots, kv_heads, head_dim)`` of the group's layers, in order. A slot's values
                must lie side by side.

        Raises:
            FormatError: packed sides that do not fit the spec.
            ValueError: slots or buffers that do not fit; the caller's mistake.
        """
        ...
