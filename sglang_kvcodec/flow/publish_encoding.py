"""Codes the pages that are queued for publishing, and hands them on to be stored."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import PackedPage, PageEncoder
from sglang_kvcodec.flow.publish_peer import PublishPeer
from sglang_kvcodec.flow.publish_queue import CodedPage, PublishQueue, UncodedPage, count_dropped

logger = logging.getLogger(__name__)

MAX_ENCODERS = 4
"""That a thread keeps open: of the tiers, and of those before a calibration."""


class EncodeLoop:
    """What each of the encoding threads does."""

    def __init__(
        self,
        pages: PublishQueue,
        peer: PublishPeer,
        pool: PagedKVPool,
        new_encoder: Callable[[bytes], PageEncoder],
        on_coded: Callable[[bytes, bytes], None],
        send: Callable[[CodedPage], None],
        closed: threading.Event,
    ) -> None:
        """Nothing is coded.

        Args:
            pages: to code.
            peer: without it only what host memory keeps is coded.
            pool: where they come from.
            new_encoder: opens an encoder for pages of a namespace, for one thread.
            on_coded: as of ``Publisher``.
            send: takes what was coded, which still holds its room.
            closed: set when what is left is to be dropped.
        """
        self._pages = pages
        self._peer = peer
        self._pool = pool
        self._new_encoder = new_encoder
        self._on_coded = on_coded
        self._send = send
        self._closed = closed

    def run(self) -> None:
        """Codes until the queue is closed and empty; any number of threads may."""
        encoders: dict[bytes, PageEncoder] = {}
        while (page := self._pages.get()) is not None:
            self._encode_and_send(page, encoders)
            # It would be held until the next one comes.
            del page

    def _encode_and_send(self, page: UncodedPage, encoders: dict[bytes, PageEncoder]) -> None:
        """``encoders``: the thread's, by namespace; no more than :data:`MAX_ENCODERS`."""
        # Without a peer only what host memory keeps is worth coding.
        is_of_use = page.is_best or self._peer.wait_until_up()
        if self._closed.is_set() or not is_of_use:
            self._drop(page, "closed" if self._closed.is_set() else "peer_down")
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
            self._drop(page, error.reason)
        except Exception:
            # A thread's top: publishing goes on with the next page.
            logger.exception("kvcodec: a page could not be encoded")
            self._drop(page, "encode_failed")
        else:
            self._send(CodedPage(page.namespace_digest, page.page_hash, coded, page.held_bytes, page.is_best))

    def _encode(self, encoder: PageEncoder, page: UncodedPage) -> bytes:
        if isinstance(page.content, PackedPage):
            return encoder.encode_packed(page.page_hash, page.content)
        # A calibrated tier packs on the pool's device: not on the stream that the model is launched on.
        with self._pool.side_stream():
            return encoder.encode(page.page_hash, page.content, page.first_position)

    def _drop(self, page: UncodedPage, reason: str) -> None:
        count_dropped(1, reason)
        self._pages.release(page.held_bytes)
