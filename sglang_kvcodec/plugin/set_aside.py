"""Slots of the pool for what is restored before a request has it, from when they are set aside until they are free."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_kvcodec.flow.restore import StartRestore
from sglang_kvcodec.flow.restorer import Restorer
from sglang_kvcodec.format.page_object import PageObject

MAX_POOL_SHARE = 0.5
"""Of the pool, for all of these together. They will be some request's own, but are set aside early."""


class Restoring(Protocol):
    """What has been given slots."""

    @property
    def is_idle(self) -> bool:
        """Whether no slot is written any more."""

    @property
    def bad_pages(self) -> Sequence[PageObject]:
        """Pages that could not be restored."""

    def leftover(self) -> torch.Tensor | None:
        """The slots that nobody took, once it is idle; None if there are none."""

    def wait(self) -> None:
        """Waits until it is idle."""


class SetAside:
    """Those of one rank. Runs on the scheduler's thread, and on all ranks at the same place."""

    def __init__(
        self,
        cache: Any,
        restorer: Restorer,
        ready_events: Callable[[], list[Any]],
        smallest_of_ranks: Callable[[Sequence[int]], list[int]],
        on_bad_pages: Callable[[Sequence[PageObject]], None],
    ) -> None:
        """None yet.

        Args:
            cache: SGLang's tree, with its pools.
            restorer: restores.
            ready_events: device events after which slots that were just set aside may be written.
            smallest_of_ranks: the smallest of what all ranks give it at once, number by number.
            on_bad_pages: told of pages that could not be restored.
        """
        self._cache = cache
        self._restorer = restorer
        self._ready_events = ready_events
        self._smallest_of_ranks = smallest_of_ranks
        self._on_bad_pages = on_bad_pages
        self._tokens = 0
        self._closing: list[tuple[Restoring, int]] = []
        """Over, but slots of them may still be written; and how many tokens' they were given."""

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

    def restores(self) -> StartRestore:
        """What starts restores into slots that were just allocated; no forward pass waits for them."""
        return functools.partial(self._restorer.start, after=self._ready_events(), is_awaited=False)

    def close(self, restoring: Restoring, tokens: int) -> None:
        """It is over. What nobody took of so many tokens' slots is given back when it is not written any more."""
        self._closing.append((restoring, tokens))
        self.reap()

    def reap(self) -> None:
        """Gives back the slots of what is over and written no more, on any rank: all have the same room."""
        if not self._closing:
            return
        idle = self._smallest_of_ranks([int(restoring.is_idle) for restoring, _ in self._closing])
        over = [entry for entry, is_idle in zip(self._closing, idle, strict=True) if is_idle]
        self._closing = [entry for entry in self._closing if entry not in over]
        for restoring, tokens in over:
            self._tokens -= tokens
            leftover = restoring.leftover()
            if leftover is not None:
                self._cache.token_to_kv_pool_allocator.free(leftover)
            self.blame(restoring)

    def blame(self, restoring: Restoring) -> None:
        """Has what could not be restored be known at once: it is looked for again before its slots are given back."""
        if bad_pages := restoring.bad_pages:
            self._on_bad_pages(bad_pages)

    @property
    def has_pending(self) -> bool:
        """Whether there are slots that only this knows of."""
        return bool(self._closing)

    def reset(self) -> None:
        """Waits until nothing is written any more and forgets all; the pool is about to be emptied."""
        for restoring, _ in self._closing:
            restoring.wait()
        self._closing.clear()
        self._tokens = 0
