"""Values as the integers that hold their bits, and those bits as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVDtype

_INT_TYPES = {1: torch.uint8, 2: torch.int16}


def torch_dtype(dtype: KVDtype) -> torch.dtype:
    """The torch type of a pool."""
    return getattr(torch, dtype.torch_name)  # type: ignore[no-any-return]


def to_bits(values: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 or int16, contiguous."""
    return values.contiguous().view(_INT_TYPES[values.element_size()])


def from_bits(bits: torch.Tensor, dtype: KVDtype) -> torch.Tensor:
    """The inverse of :func:`to_bits`."""
    return bits.contiguous().view(torch_dtype(dtype))


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The little-endian bytes of an integer tensor."""
    array = tensor.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def stack_bytes(rows: Sequence[bytes], row_bytes: int) -> torch.Tensor:
    """Byte strings of ``row_bytes`` each as uint8 ``(len(rows), row_bytes)``.

    Raises:
        FormatError: one of another length.
    """
    for row in rows:
        if len(row) != row_bytes:
            raise FormatError(f"expected {row_bytes} stored bytes, got {len(row)}")
    joined = bytearray(b"".join(rows))
    return torch.from_numpy(np.frombuffer(joined, np.uint8)).reshape(len(rows), row_bytes)
