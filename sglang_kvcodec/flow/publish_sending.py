"""Stores coded pages at the peer, in batches; what it was not there for it gets when it is back.

Such pages stay in host memory, as far as that has room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.publish_peer import PublishPeer
from sglang_kvcodec.flow.publish_queue import CodedPage, PublishQueue, count_dropped
from sglang_kvcodec.flow.write_back import WriteBack

logger = logging.getLogger(__name__)

PUT_BATCH_PAGES = 16
"""Pages per Put."""


@dataclasses.dataclass(frozen=True)
class _PeerIsBack:
    """Ends a batch; that the peer is back, or nothing new."""

    is_news: bool = True


class SendLoop:
    """What the sending thread does."""

    def __init__(
        self,
        peer: PublishPeer,
        pages: PublishQueue,
        recall: Callable[[bytes, bytes], bytes | None],
        closed: threading.Event,
    ) -> None:
        """Nothing to send.

        Args:
            peer: where pages go.
            pages: in which they hold their room.
            recall: as of ``Publisher``.
            closed: set when what is left is to be dropped.
        """
        self._peer = peer
        self._pages = pages
        self._recall = recall
        self._closed = closed
        self._write_back = WriteBack()
        self._to_send: queue.SimpleQueue[CodedPage | _PeerIsBack | None] = queue.SimpleQueue()

    @property
    def kept_pages(self) -> int:
        """How many wait for the peer to come back."""
        return len(self._write_back)

    def put(self, page: CodedPage) -> None:
        """Hands over a page, which still holds its room."""
        self._to_send.put(page)

    def peer_is_back(self) -> None:
        """The peer gets what was kept for it."""
        self._to_send.put(_PeerIsBack())

    def end(self) -> None:
        """Ends :meth:`run` after what was handed over."""
        self._to_send.put(None)

    def run(self) -> None:
        """Sends until :meth:`end`."""
        end: _PeerIsBack | None = _PeerIsBack()
        while end is not None:
            batch, end = self._next_batch()
            try:
                self._send(batch)
                if isinstance(end, _PeerIsBack) and end.is_news:
                    self._send_what_was_kept()
            finally:
                self._pages.release(sum(page.held_bytes for page in batch))
                # Their room is given back: nor are they kept until the next ones come.
                batch = []

    def _next_batch(self) -> tuple[list[CodedPage], _PeerIsBack | None]:
        """Waits for a page and takes what else is there; and what ended the batch, None if nothing comes after it."""
        batch: list[CodedPage] = []
        item = self._to_send.get()
        while isinstance(item, CodedPage):
            batch.append(item)
            if len(batch) == PUT_BATCH_PAGES or self._to_send.empty():
                return batch, _PeerIsBack(is_news=False)
            item = self._to_send.get()
        return batch, item

    def _send_what_was_kept(self) -> None:
        """Stores what the peer has not been given while it was away, if it is still in host memory."""
        while len(self._write_back) and self._peer.is_up and not self._closed.is_set():
            for namespace_digest, hashes in self._write_back.take(PUT_BATCH_PAGES).items():
                with _counting(len(hashes)):
                    self._send(self._recalled(namespace_digest, hashes))

    def _recalled(self, namespace_digest: bytes, hashes: list[bytes]) -> list[CodedPage]:
        """Those that the peer does not have and host memory has."""
        present = self._peer.present(namespace_digest, hashes)
        pages = []
        for page_hash, is_present in zip(hashes, present, strict=True):
            coded = None if is_present else self._recall(namespace_digest, page_hash)
            if coded is not None:
                pages.append(CodedPage(namespace_digest, page_hash, coded, held_bytes=0, is_best=True))
        lost = len(hashes) - len(pages) - sum(present)
        count_dropped(lost, "peer_down")
        metrics.WRITE_BACK_PAGES.labels(outcome="lost").inc(lost)
        metrics.WRITE_BACK_PAGES.labels(outcome="sent").inc(len(pages))
        return pages

    def _send(self, batch: Sequence[CodedPage]) -> None:
        by_namespace: dict[bytes, list[CodedPage]] = {}
        for page in batch:
            by_namespace.setdefault(page.namespace_digest, []).append(page)
        for namespace_digest, pages in by_namespace.items():
            with _counting(len(pages)):
                failure = self._peer.put(namespace_digest, pages)
                if failure is None:
                    continue
                if failure.is_away:
                    self._keep(namespace_digest, pages, failure.reason)
                else:
                    count_dropped(len(pages), failure.reason)

    def _keep(self, namespace_digest: bytes, pages: Sequence[CodedPage], reason: str) -> None:
        """Of pages that could not be stored, keeps what host memory has, and drops the rest."""
        kept = [page.page_hash for page in pages if page.is_best]
        count_dropped(len(pages) - len(kept) + self._write_back.keep(namespace_digest, kept), reason)
        if self._peer.is_up:
            # It was away for a moment only: nobody will say that it has come back.
            self.peer_is_back()


@contextlib.contextmanager
def _counting(pages: int) -> Iterator[None]:
    """What nobody expected loses so many pages; publishing goes on with the next ones."""
    try:
        yield
    except Exception:
        logger.exception("kvcodec: pages could not be stored")
        count_dropped(pages, "send_failed")
