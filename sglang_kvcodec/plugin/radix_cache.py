"""SGLang's radix cache with a remote tier behind it.

The frame is SGLang's own: a request is held out of the batch while its pages are fetched (``prefetch_from_storage``,
``check_prefetch_progress``), then the external-linker machinery restores them layer by layer into slots of the
request's own under the running forward pass, and offers new nodes for publishing. This subclass only connects the two.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import touch_waiting_prefix
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_parallel

from sglang_kvcodec.config import parse_cpus
from sglang_kvcodec.cpus import starting_on
from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.plugin.ahead import AheadBook
from sglang_kvcodec.plugin.calibrating import auto_calibration, calibration_at_start
from sglang_kvcodec.plugin.held_back import HeldBack
from sglang_kvcodec.plugin.held_requests import HeldRequests
from sglang_kvcodec.plugin.identity import build_namespace
from sglang_kvcodec.plugin.intake import Intake
from sglang_kvcodec.plugin.layer_kinds import check_built_kinds
from sglang_kvcodec.plugin.linker import KVCodecLinker
from sglang_kvcodec.plugin.passes import PassObserver
from sglang_kvcodec.plugin.pipeline import PipelineAgreement, UnjudgedLoads
from sglang_kvcodec.plugin.placed_linker import PlacedLinkerWrapper
from sglang_kvcodec.plugin.pool import wrap_pool
from sglang_kvcodec.plugin.retry import RestoreFailed, RetryBook
from sglang_kvcodec.plugin.runtime import Runtime
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime, timed
from sglang_kvcodec.plugin.set_aside import SetAside
from sglang_kvcodec.plugin.settings import server_config
from sglang_kvcodec.plugin.stage_link import StageLink
from sglang_kvcodec.plugin.tails import TailBook
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

REST_S = 0.002
"""Longest rest of an otherwise idle scheduler that only waits for fetches; the fetch threads need the interpreter."""


class KVCodecRadixCache(UnifiedRadixCache):
    """One rank's cache. All methods run on the scheduler's thread."""

    _held: HeldRequests
    _runtime: Runtime | None = None
    _tails: TailBook | None = None
    _ahead: AheadBook | None = None
    _intake: Intake | None = None
    _set_aside: SetAside | None = None
    _pipeline: PipelineAgreement | None = None
    """With the other stages of a pipeline; None without."""
    _unjudged: UnjudgedLoads | None = None
    _settled_offloads = 0
    scheduler: Any = None
    """The scheduler that owns this cache; set when it is built."""

    def __init__(self, params: Any) -> None:
        # Before super(): it calls reset().
        self._held = HeldRequests()
        self.retries = RetryBook()
        self.scheduler_time = SchedulerTime()
        self._held_back = HeldBack(lambda req: touch_waiting_prefix(req, self), self.scheduler_time)
        super().__init__(params)

    def attach(self, runtime: Runtime, ctx: Any) -> None:
        """Connects the tree, the pool and the model's layers to the flow."""
        kv_cache = ctx.params.token_to_kv_pool_allocator.get_kvcache()
        device = runtime.pool.device.type
        self._runtime = runtime
        self._passes = PassObserver(runtime.rates.prefill, runtime.tracer)
        self._linker = KVCodecLinker(
            kv_cache,
            kv_cache.layer_num,
            self.page_size,
            runtime.cache,
            runtime.restorer,
            runtime.publisher,
            runtime.tiers,
            self._pages_of,
            ctx.tp_worker.model_runner.forward_stream if device == "cuda" else None,
            runtime.tracer,
            runtime.restoring_pays,
            self.scheduler_time,
            # The same on all ranks, whatever calibrations they have.
            self.worst_of_ranks if len(runtime.config.tiers) > 1 else None,
            uses_cache=self.pp_size == 1,
        )
        self._intake = Intake(self, runtime, self._linker, self._held, self.retries, self._passes, self.scheduler_time)
        self._set_aside = SetAside(
            self, runtime.restorer, self._linker.slots_ready, self.smallest_of_ranks, self._linker.blame
        )
        self._tails = TailBook(
            self, self._set_aside, self.page_size, self.smallest_of_ranks, self._linker.note_joined, runtime.tracer
        )
        self._ahead = AheadBook(
            self,
            self._set_aside,
            self.page_size,
            kv_cache.layer_num,
            self.smallest_of_ranks,
            self._intake.others_use_the_model,
            runtime.holds_up,
            self._linker.in_host_memory,
            self._linker.note_joined,
            runtime.tracer,
        )
        if self.pp_size > 1:
            self._pipeline = PipelineAgreement(StageLink(self.pp_group), self.smallest_of_ranks, runtime.news.tell)
            self._unjudged = UnjudgedLoads(self._pipeline)
        self.init_cache_linker(self._linker)
        kv_cache.register_layer_transfer_counter(self._linker.layer_done_counter)
        ctx.tp_worker.register_hicache_layer_transfer_counter(self._linker.layer_done_counter)

    def init_cache_linker(self, cache_linker: Any) -> None:
        """As SGLang does, with a wrapper that knows where pages are in their prompt."""
        self.linker = PlacedLinkerWrapper(self, cache_linker)

    def all_ranks(self, mine: bool) -> bool:
        """Whether ``mine`` is true on all ranks; called by all of them at the same place."""
        agreed = torch.tensor([int(mine)], dtype=torch.int64)
        self._all_reduce_attn_groups(agreed, torch.distributed.ReduceOp.MIN)
        return bool(agreed.item())

    def worst_of_ranks(self, mine: int) -> int:
        """The largest of what the ranks give; called by all of them at the same place."""
        worst = torch.tensor([mine], dtype=torch.int64)
        self._all_reduce_attn_groups(worst, torch.distributed.ReduceOp.MAX)
        return int(worst.item())

    def smallest_of_ranks(self, mine: Sequence[int]) -> list[int]:
        """Number by number, the smallest of what the ranks give; called by all of them at the same place."""
        smallest = torch.tensor(mine, dtype=torch.int64)
        self._all_reduce_attn_groups(smallest, torch.distributed.ReduceOp.MIN)
        numbers: list[int] = smallest.tolist()
        return numbers

    # ---- waiting for pages ----

    def is_backuped(self, node_id: Any) -> bool:
        """Any node may have stored pages behind it; without a host tier SGLang would not ask for them."""
        return True

    @timed
    def prefetch_from_storage(
        self,
        request: Any,
        last_host_node_id: Any,
        new_input_tokens: Any,
        last_hash: str | None = None,
        prefix_keys: Any = None,
        matched_prefix_tokens: Any = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        storage_hit_end: int | None = None,
    ) -> None:
        """Starts to fetch the pages of a queued request that neither device nor host memory has."""
        assert self._intake is not None
        matched = list(matched_prefix_tokens or [])
        key = RadixKey(
            array("q", [*matched, *new_input_tokens]),
            extra_key,
            is_bigram=self.tree_core.is_eagle,
            cache_salt=cache_salt,
        ).page_aligned(self.page_size)
        self._intake.queued(request, key, len(matched), len(matched) + len(new_input_tokens) + 1)

    @property
    def has_one_component(self) -> bool:
        """Whether all of a token's KV is in one pool, so that slots are all that there is to a request's KV."""
        return len(self._components_tuple) == 1

    @timed
    def check_prefetch_progress(self, request: Any) -> bool:
        """Whether the request may go on: False only while its pages are on their way."""
        held = self._held.get(request)
        if held is None:
            return True
        if held.agreed_pages is None:
            return False
        kept = len(held.kept)
        if held.agreed_pages > kept:
            self.prefetch_loaded_tokens_by_reqid[request] = (held.agreed_pages - kept) * self.page_size
            self.prefetch_loaded_storage_start_by_reqid[request] = (held.start_page + kept) * self.page_size
        return True

    def look_past_held(self, look: Callable[[], Any]) -> Any:
        """SGLang looks for a batch; those that can't be in it are not in its queue meanwhile."""
        waiting = self._held.waiting_rids
        return self._held_back.around(self.scheduler, waiting, look) if waiting else look()

    def check_hicache_events(self) -> None:
        """Once per scheduling pass, on all ranks at the same place: settles offloads, agrees on finished fetches."""
        self.scheduler_time.next_pass()
        if self._intake is not None:
            self._intake.start_followers()
        if self._pipeline is not None:
            self._agree_in_pipeline(self._pipeline)
            return
        super().check_hicache_events()
        self._agree()

    @timed
    def _agree(self) -> None:
        assert self._runtime is not None
        assert self._tails is not None
        assert self._ahead is not None
        assert self._set_aside is not None
        for request, has_failed in self._ahead.ended():
            self._restored_ahead(request, has_failed)
        if self._held and (self.has_other_ranks or self._held.has_news(self._runtime.news)):
            self._held.agree(self.smallest_of_ranks, self._tails, self._ahead)
        self._set_aside.reap()

    def _restored_ahead(self, request: Any, has_failed: bool) -> None:
        """A request finds its pages on the device now, or goes on as one whose restore has failed in a batch."""
        if not has_failed:
            self._held.restored(request)
            return
        held = self._held.let_go(request)
        assert held is not None
        logger.warning("kvcodec: request %s goes on without what could not be restored", request.rid)
        self._held.hold(request, held.ticket.second or held.ticket.again(None), held.start_page, held.hashes)

    @property
    def has_other_ranks(self) -> bool:
        """Whether other ranks of the same stage schedule the same requests."""
        groups = (self.attn_cp_group, self.attn_tp_group)
        sizes = [torch.distributed.get_world_size(group=group) for group in groups if group is not None]
        return max([self.tp_world_size, *sizes]) > 1

    @timed
    def _agree_in_pipeline(self, pipeline: PipelineAgreement) -> None:
        if not self._held.waiting_rids and not self.linker.pending_offloads:
            return
        offloads = self._linker.completed_offloads()
        successes = self._held.agree_in_pipeline(pipeline, self._settled_offloads, offloads)
        self.linker.take_completed_offloads(len(successes))
        self.linker.commit_completed_offloads(successes)
        self._settled_offloads += len(successes)

    def rest_while_held(self) -> None:
        """Called when the scheduler has nothing to run: rests a moment if all it waits for is a fetch."""
        if self._runtime is not None and self._held.waiting_rids:
            self._runtime.news.wait(REST_S)
        if self._intake is not None:
            self._intake.nothing_runs()

    def _pages_of(self, rid: str) -> dict[bytes, PageObject] | None:
        """Pages fetched for a request that waits; None for a request that must be computed."""
        return self._held.pages_of(rid) if rid in self.retries else None

    @timed
    def finish_storage_prefetch_admission(self, request: Any, fulfilled_tokens: int, reason: str | None) -> None:
        """The request is in a batch."""
        super().finish_storage_prefetch_admission(request, fulfilled_tokens, reason)
        held = self._held.get(request)
        if held is not None and not self.retries.was_restarted(request.rid):
            self.retries.admitted(request.rid, held)
        self._release(request, FetchTicket.admitted)
        if self._tails is not None:
            self._tails.admitted(request.rid)

    @timed
    def release_aborted_request(self, request: Any) -> None:
        """The request is gone."""
        super().release_aborted_request(request)
        self._release(request, FetchTicket.cancel)
        if self._ahead is not None:
            self._ahead.close(request.rid)
        if (first := self.retries.take_wait(request.rid)) is not None and first.ticket.second is not None:
            first.ticket.second.cancel()
        self._close_tail(request.rid)
        self._passes.forget(request.rid)
        self._led(request.rid)

    def _release(self, request: Any, tell: Callable[[FetchTicket], None]) -> None:
        held = self._held.let_go(request)
        if held is not None:
            tell(held.ticket)
            if self._runtime is not None:
                self._runtime.tracer.span(request.rid, "held", held.ticket.start_s, time.monotonic())
        self._linker.forget(request.rid)
        if not self._linker.is_loading(request.rid):
            self.retries.forget(request.rid)

    # ---- computing while the end is fetched ----

    @timed
    def most_tokens(self, req: Any, prefix_tokens: int) -> int | None:
        """How much of a prompt the next pass is to compute after a prefix; None for as much as SGLang likes."""
        return None if self._tails is None else self._tails.most_tokens(req.rid, prefix_tokens)

    @timed
    def launched(self, req: Any, is_last: bool) -> None:
        """The next pass computes a request's prompt up to its ``extend_end``; ``is_last`` if that is all of it."""
        if self._tails is not None:
            self._tails.launched(req.rid, req.extend_end, is_last)

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Takes what a request has computed into the tree, and what is restored behind it."""
        if self._tails is not None and not req.finished():
            up_to = self._join(self._tails, req, up_to)
        super().checkpoint(req, up_to=up_to, **kwargs)

    @timed
    def _join(self, tails: TailBook, req: Any, up_to: int) -> int:
        return tails.join(req, up_to)

    def _led(self, rid: str) -> None:
        if self._intake is not None:
            self._intake.led(rid)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        """A request gives back its slots: it has ended, or is retracted."""
        super().on_release(req, checkpointed=checkpointed)
        self._close_tail(req.rid)
        self._led(req.rid)

    @timed
    def _close_tail(self, rid: str) -> None:
        if self._tails is not None:
            self._tails.close(rid)

    # ---- failures after admission ----

    def finish_external_linker_loads(self, reqs: Any) -> Any:
        """After the forward pass: requests whose pages did not all land are computed instead."""
        if self._unjudged is not None:
            return self._finish_loads_of_stage(reqs, self._unjudged)
        loading = [req.rid for req in reqs if self._linker.is_loading(req.rid)]
        failed = super().finish_external_linker_loads(reqs)
        self._after_loads()
        self._judged(loading, failed)
        return failed

    def _finish_loads_of_stage(self, reqs: Any, unjudged: UnjudgedLoads) -> list[Any]:
        """The same at one stage of a pipeline: what becomes of the requests is not known before all have come to it."""
        loading = set(self.linker.inflight_load_rids)
        failed = self.linker.finish_loads()
        self._after_loads()
        if loading:
            unjudged.launched([req for req in reqs if req.rid in loading], not failed)
        return []

    @timed
    def _after_loads(self) -> None:
        self._linker.note_restored()
        waited_s, restored_tokens = self._linker.take_loaded()
        if restored_tokens:
            self._passes.loaded(self.scheduler.forward_ct, waited_s, restored_tokens)

    @timed
    def _judged(self, loading: Sequence[str], failed: Sequence[Any]) -> None:
        self.retries.mark_failed(failed)
        lost = {req.rid for req in failed}
        for rid in loading:
            self._linker.loaded(rid)
            if rid not in lost:
                self.retries.forget(rid)

    @timed
    def result_comes(self, batch: Any) -> None:
        """A pass's output is about to be looked at; in a pipeline it has been through all stages."""
        if not self._unjudged:
            return
        reqs, landed = self._unjudged.judge(batch.reqs)
        failed = [] if landed else reqs
        for req in failed:
            # As SGLang does where a load fails that it knows of at once.
            req.discard_output_reason = FINISH_ABORT("kvcodec: restore failed", HTTPStatus.SERVICE_UNAVAILABLE)
            if self.scheduler.chunked_req is req:
                self.scheduler._pending_chunked_abort_req = req
        self._judged([req.rid for req in reqs], failed)

    def ran(self, batch: Any, seconds: float) -> None:
        """The launch of a forward pass took so long; on a CPU that is all of it."""
        if self._runtime is not None and self._runtime.pool.device.type == "cpu":
            self._passes.ran(batch.forward_iter, seconds)

    @timed
    def passed(self, batch: Any, prefill_busy_us: int) -> None:
        """A forward pass has ended, and SGLang has accounted for it."""
        self._passes.ended(batch, prefill_busy_us)
        if self._intake is not None:
            self._intake.computed(batch.reqs)

    @staticmethod
    def has_lost(reason: object) -> bool:
        """Whether a request ended for this reason is to be computed instead of answered."""
        return isinstance(reason, RestoreFailed)

    def restart(self, req: Any) -> None:
        """Computes a request whose restore failed."""
        self.retries.restart(req, self.scheduler)

    # ---- lifecycle ----

    def has_pending_cache_operations(self) -> bool:
        """Whether slots are being read or written behind the tree's back, so that the server is not idle."""
        if self._linker.has_pending or self.linker.pending_offloads or self._unjudged:
            return True
        return any(each is not None and each.has_pending for each in (self._tails, self._ahead, self._set_aside))

    def clear_storage_backend(self) -> bool:
        """Forgets the page objects in host memory; what the peer keeps is shared and stays."""
        assert self._runtime is not None
        self._runtime.cache.clear()
        return True

    def supports_retraction_backup(self) -> bool:
        """Retracted requests are matched again, not backed up."""
        return False

    def reset(self) -> None:
        """Empties the tree; the peer and the host cache keep their pages."""
        self._held.clear()
        if self._intake is not None:
            self._intake.clear()
        for each in (self._tails, self._ahead, self._set_aside):
            if each is not None:
                each.reset()
        if self.linker is not None:
            # They end here without another word.
            self._settled_offloads += len(self.linker.pending_offloads)
        super().reset()
        if self._runtime is not None:
            self._runtime.flushed()

    def weights_changing(self) -> None:
        """New weights are about to be loaded."""
        if self._runtime is not None:
            self._runtime.weights_changing()

    def release_host_resources(self) -> None:
        """The server ends."""
        super().release_host_resources()
        if self._pipeline is not None:
            self._pipeline.close()
        if self._runtime is not None:
            self._runtime.close()


def build_radix_cache(ctx: Any) -> KVCodecRadixCache:
    """Factory for SGLang's radix-cache registry; ``ctx`` is its ``TreeCacheBuildContext``.

    Raises:
        ConfigurationError: what was asked for can't be had; the server does not start.
    """
    try:
        if ctx.disable_radix_cache:
            raise UnsupportedError("kvcodec does not work together with --disable-radix-cache")
        check_built_kinds(ctx.is_hybrid_swa, ctx.is_hybrid_ssm)
        config = server_config(ctx.server_args)
        pool = wrap_pool(ctx.params.token_to_kv_pool_allocator.get_kvcache(), ctx.params.page_size)
        transforms = PageTransforms(pool.spec, config.tiers, device=pool.device)
        cache: KVCodecRadixCache = create_unified_radix_cache(ctx, cache_class=KVCodecRadixCache)
        calibration = calibration_at_start(ctx, config, transforms, cache.all_ranks)
        with starting_on(parse_cpus(config.cpus)):
            runtime = Runtime(
                config,
                pool,
                transforms,
                calibration,
                lambda: build_namespace(ctx, pool.spec, transforms.uncalibrated),
                auto_calibration(ctx, config, transforms) if calibration is None else None,
                max(0, ctx.params.chunked_prefill_size or 0),
                ((get_parallel().dp_rank or 0) * ctx.params.pp_size + ctx.params.pp_rank) * ctx.tp_size + ctx.tp_rank,
            )
    except ConfigurationError as error:
        logger.error("sglang-kvcodec: %s", error)
        raise
    cache.attach(runtime, ctx)
    return cache
