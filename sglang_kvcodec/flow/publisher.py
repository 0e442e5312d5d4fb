"""Copies new pages out of the pool, codes them and stores them at the peer, in the background.

Two threads and two bounded hand-overs: the copier takes pages out of the pool as soon as it can, so that their slots
are free again, then the encoders code them and the sender stores them. Where that has no room for new pages, those that
have waited longest are dropped and counted.

What was coded and can't be stored because the peer is away is kept in host memory, as far as that has room, and stored
when the peer is back.

Out of a pool on a GPU pages come packed by kernels, and encoders code their pictures; elsewhere they come as they are,
and encoders pack them first.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.errors import KVCodecError, PeerError, PeerRejectedError
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import PackedPage, PageEncoder
from sglang_kvcodec.flow.page_packer import PagePacker
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.turn_queue import TurnQueue
from sglang_kvcodec.flow.write_back import WriteBack
from sglang_kvcodec.format.exchange import PeerTransport, PutOutcome
from sglang_kvcodec.format.spec import Side

logger = logging.getLogger(__name__)

PUT_BATCH_PAGES = 16
"""Pages per Put."""
PUT_ATTEMPTS = 3
MAX_ENCODERS = 4
"""That a thread keeps open: of the tiers, and of those before a calibration."""
NICENESS = 10
"""Publishing yields the CPU to the server's own threads."""
TURN_S_PER_TIER = 5.0
"""So much later is the turn of a page for each tier that is better than its own."""
TURN_S_PER_TOKEN = 1e-3
"""So much later is the turn of a page for each token before it: about what it takes to code one."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A namespace that pages are published in.

    Attributes:
        namespace_digest: the namespace.
        pages: indices of the pages of an offload that it is to get.
    """

    namespace_digest: bytes
    pages: Sequence[int]


class Offload:
    """Pages handed over for publishing."""

    def __init__(
        self,
        targets: Sequence[Target],
        page_hashes: Sequence[bytes],
        slots: torch.Tensor,
        after: Sequence[Any] = (),
        page_bytes: Sequence[int] = (),
        first_position: int = 0,
    ) -> None:
        """An offload that is not settled yet; the arguments are those of :meth:`Publisher.offload`.

        ``page_bytes`` is what a page has reserved of the queue for each target.
        """
        self.targets = targets
        self.page_hashes = page_hashes
        self.slots = slots
        self.after = after
        self.page_bytes = page_bytes
        self.first_position = first_position
        self.succeeded: bool | None = None
        """Whether the pages were taken over; None as long as their slots may still be read."""
        self._settled = threading.Event()

    @property
    def reserved_bytes(self) -> int:
        """Of the queue, by all its pages."""
        return sum(size * len(target.pages) for size, target in zip(self.page_bytes, self.targets, strict=True))

    def settle(self, succeeded: bool) -> None:
        """The slots are free again."""
        self.succeeded = succeeded
        self._settled.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the slots are free again; False if they are not after ``timeout_s``."""
        return self._settled.wait(timeout_s)


@dataclasses.dataclass(frozen=True)
class _Page:
    namespace_digest: bytes
    page_hash: bytes
    content: Mapping[Side, torch.Tensor] | PackedPage | None
    """None once it is coded."""
    held_bytes: int
    """Of the queue."""
    first_position: int
    is_best: bool
    """Whether it is of the best tier."""


@dataclasses.dataclass(frozen=True)
class _PeerIsBack:
    """Ends a batch; that the peer is back, or nothing new."""

    is_news: bool = True


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What is left of a page when its slots are not read any more.

    Attributes:
        content: to encode.
        shown: its values, if they are to be shown.
    """

    content: Mapping[Side, torch.Tensor] | PackedPage
    shown: Mapping[Side, torch.Tensor] | None


def _turn_s(first_position: int, tier: int) -> float:
    """The turn of a page, from now on, among those that wait for an encoder; the least is first.

    The nearer to the start of its prompt, the more other prompts may begin as well with what ends in it; and a page is
    of no use without those before it. A later one waits for its turn, not for ever; so does one of a smaller tier.
    """
    return time.monotonic() + first_position * TURN_S_PER_TOKEN + tier * TURN_S_PER_TIER


class Publisher:
    """The write side of one server process."""

    def __init__(
        self,
        peer: PeerTransport,
        monitor: PeerMonitor,
        stored: StoredPages,
        pool: PagedKVPool,
        new_encoder: Callable[[bytes], PageEncoder],
        config: ServerConfig,
        on_page: Callable[[Mapping[Side, torch.Tensor], int], None] | None = None,
        wants_pages: Callable[[], bool] | None = None,
        packer: PagePacker | None = None,
        on_coded: Callable[[bytes, bytes], None] = lambda page_hash, coded: None,
        recall: Callable[[bytes, bytes], bytes | None] = lambda namespace_digest, page_hash: None,
    ) -> None:
        """Starts the threads.

        Args:
            peer: where pages go.
            monitor: knows whether it is there.
            stored: knows what it has.
            pool: where pages come from.
            new_encoder: opens an encoder for pages of a namespace, for one thread.
            config: bounds.
            on_page: called on the copying thread with the values ``(layers, page_tokens, kv_heads, head_dim)`` of each
                side of a page that will be published, and the position of its first token.
            wants_pages: whether ``on_page`` has any use for a page now, which costs a copy; None if it always has.
            packer: packs pages where they lie; None to copy them and to pack them on the encoding threads.
            on_coded: called on an encoding thread with the hash and the page object of each page of the best tier,
                before it is sent; keeps it in host memory.
            recall: gives it back, by namespace and hash, if it is still there.
        """
        self._peer = peer
        self._monitor = monitor
        self._stored = stored
        self._pool = pool
        self._new_encoder = new_encoder
        self._config = config
        self._on_page = on_page
        self._wants_pages = wants_pages
        self._packer = packer
        self._on_coded = on_coded
        self._recall = recall
        self._write_back = WriteBack()
        self._queue_changed = threading.Condition()
        self._queued_bytes = 0
        self._closed = threading.Event()
        self._to_copy: queue.SimpleQueue[Offload | None] = queue.SimpleQueue()
        self._to_encode: TurnQueue[_Page] = TurnQueue()
        """By their turns, see :func:`_turn_s`."""
        self._to_send: queue.SimpleQueue[tuple[_Page, bytes] | _PeerIsBack | None] = queue.SimpleQueue()
        monitor.on_up = lambda: self._to_send.put(_PeerIsBack())
        self._threads = [
            threading.Thread(target=self._copy_loop, name="kvcodec-copy", daemon=True),
            *(
                threading.Thread(target=self._encode_loop, name=f"kvcodec-encode-{i}", daemon=True)
                for i in range(max(config.encode_threads, config.encoder_processes))
            ),
            threading.Thread(target=self._send_loop, name="kvcodec-send", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def offload(
        self,
        targets: Sequence[Target],
        page_hashes: Sequence[bytes],
        slots: torch.Tensor,
        after: Sequence[Any],
        first_position: int = 0,
    ) -> Offload:
        """Takes pages; returns at once and never waits.

        Args:
            targets: the namespaces that get them, that of the best tier first.
            page_hashes: one per page, of pages that follow each other.
            slots: int64 ``(pages * page_tokens,)`` on the pool's device; must stay as they are until the result is
                settled.
            after: device events after which the slots are written.
            first_position: of the first page's first token; only calibrated tiers use it.

        Returns:
            An offload that has succeeded already if the peer has all the pages, and failed already if there is no
            room or no peer.
        """
        page_bytes = [self._page_bytes(target.namespace_digest) for target in targets]
        offload = Offload(targets, page_hashes, slots, after, page_bytes, first_position)
        if self._config.read_only or not any(self._missing(offload, target) for target in targets):
            offload.settle(True)
        elif self._closed.is_set():
            self._drop(len(page_hashes), "closed")
            offload.settle(False)
        elif not self._monitor.is_up:
            self._drop(len(page_hashes), "peer_down")
            offload.settle(False)
        elif not self._reserve(offload.reserved_bytes):
            self._drop(len(page_hashes), "queue_full")
            offload.settle(False)
        else:
            self._to_copy.put(offload)
        return offload

    def close(self) -> None:
        """Drops what waits and ends; the monitor and the peer are to be closed first, which ends waits and calls.

        Every offload is settled afterwards.
        """
        self._closed.set()
        copier, *encoders, sender = self._threads
        # In the order in which pages pass through, so that each thread finds all that it has to drop.
        self._to_copy.put(None)
        copier.join(timeout=10)
        self._to_encode.close()
        for thread in encoders:
            thread.join(timeout=10)
        self._to_send.put(None)
        sender.join(timeout=10)
        self._drop(len(self._write_back), "closed")

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits until nothing is queued or under way; for tests."""
        with self._queue_changed:
            return self._queue_changed.wait_for(lambda: not self._queued_bytes, timeout_s)

    # ---- accounting ----

    def _missing(self, offload: Offload, target: Target) -> list[int]:
        """Indices of the pages that a target is to get and is not known to have."""
        hashes = [offload.page_hashes[index] for index in target.pages]
        return [target.pages[index] for index in self._stored.missing(target.namespace_digest, hashes)]

    def _page_bytes(self, namespace_digest: bytes) -> int:
        """What a page is taken to need before it is known."""
        return self._packer.page_bytes(namespace_digest) if self._packer is not None else self._pool.spec.page_bytes

    def _reserve(self, size_bytes: int) -> bool:
        with self._queue_changed:
            # One offload larger than the bound is taken when nothing else is under way: else it never could be.
            bound_bytes = self._config.publish_queue_bytes
            if self._queued_bytes and self._queued_bytes + size_bytes > bound_bytes:
                # Looked at one by one only where it is full: this runs on the scheduler's thread.
                fixed_bytes = self._queued_bytes - sum(page.held_bytes for page in self._to_encode.waiting())
                if fixed_bytes and fixed_bytes + size_bytes > bound_bytes:
                    return False
            while self._queued_bytes and self._queued_bytes + size_bytes > bound_bytes:
                oldest = self._to_encode.drop_oldest()
                if oldest is None:
                    break
                self._drop(1, "queue_full")
                self._queued_bytes -= oldest.held_bytes
            self._queued_bytes += size_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._queued_bytes)
            return True

    def _resize(self, reserved_bytes: int, held_bytes: int) -> bool:
        """Has a page hold what it is instead of what it was taken for; False if it is more, and there is no room."""
        with self._queue_changed:
            grown_bytes = held_bytes - reserved_bytes
            if grown_bytes > 0 and self._queued_bytes + grown_bytes > self._config.publish_queue_bytes:
                return False
            self._queued_bytes += grown_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._queued_bytes)
            return True

    def _release(self, size_bytes: int) -> None:
        with self._queue_changed:
            self._queued_bytes -= size_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._queued_bytes)
            self._queue_changed.notify_all()

    def _drop(self, pages: int, reason: str) -> None:
        metrics.PUBLISH_DROPS.labels(reason=reason).inc(pages)

    # ---- threads ----

    def _copy_loop(self) -> None:
        _be_nice()
        while (offload := self._to_copy.get()) is not None:
            pages = len(offload.page_hashes)
            missing = [self._missing(offload, target) for target in offload.targets]
            try:
                is_wanted = any(missing) and not self._closed.is_set()
                taken = self._take(offload, missing) if is_wanted else [[] for _ in missing]
            except Exception:
                # A thread's top: the pages' slots stay locked until this is answered.
                logger.exception("kvcodec: pages could not be copied out of the pool")
                self._drop(pages, "copy_failed")
                self._release(offload.reserved_bytes)
                offload.settle(False)
                continue
            if self._closed.is_set():
                self._drop(pages, "closed")
                self._release(offload.reserved_bytes)
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
            contents: Sequence[Mapping[Side, torch.Tensor] | PackedPage]
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
        present = self._present(target.namespace_digest, hashes)
        self._release((len(target.pages) - len(missing) + sum(present)) * page_bytes)
        if any(present):
            metrics.PUBLISHED_PAGES.labels(outcome="already_stored").inc(sum(present))
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
                if not self._resize(page_bytes, held_bytes):
                    self._drop(1, "queue_full")
                    self._release(page_bytes)
                    continue
            waiting = _Page(
                target.namespace_digest, page_hash, page.content, held_bytes, first_position, is_best=tier == 0
            )
            self._to_encode.put(_turn_s(first_position, tier), waiting)

    def _present(self, namespace_digest: bytes, hashes: list[bytes]) -> Sequence[bool]:
        """Which of the pages the peer has: one RPC, so that no page is coded in vain."""
        if not hashes or not self._monitor.is_up:
            # Without a peer nothing is known, and the next offload must not wait for a time-out.
            return [False] * len(hashes)
        try:
            lookup = self._peer.lookup(namespace_digest, hashes)
        except PeerError as error:
            self._monitor.failed("lookup", error)
            return [False] * len(hashes)
        self._stored.update(namespace_digest, hashes, lookup.present)
        return lookup.present

    def _encode_loop(self) -> None:
        _be_nice()
        encoders: dict[bytes, PageEncoder] = {}
        while (page := self._to_encode.get()) is not None:
            self._encode_and_queue(page, encoders)
            # It would be held until the next one comes.
            del page

    def _encode_and_queue(self, page: _Page, encoders: dict[bytes, PageEncoder]) -> None:
        """``encoders``: the thread's, by namespace; no more than :data:`MAX_ENCODERS`."""
        # Without a peer only what host memory keeps is worth coding.
        is_of_use = page.is_best or self._monitor.wait_until_up(self._config.timeouts.retry_s * 2)
        if self._closed.is_set() or not is_of_use:
            self._drop(1, "closed" if self._closed.is_set() else "peer_down")
            self._release(page.held_bytes)
            return
        try:
            if page.namespace_digest not in encoders:
                if len(encoders) >= MAX_ENCODERS:
                    encoders.clear()
                encoders[page.namespace_digest] = self._new_encoder(page.namespace_digest)
            start_s = time.monotonic()
            coded = self._encode(encoders[page.namespace_digest], page)
            metrics.ENCODE_SECONDS.observe(time.monotonic() - start_s)
            if page.is_best:
                self._on_coded(page.page_hash, coded)
        except KVCodecError as error:
            logger.error("kvcodec: a page could not be encoded: %s", error)
            self._drop(1, error.reason)
            self._release(page.held_bytes)
        except Exception:
            # A thread's top: publishing goes on with the next page.
            logger.exception("kvcodec: a page could not be encoded")
            self._drop(1, "encode_failed")
            self._release(page.held_bytes)
        else:
            self._to_send.put((dataclasses.replace(page, content=None), coded))

    def _encode(self, encoder: PageEncoder, page: _Page) -> bytes:
        assert page.content is not None, "it is coded once"
        if isinstance(page.content, PackedPage):
            return encoder.encode_packed(page.page_hash, page.content)
        # A calibrated tier packs on the pool's device: not on the stream that the model is launched on.
        with self._pool.side_stream():
            return encoder.encode(page.page_hash, page.content, page.first_position)

    def _send_loop(self) -> None:
        _be_nice()
        end: _PeerIsBack | None = _PeerIsBack()
        while end is not None:
            batch, end = self._next_batch()
            try:
                self._send(batch)
                if isinstance(end, _PeerIsBack) and end.is_news:
                    self._send_what_was_kept()
            except Exception:
                # A thread's top: publishing goes on with the next pages.
                logger.exception("kvcodec: pages could not be stored")
                self._drop(len(batch), "send_failed")
            finally:
                self._release(sum(page.held_bytes for page, _ in batch))

    def _next_batch(self) -> tuple[list[tuple[_Page, bytes]], _PeerIsBack | None]:
        """Waits for a page and takes what else is there; and what ended the batch, None if nothing comes after it."""
        batch: list[tuple[_Page, bytes]] = []
        item = self._to_send.get()
        while isinstance(item, tuple):
            batch.append(item)
            if len(batch) == PUT_BATCH_PAGES or self._to_send.empty():
                return batch, _PeerIsBack(is_news=False)
            item = self._to_send.get()
        return batch, item

    def _send_what_was_kept(self) -> None:
        """Stores what the peer has not been given while it was away, if it is still in host memory."""
        while len(self._write_back) and self._monitor.is_up and not self._closed.is_set():
            for namespace_digest, hashes in self._write_back.take(PUT_BATCH_PAGES).items():
                present = self._present(namespace_digest, hashes)
                batch = []
                for page_hash, is_present in zip(hashes, present, strict=True):
                    coded = None if is_present else self._recall(namespace_digest, page_hash)
                    if coded is not None:
                        batch.append((_Page(namespace_digest, page_hash, None, 0, 0, is_best=True), coded))
                lost = len(hashes) - len(batch) - sum(present)
                self._drop(lost, "peer_down")
                metrics.WRITE_BACK_PAGES.labels(outcome="lost").inc(lost)
                metrics.WRITE_BACK_PAGES.labels(outcome="sent").inc(len(batch))
                self._send(batch)

    def _send(self, batch: list[tuple[_Page, bytes]]) -> None:
        by_namespace: dict[bytes, list[tuple[_Page, bytes]]] = {}
        for page, coded in batch:
            by_namespace.setdefault(page.namespace_digest, []).append((page, coded))
        for namespace_digest, pages in by_namespace.items():
            reason, is_away = "", False
            for _ in range(PUT_ATTEMPTS):
                if self._closed.is_set():
                    reason = "closed"
                    break
                try:
                    results = self._peer.put(namespace_digest, [(page.page_hash, coded) for page, coded in pages])
                except PeerError as error:
                    # Storing a page twice does no harm: the peer keeps the first.
                    self._monitor.failed("put", error)
                    reason, is_away = error.reason, not isinstance(error, PeerRejectedError)
                    if not is_away:
                        break
                    if not self._monitor.wait_until_up(self._config.timeouts.retry_s * 2):
                        break
                    continue
                reason, is_away = "", False
                kept = (PutOutcome.STORED, PutOutcome.ALREADY_STORED)
                self._stored.update(
                    namespace_digest, [page.page_hash for page, _ in pages], [r.outcome in kept for r in results]
                )
                for (_, coded), result in zip(pages, results, strict=True):
                    metrics.PUBLISHED_PAGES.labels(outcome=result.outcome.value).inc()
                    if result.outcome is PutOutcome.STORED:
                        metrics.PUBLISHED_BYTES.inc(len(coded))
                        metrics.PUBLISHED_KV_BYTES.inc(self._pool.spec.page_bytes)
                    elif result.outcome not in kept:
                        self._drop(1, result.outcome.value)
                        logger.warning("kvcodec: the peer did not store a page: %s", result.detail)
                break
            if is_away:
                self._keep(namespace_digest, [page for page, _ in pages], reason)
            elif reason:
                self._drop(len(pages), reason)

    def _keep(self, namespace_digest: bytes, pages: Sequence[_Page], reason: str) -> None:
        """Of pages that could not be stored, keeps what host memory has, and drops the rest."""
        kept = [page.page_hash for page in pages if page.is_best]
        self._drop(len(pages) - len(kept) + self._write_back.keep(namespace_digest, kept), reason)
        if self._monitor.is_up:
            # It was away for a moment only: nobody will say that it has come back.
            self._to_send.put(_PeerIsBack())


def _be_nice() -> None:
    """Lowers the priority of this thread alone, where the system can: on Linux a thread has a niceness of its own."""
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except OSError as error:
            logger.debug("kvcodec: publishing keeps its priority: %s", error)
