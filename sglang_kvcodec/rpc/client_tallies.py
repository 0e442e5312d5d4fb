"""What each client has done at a peer since it started, for whoever looks at the peer."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

_CLIENTS_REMEMBERED = 1024


@dataclasses.dataclass
class ClientTally:
    """Of one client.

    Attributes:
        name: of its token, or its address where there are no tokens.
        open_calls: under way now.
        calls: so far, those under way too.
        sent_bytes: object bytes that it was sent.
        received_bytes: bytes of its messages.
        called_at_s: when it last began a call, on the monotonic clock.
    """

    name: str
    open_calls: int = 0
    calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    called_at_s: float = 0.0


class ClientTallies:
    """Counts for the clients that called last. Written by the event loop, read by any thread."""

    def __init__(self, clients: int = _CLIENTS_REMEMBERED) -> None:
        """Remembers ``clients`` of them, and all that have a call under way."""
        self._clients = clients
        self._lock = threading.Lock()
        self._tallies: OrderedDict[str, ClientTally] = OrderedDict()

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[ClientTally]:
        """Counts a call for as long as the block lasts; what it moves is the block's to add."""
        with self._lock:
            tally = self._tallies.get(name)
            if tally is None:
                tally = self._tallies[name] = ClientTally(name)
            self._tallies.move_to_end(name)
            tally.open_calls += 1
            tally.calls += 1
            tally.called_at_s = time.monotonic()
            self._forget_idle()
        try:
            yield tally
        finally:
            tally.open_calls -= 1

    def __len__(self) -> int:
        return len(self._tallies)

    def top(self, count: int) -> list[ClientTally]:
        """Copies of ``count`` tallies: those with the most calls under way first, then those who called last."""
        with self._lock:
            tallies = list(self._tallies.values())
        busiest = heapq.nlargest(count, tallies, key=lambda tally: (tally.open_calls, tally.called_at_s))
        return [dataclasses.replace(tally) for tally in busiest]

    def _forget_idle(self) -> None:
        if len(self._tallies) > self._clients:
            idle = next((name for name, tally in self._tallies.items() if not tally.open_calls), None)
            if idle is not None:
                del self._tallies[idle]
