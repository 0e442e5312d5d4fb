"""Pages that were coded while the peer was away: they stay in host memory, and are stored when it is back."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence

from sglang_kvcodec import metrics

MAX_PAGES = 1 << 16


class WriteBack:
    """The names of pages that the peer is to get later; their bytes are in host memory, if nothing took their room."""

    def __init__(self) -> None:
        """No page waits."""
        self._pages: collections.OrderedDict[tuple[bytes, bytes], None] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._pages)

    def keep(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> int:
        """Remembers pages; how many of older ones it has to forget for them."""
        lost = 0
        with self._lock:
            for page_hash in page_hashes:
                self._pages[namespace_digest, page_hash] = None
            while len(self._pages) > MAX_PAGES:
                self._pages.popitem(last=False)
                lost += 1
            metrics.WRITE_BACK_KEPT_PAGES.set(len(self._pages))
        metrics.WRITE_BACK_PAGES.labels(outcome="kept").inc(len(page_hashes))
        return lost

    def take(self, most_pages: int) -> dict[bytes, list[bytes]]:
        """Takes some, the oldest first: namespace -> hashes."""
        taken: dict[bytes, list[bytes]] = {}
        with self._lock:
            for _ in range(min(most_pages, len(self._pages))):
                (namespace_digest, page_hash), _ = self._pages.popitem(last=False)
                taken.setdefault(namespace_digest, []).append(page_hash)
            metrics.WRITE_BACK_KEPT_PAGES.set(len(self._pages))
        return taken
