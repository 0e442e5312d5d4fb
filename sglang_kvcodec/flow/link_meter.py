"""How fast the link to a peer is: measured as pages arrive, followed as it changes.

Nothing is sent for it. All is thread-safe, and telling costs a lock and an append.
"""

from __future__ import annotations

import collections
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.rpc.message_pace import FIRST_BYTES

Clock = Callable[[], float]

SLICE_S = 0.05
"""The link is measured over slices of this length, or over a whole transfer that takes less."""
SLICES = 7
"""Bandwidth is the median over so many slices: it follows a change after four of them, a fifth of a second."""
WINDOW_S = 0.5
"""What was measured longer than this before the newest slice does not count."""
ONE_MOMENT_S, LONG_MOMENT_S = 0.001, 0.01
"""What comes within the first of these is of one message, but a message takes no longer than the second."""
FORGETTING = 0.98
"""A large message counts that much less with each that follows."""
MIN_SLICE_BYTES = 16 << 10
"""Less at the end of a transfer says more of the machine than of the link."""
SLOW_FIRST_BYTE_S = 0.1
ROUND_TRIPS = 9


class LinkMeter:
    """Bandwidth and round trip of the way from one peer, over all transfers together."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Knows nothing."""
        self._clock = clock
        self._lock = threading.Lock()
        self._slices: collections.deque[tuple[float, float]] = collections.deque(maxlen=SLICES)
        """``(end_s, bytes_per_s)``, oldest first."""
        self._round_trips: collections.deque[float] = collections.deque(maxlen=ROUND_TRIPS)
        self._running = 0
        """Transfers of which something has arrived."""
        self._start_s = 0.0
        self._bytes = 0
        self._has_slice = False
        """Whether a slice has ended since something began to arrive."""
        self._arrived_s = self._message_s = 0.0
        self._message_bytes = self._largest_bytes = 0.0
        """What arrived last at one moment, and the most of late."""

    def round_trip(self, seconds: float) -> None:
        """An RPC that sends next to nothing took so long."""
        with self._lock:
            self._round_trips.append(seconds)
            value = statistics.median(self._round_trips)
        metrics.ROUND_TRIP_SECONDS.set(value)

    @property
    def round_trip_s(self) -> float:
        """Median of the last ones; 0 before the first."""
        with self._lock:
            return statistics.median(self._round_trips) if self._round_trips else 0.0

    def transfer(self) -> Transfer:
        """A transfer that is asked for now."""
        return Transfer(self, self._clock())

    def bytes_per_s(self) -> float | None:
        """What all transfers get together; None before anything was measured.

        While something is on its way, silence counts: as so many slices, in all of which one message comes.
        """
        with self._lock:
            now_s = self._clock()
            slices = list(self._slices)
            if self._running:
                if self._arrived_s - self._start_s >= SLICE_S:
                    slices += self._slice()
                silent_s = now_s - self._arrived_s
                if silent_s >= 2 * SLICE_S:
                    # A message that is on its way may come right now, and is then as large as others.
                    slices += [(now_s, self._message_to_come_bytes / silent_s)] * int(silent_s / SLICE_S)
            if not slices:
                return None
            return statistics.median(self._recent(slices))

    @property
    def shortfall(self) -> float | None:
        """By what share of the median the slowest of the newest slices is slower; None with too few of them."""
        with self._lock:
            recent = self._recent(list(self._slices))
        if len(recent) <= SLICES // 2:
            return None
        return 1 - min(recent) / max(1e-9, statistics.median(recent))

    @staticmethod
    def _recent(slices: Sequence[tuple[float, float]]) -> list[float]:
        """Bytes per second of those that count."""
        return [rate for end_s, rate in slices[-SLICES:] if end_s >= slices[-1][0] - WINDOW_S]

    @property
    def message_bytes(self) -> float:
        """The most that has come at one moment of late; 0 before anything has."""
        with self._lock:
            return self._largest_bytes

    @property
    def age_s(self) -> float:
        """How long ago the newest slice ended; infinite before the first."""
        with self._lock:
            return self._clock() - self._slices[-1][0] if self._slices else float("inf")

    def _first(self, size_bytes: int, asked_s: float) -> None:
        with self._lock:
            now_s = self._clock()
            round_trip_s = statistics.median(self._round_trips) if self._round_trips else 0.0
            waited_s = now_s - asked_s
            if waited_s > max(SLOW_FIRST_BYTE_S, 4 * round_trip_s):
                # So slow a link that the first message tells its speed. On others it tells how long the peer thinks.
                self._slices.append((now_s, size_bytes / (waited_s - round_trip_s)))
            if self._running:
                self._add(size_bytes, now_s)
            else:
                self._start_s, self._bytes, self._has_slice = now_s, 0, False
                self._arrived_s = now_s
            self._running += 1

    def _received(self, size_bytes: int) -> None:
        with self._lock:
            self._add(size_bytes, self._clock())

    def _add(self, size_bytes: int, now_s: float) -> None:
        if now_s - self._arrived_s >= ONE_MOMENT_S or now_s - self._message_s >= LONG_MOMENT_S:
            # What arrives at one moment is one message, and belongs to one slice.
            self._message_s = now_s
            if self._arrived_s - self._start_s >= SLICE_S:
                self._end_slice()
            self._message_bytes = 0.0
            self._largest_bytes *= FORGETTING
        self._bytes += size_bytes
        self._message_bytes += size_bytes
        self._largest_bytes = max(self._largest_bytes, self._message_bytes)
        self._arrived_s = now_s

    def _ended(self) -> None:
        with self._lock:
            self._running -= 1
            # The end of a longer transfer may be a burst that had waited in some buffer.
            took_s = self._arrived_s - self._start_s
            is_telling = took_s > 0 and (not self._has_slice or took_s >= SLICE_S / 2)
            is_enough = self._bytes >= MIN_SLICE_BYTES or took_s >= SLICE_S
            if not self._running and is_enough and is_telling:
                self._end_slice()
            silent_s = self._clock() - self._arrived_s
            if not self._slices and silent_s >= 2 * SLICE_S:
                # Given up in silence, with nothing else known: else each fetch to come would be begun and given up.
                self._slices.append((self._clock(), self._message_to_come_bytes / silent_s))
        bytes_per_s = self.bytes_per_s()
        if bytes_per_s is not None:
            metrics.LINK_BYTES_PER_SECOND.set(bytes_per_s)

    @property
    def _message_to_come_bytes(self) -> float:
        """Before there was a large one, what a client asks for at first."""
        return self._largest_bytes or FIRST_BYTES

    def _slice(self) -> list[tuple[float, float]]:
        """The one that ends with what has arrived last; as several where it was so long, for messages are large."""
        took_s = self._arrived_s - self._start_s
        return [(self._arrived_s, self._bytes / took_s)] * max(1, min(SLICES, round(took_s / SLICE_S)))

    def _end_slice(self) -> None:
        self._slices += self._slice()
        self._start_s, self._bytes, self._has_slice = self._arrived_s, 0, True


class Transfer:
    """One transfer under measurement; for one thread."""

    def __init__(self, meter: LinkMeter, asked_s: float) -> None:
        self._meter = meter
        self._asked_s = asked_s
        self._has_begun = False
        self._has_ended = False

    @property
    def has_begun(self) -> bool:
        """Whether anything has arrived."""
        return self._has_begun

    def received(self, size_bytes: int) -> None:
        """So many bytes have just arrived."""
        if self._has_begun:
            self._meter._received(size_bytes)
        else:
            self._has_begun = True
            self._meter._first(size_bytes, self._asked_s)

    def end(self) -> None:
        """Nothing more will arrive. May be called twice."""
        if self._has_begun and not self._has_ended:
            self._meter._ended()
        self._has_ended = True
