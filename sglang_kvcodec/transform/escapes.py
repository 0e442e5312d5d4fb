"""The values of a layer group that its canvas can't hold, exact.

Bytes, little-endian: ``u32 count`` of each layer; then of each layer its positions, ``u32`` within the layer, strictly
rising; then of each layer the bits of its values in the same order. A layer whose count is all of its values has no
positions. A group without any escape has no bytes at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    if not data:
        raise FormatError("escapes without their counts")
    places = escape_places([data], layers, layer_values, dtype)
    flat = [
        layer * layer_values + (np.arange(count) if at < 0 else np.frombuffer(data, "<u4", count, at).astype(np.int64))
        for layer, (count, at) in enumerate(zip(places.counts[0], places.position_at[0], strict=True))
    ]
    values_at = int(places.value_at[0, 0])
    if dtype.item_bytes == 1:
        return np.concatenate(flat), np.frombuffer(data, np.uint8, offset=values_at).copy()
    return np.concatenate(flat), np.frombuffer(data, "<i2", offset=values_at).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class EscapePlaces:
    """Where the escapes of each page and layer lie in the bytes of all pages, checked.

    Attributes:
        pieces: the bytes, page behind page, each filled up to a multiple of four, so that positions are aligned.
        counts: int32 ``(pages, layers)``, how many there are.
        position_at: int64, same shape, where their positions begin; ``-1`` for a layer that lists none, being whole.
        value_at: int64, same shape, where their values begin.
    """

    pieces: Sequence[bytes]
    counts: npt.NDArray[np.int32]
    position_at: npt.NDArray[np.int64]
    value_at: npt.NDArray[np.int64]


def escape_places(pages: Sequence[bytes], layers: int, layer_values: int, dtype: KVDtype) -> EscapePlaces:
    """Looks through the escapes of many pages without taking them apart.

    Args:
        pages: the bytes of each, none for a page without escapes; only if all are without may there be no counts.
        layers: of the group.
        layer_values: of a layer.
        dtype: of the values.

    Raises:
        FormatError: not such bytes.
    """
    head = layers * POSITION_BYTES
    counts = np.zeros((len(pages), layers), np.int64)
    for index, data in enumerate(pages):
        if data:
            if len(data) < head:
                raise FormatError("escapes without their counts")
            counts[index] = np.frombuffer(data, "<u4", layers)
    sizes = np.array([len(data) for data in pages], np.int64)
    if (counts > layer_values).any() or ((sizes > 0) & ~counts.any(axis=1)).any():
        raise FormatError("an impossible count of escapes")
    listed = np.where(counts == layer_values, 0, counts)
    values_at = np.where(sizes > 0, head, 0) + listed.sum(axis=1) * POSITION_BYTES
    if (sizes != values_at + counts.sum(axis=1) * dtype.item_bytes).any():
        raise FormatError("escapes whose bytes do not match their counts")
    _check_positions(pages, listed, head, layer_values)
    filled = -(-sizes // POSITION_BYTES) * POSITION_BYTES
    starts = (np.cumsum(filled) - filled)[:, None]
    position_at = starts + head + (np.cumsum(listed, axis=1) - listed) * POSITION_BYTES
    value_at = starts + values_at[:, None] + (np.cumsum(counts, axis=1) - counts) * dtype.item_bytes
    pieces = [part for data, fill in zip(pages, (filled - sizes).tolist(), strict=True) for part in (data, bytes(fill))]
    return EscapePlaces(pieces, counts.astype(np.int32), np.where(listed > 0, position_at, -1), value_at)


def _check_positions(pages: Sequence[bytes], listed: npt.NDArray[np.int64], head: int, layer_values: int) -> None:
    """Refuses positions that are not strictly rising within each layer, or outside of it."""
    ends = np.cumsum(listed.ravel())
    positions = np.empty(ends[-1], np.uint32)
    start = 0
    for data, count in zip(pages, listed.sum(axis=1).tolist(), strict=True):
        if count:
            positions[start : start + count] = np.frombuffer(data, "<u4", count, head)
            start += count
    if (positions >= layer_values).any():
        raise FormatError("an escape outside its layer")
    is_rising = positions[1:] > positions[:-1]
    # A layer may begin anywhere.
    borders = ends[(ends > 0) & (ends < len(positions))]
    is_rising[borders - 1] = True
    if not is_rising.all():
        raise FormatError("escapes out of order")
