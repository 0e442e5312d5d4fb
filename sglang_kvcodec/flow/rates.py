"""What the planner knows of this server and its peer: measured as they work, followed as they change.

Nothing here sends anything or waits. Measuring is done by those who work: the fetcher tells what arrives, the restorer
what a part took, the scheduler what a forward pass took. All is thread-safe, and telling costs a lock and an append.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fitting import Floats, OnlineFit
from sglang_kvcodec.rpc.message_pace import FIRST_BYTES

Clock = Callable[[], float]
Ints = npt.NDArray[np.int64]

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
LEAST_KNOWN_TOKENS = 64
"""A pass of so many tokens has to be seen before passes count as known: a short one tells nothing of long ones."""
RESTORE_DOUBTED_S = 60.0
"""After so long without a restore its rate is doubted: where it is too slow to be of use it gets another try."""
TIER_FORGOTTEN_S = 600.0
"""That of a tier is unknown again if so long only others were restored."""


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


@dataclasses.dataclass(frozen=True)
class RestoreModel:
    """How long decoding and restoring take.

    Attributes:
        part_s: of each part, whatever its size.
        byte_s: of each coded byte.
        parts: that a segment is cut into: layer groups times sides.
        segment_pages: pages of a segment at most.
        threads: that work on parts at once.
        layer_groups: after each of which the forward pass can go on.
        queued_s: until all that was asked for before is restored.
        is_doubted: whether it was measured so long ago that it is no reason to give up restoring.
    """

    part_s: float
    byte_s: float
    parts: int
    segment_pages: int
    threads: int
    layer_groups: int
    queued_s: float = 0.0
    is_doubted: bool = False

    def seconds(self, pages: int, coded_bytes: int) -> float:
        """To restore pages of ``coded_bytes`` together, without what is queued."""
        segments = -(-pages // self.segment_pages)
        return (segments * self.parts * self.part_s + coded_bytes * self.byte_s) / self.threads


class RestoreMeter:
    """What parts of restores take on the restorer's threads."""

    def __init__(
        self, layer_groups: int, sides: int, segment_pages: int, threads: int, clock: Clock = time.monotonic
    ) -> None:
        """Knows nothing; the arguments are those of :class:`RestoreModel`."""
        self._layer_groups = layer_groups
        self._parts = layer_groups * sides
        self._segment_pages = segment_pages
        self._threads = threads
        self._clock = clock
        self._fits: dict[str, OnlineFit] = {}
        """By profile. Of each page about as many pixels are decoded, but not as many bytes."""
        self._restored_s: dict[str, float] = {}
        """By profile: when a part of it was restored last."""
        self._lock = threading.Lock()
        self._queued_bytes = 0.0
        self._last_s = 0.0
        self.on_idle: Callable[[], None] = lambda: None
        """Called on the thread that has restored the last of what was asked for."""

    def queued(self, coded_bytes: int) -> None:
        """So many coded bytes are to be restored."""
        with self._lock:
            self._queued_bytes += coded_bytes

    def part_ended(
        self, queued_bytes: int, seconds: float | None, coded_bytes: int | None = None, profile_name: str = ""
    ) -> None:
        """A part of a segment is done; None for its seconds if it was left out or failed.

        Args:
            queued_bytes: of the segment, as :meth:`queued` was told.
            seconds: that a thread worked on it.
            coded_bytes: of the segment; None if that is what was told.
            profile_name: of its pages, or of the first of them.
        """
        share_bytes = (queued_bytes if coded_bytes is None else coded_bytes) / self._parts
        with self._lock:
            self._queued_bytes -= queued_bytes / self._parts
            is_idle = self._queued_bytes < 1
            if is_idle:
                self._queued_bytes = 0.0
            self._last_s = self._clock()
            if seconds is not None:
                self._restored_s[profile_name] = self._last_s
        if seconds is not None:
            for fit in (self._fit_of(""), self._fit_of(profile_name)) if profile_name else (self._fit_of(""),):
                fit.add((1.0, share_bytes), seconds)
        if is_idle:
            self.on_idle()

    def model(self, refit: bool = True, profile_name: str = "") -> RestoreModel | None:
        """What is known of a profile, or of all together; None before its first restore.

        A tier may be restored in no time beside another, as ``raw`` is: nothing follows from one for the other.
        ``refit`` as of ``OnlineFit``.
        """
        with self._lock:
            queued_bytes, idle_s = self._queued_bytes, self._clock() - self._last_s
            unused_s = self._last_s - self._restored_s.get(profile_name, self._last_s)
        if unused_s > TIER_FORGOTTEN_S:
            self._fit_of(profile_name).forget()
        fitted_of_all = self._fit_of("").coefficients(refit)
        fitted = self._fit_of(profile_name).coefficients(refit)
        if fitted_of_all is None or fitted is None:
            return None
        byte_s_of_all = fitted_of_all[1]
        if refit and byte_s_of_all > 0:
            metrics.RESTORE_BYTES_PER_SECOND.set(self._threads / byte_s_of_all)
        is_doubted = not queued_bytes and idle_s > RESTORE_DOUBTED_S
        return self._model(fitted, queued_bytes * byte_s_of_all / self._threads, is_doubted)

    def slowest(self) -> RestoreModel | None:
        """If all were of the slowest tiers, as far as that was fitted; None before the first restore.

        What is queued may be of any tier, before headers have come.
        """
        with self._lock:
            queued_bytes, fits = self._queued_bytes, list(self._fits.values())
        fitted = [found for fit in fits if (found := fit.coefficients(refit=False)) is not None]
        if not fitted:
            return None
        part_s, byte_s = (max(values) for values in zip(*fitted, strict=True))
        return self._model((part_s, byte_s), queued_bytes * byte_s / self._threads)

    def _model(self, fitted: Sequence[float], queued_s: float, is_doubted: bool = False) -> RestoreModel:
        part_s, byte_s = fitted
        return RestoreModel(
            part_s,
            byte_s,
            self._parts,
            self._segment_pages,
            self._threads,
            self._layer_groups,
            queued_s,
            is_doubted,
        )

    def renew(self) -> None:
        """Fits what has been restored since."""
        with self._lock:
            names = list(self._fits)
        for name in names:
            self.model(profile_name=name)

    def _fit_of(self, profile_name: str) -> OnlineFit:
        with self._lock:
            return self._fits.setdefault(profile_name, OnlineFit(2, primary=1))


@dataclasses.dataclass(frozen=True)
class PrefillModel:
    """How long computing takes: ``pass_s`` for each forward pass, and for n tokens after p others
    ``token_s * n + pair_s * n * (p + n / 2)``, the second being attention; and ``whole_s * (p + n)**2`` with a backend
    whose attention asks for all tokens again in each pass (SGLang's ``torch_native``, ``_run_sdpa_forward_extend``).

    Attributes:
        pass_s: of a forward pass, whatever is in it.
        token_s: of a token.
        pair_s: of a token that looks at another.
        pass_tokens: computed by one forward pass at most; 0 for no bound.
        whole_s: of a pair of any two tokens that a pass knows.
        restored_s: of a token that is restored beside the pass that uses it. Nothing where decoders and model share
            nothing; without a GPU they share cores.
    """

    pass_s: float
    token_s: float
    pair_s: float
    pass_tokens: int = 0
    whole_s: float = 0.0
    restored_s: float = 0.0

    def seconds(self, new_tokens: int, prefix_tokens: int) -> float:
        """To compute ``new_tokens`` after ``prefix_tokens`` that are there."""
        return float(self.seconds_of(np.array([new_tokens]), np.array([prefix_tokens]))[0])

    def seconds_of(self, new_tokens: Ints, prefix_tokens: Ints) -> Floats:
        """The same of each of several, int64."""
        chunk = np.minimum(new_tokens, self.pass_tokens) if self.pass_tokens else new_tokens
        # The passes before the last, which are full ones.
        full = np.maximum(0, -(-new_tokens // np.maximum(1, chunk)) - 1)
        pairs = new_tokens * (prefix_tokens + new_tokens / 2)
        # The sum of (p + i * c) ** 2 for i from 1 to the number of full passes, and the last one.
        wholes = (prefix_tokens + new_tokens) ** 2.0
        wholes += full * prefix_tokens**2.0 + prefix_tokens * chunk * full * (full + 1.0)
        wholes += chunk**2.0 * full * (full + 1.0) * (2.0 * full + 1.0) / 6
        seconds: Floats = (
            (full + 1) * self.pass_s + self.token_s * new_tokens + self.pair_s * pairs + self.whole_s * wholes
        )
        return np.where(new_tokens > 0, seconds, 0.0)


class PrefillMeter:
    """What forward passes of prompts take."""

    def __init__(self, pass_tokens: int = 0) -> None:
        """Knows nothing. ``pass_tokens`` as in :class:`PrefillModel`."""
        self._pass_tokens = pass_tokens
        self._most_tokens = 0
        self._fit = OnlineFit(5, primary=1)

    def forward_pass(
        self, new_tokens: Sequence[int], prefix_tokens: Sequence[int], seconds: float, restored_tokens: int = 0
    ) -> None:
        """A pass over one or several requests has ended.

        Args:
            new_tokens: of each.
            prefix_tokens: of each, before them.
            seconds: that it took, without waiting for what was restored.
            restored_tokens: of all prefixes together, those that were restored beside it.
        """
        pairs = sum(new * (prefix + new / 2) for new, prefix in zip(new_tokens, prefix_tokens, strict=True))
        wholes = sum((prefix + new) ** 2 for new, prefix in zip(new_tokens, prefix_tokens, strict=True))
        self._fit.add((1.0, sum(new_tokens), pairs, wholes, restored_tokens), seconds)
        self._most_tokens = max(self._most_tokens, max(new_tokens, default=0))

    @property
    def is_known(self) -> bool:
        """Whether a pass has told how long longer ones take."""
        return self._most_tokens >= LEAST_KNOWN_TOKENS

    def model(self, refit: bool = True) -> PrefillModel | None:
        """What is known; None before the first pass that tells. ``refit`` as of ``OnlineFit``."""
        if not self.is_known:
            return None
        fitted = self._fit.coefficients(refit)
        if fitted is None:
            return None
        pass_s, token_s, pair_s, whole_s, restored_s = fitted
        model = PrefillModel(pass_s, token_s, pair_s, self._pass_tokens, whole_s, restored_s)
        if refit:
            metrics.PREFILL_TOKENS_PER_SECOND.set(1024 / max(1e-9, model.seconds(1024, 0)))
        return model


class Rates:
    """All that is measured, for one server process and one peer."""

    def __init__(self, link: LinkMeter, restore: RestoreMeter, prefill: PrefillMeter) -> None:
        """Puts them together, and has both fits renewed after each restore: not only fetches ask for them."""
        self.link = link
        self.restore = restore
        self.prefill = prefill
        restore.on_idle = self._refit

    def _refit(self) -> None:
        self.restore.renew()
        self.prefill.model()
