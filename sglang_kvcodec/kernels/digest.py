"""The plane digest of ``format/digest.py`` on a GPU: decoded pictures are checked where they lie, against page objects.

The digest is a sum modulo ``2**64`` over words, each with a multiplier that depends on its place alone. So programs sum
parts in any order, and add them up with atomic additions of 64 bits, which wrap around as the digest does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from sglang_kvcodec.kernels.planes import Planes, plane_addresses
from sglang_kvcodec.kernels.upload import upload

_BLOCK_WORDS = 1024


@triton.jit
def _splitmix64(index: tl.tensor) -> tl.tensor:
    """``plane_multipliers`` of words ``index``, uint64."""
    z = (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) | 1


@triton.jit
def _add_digest(
    luma: tl.tensor,
    chroma: tl.tensor,
    digests: tl.tensor,
    pitch_bytes: tl.tensor,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    IS_WORD_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    words: tl.constexpr = HEIGHT * 3 // 2 * WIDTH // 4
    picture = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < words
    row = index // (WIDTH // 4)
    rows = plane_addresses(luma, chroma, picture, row, pitch_bytes, HEIGHT)
    at = rows + index % (WIDTH // 4) * 4
    if IS_WORD_ALIGNED:
        word = tl.load(at.to(tl.pointer_type(tl.uint32)), mask=exists, other=0).to(tl.uint64)
    else:
        word = tl.zeros((BLOCK,), tl.uint64)
        for byte in tl.static_range(4):
            word |= tl.load(at + byte, mask=exists, other=0).to(tl.uint64) << (8 * byte)
    terms = tl.where(exists, (word + 1) * _splitmix64(index), 0)
    tl.atomic_add(digests + picture, tl.sum(terms.to(tl.int64, bitcast=True)))


def plane_digests(planes: Planes, width: int, height: int) -> torch.Tensor:
    """The digest of each picture, computed on the planes' device on the current stream.

    Args:
        planes: the pictures.
        width: bytes of a row, a multiple of four.
        height: rows of luma, even.

    Returns:
        int64 ``(pictures,)``: the 64 bits of ``plane_digest``.

    Raises:
        ValueError: planes or a size that can't be; the caller's mistake.
    """
    if width % 4 or height % 2 or width < 1 or height < 1:
        raise ValueError(f"no digest of pictures of {width} x {height}")
    planes.check(len(planes), width, planes.luma.device)
    digests = torch.zeros(len(planes), dtype=torch.int64, device=planes.luma.device)
    if len(planes):
        grid = (triton.cdiv(height * 3 // 2 * width // 4, _BLOCK_WORDS), len(planes))
        with torch.cuda.device_of(digests):  # type: ignore[no-untyped-call]
            _add_digest[grid](
                luma=planes.luma,
                chroma=planes.chroma,
                digests=digests,
                pitch_bytes=planes.pitch_bytes,
                WIDTH=width,
                HEIGHT=height,
                IS_WORD_ALIGNED=planes.is_word_aligned,
                BLOCK=_BLOCK_WORDS,
            )
    return digests


def pictures_differ(planes: Planes, width: int, height: int, expected: Sequence[int]) -> torch.Tensor:
    """Which pictures are not those that page objects promise; reading ``any()`` of it is one transfer for a segment.

    Args:
        planes: the pictures.
        width: see :func:`plane_digests`.
        height: see there.
        expected: the digest of each picture, as page objects hold it.

    Returns:
        bool ``(pictures,)`` on the planes' device.

    Raises:
        ValueError: see :func:`plane_digests`; also another number of digests.
    """
    if len(expected) != len(planes):
        raise ValueError(f"{len(expected)} digests for {len(planes)} pictures")
    wanted = upload(torch.from_numpy(np.array(expected, np.uint64).view(np.int64)), planes.luma.device)
    return plane_digests(planes, width, height) != wanted
