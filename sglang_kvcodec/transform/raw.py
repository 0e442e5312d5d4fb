"""Profile ``raw``: the values as they are, little-endian, in the order layer, token, head, dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_kvcodec.format.spec import KVSpec
from sglang_kvcodec.transform.base import PackedSide
from sglang_kvcodec.transform.checks import check_fields, check_values
from sglang_kvcodec.transform.floats import from_bits, stack_bytes, to_bits, to_bytes


class RawTransform:
    """See the module."""

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec

    def pack(self, values: torch.Tensor) -> list[PackedSide]:
        """See ``Transform.pack``."""
        check_values(values, self._spec)
        return [PackedSide(stored=to_bytes(page)) for page in to_bits(values)]

    def restore(self, layers: int, packed: Sequence[PackedSide]) -> torch.Tensor:
        """See ``Transform.restore``."""
        spec = self._spec
        for side in packed:
            check_fields(side, stored=True)
        data = stack_bytes([side.stored for side in packed], layers * spec.layer_values * spec.dtype.item_bytes)
        values = from_bits(data, spec.dtype)
        return values.reshape(len(packed), layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
