"""What each client may take of a peer, so that none of them takes what is there for all. For one event loop."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import AsyncIterator

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import CapacityError, ClientLimitError
from sglang_kvcodec.rpc.bandwidth import BandwidthLimit
from sglang_kvcodec.rpc.budget import ByteBudget

_MOST_DELAY_S = 3.0
"""What would wait longer for its client's bandwidth is refused: the client would take the peer for silent, see
``config.Timeouts.progress_s``, and the call would only hold memory and a stream."""


class StreamSlots:
    """Bounds the streams that are open at once, of all clients and of each."""

    def __init__(self, max_streams: int, max_client_streams: int) -> None:
        self.open_streams = 0
        self._max_streams = max_streams
        self._max_client_streams = max_client_streams
        self._of_client: collections.Counter[str] = collections.Counter()

    @contextlib.asynccontextmanager
    async def __call__(self, method: str, client: str) -> AsyncIterator[None]:
        """Holds a slot.

        Raises:
            ClientLimitError: the client has all it may have.
            CapacityError: there is none.
        """
        if self._of_client[client] >= self._max_client_streams < self._max_streams:
            peer_metrics.PEER_REFUSED.labels("client_streams").inc()
            raise ClientLimitError(f"this client has {self._max_client_streams} streams open already")
        if self.open_streams >= self._max_streams:
            peer_metrics.PEER_REFUSED.labels("streams").inc()
            raise CapacityError(f"this peer serves {self.open_streams} streams already")
        self.open_streams += 1
        self._of_client[client] += 1
        peer_metrics.PEER_STREAMS.labels(method).inc()
        try:
            yield
        finally:
            self.open_streams -= 1
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]
            peer_metrics.PEER_STREAMS.labels(method).dec()


class ClientBandwidth:
    """Delays the bytes of each client, so that together they pass at its rate."""

    def __init__(self, bits_per_s: int | None) -> None:
        """Of ``bits_per_s`` for each client; None delays nothing."""
        self._bits_per_s = bits_per_s
        self._limits: dict[str, BandwidthLimit] = {}

    @property
    def message_bytes(self) -> int | None:
        """The largest sensible message, None without a limit."""
        return None if self._bits_per_s is None else BandwidthLimit(self._bits_per_s).message_bytes

    async def take(self, client: str, size_bytes: int) -> None:
        """Waits until ``size_bytes`` of the client have passed, after those that were taken before.

        Raises:
            ClientLimitError: it would take too long, because the client has so much under way.
        """
        if self._bits_per_s is None:
            return
        limit = self._limits.get(client)
        if limit is None:
            # One that is idle has saved up nothing, so it may be forgotten.
            self._limits = {name: each for name, each in self._limits.items() if each.delay_s > 0}
            limit = self._limits[client] = BandwidthLimit(self._bits_per_s)
        if limit.delay_s > _MOST_DELAY_S:
            peer_metrics.PEER_REFUSED.labels("client_bandwidth").inc()
            raise ClientLimitError(f"this client has {limit.delay_s:.0f} s of its bandwidth under way already")
        await limit.take(size_bytes)


class ClientBudgets:
    """Bounds the bytes of announced objects that each client's Put streams hold together."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._budgets: dict[str, ByteBudget] = {}

    async def acquire(self, client: str, size_bytes: int, timeout_s: float) -> None:
        """Waits for ``size_bytes`` of what the client may hold; to be given back with :meth:`release`.

        Raises:
            ClientLimitError: not free in time.
            CapacityError: more than anybody may hold.
        """
        budget = self._budgets.setdefault(client, ByteBudget(self._total_bytes))
        try:
            await budget.acquire(size_bytes, timeout_s)
        except CapacityError:
            if size_bytes > self._total_bytes:
                raise
            peer_metrics.PEER_REFUSED.labels("client_bytes").inc()
            raise ClientLimitError(f"this client is sending {budget.held_bytes} bytes at once already") from None
        finally:
            self._forget_idle(client)

    def release(self, client: str, size_bytes: int) -> None:
        """Gives back bytes of an :meth:`acquire`."""
        self._budgets[client].release(size_bytes)
        self._forget_idle(client)

    def _forget_idle(self, client: str) -> None:
        if self._budgets[client].is_idle:
            del self._budgets[client]
