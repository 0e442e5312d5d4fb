"""Fetches from several peers at once, as one stream of events; what one peer can't give, another one is asked for."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent

logger = logging.getLogger(__name__)

FetchFrom = Callable[[int, Sequence[int], threading.Event], Iterator[FetchEvent]]
"""Peer, indices of pages, what ends it early -> events, whose page indices count within those indices."""
OnDelivered = Callable[[int, int, float, float], None]
"""Told, on any thread, of a stream that has ended: peer, bytes, seconds from its first word to its last without those
in which it waited for the reader, and the mean size of its pages, 0 if it began none."""

_BATCH_EVENTS = 16
_BATCH_BYTES = 256 << 10
_BATCHES_AHEAD = 16
_POLL_S = 0.05
_FIRST_WORD_S = 1.0
_SILENCE_S = 0.3
_PAUSES = 4
"""A peer that has said nothing for so many times its longest pause, and for :data:`_SILENCE_S` at least, is silent."""


_BEHIND, _BEHIND_S = 2.0, 0.05
"""What another peer, which has nothing left to do, would deliver anew in less than half the time is asked of it: that
is worth the bytes that have come already, unless it is a matter of so few seconds."""


class _Stop(threading.Event):
    """Set when either the caller has cancelled or the reader has gone."""

    def __init__(self, cancelled: threading.Event | None) -> None:
        super().__init__()
        self._cancelled = cancelled

    def is_set(self) -> bool:
        return super().is_set() or (self._cancelled is not None and self._cancelled.is_set())


class _Run:
    """One stream from one peer.

    Attributes:
        peer: which.
        left: page -> bytes that are still to come, -1 before the header; of the pages that are asked of this peer.
        stop: ends it.
        last_s: when it said something last, or was asked.
        pause_s: the longest that it has been silent so far, from its first word on; None before that.
        waits_for_reader: it is not the peer that is silent.
        size_bytes: that came since its first word.
        spoke_s: for how long it has delivered.
        object_bytes: page -> its size, of those of which a header has come.
        was_left: it was ended for others that deliver all that was asked of it.
    """

    def __init__(self, peer: int, indices: Sequence[int], stop: _Stop) -> None:
        self.peer = peer
        self.left = dict.fromkeys(indices, -1)
        self.stop = _Stop(stop)
        self.last_s = time.monotonic()
        self.pause_s: float | None = None
        self.waits_for_reader = False
        self.size_bytes = 0
        self.spoke_s = 0.0
        self.object_bytes: dict[int, int] = {}
        self.was_left = False

    def leave(self) -> None:
        """Others deliver what was asked of it."""
        self.was_left = True
        self.stop.set()

    def heard(self, size_bytes: int) -> None:
        """The peer has said something."""
        now_s = time.monotonic()
        silent_s = now_s - self.last_s
        if self.pause_s is None:
            self.pause_s = 0.0
        else:
            self.pause_s = max(self.pause_s, silent_s)
            self.spoke_s += silent_s
            self.size_bytes += size_bytes
        self.last_s = now_s

    @property
    def is_silent(self) -> bool:
        """Whether the peer has said nothing for much longer than before."""
        if self.waits_for_reader:
            return False
        allowed_s = _FIRST_WORD_S if self.pause_s is None else max(_SILENCE_S, _PAUSES * self.pause_s)
        return time.monotonic() - self.last_s > allowed_s

    def is_behind(self, pages: Sequence[int], other: _Run) -> bool:
        """Whether ``pages``, of which it has told the sizes, would come much sooner from the peer of another stream."""
        if not self.size_bytes or not other.size_bytes or self.waits_for_reader:
            return False
        pause_s = time.monotonic() - self.last_s
        left_s = sum(self.left[page] for page in pages) / self.size_bytes * (self.spoke_s + pause_s)
        anew_s = sum(self.object_bytes[page] for page in pages) / other.size_bytes * other.spoke_s
        return left_s > _BEHIND * anew_s + _BEHIND_S


class _Rivals(NamedTuple):
    """Two streams of a page.

    Attributes:
        first: it was asked first, and fell silent or behind.
        second: it was asked as well.
        was_silent: the next word of the page decides, whoever says it; else the second one's first word does.
    """

    first: _Run
    second: _Run
    was_silent: bool


class MergedFetch:
    """One fetch. A page whose peer fails starts again with its header, from the next peer that has it.

    Where a peer falls silent in the middle or is far behind, the next one is asked as well: the request is hedged (Dean
    and Barroso, "The Tail at Scale", CACM 2013). From then on one of them delivers the page.
    """

    def __init__(
        self,
        fetch_from: FetchFrom,
        routes: Sequence[Sequence[int]],
        threads: Executor,
        on_delivered: OnDelivered,
        cancelled: threading.Event | None,
    ) -> None:
        """Begins.

        Args:
            fetch_from: fetches from one peer; may raise ``PeerError``.
            routes: for each page the peers to ask for it, in their order; none for a page that is nowhere.
            threads: has room for as many at once as there are peers.
            on_delivered: is told of each stream that has ended.
            cancelled: ends it early.
        """
        self._fetch_from = fetch_from
        self._routes = [list(route) for route in routes]
        self._threads = threads
        self._on_delivered = on_delivered
        self._stop = _Stop(cancelled)
        self._batches: queue.Queue[tuple[_Run | None, list[FetchEvent]] | None] = queue.Queue(_BATCHES_AHEAD)
        self._lock = threading.Lock()
        self._owners: dict[int, _Run] = {}
        """Page -> the stream whose events of it count; what another one has said, the reader leaves out."""
        self._runs: list[_Run] = []
        self._ended: list[_Run] = []
        """Streams that have brought all that was asked of them."""
        self._hedged: set[int] = set()
        """Pages of which another peer was asked because theirs was silent or slow."""
        self._rivals: dict[int, _Rivals] = {}
        """Pages of which has not been decided which of two streams delivers them."""
        self._running = 1
        self._ask(range(len(self._routes)))
        self._one_ended()

    def events(self) -> Iterator[FetchEvent]:
        """The events, as they come."""
        try:
            while not self._stop.is_set():
                self._hedge()
                try:
                    batch = self._batches.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if batch is None:
                    return
                run, events = batch
                for event in events:
                    # What a peer says after all of a page that has been asked of another one is late.
                    if run is None or self._owners.get(event.page_index) is run:
                        yield event
        finally:
            self._stop.set()

    def _hedge(self) -> None:
        """Asks others as well for the pages of peers that say nothing, or are far behind one that has no more to say.

        Where all are silent it is this server's own link, and there is nobody better to ask. It is done once for each
        page: on a link that is slower than the patience here it would else start again and again.
        """
        with self._lock:
            silent = self._silent()
            first = {index: run for run, pages in silent or self._behind() for index in pages}
            if not first:
                return
            self._hedged.update(first)
            begun, missing = self._assign(first)
            for index, run in first.items():
                self._rivals[index] = _Rivals(run, self._owners[index], bool(silent))
            # As long as nothing is decided.
            self._owners.update(first)
        metrics.FETCH_SWITCHES.inc(len(first))
        logger.info("kvcodec: a peer is silent or slow in a fetch, others are asked for %d pages", len(first))
        self._begin(begun, missing)

    def _decide(self, index: int, winner: _Run) -> None:
        """One of its two streams delivers a page; the other one's peer comes last from now on. Under the lock."""
        first, second, _ = self._rivals.pop(index)
        loser = second if winner is first else first
        self._owners[index] = winner
        self._routes[index].append(loser.peer)
        del loser.left[index]
        if not loser.left:
            loser.leave()

    def _has_gone(self, run: _Run) -> None:
        """Pages of this stream, which has ended, are the other one's where there are two; under the lock."""
        for index in [index for index in run.left if index in self._rivals]:
            first, second, _ = self._rivals.pop(index)
            self._owners[index] = second if run is first else first
            del run.left[index]
            if run is second:
                # And if the first goes on saying nothing, the next one may be asked.
                self._hedged.discard(index)

    def _silent(self) -> list[tuple[_Run, list[int]]]:
        """Streams of peers that say nothing, and those of their pages that others have; under the lock."""
        silent = [run for run in self._runs if run.left and run.is_silent]
        if len(silent) == len(self._runs) and len(silent) > 1:
            return []
        left = [
            (run, [index for index in run.left if self._routes[index] and index not in self._hedged]) for run in silent
        ]
        return [(run, pages) for run, pages in left if pages]

    def _behind(self) -> list[tuple[_Run, list[int]]]:
        """The same of streams that are much slower than one that has ended; what they ask next is that one's peer."""
        behind = []
        for run in self._runs:
            for ended in self._ended:
                pages = [
                    index
                    for index, left_bytes in run.left.items()
                    if left_bytes >= 0 and index not in self._hedged and ended.peer in self._routes[index]
                ]
                if run.is_behind(pages, ended):
                    for index in pages:
                        self._routes[index].remove(ended.peer)
                        self._routes[index].insert(0, ended.peer)
                    behind.append((run, pages))
                    break
        return behind

    def _ask(self, indices: Sequence[int]) -> None:
        """Asks the next peer of each page; where there is none any more, it is missing."""
        with self._lock:
            begun, missing = self._assign(indices)
        self._begin(begun, missing)

    def _assign(self, indices: Iterable[int]) -> tuple[list[tuple[_Run, list[int]]], list[FetchEvent]]:
        """The streams to begin, which count as running from now on, and the pages that are missing; under the lock."""
        by_peer: dict[int, list[int]] = {}
        missing: list[FetchEvent] = []
        for index in indices:
            if self._routes[index]:
                by_peer.setdefault(self._routes[index].pop(0), []).append(index)
            else:
                missing.append(FetchedMissing(index))
        begun = []
        for peer, of_peer in by_peer.items():
            run = _Run(peer, of_peer, self._stop)
            self._running += 1
            self._runs.append(run)
            self._owners.update(dict.fromkeys(of_peer, run))
            begun.append((run, of_peer))
        return begun, missing

    def _begin(self, begun: Sequence[tuple[_Run, list[int]]], missing: list[FetchEvent]) -> None:
        """Starts the streams, and tells of missing pages."""
        if missing:
            self._hand_over((None, missing))
        for run, of_peer in begun:
            try:
                self._threads.submit(self._run, run, of_peer)
            except RuntimeError:
                # The client has been closed.
                self._stop.set()
                self._one_ended()

    def _run(self, run: _Run, indices: Sequence[int]) -> None:
        # It may have waited for a thread.
        run.last_s = time.monotonic()
        try:
            self._receive(run, indices)
        except PeerError as error:
            logger.info("kvcodec: a peer failed in a fetch, others are asked for %d pages: %s", len(run.left), error)
        except Exception:
            # A thread's top: the pages count as those of a peer that failed.
            logger.exception("kvcodec: a part of a fetch failed")
        finally:
            with self._lock:
                self._runs.remove(run)
                self._has_gone(run)
                left = list(run.left)
                if not left and not run.was_left:
                    self._ended.append(run)
            self._on_delivered(
                run.peer, run.size_bytes, run.spoke_s, sum(run.object_bytes.values()) / max(1, len(run.object_bytes))
            )
            if left and not self._stop.is_set():
                self._ask(left)
            self._one_ended()

    def _receive(self, run: _Run, indices: Sequence[int]) -> None:
        batch: list[FetchEvent] = []
        batch_bytes = 0
        try:
            for event in self._fetch_from(run.peer, indices, run.stop):
                index = indices[event.page_index]
                if isinstance(event, FetchedMissing):
                    run.heard(0)
                    continue
                run.heard(len(event.header if isinstance(event, FetchedHeader) else event.data))
                with self._lock:
                    if index not in run.left:
                        continue
                    rivals = self._rivals.get(index)
                    if rivals is not None and (rivals.was_silent or run is rivals.second):
                        self._decide(index, run)
                    if isinstance(event, FetchedHeader):
                        run.left[index] = event.object_bytes - len(event.header)
                        run.object_bytes[index] = event.object_bytes
                        batch.append(FetchedHeader(index, event.object_bytes, event.header))
                        batch_bytes += len(event.header)
                    else:
                        run.left[index] -= len(event.data)
                        batch.append(FetchedFragment(index, event.offset, event.data))
                        batch_bytes += len(event.data)
                    if run.left[index] == 0:
                        if index in self._rivals:
                            self._decide(index, run)
                        del run.left[index]
                if len(batch) >= _BATCH_EVENTS or batch_bytes >= _BATCH_BYTES:
                    self._hand_over((run, batch))
                    batch, batch_bytes = [], 0
        finally:
            if batch:
                self._hand_over((run, batch))

    def _one_ended(self) -> None:
        with self._lock:
            self._running -= 1
            is_last = self._running == 0
        if is_last:
            self._hand_over(None)

    def _hand_over(self, batch: tuple[_Run | None, list[FetchEvent]] | None) -> None:
        run = batch[0] if batch is not None else None
        if run is not None:
            run.waits_for_reader = True
        while not self._stop.is_set():
            try:
                self._batches.put(batch, timeout=_POLL_S)
            except queue.Full:
                continue
            break
        if run is not None:
            run.last_s = time.monotonic()
            run.waits_for_reader = False
