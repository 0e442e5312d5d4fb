"""Which stored prefixes are asked for. A page's hash names the whole prefix that ends in it, so a key is enough."""

from __future__ import annotations

import dataclasses
import heapq
import math
import operator
import threading
import time
from collections import OrderedDict

_PREFIXES_REMEMBERED = 4096
_HALF_LIFE_S = 600.0


@dataclasses.dataclass(frozen=True)
class PrefixUse:
    """What is known of one prefix.

    Attributes:
        key: the storage key of its last page.
        pages: how many of its pages were found, at most.
        lookups: how often a Lookup found it, and no longer one.
        used_at_s: of the last such Lookup, on the monotonic clock.
        rank: logarithm of its weight: the pages found, each time's halved every ten minutes since. All weights shrink
            alike, so this is as of the clock's zero, and never has to be computed anew.
    """

    key: bytes
    pages: int
    lookups: int
    used_at_s: float
    rank: float


class HotPrefixes:
    """Remembers the prefixes that were found last, a bounded number of them. Thread-safe."""

    def __init__(self, prefixes: int = _PREFIXES_REMEMBERED) -> None:
        """Remembers at most ``prefixes`` of them."""
        self._prefixes = prefixes
        self._lock = threading.Lock()
        self._uses: OrderedDict[bytes, PrefixUse] = OrderedDict()

    def note(self, key: bytes, pages: int, now_s: float | None = None) -> None:
        """Counts a Lookup that found a prefix of ``pages`` pages, at least one, of which ``key`` is the last."""
        now_s = time.monotonic() if now_s is None else now_s
        rank = math.log2(pages) + now_s / _HALF_LIFE_S
        with self._lock:
            before = self._uses.pop(key, None)
            if before is None:
                self._uses[key] = PrefixUse(key, pages, 1, now_s, rank)
                if len(self._uses) > self._prefixes:
                    self._uses.popitem(last=False)
            else:
                most = max(rank, before.rank)
                rank = most + math.log2(2.0 ** (rank - most) + 2.0 ** (before.rank - most))
                self._uses[key] = PrefixUse(key, max(pages, before.pages), before.lookups + 1, now_s, rank)

    def top(self, count: int) -> list[PrefixUse]:
        """The ``count`` heaviest, the heaviest first. Looks at all that are remembered, but holds up no note."""
        with self._lock:
            uses = list(self._uses.values())
        return heapq.nlargest(count, uses, key=operator.attrgetter("rank"))
