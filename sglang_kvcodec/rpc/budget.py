"""A bound on the bytes that all Put streams hold together."""

from __future__ import annotations

import asyncio
import collections

from sglang_kvcodec.errors import CapacityError


class ByteBudget:
    """Hands out bytes first come, first served. For one event loop.

    Whoever waits holds nothing, so waiting can't deadlock.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._free_bytes = total_bytes
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def held_bytes(self) -> int:
        """Bytes handed out now."""
        return self._total_bytes - self._free_bytes

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds or waits for any."""
        return self._free_bytes == self._total_bytes and not self._waiting

    async def acquire(self, size_bytes: int, timeout_s: float) -> None:
        """Waits for ``size_bytes``; the caller gives them back with :meth:`release`.

        Raises:
            CapacityError: more than the whole budget, or not free in time.
        """
        if size_bytes > self._total_bytes:
            raise CapacityError(f"{size_bytes} bytes are more than this peer receives at once ({self._total_bytes})")
        if not self._waiting and size_bytes <= self._free_bytes:
            self._free_bytes -= size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            self._forget(size_bytes, turn)
            if isinstance(error, TimeoutError):
                raise CapacityError(f"this peer is busy receiving {self.held_bytes} bytes") from None
            raise

    def release(self, size_bytes: int) -> None:
        """Gives back bytes of an :meth:`acquire`."""
        self._free_bytes += size_bytes
        self._serve()

    def _forget(self, size_bytes: int, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.release(size_bytes)
            return
        self._waiting = collections.deque(entry for entry in self._waiting if entry[1] is not turn)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free_bytes:
            size_bytes, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free_bytes -= size_bytes
                turn.set_result(None)
