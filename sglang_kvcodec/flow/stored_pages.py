"""Remembers which pages the peer has, so that they are not sent again."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence

MAX_PAGES = 1 << 18


class StoredPages:
    """A bounded set of pages known to be stored. A belief, not a promise: the peer may evict. Thread-safe."""

    def __init__(self) -> None:
        """Knows nothing."""
        self._keys: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._lock = threading.Lock()

    def missing(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> list[int]:
        """Indices of the pages that are not known to be stored."""
        with self._lock:
            return [i for i, page_hash in enumerate(page_hashes) if namespace_digest + page_hash not in self._keys]

    def update(self, namespace_digest: bytes, page_hashes: Sequence[bytes], present: Sequence[bool]) -> None:
        """Learns which of the pages are stored and which are not."""
        with self._lock:
            for page_hash, stored in zip(page_hashes, present, strict=True):
                key = namespace_digest + page_hash
                self._keys.pop(key, None)
                if stored:
                    self._keys[key] = None
            while len(self._keys) > MAX_PAGES:
                self._keys.popitem(last=False)
