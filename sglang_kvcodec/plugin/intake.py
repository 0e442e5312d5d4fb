"""What a request that comes into the queue waits for: its own fetch, another request's, a restore, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.plugin.following import Following
from sglang_kvcodec.plugin.held_requests import HeldRequests
from sglang_kvcodec.plugin.linker import KVCodecLinker
from sglang_kvcodec.plugin.passes import PassObserver
from sglang_kvcodec.plugin.retry import RetryBook
from sglang_kvcodec.plugin.runtime import Runtime
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime, timed


class Intake:
    """Of one rank. All methods run on the scheduler's thread, and on all ranks at the same place."""

    def __init__(
        self,
        cache: Any,
        runtime: Runtime,
        linker: KVCodecLinker,
        held: HeldRequests,
        retries: RetryBook,
        passes: PassObserver,
        scheduler_time: SchedulerTime,
    ) -> None:
        """Nobody is in the queue.

        Args:
            cache: the tree, which knows its scheduler when a request comes.
            runtime: fetches.
            linker: knows what is in host memory, and what has turned out bad.
            held: is told who waits.
            retries: knows who may wait, and who has before.
            passes: follows requests to their first tokens.
            scheduler_time: told what this takes of the scheduler's thread.
        """
        self.scheduler_time = scheduler_time
        self._cache = cache
        self._runtime = runtime
        self._linker = linker
        self._held = held
        self._retries = retries
        self._passes = passes
        self._following = Following()
        self._led_followers: list[Any] = []
        self._page_tokens: int = cache.page_size
        self._is_pipeline: bool = cache.pp_size > 1

    def queued(self, request: Any, key: RadixKey, matched_tokens: int, prompt_tokens: int) -> None:
        """Has a request wait for what it lacks, if it is worth waiting for.

        Args:
            request: SGLang's handle of it.
            key: of the whole pages of its prompt that may be cached.
            matched_tokens: of the prompt, that are on the device or in host memory.
            prompt_tokens: of the whole prompt.
        """
        if request.rid not in self._retries or request in self._held:
            return
        tiers = self._runtime.tiers()
        if not tiers and not self._is_pipeline:
            return
        if self._retries.was_restarted(request.rid):
            # Its pages did not all come. What did is in host memory, and it has waited once.
            self._hold_again(request)
            return
        start_page = matched_tokens // self._page_tokens
        host_pages = self._cache.linker.hit_pages(request.rid)
        may_be_ahead = not self._is_pipeline and self._cache.has_one_component
        is_here = len(key) // self._page_tokens <= start_page
        if is_here and not (host_pages and may_be_ahead):
            return
        hashes = tuple(bytes.fromhex(h) for h in get_storage_hash_str(key, None, page_size=self._page_tokens))
        lacking = hashes[start_page:]
        ahead: dict[str, Any] = {}
        if may_be_ahead:
            ahead = {"key": key, "before": hashes[:start_page], "device_pages": start_page - host_pages}
        if is_here:
            ticket = FetchTicket((), matched_tokens, prompt_tokens, request.rid).again(None)
            self._held.hold(request, ticket, start_page, (), **ahead)
            return
        if self._follow(request, start_page, lacking, prompt_tokens):
            return
        wanted = self._linker.without_bad(lacking)
        kept = self._linker.kept(wanted) if self._is_pipeline else ()
        missing, tokens_before = wanted[len(kept) :], (start_page + len(kept)) * self._page_tokens
        if not self._is_pipeline or (tiers and missing):
            ticket = self._runtime.fetcher.start(
                tiers,
                missing,
                tokens_before,
                prompt_tokens,
                request.rid,
                self._may_compute(),
                may_be_ahead and self.others_use_the_model(),
            )
        else:
            # All stages of a pipeline hold the same requests, whatever each has to do for them.
            ticket = FetchTicket((), tokens_before, prompt_tokens, request.rid).again(None)
        self._held.hold(request, ticket, start_page, wanted, kept, **ahead)
        self._passes.expect(request.rid, ticket)
        # Where there are other ranks, what this one has come to says nothing of theirs.
        if not self._is_pipeline and (self._cache.has_other_ranks or not ticket.is_done):
            self._following.lead(request.rid, lacking)

    def _hold_again(self, request: Any) -> None:
        """At its second start a request waits for no page, but what ended its first fetch may have left it a tail."""
        held = self._retries.take_wait(request.rid)
        if held is None or self._is_pipeline:
            return
        second = held.ticket.second
        if second is not None or self._cache.has_other_ranks:
            # All ranks hold the same requests; whether all of them have a tail they agree on then.
            self._held.hold(request, second or held.ticket.again(None), held.start_page, held.hashes)

    # ---- who else is there ----

    def _may_compute(self) -> bool:
        """Whether a prompt that comes now may be computed while it is fetched: where nothing else wants the model."""
        scheduler, when = self._cache.scheduler, self._runtime.config.compute_while_fetching
        if when == "never" or not self._cache.has_one_component or not scheduler.chunked_prefill_size:
            return False
        if self._is_pipeline:
            # Where a stage joins both ends, those before it have launched the next pass.
            return False
        if scheduler.truncation_align_size is not None:
            # Deterministic inference: passes end where SGLang wants them to.
            return False
        if self._held or scheduler.waiting_queue or scheduler.chunked_req is not None:
            return False
        return bool(when == "always" or scheduler.running_batch.is_empty())

    def others_use_the_model(self) -> bool:
        """Whether there are requests that would wait for what one more in their batch waits for."""
        scheduler = self._cache.scheduler
        if not scheduler.running_batch.is_empty() or scheduler.chunked_req is not None:
            return True
        return any(req.cache_request_handle not in self._held for req in scheduler.waiting_queue)

    # ---- requests that wait for another one's fetch ----

    def _follow(self, request: Any, start_page: int, lacking: tuple[bytes, ...], prompt_tokens: int) -> bool:
        """Has a request wait for one that fetches the same pages, if there is one; whether it does.

        Not in a pipeline: its stages see at different times that a prompt has been computed. Nor where requests have
        priorities: one that has to go first could wait for one that is kept waiting. ``lacking`` is the same on all
        ranks, whatever one of them has found bad: they must hold the same requests for the same reason.
        """
        if self._is_pipeline or self._cache.scheduler.enable_priority_scheduling:
            return False
        if len(lacking) * self._page_tokens < self._runtime.config.min_fetch_tokens:
            return False
        leader = self._following.leader_of(lacking)
        if leader is None or leader == request.rid:
            return False
        ticket = FetchTicket(lacking, start_page * self._page_tokens, prompt_tokens, request.rid)
        self._held.hold(request, ticket, start_page, lacking, follows=True)
        self._following.follow(leader, request)
        self._passes.expect(request.rid, ticket)
        metrics.FOLLOWING_REQUESTS.inc()
        return True

    def led(self, rid: str) -> None:
        """Nobody needs to wait for a request any more. Its followers go on at the next pass: this one is within it."""
        self._led_followers += self._following.over(rid)

    def computed(self, reqs: Sequence[Any]) -> None:
        """A pass over these requests has ended: nobody needs to wait for those that have a first token."""
        if self._following:
            for req in reqs:
                if req.output_ids:
                    self.led(req.rid)

    def nothing_runs(self) -> None:
        """Who is not in the queue now has gone without another word."""
        if self._following:
            queued = {req.rid for req in self._cache.scheduler.waiting_queue}
            for rid in self._following.leaders:
                if rid not in queued:
                    self.led(rid)

    def start_followers(self) -> None:
        """Looks up anew what those lack who have waited for others; once in each pass."""
        if self._led_followers:
            self._start_followers()

    @timed
    def _start_followers(self) -> None:
        followers, self._led_followers = self._led_followers, []
        scheduler = self._cache.scheduler
        for request in followers:
            held = self._held.let_go(request)
            if held is None:
                continue
            self._runtime.tracer.span(request.rid, "follows", held.ticket.start_s, time.monotonic())
            req = next((req for req in scheduler.waiting_queue if req.rid == request.rid), None)
            if req is not None:
                scheduler._prefetch_kvcache(req)

    def clear(self) -> None:
        """Nobody is in the queue any more."""
        self._following.clear()
        self._led_followers.clear()
