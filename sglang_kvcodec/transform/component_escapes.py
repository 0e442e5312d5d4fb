"""Components of a page that its canvas can't hold: the whole numbers that would have lain there.

Bytes, little-endian: ``u32`` positions ``token * components + component``, strictly rising; then ``i32`` numbers in the
same order. A side without any has no bytes at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sglang_kvcodec.errors import FormatError

ESCAPE_BYTES = 8
LARGEST_ESCAPE = (1 << 24) - 1
"""No component is larger: fp32 holds whole numbers exactly up to here."""


def pack_component_escapes(codes: torch.Tensor, escaped: torch.Tensor) -> bytes:
    """The escapes of one page.

    Args:
        codes: int32 ``(page_tokens, components)``.
        escaped: bool of the same shape.
    """
    where = escaped.reshape(-1).nonzero()[:, 0]
    values = codes.reshape(-1)[where]
    return where.cpu().numpy().astype("<u4").tobytes() + values.cpu().numpy().astype("<i4").tobytes()


def unpack_component_escapes(data: bytes, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The inverse of :func:`pack_component_escapes`.

    Args:
        data: its bytes.
        count: components of the page.

    Returns:
        Positions below ``count``, strictly rising, and the number for each.

    Raises:
        FormatError: not such bytes.
    """
    if not data:
        raise FormatError("escapes without any")
    where, numbers, _ = escape_arrays([data], count)
    return where.astype(np.int64), numbers


def escape_arrays(
    pages: Sequence[bytes], count: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The escapes of many pages, one page behind the other.

    Args:
        pages: the bytes of each, none for a page without escapes.
        count: components of a page.

    Returns:
        Positions in their page, below ``count`` and strictly rising; the number for each; and ``(pages + 1,)`` the
        first of each page, and the end.

    Raises:
        FormatError: not such bytes.
    """
    sizes = np.array([len(data) for data in pages], np.int64)
    entries, rest = np.divmod(sizes, ESCAPE_BYTES)
    if rest.any() or (entries > count).any():
        raise FormatError(f"{sizes[rest.astype(bool) | (entries > count)][0]} bytes of escapes for {count} components")
    first = np.concatenate([[0], np.cumsum(entries)])
    where, numbers = np.empty(first[-1], np.uint32), np.empty(first[-1], np.int32)
    for data, start, number in zip(pages, first.tolist(), entries.tolist(), strict=False):
        if number:
            where[start : start + number] = np.frombuffer(data, "<u4", number)
            numbers[start : start + number] = np.frombuffer(data, "<i4", number, 4 * number)
    is_rising = where[1:] > where[:-1]
    borders = first[1:-1]
    # A page may begin anywhere.
    is_rising[borders[(borders > 0) & (borders < len(where))] - 1] = True
    if not is_rising.all() or (where >= count).any():
        raise FormatError("escapes out of order or outside their page")
    if (numbers > LARGEST_ESCAPE).any() or (numbers < -LARGEST_ESCAPE).any():
        raise FormatError("an escape that no page has")
    return where, numbers, first.astype(np.int32)
