"""Page objects in host memory: coded, checked, bounded by bytes, least recently used first out."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable

from sglang_kvcodec import metrics
from sglang_kvcodec.format.page_object import PageObject


class BitstreamCache:
    """Thread-safe; a look-up is a dictionary access and fit for a scheduler's thread. Keys are page hashes."""

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
        """The page, marked as used."""
        with self._lock:
            page = self._pages.get(page_hash)
            if page is not None:
                self._pages.move_to_end(page_hash)
            return page

    def put(self, page_hash: bytes, page: PageObject) -> None:
        """Adds a page; one larger than the whole cache is not kept."""
        with self._lock:
            self._remove(page_hash)
            if len(page) > self._capacity_bytes:
                return
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
