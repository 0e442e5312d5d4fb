"""Fetches from several peers at once, as one stream of events; what one peer can't give, another one is asked for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent

logger = logging.getLogger(__name__)

FetchFrom = Callable[[int, Sequence[int], threading.Event], Iterator[FetchEvent]]
"""Peer, indices of pages, what ends it early -> events, whose page indices count within those indices."""

_BATCH_EVENTS = 16
_BATCH_BYTES = 256 << 10
_BATCHES_AHEAD = 16
_POLL_S = 0.05


class _Stop(threading.Event):
    """Set when either the caller has cancelled or the reader has gone."""

    def __init__(self, cancelled: threading.Event | None) -> None:
        super().__init__()
        self._cancelled = cancelled

    def is_set(self) -> bool:
        return super().is_set() or (self._cancelled is not None and self._cancelled.is_set())


class MergedFetch:
    """One fetch. A page whose peer fails in the middle starts again with its header, from the next peer that has it."""

    def __init__(
        self,
        fetch_from: FetchFrom,
        routes: Sequence[Sequence[int]],
        threads: Executor,
        cancelled: threading.Event | None,
    ) -> None:
        """Begins.

        Args:
            fetch_from: fetches from one peer; may raise ``PeerError``.
            routes: for each page the peers to ask for it, in their order; none for a page that is nowhere.
            threads: has room for as many at once as there are peers.
            cancelled: ends it early.
        """
        self._fetch_from = fetch_from
        self._routes = [list(route) for route in routes]
        self._threads = threads
        self._stop = _Stop(cancelled)
        self._batches: queue.Queue[list[FetchEvent] | None] = queue.Queue(_BATCHES_AHEAD)
        self._lock = threading.Lock()
        self._running = 1
        self._ask(range(len(self._routes)))
        self._one_ended()

    def events(self) -> Iterator[FetchEvent]:
        """The events, as they come."""
        try:
            while not self._stop.is_set():
                try:
                    batch = self._batches.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if batch is None:
                    return
                yield from batch
        finally:
            self._stop.set()

    def _ask(self, indices: Sequence[int]) -> None:
        """Asks the next peer of each page; where there is none any more, it is missing."""
        by_peer: dict[int, list[int]] = {}
        missing: list[FetchEvent] = []
        for index in indices:
            if self._routes[index]:
                by_peer.setdefault(self._routes[index].pop(0), []).append(index)
            else:
                missing.append(FetchedMissing(index))
        if missing:
            self._hand_over(missing)
        for peer, of_peer in by_peer.items():
            with self._lock:
                self._running += 1
            try:
                self._threads.submit(self._run, peer, of_peer)
            except RuntimeError:
                # The client has been closed.
                self._stop.set()
                self._one_ended()

    def _run(self, peer: int, indices: Sequence[int]) -> None:
        left = dict.fromkeys(indices, -1)
        """Bytes that are still to come; -1 before the header."""
        try:
            self._receive(peer, indices, left)
        except PeerError as error:
            logger.info("kvcodec: a peer failed in a fetch, others are asked for %d pages: %s", len(left), error)
        except Exception:
            # A thread's top: the pages count as those of a peer that failed.
            logger.exception("kvcodec: a part of a fetch failed")
        finally:
            if left and not self._stop.is_set():
                self._ask(list(left))
            self._one_ended()

    def _receive(self, peer: int, indices: Sequence[int], left: dict[int, int]) -> None:
        batch: list[FetchEvent] = []
        batch_bytes = 0
        try:
            for event in self._fetch_from(peer, indices, self._stop):
                index = indices[event.page_index]
                if isinstance(event, FetchedMissing):
                    continue
                if isinstance(event, FetchedHeader):
                    left[index] = event.object_bytes - len(event.header)
                    batch.append(FetchedHeader(index, event.object_bytes, event.header))
                    batch_bytes += len(event.header)
                else:
                    left[index] = left.get(index, 0) - len(event.data)
                    batch.append(FetchedFragment(index, event.offset, event.data))
                    batch_bytes += len(event.data)
                if left[index] == 0:
                    del left[index]
                if len(batch) >= _BATCH_EVENTS or batch_bytes >= _BATCH_BYTES:
                    self._hand_over(batch)
                    batch, batch_bytes = [], 0
        finally:
            if batch:
                self._hand_over(batch)

    def _one_ended(self) -> None:
        with self._lock:
            self._running -= 1
            is_last = self._running == 0
        if is_last:
            self._hand_over(None)

    def _hand_over(self, batch: list[FetchEvent] | None) -> None:
        while not self._stop.is_set():
            try:
                self._batches.put(batch, timeout=_POLL_S)
            except queue.Full:
                continue
            return
