"""The values of a layer group that its canvas can't hold, exact.

Bytes, little-endian: ``u32 count`` of each layer; then of each layer its positions, ``u32`` within the layer, strictly
rising; then of each layer the bits of its values in the same order. A layer whose count is all of its values has no
positions. A group without any escape has no bytes at all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVDtype

POSITION_BYTES = 4


def widen_where_dense(escaped: torch.Tensor, dtype: KVDtype) -> torch.Tensor:
    """Escapes all of a layer where listing positions would take more bytes than that.

    Args:
        escaped: bool ``(..., layer_values)``.
        dtype: of the values.
    """
    count = escaped.sum(-1, keepdim=True)
    whole = count * (POSITION_BYTES + dtype.item_bytes) > escaped.shape[-1] * dtype.item_bytes
    return escaped | whole


def pack_escapes(bits: torch.Tensor, escaped: torch.Tensor) -> bytes:
    """The escapes of one layer group.

    Args:
        bits: integer ``(layers, layer_values)``, the bits of the values.
        escaped: bool of the same shape.
    """
    counts = escaped.sum(-1)
    if not bool(counts.any()):
        return b""
    has_positions = (counts != escaped.shape[-1])[:, None]
    positions = (escaped & has_positions).nonzero()[:, 1]
    values = bits[escaped].cpu().numpy()
    return b"".join(
        [
            counts.cpu().numpy().astype("<u4").tobytes(),
            positions.cpu().numpy().astype("<u4").tobytes(),
            values.astype(values.dtype.newbyteorder("<")).tobytes(),
        ]
    )


def unpack_escapes(
    data: bytes, layers: int, layer_values: int, dtype: KVDtype
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16] | npt.NDArray[np.uint8]]:
    """The inverse of :func:`pack_escapes`.

    Returns:
        Positions within the layer group, all below ``layers * layer_values``, and the bits for each.

    Raises:
        FormatError: not such bytes.
    """
    head = layers * POSITION_BYTES
    if len(data) < head:
        raise FormatError("escapes without their counts")
    counts = np.frombuffer(data, "<u4", layers).astype(np.int64)
    if (counts > layer_values).any() or not counts.any():
        raise FormatError("an impossible count of escapes")
    listed = np.where(counts == layer_values, 0, counts)
    values_at = head + int(listed.sum()) * POSITION_BYTES
    if len(data) != values_at + int(counts.sum()) * dtype.item_bytes:
        raise FormatError(f"escapes of {len(data)} bytes do not match their counts")
    positions = np.frombuffer(data, "<u4", int(listed.sum()), head).astype(np.int64)
    if (positions >= layer_values).any():
        raise FormatError("an escape outside its layer")
    bounds = np.cumsum(listed)[:-1]
    flat = [
        layer * layer_values + (np.arange(layer_values) if counts[layer] == layer_values else inside)
        for layer, inside in enumerate(np.split(positions, bounds))
    ]
    where = np.concatenate(flat)
    if (np.diff(where) <= 0).any():
        raise FormatError("escapes out of order")
    if dtype.item_bytes == 1:
        return where, np.frombuffer(data, np.uint8, offset=values_at).copy()
    return where, np.frombuffer(data, "<i2", offset=values_at).astype(np.int16)
