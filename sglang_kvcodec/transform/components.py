"""Where the components of a layer group lie on its canvas."""

from __future__ import annotations

import torch

from sglang_kvcodec.format.spec import PictureGeometry
from sglang_kvcodec.transform.layout import CANVAS_FILL, from_canvas, to_canvas


def components_to_canvas(codes: torch.Tensor, geometry: PictureGeometry) -> torch.Tensor:
    """Lays components out: the first ``channels`` where a group's first layer would lie, and so on.

    Args:
        codes: uint8 ``(pages, page_tokens, components)``, at most ``layers_per_picture * channels`` components.
        geometry: the canvas.

    Returns:
        uint8 ``(pages, height * 3 // 2, width)``, contiguous.
    """
    pages, tokens, components = codes.shape
    planes = -(-components // geometry.channels)
    padded = torch.nn.functional.pad(codes, (0, planes * geometry.channels - components), value=CANVAS_FILL)
    return to_canvas(padded.reshape(pages, tokens, planes, geometry.channels).transpose(1, 2), geometry)


def components_from_canvas(canvases: torch.Tensor, geometry: PictureGeometry, components: int) -> torch.Tensor:
    """The inverse of :func:`components_to_canvas`: uint8 ``(pages, page_tokens, components)``.

    Raises:
        FormatError: canvases of another shape or type.
    """
    planes = -(-components // geometry.channels)
    return from_canvas(canvases, geometry, planes).transpose(1, 2).flatten(2)[..., :components]
