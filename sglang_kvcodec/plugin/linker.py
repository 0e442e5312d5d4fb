"""Between SGLang's tree and the flow: which pages a request can have, restoring them, and publishing new ones.

SGLang calls every method on the scheduler's thread; none of them waits for the network, a codec or a disk.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.offload import Offload, Target
from sglang_kvcodec.flow.publisher import Publisher
from sglang_kvcodec.flow.restore import Restore, RestoreJob
from sglang_kvcodec.flow.restorer import Restorer
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.flow.streams import DeviceEvent
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import LayerGroup
from sglang_kvcodec.plugin.load_counter import EventLoadCounter
from sglang_kvcodec.plugin.provenance import Provenance
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime, timed

logger = logging.getLogger(__name__)

MAX_BAD_PAGES = 1 << 14
MAX_COMPUTED = 1 << 14


class WaitedCounter(EventLoadCounter):
    """A counter that also tells how long the launching thread of a forward pass has waited."""

    def __init__(self, num_layers: int, on_wait: Callable[[int, float, float], None]) -> None:
        """A counter.

        Args:
            num_layers: of this rank.
            on_wait: called with a layer, and when a wait for it began and ended, in seconds of the monotonic clock.
        """
        super().__init__(num_layers)
        self._on_wait = on_wait

    def wait_until(self, threshold: int) -> None:
        """Waits for a layer."""
        futures = self.futures.get(self.consumer_index)
        if futures is None or futures[threshold].done():
            super().wait_until(threshold)
            return
        start_s = time.monotonic()
        super().wait_until(threshold)
        self._on_wait(threshold, start_s, time.monotonic())


class KVCodecLinker(UnifiedCacheLinker):
    """One rank's link between the tree and the flow."""

    def __init__(
        self,
        pool: Any,
        num_layers: int,
        page_tokens: int,
        cache: BitstreamCache,
        restorer: Restorer,
        publisher: Publisher,
        tiers: Callable[[], Sequence[Tier]],
        pages_of: Callable[[str], dict[bytes, PageObject] | None],
        forward_stream: Any,
        tracer: Tracer | None = None,
        restoring_pays: Callable[[Sequence[PageObject]], bool] = lambda pages: True,
        scheduler_time: SchedulerTime | None = None,
        worst_of_ranks: Callable[[int], int] | None = None,
        uses_cache: bool = True,
    ) -> None:
        """Links the tree of one rank.

        Args:
            pool: SGLang's device pool.
            num_layers: layers of this rank.
            page_tokens: tokens of a page.
            cache: fetched pages.
            restorer: restores them.
            publisher: publishes new ones.
            tiers: in which pages are published and may be used now, the best first; none while there is no namespace to
                trust.
            pages_of: pages fetched for a request (by its id) that still waits; None for one that must be computed.
            forward_stream: the stream the model writes the pool on, None on a CPU.
            tracer: told of restores and of waits for layers.
            restoring_pays: whether pages in host memory are restored sooner than computed.
            scheduler_time: told what all this takes of the scheduler's thread.
            worst_of_ranks: where pages of several tiers are around: the largest of what all ranks give it at once.
            uses_cache: whether a look-up finds whatever is in host memory; if not, then only what ``pages_of`` gives:
                all stages of a pipeline have agreed how much that is.
        """
        self.scheduler_time = scheduler_time or SchedulerTime()
        self.pools = {PoolName.KV: pool}
        self.forward_stream = forward_stream
        self.layer_done_counter = WaitedCounter(num_layers, self._waited)
        self._page_tokens = page_tokens
        self._cache = cache
        self._restorer = restorer
        self._publisher = publisher
        self._tiers = tiers
        self._pages_of = pages_of
        self._restoring_pays = restoring_pays
        self._worst_of_ranks = worst_of_ranks
        self._uses_cache = uses_cache
        self._matched: dict[str, list[PageObject]] = {}
        self._computed: collections.OrderedDict[str, None] = collections.OrderedDict()
        """Requests whose pages in host memory are not used, so that every look-up says the same."""
        self._queued: dict[str, RestoreJob] = {}
        self._loading: set[str] = set()
        self._running: dict[int, Restore] = {}
        self._offloads: collections.deque[Offload] = collections.deque()
        self._bad_pages: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._before: Sequence[str] | None = None
        self._provenance = Provenance()
        self._restored: list[RestoreJob] = []
        self._waited_s = 0.0
        self._loaded_tokens = 0
        self._tracer = tracer or Tracer()

    # ---- read side ----

    @timed
    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length in pages: those whose page objects are in host memory."""
        before = {page.key.page_hash: page for page in self._matched.pop(rid, ())}
        held = self._pages_of(rid)
        digests = self._usable_digests()
        if held is None or not digests:
            return []
        pages: list[PageObject] = []
        for key in self._keys(transfers):
            if self._uses_cache:
                page = None if key in self._bad_pages else held.get(key) or before.get(key) or self._cache.get(key)
            else:
                # One that turned out bad meanwhile is bad here and not at other stages: the load will fail.
                page = held.get(key)
            # A thread may have put a page of old weights into the cache after it was cleared.
            if page is None or page.key.namespace_digest not in digests:
                break
            pages.append(page)
        if pages and not before and not held and not self._pays(rid, pages):
            return []
        if pages:
            # The restore takes these very objects, whatever the cache evicts until then. The next look-up does so too:
            # what is fetched for a request starts after what was found for it here.
            self._matched[rid] = pages
            self._cache.mark_used([page.key.page_hash for page in pages])
        return list(range(1, len(pages) + 1))

    def _usable_digests(self) -> set[bytes]:
        return {digest for tier in self._tiers() for digest in tier.namespace_digests}

    def _pays(self, rid: str, pages: Sequence[PageObject]) -> bool:
        """Whether pages in host memory are worth restoring; asked once for each request."""
        if rid not in self._computed:
            if self._restoring_pays(pages):
                return True
            metrics.PLANS.labels(reason="host_restore_too_slow").inc()
            self._computed[rid] = None
            while len(self._computed) > MAX_COMPUTED:
                self._computed.popitem(last=False)
        return False

    def kept(self, page_hashes: Sequence[bytes]) -> tuple[PageObject, ...]:
        """The first of these pages, as far as they are in host memory and worth restoring."""
        digests = self._usable_digests()
        pages: list[PageObject] = []
        for page_hash in page_hashes:
            page = self._cache.get(page_hash)
            if page is None or page.key.namespace_digest not in digests:
                break
            pages.append(page)
        if pages and not self._restoring_pays(pages):
            metrics.PLANS.labels(reason="host_restore_too_slow").inc()
            return ()
        self._cache.mark_used([page.key.page_hash for page in pages])
        return tuple(pages)

    def in_host_memory(self, page_hashes: Sequence[bytes]) -> list[PageObject] | None:
        """These pages; None if one of them is not there, or could not be restored."""
        digests = self._usable_digests()
        pages = []
        for page_hash in page_hashes:
            page = None if page_hash in self._bad_pages else self._cache.get(page_hash)
            if page is None or page.key.namespace_digest not in digests:
                return None
            pages.append(page)
        return pages

    def forget(self, rid: str) -> None:
        """The request is admitted or gone."""
        self._matched.pop(rid, None)
        self._computed.pop(rid, None)

    @timed
    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queues the restore of pages that the last :meth:`lookup` found."""
        pages = self._matched.pop(rid, [])
        count = len(self._keys(transfers))
        # All ranks agreed on `count` from what each found, so each has at least that many.
        if len(pages) < count:
            raise RuntimeError(f"kvcodec: asked to load {count} pages of which {len(pages)} were found")
        slots = transfers[0].device_indices
        self._queued[rid] = RestoreJob(pages[:count], slots)
        self._loading.add(rid)
        return True

    def is_loading(self, rid: str) -> bool:
        """Whether a restore for the request is queued or not yet judged."""
        return rid in self._loading

    def loaded(self, rid: str) -> None:
        """The request's restore has been judged."""
        self._loading.discard(rid)

    def without_bad(self, page_hashes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The part of a prefix before the first page that could not be restored once."""
        for index, page_hash in enumerate(page_hashes):
            if page_hash in self._bad_pages:
                return page_hashes[:index]
        return page_hashes

    @timed
    def start_layer_wise_loading(self) -> int:
        """Starts the queued restores; the forward pass then waits layer by layer."""
        if not self._queued:
            return -1
        jobs, rids = list(self._queued.values()), list(self._queued)
        self._queued.clear()
        start_s = time.monotonic()
        counter = self.layer_done_counter
        index = counter.update_producer()

        def on_layers(group: LayerGroup, events: Sequence[DeviceEvent]) -> None:
            counter.complete_after(index, range(group.first_layer, group.first_layer + group.layers), events)
            if group.first_layer + group.layers == counter.num_layers:
                end_s = time.monotonic()
                for rid in rids:
                    metrics.RESTORE_SECONDS.observe(end_s - start_s)
                    self._tracer.span(rid, "restore", start_s, end_s)

        def on_failure(error: KVCodecError) -> None:
            counter.fail(index, error)

        self._running[index] = self._restorer.start(jobs, on_layers, on_failure, self.slots_ready())
        return index

    def slots_ready(self) -> list[Any]:
        """Events to wait for: slots freed a moment ago may still be written by the forward pass that runs."""
        return self.record_offload_ready() if self.forward_stream is not None else []

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Whether every layer landed. Pages that could not be restored are not offered again."""
        landed = self.layer_done_counter.finish(counter_index, self.forward_stream)
        restore = self._running.pop(counter_index, None)
        if restore is not None:
            self._loaded_tokens += sum(len(job.pages) for job in restore.jobs) * self._page_tokens
        if restore is not None and self._worst_of_ranks is not None:
            self._restored += restore.jobs
        if restore is not None and not landed:
            self.blame(restore.bad_pages)
        return landed

    def blame(self, pages: Sequence[PageObject]) -> None:
        """Pages that could not be restored are not offered again."""
        for page in pages:
            self._bad_pages[page.key.page_hash] = None
        while len(self._bad_pages) > MAX_BAD_PAGES:
            self._bad_pages.popitem(last=False)
        self._cache.discard(page.key.page_hash for page in pages)

    def note_joined(self, pages: Sequence[PageObject]) -> None:
        """Remembers from which tiers pages were restored that a request is about to have; on all ranks at once."""
        if self._worst_of_ranks is not None:
            self._provenance.restored([page.key for page in pages], self._tiers(), self._worst_of_ranks)

    def note_restored(self) -> None:
        """Remembers from which tiers pages were restored, once that is over: until then another may take their place.

        Called by all ranks after the same forward passes.
        """
        if self._worst_of_ranks is not None:
            for job in self._restored:
                self._provenance.restored([page.key for page in job.pages], self._tiers(), self._worst_of_ranks)
        self._restored.clear()

    def _waited(self, layer: int, start_s: float, end_s: float) -> None:
        self._waited_s += end_s - start_s
        self._tracer.work(f"wait for layer {layer}", start_s, end_s)

    def take_loaded(self) -> tuple[float, int]:
        """How long forward passes have waited for layers since this was last asked, and for how many tokens."""
        loaded = self._waited_s, self._loaded_tokens
        self._waited_s, self._loaded_tokens = 0.0, 0
        return loaded

    def cancel_queued_load(self, rid: str) -> bool:
        """Cancels a restore that has not started."""
        self._loading.discard(rid)
        return self._queued.pop(rid, None) is not None

    # ---- write side ----

    @contextlib.contextmanager
    def offload_after(self, before: Sequence[str]) -> Iterator[None]:
        """Says of what is offloaded inside which pages of its prompts come before it, by their hashes in hex."""
        self._before = before
        try:
            yield
        finally:
            self._before = None

    @timed
    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Hands pages to the publisher. Always accepted, so that all ranks keep the same list of offloads.

        Raises:
            RuntimeError: outside :meth:`offload_after`.
        """
        if self._before is None:
            raise RuntimeError("kvcodec: pages are offloaded whose place in the prompt is not known")
        keys = self._keys(transfers)
        targets = self._targets(keys)
        if not targets:
            refused = Offload((), keys, torch.empty(0))
            refused.settle(False)
            self._offloads.append(refused)
        else:
            slots = transfers[0].device_indices
            first_position = len(self._before) * self._page_tokens
            ready = self.record_offload_ready()
            self._offloads.append(self._publisher.offload(targets, keys, slots, ready, first_position))
        return True

    def _targets(self, page_hashes: Sequence[bytes]) -> list[Target]:
        """Where pages that are offered may be published."""
        tiers = self._tiers()
        if not page_hashes or not tiers:
            return []
        if self._worst_of_ranks is None:
            return [Target(tiers[0].namespace_digests[0], range(len(page_hashes)))]
        assert self._before is not None
        before = [bytes.fromhex(page_hash) for page_hash in self._before]
        return self._provenance.targets(before, page_hashes, tiers)

    def num_completed_offloads(self) -> int:
        """Offloads whose slots are free again, counted from the oldest without a gap."""
        return len(self.completed_offloads())

    def completed_offloads(self) -> list[bool]:
        """Whether they have succeeded, the oldest first."""
        results: list[bool] = []
        for offload in self._offloads:
            # Read once: another thread sets it.
            succeeded = offload.succeeded
            if succeeded is None:
                break
            results.append(succeeded)
        return results

    def pop_completed_offload(self) -> bool:
        """The result of the oldest one."""
        return bool(self._offloads.popleft().succeeded)

    @property
    def has_pending(self) -> bool:
        """Whether slots are being read or written behind the tree's back."""
        return bool(self._offloads or self._queued or self._running)

    # ---- lifecycle ----

    def reset(self) -> None:
        """Waits until no slot is read or written any more and forgets every request."""
        for index in list(self._running):
            self.finish_layer_wise_loading(index)
        for offload in self._offloads:
            offload.wait()
        self._offloads.clear()
        self._matched.clear()
        self._computed.clear()
        self._queued.clear()
        self._loading.clear()
        self._restored.clear()
        self._provenance.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """As :meth:`reset`; the owner of the flow closes the rest."""
        self.reset()

    @staticmethod
    def _keys(transfers: Sequence[PoolTransfer]) -> list[bytes]:
        if len(transfers) != 1 or transfers[0].name != PoolName.KV:
            return []
        return [bytes.fromhex(key) for key in transfers[0].keys or []]
