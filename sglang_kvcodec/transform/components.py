"""Where the components of a transform lie on an NV12 canvas: an order of the canvas's bytes that suits HEVC.

Values go onto the canvas component after component, in falling order of variance, each with all its tokens. The order
of the bytes follows what HEVC's coder of residuals does (ITU-T H.265, 7.3.8.11 and 9.3.4.2): it codes groups of 4 x 4
samples, starts its Golomb-Rice parameter anew in each, and shares nearly all adaptive contexts between the groups of a
transform block. So a group should hold one variance, and the variance should change slowly from group to group:

1. **Luma, then chroma.** Luma is cut into blocks of 32 x 32 in raster order, the largest transform block. Chroma is
   cut into blocks of 16 x 16, which belong to the same coding units: U, then V, block by block. Chroma has contexts of
   its own, fewer than luma, so it takes the components of low variance.
2. **In a block**, groups of 4 x 4 by rising ``x + y``, within a diagonal from the lower left up; in a group, raster.
3. **Guards come last.** A block at the picture's upper or left edge has no neighbours on that side, and HEVC replaces
   them all by a single sample: the upper right corner of the block to its left, or the lower left corner of the block
   above (8.4.4.2.2). A value there would be predicted into all of the block. So these corner groups get the components
   of lowest variance, which are nearly always zero; a byte that holds zero is 128, like one that holds nothing.

The order does not depend on how many components there are, so one with fewer fills a prefix of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import ComponentGeometry
from sglang_kvcodec.transform.layout import CANVAS_FILL

_LUMA_BLOCK, _CHROMA_BLOCK = 32, 16
_GROUP = 4
_Indices = npt.NDArray[np.int64]


def component_layout(geometry: ComponentGeometry) -> torch.Tensor:
    """Where each value lies.

    Returns:
        int64 ``(components, page_tokens)``: index into the flat canvas ``(height * 3 // 2 * width)``. No two are equal.
    """
    order = torch.from_numpy(_canvas_order(geometry.width, geometry.height))
    values = geometry.components * geometry.page_tokens
    return order[:values].reshape(geometry.components, geometry.page_tokens)


def components_to_canvas(codes: torch.Tensor, geometry: ComponentGeometry, layout: torch.Tensor) -> torch.Tensor:
    """Lays 8-bit codes out on canvases.

    Args:
        codes: uint8 ``(pages, page_tokens, components)``; fewer components than the geometry's are the first ones.
        geometry: the canvas.
        layout: of :func:`component_layout`, on the device of ``codes``.

    Returns:
        uint8 ``(pages, height * 3 // 2, width)``, contiguous. What is left over holds 128.
    """
    pages, _, components = codes.shape
    canvases = codes.new_full((pages, geometry.picture_bytes), CANVAS_FILL)
    canvases[:, layout[:components].flatten()] = codes.transpose(1, 2).flatten(1)
    return canvases.reshape(pages, *geometry.canvas_shape)


def components_from_canvas(
    canvases: torch.Tensor, geometry: ComponentGeometry, layout: torch.Tensor, components: int
) -> torch.Tensor:
    """The inverse of :func:`components_to_canvas`.

    Args:
        canvases: uint8 ``(pages, height * 3 // 2, width)``.
        geometry: the canvas.
        layout: of :func:`component_layout`, on the device of ``canvases``.
        components: how many lie on each canvas, at most the geometry's.

    Returns:
        uint8 ``(pages, page_tokens, components)``.

    Raises:
        FormatError: canvases of another shape or type, or more components than the geometry has.
    """
    if canvases.dtype != torch.uint8 or tuple(canvases.shape[1:]) != geometry.canvas_shape:
        raise FormatError(f"expected uint8 canvases of {geometry.canvas_shape}, got {canvases.dtype} {canvases.shape}")
    if not 0 <= components <= geometry.components:
        raise FormatError(f"{components} components on a canvas of {geometry.components}")
    flat = canvases.flatten(1)[:, layout[:components].flatten()]
    return flat.reshape(len(canvases), components, geometry.page_tokens).transpose(1, 2)


def _canvas_order(width: int, height: int) -> _Indices:
    """All bytes of a canvas ``(height * 3 // 2, width)`` in the order of the module: a permutation of its indices."""
    luma_y, luma_x, luma_guard = _plane_order(width, height, _LUMA_BLOCK)
    luma = luma_y * width + luma_x
    chroma_y, chroma_x, chroma_guard = _plane_order(width // 2, height // 2, _CHROMA_BLOCK)
    u = (height + chroma_y) * width + 2 * chroma_x
    # Both planes of a block together: (blocks, 2, groups, samples).
    chroma = np.stack([u, u + 1], axis=1)
    chroma_is_guard = np.stack([chroma_guard, chroma_guard], axis=1)
    return np.concatenate(
        [
            luma[~luma_guard].ravel(),
            chroma[~chroma_is_guard].ravel(),
            luma[luma_guard].ravel(),
            chroma[chroma_is_guard].ravel(),
        ]
    )


def _plane_order(width: int, height: int, block: int) -> tuple[_Indices, _Indices, npt.NDArray[np.bool_]]:
    """The samples of one plane, cut into blocks and groups.

    Returns:
        Rows and columns ``(blocks, groups, 16)``, and which groups are guards, bool ``(blocks, groups)``.
    """
    across = block // _GROUP
    rows, columns = np.divmod(np.arange(across * across), across)
    diagonal = np.lexsort((-rows, rows + columns))
    group_y, group_x = rows[diagonal], columns[diagonal]
    block_y, block_x = np.divmod(np.arange((height // block) * (width // block)), width // block)
    sample_y, sample_x = np.divmod(np.arange(_GROUP * _GROUP), _GROUP)
    y = block_y[:, None, None] * block + group_y[:, None] * _GROUP + sample_y
    x = block_x[:, None, None] * block + group_x[:, None] * _GROUP + sample_x
    upper_right = (group_y == 0) & (group_x == across - 1)
    lower_left = (group_y == across - 1) & (group_x == 0)
    guard = (block_y == 0)[:, None] & upper_right | (block_x == 0)[:, None] & lower_left
    return y, x, guard
