"""What publishing asks of the peer: which pages it has, and to store those that it has not."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import PeerError, PeerRejectedError
from sglang_kvcodec.flow.offload import Offload, Target
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.publish_queue import CodedPage, count_dropped
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import PeerTransport, PutOutcome, PutResult

logger = logging.getLogger(__name__)

PUT_ATTEMPTS = 3
_KEPT = (PutOutcome.STORED, PutOutcome.ALREADY_STORED)


@dataclasses.dataclass(frozen=True)
class PutFailure:
    """Why pages were not handed over.

    Attributes:
        reason: as drops are counted by.
        is_away: whether the peer was not there, so that it may take them later.
    """

    reason: str
    is_away: bool


class PublishPeer:
    """Asks, while the peer is there, and remembers what it has answered. Thread-safe."""

    def __init__(
        self,
        peer: PeerTransport,
        monitor: PeerMonitor,
        stored: StoredPages,
        patience_s: float,
        values_bytes: int,
        tier_of: Callable[[bytes], str],
        closed: threading.Event,
    ) -> None:
        """Nothing was asked.

        Args:
            peer: whom to ask.
            monitor: knows whether it is there.
            stored: knows what it has.
            patience_s: how long to wait for it where it has gone.
            values_bytes: of a page in the pool, for the metrics.
            tier_of: names the tier of a namespace, for the metrics.
            closed: set when no more is to be stored.
        """
        self._peer = peer
        self._monitor = monitor
        self._stored = stored
        self._patience_s = patience_s
        self._values_bytes = values_bytes
        self._tier_of = tier_of
        self._closed = closed

    @property
    def is_up(self) -> bool:
        """Whether the last thing heard of it was good."""
        return self._monitor.is_up

    def wait_until_up(self) -> bool:
        """Waits for it, not for long; False if it didn't come."""
        return self._monitor.wait_until_up(self._patience_s)

    def missing(self, offload: Offload, target: Target) -> list[int]:
        """Indices of the pages that a target is to get and is not known to have; asks nobody."""
        hashes = [offload.page_hashes[index] for index in target.pages]
        return [target.pages[index] for index in self._stored.missing(target.namespace_digest, hashes)]

    def present(self, namespace_digest: bytes, hashes: list[bytes]) -> Sequence[bool]:
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

    def count_present(self, namespace_digest: bytes, pages: int) -> None:
        """So many pages are not coded and offered because it has them."""
        outcome = PutOutcome.ALREADY_STORED.value
        metrics.PUBLISHED_PAGES.labels(outcome=outcome, tier=self._tier_of(namespace_digest)).inc(pages)

    def put(self, namespace_digest: bytes, pages: Sequence[CodedPage]) -> PutFailure | None:
        """Hands over pages of one namespace; why they were not, if so. What the peer makes of each is counted."""
        reason, is_away = "", False
        for _ in range(PUT_ATTEMPTS):
            if self._closed.is_set():
                reason = "closed"
                break
            try:
                results = self._peer.put(namespace_digest, [(page.page_hash, page.coded) for page in pages])
            except PeerError as error:
                # Storing a page twice does no harm: the peer keeps the first.
                self._monitor.failed("put", error)
                reason, is_away = error.reason, not isinstance(error, PeerRejectedError)
                if not is_away or not self.wait_until_up():
                    break
                continue
            self._learn(namespace_digest, pages, results)
            return None
        return PutFailure(reason, is_away)

    def _learn(self, namespace_digest: bytes, pages: Sequence[CodedPage], results: Sequence[PutResult]) -> None:
        self._stored.update(
            namespace_digest, [page.page_hash for page in pages], [result.outcome in _KEPT for result in results]
        )
        tier = self._tier_of(namespace_digest)
        for page, result in zip(pages, results, strict=True):
            metrics.PUBLISHED_PAGES.labels(outcome=result.outcome.value, tier=tier).inc()
            if result.outcome is PutOutcome.STORED:
                metrics.PUBLISHED_BYTES.labels(tier=tier).inc(len(page.coded))
                metrics.PUBLISHED_KV_BYTES.labels(tier=tier).inc(self._values_bytes)
            elif result.outcome not in _KEPT:
                count_dropped(1, result.outcome.value)
                logger.warning("kvcodec: the peer did not store a page: %s", result.detail)
