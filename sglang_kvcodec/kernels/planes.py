"""Where decoded pictures lie: addresses of their planes, so that a kernel reads a decoder's surfaces in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import ComponentGeometry, PictureGeometry
from sglang_kvcodec.kernels.upload import upload
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.checks import stack_canvases


@dataclasses.dataclass(frozen=True)
class Planes:
    """NV12 pictures of one size, anywhere in the memory of one device.

    Attributes:
        luma: int64 ``(pictures,)`` on that device: address of each picture's first row.
        chroma: the same of the first row of its interleaved chroma.
        pitch_bytes: from a row to the next, in both planes.
        owner: keeps the memory; None if the caller sees to that.
        is_word_aligned: whether all rows begin at a multiple of four bytes, as those of decoders do.
    """

    luma: torch.Tensor
    chroma: torch.Tensor
    pitch_bytes: int
    owner: object = None
    is_word_aligned: bool = False

    def __post_init__(self) -> None:
        for plane in (self.luma, self.chroma):
            if plane.dtype != torch.int64 or plane.dim() != 1 or not plane.is_contiguous():
                raise ValueError(f"expected int64 addresses of planes, got {plane.dtype} {tuple(plane.shape)}")
        if len(self.luma) != len(self.chroma) or self.luma.device != self.chroma.device:
            raise ValueError("addresses of luma and chroma that do not belong together")

    def __len__(self) -> int:
        return len(self.luma)

    def check(self, pictures: int, width: int, device: torch.device) -> None:
        """Refuses planes that can't be those of ``pictures`` pictures of ``width`` bytes on ``device``.

        Raises:
            ValueError: another number, device, or a pitch below the width; the caller's mistake.
        """
        if len(self) != pictures or self.luma.device != device or self.pitch_bytes < width:
            raise ValueError(f"expected planes of {pictures} pictures on {device}, at least {width} bytes a row")


def planes_of(canvases: torch.Tensor) -> Planes:
    """The planes of canvases ``(pages, height * 3 // 2, width)`` of uint8, contiguous, where they lie."""
    pages, rows, width = canvases.shape
    luma = canvases.data_ptr() + torch.arange(pages, device=canvases.device) * (rows * width)
    return Planes(luma, luma + rows * 2 // 3 * width, width, canvases, width % 4 == 0 and canvases.data_ptr() % 4 == 0)


def planes_at(
    luma_addresses: npt.NDArray[np.int64],
    chroma_addresses: npt.NDArray[np.int64],
    pitch_bytes: int,
    device: torch.device,
    owner: object = None,
) -> Planes:
    """The planes that a decoder left at these addresses of ``device``.

    Args:
        luma_addresses: int64 ``(pictures,)`` in host memory.
        chroma_addresses: the same.
        pitch_bytes: from a row to the next.
        device: whose memory they lie in.
        owner: see :class:`Planes`.
    """
    count = len(luma_addresses)
    # An even number, so that both begin at a multiple of 16 bytes: Triton compiles anew for another alignment.
    addresses = np.zeros((2, count + count % 2), np.int64)
    addresses[:, :count] = luma_addresses, chroma_addresses
    is_word_aligned = pitch_bytes % 4 == 0 and not (addresses % 4).any()
    luma, chroma = upload(torch.from_numpy(addresses), device)[:, :count]
    return Planes(luma, chroma, pitch_bytes, owner, is_word_aligned)


def planes_to_read(
    packed: Sequence[PackedSide],
    planes: Planes | None,
    geometry: PictureGeometry | ComponentGeometry,
    device: torch.device,
) -> Planes:
    """The planes given, checked; or those of the sides' canvases, copied to the device.

    Raises:
        FormatError: canvases of another shape or type.
        ValueError: planes of other pictures; the caller's mistake.
    """
    if planes is None:
        canvases = stack_canvases(packed)
        if canvases.dtype != torch.uint8 or tuple(canvases.shape[1:]) != geometry.canvas_shape:
            raise FormatError(
                f"expected uint8 canvases of {geometry.canvas_shape}, got {canvases.dtype} {canvases.shape}"
            )
        planes = planes_of(upload(canvases, device))
    planes.check(len(packed), geometry.width, device)
    return planes


@triton.jit
def plane_addresses(
    luma: tl.tensor, chroma: tl.tensor, picture: tl.tensor, row: tl.tensor, pitch_bytes: tl.tensor, HEIGHT: tl.constexpr
) -> tl.tensor:
    """Pointers to the first byte of each canvas row ``row``: luma up to ``HEIGHT``, chroma from there on."""
    is_luma = row < HEIGHT
    first = tl.where(is_luma, tl.load(luma + picture), tl.load(chroma + picture))
    inside = tl.where(is_luma, row, row - HEIGHT)
    return (first + inside.to(tl.int64) * pitch_bytes).to(tl.pointer_type(tl.uint8))
