"""The requests that fetch or wait to fetch: how many there may be, and who is next."""

from __future__ import annotations

import heapq
import itertools
import threading

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_planning import PlannedFetch

MAX_TICKETS = 256
"""Requests that may fetch or wait to fetch at once; beyond it they are computed."""


def turn_s(start_s: float, coded_bytes: float, bytes_per_s: float | None) -> float:
    """The turn of a fetch among those that wait for a thread; the least is first.

    The shortest is first, and a long one goes before all that come later than it takes itself, so none starves.
    """
    return start_s + coded_bytes / max(bytes_per_s, 1.0) if bytes_per_s is not None else start_s


class FetchQueue:
    """Counts all of them, and orders those for which no thread is free. Thread-safe."""

    def __init__(self) -> None:
        """Empty."""
        self._lock = threading.Lock()
        self._tickets = 0
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, PlannedFetch]] = []
        """A heap of fetches for which no thread is free, by their turns."""

    def __len__(self) -> int:
        """How many wait for a thread."""
        with self._lock:
            return len(self._waiting)

    def enter(self) -> bool:
        """Whether there is room for one more request; if so it is in until :meth:`leave`."""
        with self._lock:
            if self._tickets >= MAX_TICKETS:
                return False
            self._tickets += 1
            return True

    def leave(self) -> None:
        """One is over."""
        with self._lock:
            self._tickets -= 1

    def put(self, turn: float, fetch: PlannedFetch) -> None:
        """One waits for a thread."""
        with self._lock:
            heapq.heappush(self._waiting, (turn, next(self._order), fetch))
            metrics.QUEUED_FETCHES.set(len(self._waiting))

    def take(self) -> PlannedFetch:
        """The one whose turn is next; there must be one."""
        with self._lock:
            fetch = heapq.heappop(self._waiting)[-1]
            metrics.QUEUED_FETCHES.set(len(self._waiting))
            return fetch
