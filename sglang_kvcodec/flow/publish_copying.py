"""Takes pages out of the pool, as values or packed, so that their slots are free again, and queues them to be coded."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.offload import Offload, Target
from sglang_kvcodec.flow.page_codec import PackedPage
from sglang_kvcodec.flow.page_packer import PagePacker
from sglang_kvcodec.flow.publish_peer import PublishPeer
from sglang_kvcodec.flow.publish_queue import PageContent, PublishQueue, UncodedPage, count_dropped
from sglang_kvcodec.format.spec import Side

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What is left of a page when its slots are not read any more.

    Attributes:
        content: to encode.
        shown: its values, if they are to be shown.
    """

    content: PageContent
    shown: Mapping[Side, torch.Tensor] | None


class CopyLoop:
    """What the copying thread does. Every offload that it is given is settled."""

    def __init__(
        self,
        pool: PagedKVPool,
        packer: PagePacker | None,
        peer: PublishPeer,
        pages: PublishQueue,
        closed: threading.Event,
        on_page: Callable[[Mapping[Side, torch.Tensor], int], None] | None,
        wants_pages: Callable[[], bool] | None,
    ) -> None:
        """Nothing to copy.

        Args:
            pool: where pages come from.
            packer: packs them where they lie; None where they are taken as they are.
            peer: knows which of them it has.
            pages: has room for them already; gets those that are to be encoded.
            closed: set when what comes is to be dropped.
            on_page: as of ``Publisher``.
            wants_pages: as of ``Publisher``.
        """
        self._pool = pool
        self._packer = packer
        self._peer = peer
        self._pages = pages
        self._closed = closed
        self._on_page = on_page
        self._wants_pages = wants_pages
        self._to_copy: queue.SimpleQueue[Offload | None] = queue.SimpleQueue()

    def put(self, offload: Offload) -> None:
        """Hands over pages, for which room is reserved."""
        self._to_copy.put(offload)

    def end(self) -> None:
        """Ends :meth:`run` after what was handed over."""
        self._to_copy.put(None)

    def run(self) -> None:
        """Copies until :meth:`end`."""
        while (offload := self._to_copy.get()) is not None:
            pages = len(offload.page_hashes)
            missing = [self._peer.missing(offload, target) for target in offload.targets]
            try:
                is_wanted = any(missing) and not self._closed.is_set()
                taken = self._take(offload, missing) if is_wanted else [[] for _ in missing]
            except Exception:
                # A thread's top: the pages' slots stay locked until this is answered.
                logger.exception("kvcodec: pages could not be copied out of the pool")
                count_dropped(pages, "copy_failed")
                self._pages.release(offload.reserved_bytes)
                offload.settle(False)
                continue
            if self._closed.is_set():
                count_dropped(pages, "closed")
                self._pages.release(offload.reserved_bytes)
                offload.settle(False)
                continue
            offload.settle(True)
            for tier in range(len(offload.targets)):
                self._queue_missing(offload, tier, missing[tier], taken[tier])

    def _take(self, offload: Offload, missing: Sequence[Sequence[int]]) -> list[list[_Taken]]:
        """For each target, what is left of each missing page when its slots are somebody else's."""
        is_shown = self._on_page is not None and (self._wants_pages is None or self._wants_pages())
        packed_by = [self._packer_of(target) for target in offload.targets]
        # Once for all targets that take pages as they are. Those of the best one are shown.
        copied = sorted(
            {
                index
                for tier, (packer, indices) in enumerate(zip(packed_by, missing, strict=True))
                if packer is None or (is_shown and tier == 0)
                for index in indices
            }
        )
        values = self._pool.gather(offload.slots, offload.after, copied) if copied else {}
        pages = {index: {side: tensor[i] for side, tensor in values.items()} for i, index in enumerate(copied)}
        taken = []
        for tier, (target, packer, indices) in enumerate(zip(offload.targets, packed_by, missing, strict=True)):
            contents: Sequence[PageContent]
            if packer is None or not indices:
                contents = [pages[index] for index in indices]
            else:
                contents = packer.pack(
                    target.namespace_digest, offload.slots, offload.after, indices, offload.first_position
                )
            shown = [pages[index] if is_shown and tier == 0 else None for index in indices]
            taken.append([_Taken(*both) for both in zip(contents, shown, strict=True)])
        return taken

    def _packer_of(self, target: Target) -> PagePacker | None:
        """What packs pages of a target; None where they are taken as they are."""
        return self._packer if self._packer is not None and self._packer.packs(target.namespace_digest) else None

    def _queue_missing(self, offload: Offload, tier: int, missing: Sequence[int], taken: list[_Taken]) -> None:
        target, page_bytes = offload.targets[tier], offload.page_bytes[tier]
        hashes = [offload.page_hashes[i] for i in missing]
        present = self._peer.present(target.namespace_digest, hashes)
        self._pages.release((len(target.pages) - len(missing) + sum(present)) * page_bytes)
        if any(present):
            self._peer.count_present(target.namespace_digest, sum(present))
        # So that what is not queued is not kept until the next offload.
        taken.reverse()
        for i, page_hash in enumerate(hashes):
            page = taken.pop()
            if present[i]:
                continue
            first_position = offload.first_position + missing[i] * self._pool.spec.page_tokens
            if page.shown is not None and self._on_page is not None:
                self._on_page(page.shown, first_position)
            held_bytes = page_bytes
            if isinstance(page.content, PackedPage):
                held_bytes = page.content.size_bytes
                if not self._pages.resize(page_bytes, held_bytes):
                    count_dropped(1, "queue_full")
                    self._pages.release(page_bytes)
                    continue
            waiting = UncodedPage(
                target.namespace_digest, page_hash, page.content, held_bytes, first_position, is_best=tier == 0
            )
            self._pages.put(waiting, tier)
