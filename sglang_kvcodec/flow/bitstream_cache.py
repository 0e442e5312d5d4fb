"""Page objects in host memory: coded, checked, bounded by bytes, least recently used first out."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.format.page_object import PageObject


class BitstreamCache:
    """Thread-safe; a look-up is a dictionary access and fit for a scheduler's thread. Keys are page hashes.

    Pages of a prefix are put, or marked as used, from the last to the first: a page is useless without those before it,
    so the tails go first.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """An empty cache of at most ``capacity_bytes`` of page objects."""
        self._capacity_bytes = capacity_bytes
        self._pages: collections.OrderedDict[bytes, PageObject] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __contains__(self, page_hash: bytes) -> bool:
        with self._lock:
            return page_hash in self._pages

    def get(self, page_hash: bytes) -> PageObject | None:
        """The page; not yet marked as used, see :meth:`mark_used`."""
        with self._lock:
            return self._pages.get(page_hash)

    def mark_used(self, page_hashes: Sequence[bytes]) -> None:
        """Marks the pages of a prefix as used, where they are."""
        with self._lock:
            for page_hash in reversed(page_hashes):
                if page_hash in self._pages:
                    self._pages.move_to_end(page_hash)

    def put(self, page_hash: bytes, page: PageObject) -> None:
        """Adds a page; one larger than the whole cache is not kept."""
        with self._lock:
            self._remove(page_hash)
            if len(page) <= self._capacity_bytes:
                self._pages[page_hash] = page
                self._bytes += len(page)
            while self._bytes > self._capacity_bytes:
                self._remove(next(iter(self._pages)))
            metrics.HOST_CACHE_BYTES.set(self._bytes)

    def discard(self, page_hashes: Iterable[bytes]) -> None:
        """Forgets pages, where they are."""
        with self._lock:
            for page_hash in page_hashes:
                self._remove(page_hash)
            metrics.HOST_CACHE_BYTES.set(self._bytes)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._pages.clear()
            self._bytes = 0
            metrics.HOST_CACHE_BYTES.set(0)

    def _remove(self, page_hash: bytes) -> None:
        page = self._pages.pop(page_hash, None)
        if page is not None:
            self._bytes -= len(page)
