"""Where a kernel leaves what it makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def device_canvases(
    canvases: torch.Tensor | None, pages: int, canvas_shape: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks where pictures are wanted, and says where to write them.

    Pictures for the host are made on the device and copied from there in one piece: a kernel writes a canvas in pieces
    of four bytes, which would be transactions of 32 on the bus each.

    Args:
        canvases: given by the caller; None for new ones on the device.
        pages: how many.
        canvas_shape: of each.
        device: of the kernel.

    Returns:
        The canvases, and those to write: the same, or others on the device if they are in host memory.

    Raises:
        ValueError: canvases of another shape, type or device, or with gaps; the caller's mistake.
    """
    shape = (pages, *canvas_shape)
    if canvases is None:
        canvases = torch.empty(shape, dtype=torch.uint8, device=device)
    if canvases.dtype != torch.uint8 or tuple(canvases.shape) != shape or not canvases.is_contiguous():
        raise ValueError(f"expected contiguous uint8 canvases {shape}, got {canvases.dtype} {tuple(canvases.shape)}")
    if canvases.device == device:
        return canvases, canvases
    if canvases.device.type != "cpu":
        raise ValueError(f"canvases on {canvases.device}, the pool on {device}")
    return canvases, torch.empty(shape, dtype=torch.uint8, device=device)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one device in host memory, after one wait for the current stream and all that was put there before.

    They pass through pinned memory, which torch keeps and uses again: as much as one call needs, for each thread.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return copies
