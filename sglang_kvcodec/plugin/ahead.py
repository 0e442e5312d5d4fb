"""Requests whose pages are restored while they still wait, because others would have to wait for it in their batch.

A forward pass waits for the layers of what its requests have hit, and with it waits every request of the batch. Where
others use the model, and the restore takes longer than the pass has to compute, a request is kept out of the batch
until all of its pages are in slots of their own; and where it is alone, but has next to nothing to compute, so that who
comes meanwhile need not wait. They are then taken into the tree as if another request had computed
them, and SGLang finds them there. Until then nothing knows of the slots: whatever goes wrong, the request goes on with
what it would have had without.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.ahead_restore import AheadRestore, Progress
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.plugin.held_requests import HeldRequest
from sglang_kvcodec.plugin.set_aside import SetAside

logger = logging.getLogger(__name__)

RESTORED, FAILED, PREFIX_EVICTED, GONE, NO_ROOM = "restored", "failed", "prefix_evicted", "gone", "no_room"
NOTHING = (0, 0)


@dataclasses.dataclass(frozen=True)
class _Restorable:
    """What of a prompt's start can be restored now.

    Attributes:
        key: SGLang's key of all of it, whole pages.
        first_page: what is before this page is on the device.
        pages: from there on.
    """

    key: Any
    first_page: int
    pages: Sequence[PageObject]


@dataclasses.dataclass(eq=False)
class _Entry:
    request: Any
    restorable: _Restorable
    restore: AheadRestore
    start_s: float


class AheadBook:
    """Those of one rank. All methods run on the scheduler's thread, and on all ranks at the same place."""

    def __init__(
        self,
        cache: Any,
        set_aside: SetAside,
        page_tokens: int,
        layers: int,
        smallest_of_ranks: Callable[[Sequence[int]], list[int]],
        others_wait: Callable[[], bool],
        holds_up: Callable[[Sequence[PageObject], int, int, bool], bool],
        in_host_memory: Callable[[Sequence[bytes]], list[PageObject] | None],
        on_restored: Callable[[Sequence[PageObject]], None],
        tracer: Tracer,
    ) -> None:
        """None yet.

        Args:
            cache: SGLang's tree, with its pools.
            set_aside: gives slots, and restores into them.
            page_tokens: tokens of a page.
            layers: of this rank.
            smallest_of_ranks: the smallest of what all ranks give it at once, number by number.
            others_wait: whether there are requests that would wait with this one; the same on all ranks.
            holds_up: whether a pass over the rest of a prompt would wait too long for the restore of these pages, given
                how many tokens of it are there then, how many it has, and whether others would wait.
            in_host_memory: pages by their hashes; None if one is not there.
            on_restored: told of pages before they are in the tree.
            tracer: told of restores.
        """
        self._cache = cache
        self._set_aside = set_aside
        self._page_tokens = page_tokens
        self._layers = layers
        self._smallest_of_ranks = smallest_of_ranks
        self._others_wait = others_wait
        self._holds_up = holds_up
        self._in_host_memory = in_host_memory
        self._on_restored = on_restored
        self._tracer = tracer
        self._offered: dict[str, list[PageObject]] = {}
        """Of each request that was offered last, what is in host memory of its start."""
        self._entries: dict[str, _Entry] = {}

    def offers(self, several: Sequence[HeldRequest]) -> list[tuple[int, int]]:
        """What a rank thinks of restoring each request's pages ahead; of each number the smallest of all ranks counts.

        Those that all ranks agree on are told to :meth:`agreed` before this is called again.
        """
        self._offered.clear()
        return [self._offer(held) for held in several]

    def _offer(self, held: HeldRequest) -> tuple[int, int]:
        ticket = held.ticket
        if held.key is None or not ticket.is_ready or ticket.tail is not None:
            return NOTHING
        in_memory = self._in_host_memory(held.before[held.device_pages :])
        if in_memory is None or not (in_memory or ticket.pages):
            return NOTHING
        self._offered[ticket.rid] = in_memory
        tokens = (held.start_page + len(ticket.pages)) * self._page_tokens
        pages = [*in_memory, *ticket.pages]
        return -int(self._holds_up(pages, tokens, ticket.prompt_tokens, self._others_wait())), 1

    def agreed(self, request: Any, held: HeldRequest, pages: int, offer: Sequence[int]) -> bool:
        """All ranks have so many of the pages asked for; whether the request is to wait until they are restored.

        It is if the forward pass of any rank would wait for the restore, all of them can do it, and there is room.
        """
        in_memory = self._offered.get(held.ticket.rid)
        holds_up, can = offer
        restorable = self._restorable(held, in_memory, pages) if holds_up and can and in_memory is not None else None
        if restorable is None or not restorable.pages:
            return False
        tokens = len(restorable.pages) * self._page_tokens
        slots = self._set_aside.allocate(tokens, held.ticket.prompt_tokens)
        if slots is None:
            metrics.AHEAD_RESTORES.labels(outcome=NO_ROOM).inc()
            return False
        restore = AheadRestore(restorable.pages, slots, self._layers, self._set_aside.restores())
        self._entries[request.rid] = _Entry(request, restorable, restore, time.monotonic())
        return True

    def _restorable(self, held: HeldRequest, in_memory: Sequence[PageObject], pages: int) -> _Restorable | None:
        """Up to so many of the pages asked for; None if some before them are on the device no more.

        A tree is searched by all ranks or by none, for a search splits its nodes.
        """
        key = held.key[: (held.start_page + pages) * self._page_tokens]
        first = self._device_tokens(key) // self._page_tokens
        if first < held.device_pages:
            return None
        every = [*in_memory, *held.pages[:pages]]
        return _Restorable(key, first, every[first - held.device_pages :])

    def _device_tokens(self, key: Any) -> int:
        """How much of a prompt is on the device."""
        return int(self._cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len)

    def ended(self) -> list[tuple[Any, bool]]:
        """The requests that wait no longer, and whether what they waited for has failed."""
        if not self._entries:
            return []
        entries = list(self._entries.values())
        progress = self._smallest_of_ranks([entry.restore.progress for entry in entries])
        over = []
        for entry, reached in zip(entries, progress, strict=True):
            if reached == Progress.RESTORED:
                self._close(entry, RESTORED if self._take_in(entry) else PREFIX_EVICTED)
                over.append((entry.request, False))
            elif reached == Progress.FAILED:
                # Before the request looks for what it can have instead.
                self._set_aside.blame(entry.restore)
                self._close(entry, FAILED)
                over.append((entry.request, True))
        return over

    def _take_in(self, entry: _Entry) -> bool:
        """Takes what is restored into the tree; False if what comes before it is not on the device any more."""
        restorable, cache = entry.restorable, self._cache
        before_tokens = restorable.first_page * self._page_tokens
        match = cache.match_prefix(MatchPrefixParams(key=restorable.key))
        if match.device_prefix_len < before_tokens:
            return False
        self._on_restored(restorable.pages)
        before = cache.path_device_indices(match.last_device_node)[:before_tokens]
        slots = torch.cat([before, entry.restore.take()])
        # What another request has computed meanwhile stays; the tree gives our slots of that back.
        cache.insert(InsertParams(key=restorable.key, value=slots, prev_prefix_len=before_tokens))
        now_s = time.monotonic()
        metrics.RESTORE_SECONDS.observe(now_s - entry.start_s)
        self._tracer.span(entry.request.rid, "restore", entry.start_s, now_s, ahead=True)
        return True

    def close(self, rid: str) -> None:
        """The request is gone; its slots are given back when they are not written any more."""
        entry = self._entries.get(rid)
        if entry is not None:
            self._close(entry, GONE)

    def _close(self, entry: _Entry, outcome: str) -> None:
        del self._entries[entry.request.rid]
        metrics.AHEAD_RESTORES.labels(outcome=outcome).inc()
        self._set_aside.close(entry.restore, len(entry.restorable.pages) * self._page_tokens)

    @property
    def has_pending(self) -> bool:
        """Whether there are slots that only this knows of."""
        return bool(self._entries)

    def reset(self) -> None:
        """Waits until nothing is written any more and forgets all; the pool is about to be emptied."""
        for entry in self._entries.values():
            entry.restore.wait()
        self._offered.clear()
        self._entries.clear()
