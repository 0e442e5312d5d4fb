"""A KV pool in host memory, whose every value is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.format.spec import KVSpec, Side
from sglang_kvcodec.testing.synthetic import kv_like, random_bits


class KnownPool:
    """A pool full of random bits, and pages of it at places that are neither aligned nor in order."""

    def __init__(self, spec: KVSpec, pages: int, seed: int = 0) -> None:
        """A pool with room for ``pages`` pages and some slots that belong to none."""
        self.spec = spec
        slots = (pages + 1) * spec.page_tokens + 3
        shape = (slots, spec.kv_heads, spec.head_dim)
        self.buffers = {
            side: [random_bits(spec.dtype, shape, seed + 1000 * index + layer) for layer in range(spec.layers)]
            for index, side in enumerate(spec.sides)
        }
        self.wrapped = PagedKVPool(spec, lambda: self.buffers, torch.device("cpu"))
        order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
        self._slots = order[: pages * spec.page_tokens].view(pages, spec.page_tokens)

    def slots(self, pages: Sequence[int]) -> torch.Tensor:
        """Slots of the pages, int64 ``(len(pages) * page_tokens,)``."""
        return self._slots[list(pages)].reshape(-1)

    def page(self, index: int) -> dict[Side, torch.Tensor]:
        """What a page holds: per side ``(layers, page_tokens, kv_heads, head_dim)``."""
        slots = self._slots[index].tolist()
        return {
            side: torch.stack([torch.stack([layer[slot] for slot in slots]) for layer in layers])
            for side, layers in self.buffers.items()
        }

    def fill(self, index: int, seed: int) -> dict[Side, torch.Tensor]:
        """Writes KV into a page; returns it."""
        for number, layers in enumerate(self.buffers.values()):
            values = kv_like(self.spec, 1, self.spec.layers, seed + number)[0]
            for layer, buffer in enumerate(layers):
                for token, slot in enumerate(self._slots[index].tolist()):
                    buffer[slot] = values[layer, token]
        return self.page(index)

    def bits(self) -> dict[Side, torch.Tensor]:
        """A copy of everything, uint8 ``(layers, slots, bytes of a slot)`` per side."""
        return {
            side: torch.stack([layer.reshape(len(layer), -1).view(torch.uint8) for layer in layers])
            for side, layers in self.buffers.items()
        }

    def others_are(self, before: Mapping[Side, torch.Tensor], pages: Sequence[int]) -> bool:
        """Whether all slots but those of ``pages`` hold what they did when :meth:`bits` gave ``before``."""
        is_other = torch.ones(next(iter(before.values())).shape[1], dtype=torch.bool)
        is_other[self.slots(pages)] = False
        now = self.bits()
        return all(torch.equal(now[side][:, is_other], before[side][:, is_other]) for side in before)


def same_bits(a: Mapping[Side, torch.Tensor], b: Mapping[Side, torch.Tensor]) -> bool:
    """Whether two pages are the same bit for bit, NaN included."""
    return a.keys() == b.keys() and all(
        a[side].shape == b[side].shape
        and a[side].dtype == b[side].dtype
        and torch.equal(a[side].contiguous().view(torch.uint8), b[side].contiguous().view(torch.uint8))
        for side in a
    )
