"""A token bucket over the bytes a peer sends."""

from __future__ import annotations

import asyncio
import time

_GRAIN_S = 0.02
"""A message of a limited peer takes at most this long, so that streams share the link evenly."""

_CREDIT_S = 0.01


class BandwidthLimit:
    """Delays bytes so that together they leave at ``bits_per_s``. For one event loop.

    A message is due when its last byte would have left a link of that speed. What makes the next one come late, and the
    sleep too long, is made up for; else the link saves up nothing while idle.
    """

    def __init__(self, bits_per_s: int) -> None:
        self._bytes_per_s = bits_per_s / 8
        self._free_at_s = time.monotonic()

    @property
    def message_bytes(self) -> int:
        """The largest sensible message."""
        return max(1, int(self._bytes_per_s * _GRAIN_S))

    @property
    def delay_s(self) -> float:
        """How long what is taken already keeps the link."""
        return max(0.0, self._free_at_s - time.monotonic())

    async def take(self, size_bytes: int) -> None:
        """Waits until ``size_bytes`` have gone down the link, after those that were taken before."""
        now_s = time.monotonic()
        self._free_at_s = max(self._free_at_s, now_s - _CREDIT_S) + size_bytes / self._bytes_per_s
        if self._free_at_s > now_s:
            await asyncio.sleep(self._free_at_s - now_s)
