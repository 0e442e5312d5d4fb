"""How soon each of several peers delivers, and from which of them to fetch a page that more than one has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

_LATENCY_WEIGHT = 0.2
_RATE_WEIGHT = 0.3
_DOUBLES_IN_S = 60.0
"""A peer that has delivered nothing lately may be faster by now: it is taken for twice as fast after so long, so that a
slow one is asked for a page now and then, and not for half of them at once."""
_MOST_DOUBLINGS = 100
_LEAST_BYTES, _LEAST_S = 128 << 10, 0.05
"""Of a delivery that tells a rate, one of both: what lies in buffers comes at no rate at all."""
_USUAL_BYTES_PER_S = 1.25e8
"""Of peers of which none has delivered anything."""


class PeerSpeed:
    """Of one peer, seen from here. Each number is replaced as a whole, so any thread may read it.

    Attributes:
        latency_s: of a Lookup; 0 before the first.
        bytes_per_s: of its streams lately; 0 before the first.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        """Nothing is known; ``now_s`` is the clock."""
        self.latency_s = 0.0
        self.bytes_per_s = 0.0
        self._now_s = now_s
        self._delivered_at_s = 0.0

    def answered_in(self, seconds: float) -> None:
        """Takes the time of a Lookup."""
        old_s = self.latency_s or seconds
        self.latency_s = (1 - _LATENCY_WEIGHT) * old_s + _LATENCY_WEIGHT * seconds

    def delivered(self, size_bytes: int, seconds: float) -> None:
        """Takes a stream: what it brought, and in which time, without that in which nobody listened."""
        if not size_bytes or (size_bytes < _LEAST_BYTES and seconds < _LEAST_S):
            return
        rate = size_bytes / max(seconds, 1e-3)
        self.bytes_per_s = (1 - _RATE_WEIGHT) * (self.bytes_per_s or rate) + _RATE_WEIGHT * rate
        self._delivered_at_s = self._now_s()

    def hoped_bytes_per_s(self, fastest: float) -> float:
        """What it may deliver now, ``fastest`` at most; more than it has the longer that is ago, or if it never has."""
        doublings = (self._now_s() - self._delivered_at_s) / _DOUBLES_IN_S
        if not self.bytes_per_s or doublings > _MOST_DOUBLINGS:
            return fastest
        return min(fastest, self.bytes_per_s * math.exp2(doublings))


def share_out(holders: Sequence[Sequence[int]], speeds: Sequence[PeerSpeed], page_bytes: float) -> list[list[int]]:
    """Whom to ask for each page: first who would deliver it first, after what he is asked for already.

    So all are over at about the same time, and one that is far or slow gets the fewer pages, or none. Who is as good
    as another keeps his place.

    Args:
        holders: for each page the peers that have it.
        speeds: of all peers.
        page_bytes: how large a page is, about.

    Returns:
        For each page its holders, in the order in which they are to be asked.
    """
    fastest = max((speed.bytes_per_s for speed in speeds), default=0.0) or _USUAL_BYTES_PER_S
    page_s = [page_bytes / speed.hoped_bytes_per_s(fastest) for speed in speeds]
    free_s = [speed.latency_s for speed in speeds]
    orders = []
    for candidates in holders:
        order = sorted(candidates, key=lambda peer: free_s[peer] + page_s[peer])
        if order:
            free_s[order[0]] += page_s[order[0]]
        orders.append(order)
    return orders
