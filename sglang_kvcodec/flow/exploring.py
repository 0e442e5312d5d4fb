"""When to try a link that is believed to be slow, so that it is noticed when it is not any more.

Nobody waits for such a transfer: the request that gave the occasion has gone on by prefill. It costs the link at most
:data:`BYTES` (one page at least) or :data:`MOST_S`, one transfer at a time, and each that finds the link as slow as
before doubles the pause until the next, up to :data:`MAX_PAUSE_S`. What arrives whole stays in the host cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

BYTES = 256 << 10
LEAST_S, MOST_S = 0.25, 5.0
"""It ends after the first of these if something was measured by then, after the second in any case."""
PAUSE_S, MAX_PAUSE_S = 0.5, 8.0


class Explorer:
    """Rations these transfers for one peer. Thread-safe."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._lock = threading.Lock()
        self._is_running = False
        self._pause_s = PAUSE_S

    def pages(self, age_s: float, page_bytes: Sequence[int]) -> int:
        """How many pages are to be tried, what is known of the link being ``age_s`` old; 0 for not now."""
        if age_s < self._pause_s:
            return 0
        pages, total = 0, 0
        for size in page_bytes:
            total += size
            if pages and total > BYTES:
                break
            pages += 1
        return pages

    def begin(self) -> bool:
        """Whether one may begin: none is under way."""
        with self._lock:
            if self._is_running:
                return False
            self._is_running = True
            self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
            return True

    def end(self) -> None:
        """It has ended."""
        with self._lock:
            self._is_running = False

    def found_fast(self) -> None:
        """A fetch is worth it again."""
        with self._lock:
            self._pause_s = PAUSE_S

    def is_enough(self, age_s: float, start_s: float) -> bool:
        """Whether a transfer that began at ``start_s`` has measured the link, what is known being ``age_s`` old."""
        elapsed_s = time.monotonic() - start_s
        return elapsed_s >= MOST_S or (elapsed_s >= LEAST_S and age_s < elapsed_s)
