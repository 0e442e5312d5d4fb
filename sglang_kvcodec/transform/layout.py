"""Where the values of a layer lie on an NV12 canvas: the one implementation of what ``PictureGeometry`` documents."""

from __future__ import annotations

import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import PictureGeometry

CANVAS_FILL = 128
"""What every byte of a canvas holds that no value lies on."""


def to_canvas(planes: torch.Tensor, geometry: PictureGeometry) -> torch.Tensor:
    """Lays 8-bit values out on canvases.

    Args:
        planes: uint8 ``(pages, layers, page_tokens, channels)``, ``layers`` at most ``layers_per_picture``.
        geometry: the canvas.

    Returns:
        uint8 ``(pages, height * 3 // 2, width)``, contiguous, on the device of ``planes``.
    """
    pages, layers, tokens, channels = planes.shape
    folded = planes.new_full((pages, layers, tokens, geometry.folds * geometry.width), CANVAS_FILL)
    folded[..., :channels] = planes
    rows = folded.reshape(pages, layers, tokens, geometry.folds, geometry.width).transpose(2, 3).flatten(2, 3)
    canvases = planes.new_full((pages, *geometry.canvas_shape), CANVAS_FILL)
    for layer in range(layers):
        start = geometry.layer_row_start(layer)
        canvases[:, start : start + geometry.layer_rows] = rows[:, layer]
    return canvases


def check_canvases(canvases: torch.Tensor, geometry: PictureGeometry) -> None:
    """Refuses what is not uint8 ``(pages, height * 3 // 2, width)``.

    Raises:
        FormatError: canvases of another shape or type.
    """
    if canvases.dtype != torch.uint8 or tuple(canvases.shape[1:]) != geometry.canvas_shape:
        raise FormatError(f"expected uint8 canvases of {geometry.canvas_shape}, got {canvases.dtype} {canvases.shape}")


def from_canvas(canvases: torch.Tensor, geometry: PictureGeometry, layers: int) -> torch.Tensor:
    """The inverse of :func:`to_canvas`.

    Args:
        canvases: uint8 ``(pages, height * 3 // 2, width)``.
        geometry: the canvas.
        layers: how many layers lie on each canvas.

    Returns:
        uint8 ``(pages, layers, page_tokens, channels)``.

    Raises:
        FormatError: canvases of another shape or type.
    """
    check_canvases(canvases, geometry)
    starts = [geometry.layer_row_start(layer) for layer in range(layers)]
    rows = torch.stack([canvases[:, start : start + geometry.layer_rows] for start in starts], dim=1)
    folded = rows.reshape(-1, layers, geometry.folds, geometry.page_tokens, geometry.width).transpose(2, 3)
    return folded.flatten(3, 4)[..., : geometry.channels]
