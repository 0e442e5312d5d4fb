"""Small values of the host on the device, without a wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT_BYTES = 16
"""Triton compiles anew for a pointer with another."""
Pieces = npt.NDArray[Any] | Sequence[bytes]
"""An array, or byte strings that come one behind the other."""


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values on ``device``, copied in the order of the current stream; on a GPU the host does not wait.

    The copy goes through pinned memory, which torch's allocator of pinned memory gives to nobody else before the copy
    has ended. From pageable memory the call would wait for all that is queued on the stream.
    """
    if device.type != "cuda" or values.device.type != "cpu" or not values.numel():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def upload_together(parts: Mapping[str, Pieces], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays on ``device`` by the names given to them, in one copy; see :func:`upload`.

    Each costs the host one copy into pinned memory and no more: what is unpacked for a kernel, the kernel unpacks.

    Returns:
        Tensors with the arrays' types and shapes; byte strings as uint8 in one dimension. They share memory.
    """
    sizes = [part.nbytes if isinstance(part, np.ndarray) else sum(map(len, part)) for part in parts.values()]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes)]).tolist()
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staged.numpy()
    for part, start in zip(parts.values(), starts, strict=False):
        for piece in [part] if isinstance(part, np.ndarray) else part:
            size = piece.nbytes if isinstance(piece, np.ndarray) else len(piece)
            bytes_ = np.ascontiguousarray(piece).reshape(-1).view(np.uint8) if isinstance(piece, np.ndarray) else None
            host[start : start + size] = np.frombuffer(piece, np.uint8) if bytes_ is None else bytes_
            start += size
    there = staged.to(device, non_blocking=True)
    result = {}
    for (name, part), start, size in zip(parts.items(), starts, sizes, strict=False):
        found = there[start : start + size]
        if isinstance(part, np.ndarray):
            found = found.view(torch.from_numpy(np.empty(0, part.dtype)).dtype).view(part.shape)
        result[name] = found
    return result
