"""Which pages come before which, as far as requests have told: a page is useless without those before it.

A page that is put is newer than the pages before it, which were used when its request came in, so the least recently
used page would be one of the head. A peer therefore marks what comes before a new page as used after it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

_PAGES_REMEMBERED = 1 << 17
_MOST_ANCESTORS = 1 << 14
_FREED_FOR_EACH_LEARNED = 2
"""So that what was forgotten is free long before there is as much again."""


class PrefixOrder:
    """Remembers for each page the one before it, of the pages that were asked for last. Thread-safe."""

    def __init__(self, pages: int = _PAGES_REMEMBERED) -> None:
        """Remembers at most ``pages`` of them and those of one request, and at least half as many."""
        self._half = pages // 2
        self._lock = threading.Lock()
        self._newer: dict[bytes, bytes] = {}
        self._older: dict[bytes, bytes] = {}
        """Forgotten as a whole when as many newer ones are there."""
        self._forgotten: dict[bytes, bytes] = {}
        """What is of no use any more and still takes memory: to free all of it at once takes milliseconds."""

    def learn(self, keys: Sequence[bytes]) -> None:
        """Takes the keys of a request for pages, which are in prefix order."""
        with self._lock:
            newer, older = self._newer, self._older
            for before, key in itertools.pairwise(keys):
                if key not in newer:
                    # What was learned first stays: later requests leave out pages that their sender knows.
                    newer[key] = older.get(key, before)
            for _ in range(min(len(self._forgotten), _FREED_FOR_EACH_LEARNED * len(keys))):
                self._forgotten.popitem()
            if len(newer) >= self._half:
                self._newer, self._older, self._forgotten = {}, newer, older

    def with_heads(self, keys: Sequence[bytes]) -> list[bytes]:
        """Pages and all that is known to come before them, each after those before it."""
        ordered: dict[bytes, None] = {}
        left = _MOST_ANCESTORS
        with self._lock:
            for key in keys:
                path: dict[bytes, None] = {}
                at: bytes | None = key
                # Requests may contradict each other: no page twice.
                while at is not None and at not in ordered and at not in path and (left > 0 or at == key):
                    path[at] = None
                    at = self._newer.get(at) or self._older.get(at)
                    left -= 1
                ordered.update(dict.fromkeys(reversed(path)))
        return list(ordered)
