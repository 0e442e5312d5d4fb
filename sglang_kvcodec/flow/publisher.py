"""Copies new pages out of the pool, codes them and stores them at the peer, in the background.

A copier takes pages out of the pool as soon as it can, so that their slots are free again, then encoders code them and
a sender stores them; what is between them is bounded. Where that has no room for new pages, those that have waited
longest are dropped and counted.

What was coded and can't be stored because the peer is away is kept in host memory, as far as that has room, and stored
when the peer is back.

Out of a pool on a GPU pages come packed by kernels, and encoders code their pictures; elsewhere they come as they are,
and encoders pack them first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.niceness import be_nice
from sglang_kvcodec.flow.offload import Offload, Target
from sglang_kvcodec.flow.page_codec import PageEncoder
from sglang_kvcodec.flow.page_packer import PagePacker
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.publish_copying import CopyLoop
from sglang_kvcodec.flow.publish_encoding import EncodeLoop
from sglang_kvcodec.flow.publish_peer import PublishPeer
from sglang_kvcodec.flow.publish_queue import PublishQueue, count_dropped
from sglang_kvcodec.flow.publish_sending import SendLoop
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.spec import Side

NICENESS = 10
"""Publishing yields the CPU to the server's own threads."""


class Publisher:
    """The write side of one server process."""

    def __init__(
        self,
        peer: PeerTransport,
        monitor: PeerMonitor,
        stored: StoredPages,
        pool: PagedKVPool,
        new_encoder: Callable[[bytes], PageEncoder],
        tier_of: Callable[[bytes], str],
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
            tier_of: names the tier of a namespace, for the metrics.
            config: bounds.
            on_page: called on the copying thread with the values ``(layers, page_tokens, kv_heads, head_dim)`` of each
                side of a page that will be published, and the position of its first token.
            wants_pages: whether ``on_page`` has any use for a page now, which costs a copy; None if it always has.
            packer: packs pages where they lie; None to copy them and to pack them on the encoding threads.
            on_coded: called on an encoding thread with the hash and the page object of each page of the best tier,
                before it is sent; keeps it in host memory.
            recall: gives it back, by namespace and hash, if it is still there.
        """
        self._monitor = monitor
        self._pool = pool
        self._config = config
        self._packer = packer
        self._closed = closed = threading.Event()
        self._pages = PublishQueue(config.publish_queue_bytes)
        patience_s = config.timeouts.retry_s * 2
        self._peer = PublishPeer(peer, monitor, stored, patience_s, pool.spec.page_bytes, tier_of, closed)
        self._copying = CopyLoop(pool, packer, self._peer, self._pages, closed, on_page, wants_pages)
        self._sending = SendLoop(self._peer, self._pages, recall, closed)
        encoding = EncodeLoop(self._pages, self._peer, pool, new_encoder, on_coded, self._sending.put, closed)
        monitor.on_up = self._sending.peer_is_back
        self._threads = [
            _nice_thread("kvcodec-copy", self._copying.run),
            *(
                _nice_thread(f"kvcodec-encode-{i}", encoding.run)
                for i in range(max(config.encode_threads, config.encoder_processes))
            ),
            _nice_thread("kvcodec-send", self._sending.run),
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
        if self._config.read_only or not any(self._peer.missing(offload, target) for target in targets):
            offload.settle(True)
        elif self._closed.is_set():
            count_dropped(len(page_hashes), "closed")
            offload.settle(False)
        elif not self._monitor.is_up:
            count_dropped(len(page_hashes), "peer_down")
            offload.settle(False)
        elif not self._pages.reserve(offload.reserved_bytes):
            count_dropped(len(page_hashes), "queue_full")
            offload.settle(False)
        else:
            self._copying.put(offload)
        return offload

    def close(self) -> None:
        """Drops what waits and ends; the monitor and the peer are to be closed first, which ends waits and calls.

        Every offload is settled afterwards.
        """
        self._closed.set()
        copier, *encoders, sender = self._threads
        # In the order in which pages pass through, so that each thread finds all that it has to drop.
        self._copying.end()
        copier.join(timeout=10)
        self._pages.close()
        for thread in encoders:
            thread.join(timeout=10)
        self._sending.end()
        sender.join(timeout=10)
        count_dropped(self._sending.kept_pages, "closed")

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits until nothing is queued or under way; for tests."""
        return self._pages.wait_until_empty(timeout_s)

    def _page_bytes(self, namespace_digest: bytes) -> int:
        """What a page is taken to need before it is known."""
        return self._packer.page_bytes(namespace_digest) if self._packer is not None else self._pool.spec.page_bytes


def _nice_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    def run_nicely() -> None:
        be_nice(NICENESS)
        run()

    return threading.Thread(target=run_nicely, name=name, daemon=True)
