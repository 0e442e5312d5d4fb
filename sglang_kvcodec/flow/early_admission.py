"""When a request may be admitted before all of its KV has landed: as soon as no one would have to wait for the network.

From its admission on a request's restore and its forward pass keep the scheduler waiting, and with it every request of
the batch. Alone it spends that time anyway while pages are decoded (where others are there, they are decoded before:
``plugin/ahead.py``); it must not get longer because bytes are still on their way. So what is left of the fetch, of the
restore and of the forward pass are predicted together, and the request is admitted when the stall that bytes would
cause is nil.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from sglang_kvcodec.flow.link_meter import WINDOW_S
from sglang_kvcodec.flow.prediction import Knowledge, Prefix, predict_rest

WATCH_S = 0.03
PERIOD_S = 0.01
LANDING_MARGIN, LEAST_MARGIN, MOST_MARGIN = 0.15, 0.05, 0.3
"""The link is taken to be slower than it was measured, by as much as it was at times; where that is not known, by the
first of these. Over longer than :data:`WINDOW_S`, in which that was seen, slow times and fast ones even out."""
RECENT_S, STEP_S = 0.05, 0.005
"""And no faster than over the first of these, which ends now; what had arrived is kept for moments the second apart."""
STALL_SHARE = 0.02
STALL_S = 0.002
"""A stall of this share of restore and forward pass, or of so many seconds, is nil."""


def is_in_time(prefix: Prefix, missing_bytes: float, known: Knowledge, last_block_bytes: float | None = None) -> bool:
    """Whether what is missing will land before its restore gets to it, if the restore begins now.

    Args:
        prefix: the pages that are being fetched.
        missing_bytes: of them.
        known: what was measured; without a rate of each kind nothing is in time.
        last_block_bytes: of the block under way, if that is the last one; None if it is not.
    """
    margin = LANDING_MARGIN
    if known.link_shortfall is not None:
        windows = missing_bytes / max(known.bytes_per_s or 0.0, 1e-9) / WINDOW_S
        # As the mean of so many independent ones.
        margin = min(MOST_MARGIN, max(LEAST_MARGIN, known.link_shortfall / math.sqrt(max(1.0, windows))))
    rest = predict_rest(prefix, missing_bytes, known, margin, last_block_bytes)
    return rest is not None and rest.stall_s <= max(STALL_S, STALL_SHARE * rest.after_s)


class EarlyAdmission:
    """Asks that for one fetch, now and then.

    What is known of the link may be old, and the link another one by now. So it is taken to be no faster than it has
    been in this very fetch, which is watched for :data:`WATCH_S` first, nor than it was a moment ago: a link that has
    just failed is not to be trusted with what is missing.
    """

    def __init__(self, prefix: Prefix) -> None:
        """Of a fetch of all pages of ``prefix``."""
        self._prefix = prefix
        self._total_bytes = sum(prefix.page_bytes)
        self._first: tuple[float, int] | None = None
        self._moments: collections.deque[tuple[float, int]] = collections.deque()
        self._next_s = 0.0

    def is_worth_asking(self, received_bytes: int, now_s: float) -> bool:
        """Whether it is time to ask, with so much received; what is known costs more to get than this."""
        if self._first is None:
            self._first = now_s, received_bytes
            self._next_s = now_s + WATCH_S
        if not self._moments or now_s >= self._moments[-1][0] + STEP_S:
            self._moments.append((now_s, received_bytes))
            while len(self._moments) > 1 and self._moments[1][0] <= now_s - RECENT_S:
                self._moments.popleft()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + PERIOD_S
        return True

    def is_due(
        self, received_bytes: int, known: Knowledge, now_s: float, last_block_bytes: float | None = None
    ) -> bool:
        """Whether the request is to be admitted, with so much received; the last argument as of :func:`is_in_time`."""
        if self._first is None or known.bytes_per_s is None:
            return False
        # Others on the link are in what was seen, so they are not to be counted twice.
        seen_bytes_per_s = min(
            (received_bytes - then_bytes) / max(1e-9, now_s - then_s)
            for then_s, then_bytes in (self._first, self._moments[0])
        )
        missing_bytes = max(0, self._total_bytes - received_bytes)
        seen = dataclasses.replace(known, bytes_per_s=min(known.bytes_per_s, seen_bytes_per_s), others_bytes=())
        return all(is_in_time(self._prefix, missing_bytes, each, last_block_bytes) for each in (seen, known))
