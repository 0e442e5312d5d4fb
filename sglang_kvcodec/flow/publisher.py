"""Copies new pages out of the pool, codes them and stores them at the peer, in the background.

Two threads and two bounded hand-overs: the copier takes pages out of the pool as soon as it can, so that their slots
are free again, then the encoders code them and the sender stores them. What finds no room is dropped and counted.
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
from sglang_kvcodec.flow.page_codec import PageEncoder
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import PeerTransport, PutOutcome
from sglang_kvcodec.format.spec import Side

logger = logging.getLogger(__name__)

PUT_BATCH_PAGES = 16
"""Pages per Put."""
PUT_ATTEMPTS = 3
NICENESS = 10
"""Publishing yields the CPU to the server's own threads."""


class Offload:
    """Pages handed over for publishing."""

    def __init__(
        self,
        namespace_digest: bytes,
        page_hashes: Sequence[bytes],
        slots: torch.Tensor,
        after: Sequence[Any] = (),
        kv_bytes: int = 0,
        first_position: int = 0,
    ) -> None:
        """An offload that is not settled yet; the arguments are those of :meth:`Publisher.offload`."""
        self.namespace_digest = namespace_digest
        self.page_hashes = page_hashes
        self.slots = slots
        self.after = after
        self.kv_bytes = kv_bytes
        self.first_position = first_position
        self.succeeded: bool | None = None
        """Whether the pages were taken over; None as long as their slots may still be read."""
        self._settled = threading.Event()

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
    values: dict[Side, torch.Tensor]
    kv_bytes: int
    first_position: int


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
        on_page: Callable[[Mapping[Side, torch.Tensor], int], None] = lambda values, first_position: None,
        on_coded: Callable[[bytes, bytes], None] = lambda page_hash, coded: None,
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
            on_coded: called on an encoding thread with the hash and the page object of each page, before it is sent.
        """
        self._peer = peer
        self._monitor = monitor
        self._stored = stored
        self._pool = pool
        self._new_encoder = new_encoder
        self._config = config
        self._on_page = on_page
        self._on_coded = on_coded
        self._queue_changed = threading.Condition()
        self._queued_bytes = 0
        self._closed = threading.Event()
        self._to_copy: queue.SimpleQueue[Offload | None] = queue.SimpleQueue()
        self._to_encode: queue.SimpleQueue[_Page | None] = queue.SimpleQueue()
        self._to_send: queue.SimpleQueue[tuple[_Page, bytes] | None] = queue.SimpleQueue()
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
        namespace_digest: bytes,
        page_hashes: Sequence[bytes],
        slots: torch.Tensor,
        after: Sequence[Any],
        first_position: int = 0,
    ) -> Offload:
        """Takes pages; returns at once and never waits.

        Args:
            namespace_digest: namespace of the pages.
            page_hashes: one per page, of pages that follow each other.
            slots: int64 ``(pages * page_tokens,)`` on the pool's device; must stay as they are until the result is
                settled.
            after: device events after which the slots are written.
            first_position: of the first page's first token; only calibrated tiers use it.

        Returns:
            An offload that has succeeded already if the peer has all the pages, and failed already if there is no
            room or no peer.
        """
        kv_bytes = len(page_hashes) * self._pool.spec.page_bytes
        offload = Offload(namespace_digest, page_hashes, slots, after, kv_bytes, first_position)
        if self._config.read_only or not self._stored.missing(namespace_digest, page_hashes):
            offload.settle(True)
        elif self._closed.is_set():
            self._drop(len(page_hashes), "closed")
            offload.settle(False)
        elif not self._monitor.is_up:
            self._drop(len(page_hashes), "peer_down")
            offload.settle(False)
        elif not self._reserve(kv_bytes):
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
        for _ in encoders:
            self._to_encode.put(None)
        for thread in encoders:
            thread.join(timeout=10)
        self._to_send.put(None)
        sender.join(timeout=10)

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits until nothing is queued or under way; for tests."""
        with self._queue_changed:
            return self._queue_changed.wait_for(lambda: not self._queued_bytes, timeout_s)

    # ---- accounting ----

    def _reserve(self, kv_bytes: int) -> bool:
        with self._queue_changed:
            # One offload larger than the bound is taken when nothing else waits: else it never could be.
            if self._queued_bytes and self._queued_bytes + kv_bytes > self._config.publish_queue_bytes:
                return False
            self._queued_bytes += kv_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._queued_bytes)
            return True

    def _release(self, kv_bytes: int) -> None:
        with self._queue_changed:
            self._queued_bytes -= kv_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._queued_bytes)
            self._queue_changed.notify_all()

    def _drop(self, pages: int, reason: str) -> None:
        metrics.PUBLISH_DROPS.labels(reason=reason).inc(pages)

    # ---- threads ----

    def _copy_loop(self) -> None:
        _be_nice()
        while (offload := self._to_copy.get()) is not None:
            pages = len(offload.page_hashes)
            missing = self._stored.missing(offload.namespace_digest, offload.page_hashes)
            try:
                is_wanted = bool(missing) and not self._closed.is_set()
                values = self._pool.gather(offload.slots, offload.after, missing) if is_wanted else {}
            except Exception:
                # A thread's top: the pages' slots stay locked until this is answered.
                logger.exception("kvcodec: pages could not be copied out of the pool")
                self._drop(pages, "copy_failed")
                self._release(offload.kv_bytes)
                offload.settle(False)
                continue
            if self._closed.is_set():
                self._drop(pages, "closed")
                self._release(offload.kv_bytes)
                offload.settle(False)
                continue
            offload.settle(True)
            self._queue_missing(offload, missing, values)

    def _queue_missing(self, offload: Offload, missing: Sequence[int], values: dict[Side, torch.Tensor]) -> None:
        spec = self._pool.spec
        hashes = [offload.page_hashes[i] for i in missing]
        present = self._present(offload.namespace_digest, hashes)
        self._release((len(offload.page_hashes) - len(missing) + sum(present)) * spec.page_bytes)
        if any(present):
            metrics.PUBLISHED_PAGES.labels(outcome="already_stored").inc(sum(present))
        for i, page_hash in enumerate(hashes):
            if not present[i]:
                page_values = {side: tensor[i] for side, tensor in values.items()}
                first_position = offload.first_position + missing[i] * spec.page_tokens
                self._on_page(page_values, first_position)
                self._to_encode.put(
                    _Page(offload.namespace_digest, page_hash, page_values, spec.page_bytes, first_position)
                )

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
            if self._closed.is_set() or not self._monitor.wait_until_up(self._config.timeouts.retry_s * 2):
                self._drop(1, "closed" if self._closed.is_set() else "peer_down")
                self._release(page.kv_bytes)
                continue
            try:
                if page.namespace_digest not in encoders:
                    encoders = {page.namespace_digest: self._new_encoder(page.namespace_digest)}
                start_s = time.monotonic()
                # A calibrated tier packs on the pool's device: not on the stream that the model is launched on.
                with self._pool.side_stream():
                    coded = encoders[page.namespace_digest].encode(page.page_hash, page.values, page.first_position)
                metrics.ENCODE_SECONDS.observe(time.monotonic() - start_s)
                self._on_coded(page.page_hash, coded)
            except KVCodecError as error:
                logger.error("kvcodec: a page could not be encoded: %s", error)
                self._drop(1, error.reason)
                self._release(page.kv_bytes)
            except Exception:
                # A thread's top: publishing goes on with the next page.
                logger.exception("kvcodec: a page could not be encoded")
                self._drop(1, "encode_failed")
                self._release(page.kv_bytes)
            else:
                self._to_send.put((dataclasses.replace(page, values={}), coded))

    def _send_loop(self) -> None:
        _be_nice()
        is_last = False
        while not is_last:
            batch, is_last = self._next_batch()
            try:
                self._send(batch)
            except Exception:
                # A thread's top: publishing goes on with the next pages.
                logger.exception("kvcodec: pages could not be stored")
                self._drop(len(batch), "send_failed")
            finally:
                self._release(sum(page.kv_bytes for page, _ in batch))

    def _next_batch(self) -> tuple[list[tuple[_Page, bytes]], bool]:
        """Waits for a page and takes what else is there; and whether nothing comes after it."""
        batch: list[tuple[_Page, bytes]] = []
        item = self._to_send.get()
        while item is not None:
            batch.append(item)
            if len(batch) == PUT_BATCH_PAGES or self._to_send.empty():
                return batch, False
            item = self._to_send.get()
        return batch, True

    def _send(self, batch: list[tuple[_Page, bytes]]) -> None:
        by_namespace: dict[bytes, list[tuple[_Page, bytes]]] = {}
        for page, coded in batch:
            by_namespace.setdefault(page.namespace_digest, []).append((page, coded))
        for namespace_digest, pages in by_namespace.items():
            reason = "peer_down"
            for _ in range(PUT_ATTEMPTS):
                if self._closed.is_set():
                    reason = "closed"
                    break
                try:
                    results = self._peer.put(namespace_digest, [(page.page_hash, coded) for page, coded in pages])
                except PeerError as error:
                    # Storing a page twice does no harm: the peer keeps the first.
                    self._monitor.failed("put", error)
                    reason = error.reason
                    if isinstance(error, PeerRejectedError):
                        break
                    self._monitor.wait_until_up(self._config.timeouts.retry_s * 2)
                    continue
                reason = ""
                kept = (PutOutcome.STORED, PutOutcome.ALREADY_STORED)
                self._stored.update(
                    namespace_digest, [page.page_hash for page, _ in pages], [r.outcome in kept for r in results]
                )
                for (page, coded), result in zip(pages, results, strict=True):
                    metrics.PUBLISHED_PAGES.labels(outcome=result.outcome.value).inc()
                    if result.outcome is PutOutcome.STORED:
                        metrics.PUBLISHED_BYTES.inc(len(coded))
                        metrics.PUBLISHED_KV_BYTES.inc(page.kv_bytes)
                    elif result.outcome not in kept:
                        self._drop(1, result.outcome.value)
                        logger.warning("kvcodec: the peer did not store a page: %s", result.detail)
                break
            if reason:
                self._drop(len(pages), reason)


def _be_nice() -> None:
    """Lowers the priority of this thread alone, where the system can: on Linux a thread has a niceness of its own."""
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except OSError as error:
            logger.debug("kvcodec: publishing keeps its priority: %s", error)
