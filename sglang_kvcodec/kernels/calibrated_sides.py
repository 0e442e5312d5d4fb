"""What lies beside the pictures of calibrated pages, checked, as arrays that go to the device as they are.

The kernels unpack it. Here only those escapes are taken apart that a code of the product can't hold (``basis.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.kernels.basis import GroupBasis
from sglang_kvcodec.kernels.upload import Pieces
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.transform.checks import check_fields
from sglang_kvcodec.transform.component_escapes import escape_arrays

_Ints = npt.NDArray[Any]


def calibrated_sides(
    packed: Sequence[PackedSide], basis: GroupBasis, page_tokens: int, *, canvas: bool, block_rows: int
) -> dict[str, Pieces]:
    """Arrays by name.

    Args:
        packed: one side of one layer group of many pages.
        basis: of that side and group.
        page_tokens: of a page.
        canvas: whether the sides have theirs.
        block_rows: tokens of a program of the product.

    Returns:
        ``steps`` fp32 ``(pages, blocks)``; ``stored``, the stored bytes of all pages; ``low_at`` and ``gains_at`` int64
        ``(pages,)``, where in them the low bits and the gains of a page begin, ``-1`` for no gains; ``escape_position``
        uint32 and ``escape_number`` int32 ``(escapes,)`` as the format has them, ``first_escape_of_page`` int32
        ``(pages + 1,)``; of those of them that no code holds, in order, ``far_row``, ``far_component`` and
        ``far_number`` int32 ``(far escapes,)``, and ``first_far`` int32, the first one of each program's tokens and the
        end.

    Raises:
        FormatError: packed sides that do not fit the basis.
    """
    for side in packed:
        check_fields(side, canvas=canvas, stored=bool(side.stored), escapes=True, steps=basis.blocks)
    steps = np.array([side.steps for side in packed], np.float64)
    if not (np.isfinite(steps) & (steps > 0)).all():
        raise FormatError("quantiser steps that are none")
    low_at, gains_at = _places(packed, basis, page_tokens)
    position, number, first = escape_arrays([side.escapes for side in packed], page_tokens * basis.components)
    row, component, far = _far(position, number, first, basis, page_tokens)
    bounds = np.arange(0, len(packed) * page_tokens + block_rows, block_rows)
    return {
        "steps": steps.astype(np.float32),
        "stored": [side.stored for side in packed],
        "low_at": low_at,
        "gains_at": gains_at,
        "escape_position": position,
        "escape_number": number,
        "first_escape_of_page": first,
        "far_row": row,
        "far_component": component,
        "far_number": number[far],
        "first_far": np.searchsorted(row, bounds).astype(np.int32),
    }


def _places(packed: Sequence[PackedSide], basis: GroupBasis, page_tokens: int) -> tuple[_Ints, _Ints]:
    """Where the low bits and the gains of each page begin; see ``transform/token_gains.py``."""
    low_bytes = basis.low_rows * -(-page_tokens // 8)
    row_bytes = -(-page_tokens // 2)
    sizes = np.array([len(side.stored) for side in packed], np.int64)
    has_gains = sizes == low_bytes + basis.blocks * row_bytes
    if not (has_gains | (sizes == low_bytes)).all():
        raise FormatError(f"stored bytes that are not {low_bytes} of low bits, or these behind gains")
    starts = np.cumsum(sizes) - sizes
    if page_tokens % 2:
        for index in np.flatnonzero(has_gains):
            if any(byte >> 4 for byte in packed[index].stored[row_bytes - 1 : basis.blocks * row_bytes : row_bytes]):
                raise FormatError("gains of a token that is none")
    return starts + sizes - low_bytes, np.where(has_gains, starts, -1)


def _far(
    position: _Ints, number: _Ints, first: _Ints, basis: GroupBasis, page_tokens: int
) -> tuple[_Ints, _Ints, _Ints]:
    """Rows and components of the escapes that no code holds, and their indices. Few are looked at: most are small."""
    largest = basis.largest_in_place
    far = np.flatnonzero(np.abs(number) > largest.min())
    far = far[np.abs(number[far]) > largest[position[far] % basis.components]]
    token, component = np.divmod(position[far], basis.components)
    page = np.searchsorted(first, far, side="right") - 1
    return (page * page_tokens + token).astype(np.int32), component.astype(np.int32), far
