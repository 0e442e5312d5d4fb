"""What counters said over the last minutes."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping


class History:
    """Samples of monotonic counters, a bounded number. For one thread."""

    def __init__(self, samples: int) -> None:
        """Remembers the last ``samples`` of them, at least 2."""
        self._samples: collections.deque[tuple[float, Mapping[str, float]]] = collections.deque(maxlen=samples)

    def add(self, at_s: float, counts: Mapping[str, float]) -> None:
        """Takes what the counters say at ``at_s`` of a clock that never goes back. One that is left out stands at 0."""
        self._samples.append((at_s, counts))

    @property
    def span_s(self) -> float:
        """From the first sample to the last, in seconds."""
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0

    def rates(self, name: str) -> list[float]:
        """The counter's rate per second between each two samples, the latest last."""
        return [
            (after.get(name, 0) - before.get(name, 0)) / max(now_s - then_s, 1e-9)
            for (then_s, before), (now_s, after) in itertools.pairwise(self._samples)
        ]

    def increase(self, name: str) -> float:
        """By how much the counter has grown between the first sample and the last."""
        if not self._samples:
            return 0
        return self._samples[-1][1].get(name, 0) - self._samples[0][1].get(name, 0)
