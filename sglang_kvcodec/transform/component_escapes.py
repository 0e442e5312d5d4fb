"""Components of a page that its canvas can't hold: the whole numbers that would have lain there.

Bytes, little-endian: ``u32`` positions ``token * components + component``, strictly rising; then ``i32`` numbers in the
same order. A side without any has no bytes at all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sglang_kvcodec.errors import FormatError

_ENTRY_BYTES = 8
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
    entries, rest = divmod(len(data), _ENTRY_BYTES)
    if rest or not 1 <= entries <= count:
        raise FormatError(f"{len(data)} bytes of escapes for {count} components")
    where = np.frombuffer(data, "<u4", entries).astype(np.int64)
    numbers = np.frombuffer(data, "<i4", entries, 4 * entries).astype(np.int32)
    if where[-1] >= count or (np.diff(where) <= 0).any():
        raise FormatError("escapes out of order or outside their page")
    if (numbers > LARGEST_ESCAPE).any() or (numbers < -LARGEST_ESCAPE).any():
        raise FormatError("an escape that no page has")
    return where, numbers
