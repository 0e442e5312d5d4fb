"""Which stored prefixes are asked for. A page's hash names the whole prefix that ends in it, so a key is enough."""

from __future__ import annotations

import dataclasses
import heapq
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
        weight: pages found, each time's halved every ten minutes, as of ``used_at_s``.
        used_at_s: of the last such Lookup, on the monotonic clock.
    """

    key: bytes
    pages: int
    lookups: int
    weight: float
    used_at_s: float

    def weight_at(self, now_s: float) -> float:
        """The weight later on."""
        return self.weight * float(0.5 ** ((now_s - self.used_at_s) / _HALF_LIFE_S))


class HotPrefixes:
    """Remembers the prefixes that were found last, a bounded number of them. Thread-safe."""

    def __init__(self, prefixes: int = _PREFIXES_REMEMBERED) -> None:
        """Remembers at most ``prefixes`` of them."""
        self._prefixes = prefixes
        self._lock = threading.Lock()
        self._uses: OrderedDict[bytes, PrefixUse] = OrderedDict()

    def note(self, key: bytes, pages: int, now_s: float | None = None) -> None:
        """Counts a Lookup that found a prefix of ``pages`` pages, of which ``key`` is the last."""
        now_s = time.monotonic() if now_s is None else now_s
        with self._lock:
            before = self._uses.pop(key, None)
            if before is None:
                self._uses[key] = PrefixUse(key, pages, 1, pages, now_s)
                if len(self._uses) > self._prefixes:
                    self._uses.popitem(last=False)
            else:
                weight = before.weight_at(now_s) + pages
                self._uses[key] = PrefixUse(key, max(pages, before.pages), before.lookups + 1, weight, now_s)

    def top(self, count: int, now_s: float | None = None) -> list[PrefixUse]:
        """The ``count`` heaviest now, the heaviest first. Looks at all that are remembered, but holds up no note."""
        now_s = time.monotonic() if now_s is None else now_s
        with self._lock:
            uses = list(self._uses.values())
        return heapq.nlargest(count, uses, key=lambda use: use.weight_at(now_s))
