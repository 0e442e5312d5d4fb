"""Slots of the pool for what is restored before a request has it."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

MAX_POOL_SHARE = 0.5
"""Of the pool, for all of these together. They will be some request's own, but are set aside early."""


class SetAside:
    """Those of one rank. Runs on the scheduler's thread, and on all ranks at the same place."""

    def __init__(self, cache: Any) -> None:
        """None yet; ``cache`` is SGLang's tree, with its pools."""
        self._cache = cache
        self._tokens = 0

    def allocate(self, tokens: int, prompt_tokens: int) -> torch.Tensor | None:
        """Slots for so many tokens, int64, if the prompt has room beside them; else None.

        What is in the tree and nobody uses is evicted for them.
        """
        allocator = self._cache.token_to_kv_pool_allocator
        if self._tokens + tokens > MAX_POOL_SHARE * allocator.size:
            return None
        free = allocator.available_size()
        if free + self._cache.evictable_size() < tokens + prompt_tokens:
            return None
        if free < tokens:
            self._cache.evict(EvictParams(num_tokens=tokens - free))
        slots = allocator.alloc(tokens)
        if slots is None:
            return None
        self._tokens += tokens
        return slots.to(torch.int64)

    def over(self, tokens: int, leftover: torch.Tensor | None) -> None:
        """So many tokens' slots are set aside no more. Those left over are written no more either, and free again."""
        self._tokens -= tokens
        if leftover is not None:
            self._cache.token_to_kv_pool_allocator.free(leftover)

    def clear(self) -> None:
        """Forgets all; the pool is about to be emptied."""
        self._tokens = 0
