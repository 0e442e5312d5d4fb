"""Prompts whose start is computed while the end of their stored prefix is fetched and restored.

To SGLang such a request is one that is prefilled in chunks. Its end is restored into slots that belong to nobody else,
and when a chunk has been launched that reaches what is restored, the request goes on as if that chunk had computed all
of it (:meth:`TailBook.join`, called where SGLang takes a chunk into the tree). Until then nothing knows of the slots:
whatever goes wrong, the request is computed, as it is anyway.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.planner import BOTH_ENDS
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.plugin.set_aside import SetAside

NO_TAIL = 1 << 40


@dataclasses.dataclass(eq=False)
class _Entry:
    """A request's tail.

    Attributes:
        tail: the tail.
        ticket: of its fetch.
        start_page: of the prompt, from which the tail's pages count.
        limit_page: a pass is to compute no more than up to this page of the prompt; all ranks have the same.
        set_aside_tokens: that have slots; none before the request is in a batch.
    """

    tail: Tail
    ticket: FetchTicket
    start_page: int
    limit_page: int = NO_TAIL
    set_aside_tokens: int = 0


class TailBook:
    """The tails of one rank. All methods run on the scheduler's thread, and on all ranks at the same place."""

    def __init__(
        self,
        cache: Any,
        set_aside: SetAside,
        page_tokens: int,
        smallest_of_ranks: Callable[[Sequence[int]], list[int]],
        on_joined: Callable[[Sequence[PageObject]], None],
        tracer: Tracer,
    ) -> None:
        """None yet.

        Args:
            cache: SGLang's tree, with its pools.
            set_aside: gives slots, and restores into them.
            page_tokens: tokens of a page.
            smallest_of_ranks: the smallest of what all ranks give it at once, number by number.
            on_joined: told of pages before a request has them.
            tracer: told of meetings.
        """
        self._cache = cache
        self._set_aside = set_aside
        self._page_tokens = page_tokens
        self._smallest_of_ranks = smallest_of_ranks
        self._on_joined = on_joined
        self._tracer = tracer
        self._entries: dict[str, _Entry] = {}

    @staticmethod
    def offer(ticket: FetchTicket) -> tuple[int, int, int, int]:
        """What a rank has planned, so that the smallest of each is what all can do: see :meth:`agreed`."""
        tail = ticket.tail
        if tail is None:
            return -NO_TAIL, 0, 0, 0
        return -tail.first_page, tail.end, tail.pass_tokens, -tail.head_pages

    def agreed(self, rid: str, ticket: FetchTicket, start_page: int, offer: Sequence[int]) -> None:
        """All ranks have planned; a tail that not all of them have ends."""
        tail = ticket.tail
        if tail is None:
            return
        first_page, end, pass_tokens, head_pages = -offer[0], offer[1], offer[2], -offer[3]
        if not head_pages < first_page < end:
            self._count("not_all_ranks", ticket, tail)
            tail.close()
            return
        tail.agree(first_page, end, pass_tokens, head_pages)
        self._entries[rid] = _Entry(tail, ticket, start_page)

    def admitted(self, rid: str) -> None:
        """The request is in a batch: slots are set aside, and what has landed is restored."""
        entry = self._entries.get(rid)
        if entry is None:
            return
        tail = entry.tail
        first = tail.lowest_page
        tokens = (tail.end - first) * self._page_tokens
        slots = self._set_aside.allocate(tokens, tail.end * self._page_tokens)
        if slots is None:
            self.close(rid, "no_room")
            return
        entry.set_aside_tokens = tokens
        tail.begin(slots, first, self._set_aside.restores())

    def most_tokens(self, rid: str, prefix_tokens: int) -> int | None:
        """How many tokens the next pass is to compute of the request; None for as many as SGLang likes."""
        entry = self._entries.get(rid)
        if entry is None:
            return None
        limit_tokens = entry.limit_page * self._page_tokens - prefix_tokens
        tokens = min(entry.tail.pass_tokens, limit_tokens) if limit_tokens > 0 else entry.tail.pass_tokens
        return max(1, tokens // self._page_tokens) * self._page_tokens

    def launched(self, rid: str, until_tokens: int, is_last: bool) -> None:
        """A pass was planned that computes the request's prompt up to this token; after the last none follows."""
        entry = self._entries.get(rid)
        if entry is None:
            return
        entry.tail.computing(-(-until_tokens // self._page_tokens) - entry.start_page)
        if is_last:
            self.close(rid, "overtaken")

    def join(self, req: Any, up_to: int) -> int:
        """Where the request's KV ends, now that a pass was launched that computes it up to the token ``up_to``.

        Further than that, if the tail is restored from there on: its slots are then the request's.
        """
        entry = self._entries.get(req.rid)
        if entry is None or not entry.set_aside_tokens or up_to % self._page_tokens:
            return up_to
        tail, page = entry.tail, up_to // self._page_tokens - entry.start_page
        outlook = tail.outlook()
        restored_from, until = self._smallest_of_ranks([-outlook.restored_from, outlook.compute_until])
        # Where nothing is about to be there, a pass goes beyond the end of the tail: it saves another one.
        entry.limit_page = entry.start_page + until if until < tail.end else NO_TAIL
        if page >= tail.end:
            self.close(req.rid, "overtaken")
            return up_to
        if page < -restored_from or page < tail.lowest_page:
            return up_to
        self._on_joined(tail.pages_from(page))
        slots = tail.take(page)
        end = up_to + slots.numel()
        self._cache.req_to_token_pool.write((req.kv.req_pool_idx, slice(up_to, end)), slots)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end
        req.extend_end = end
        req.cached_tokens_storage += slots.numel()
        metrics.JOINED_TOKENS.inc(slots.numel())
        now_s = time.monotonic()
        self._tracer.span(req.rid, "join", now_s, now_s, tokens=slots.numel())
        self.close(req.rid, "joined")
        return end

    def close(self, rid: str, outcome: str = "gone") -> None:
        """Ends a request's tail, if it has one; its slots are given back when they are not written any more."""
        entry = self._entries.pop(rid, None)
        if entry is not None:
            entry.tail.close()
            self._count(outcome, entry.ticket, entry.tail)
            self._set_aside.close(entry.tail, entry.set_aside_tokens)

    def _count(self, outcome: str, ticket: FetchTicket, tail: Tail) -> None:
        metrics.MEETINGS.labels(outcome=outcome).inc()
        computed = ticket.stored_pages - tail.head_pages - tail.joined_pages
        if computed:
            metrics.MISSES.labels(reason=BOTH_ENDS).inc(computed)

    @property
    def has_pending(self) -> bool:
        """Whether there are slots that only this knows of."""
        return bool(self._entries)

    def reset(self) -> None:
        """Waits until nothing is written any more and forgets all; the pool is about to be emptied."""
        for entry in self._entries.values():
            entry.tail.close()
        for entry in self._entries.values():
            entry.tail.wait()
        self._entries.clear()
