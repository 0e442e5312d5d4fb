"""How long decoding and restoring take, of each tier: measured as parts are restored, followed as it changes.

All is thread-safe, and telling costs a lock and an append.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fitting import OnlineFit

Clock = Callable[[], float]

RESTORE_DOUBTED_S = 60.0
"""After so long without a restore its rate is doubted: where it is too slow to be of use it gets another try."""
TIER_FORGOTTEN_S = 600.0
"""That of a tier is unknown again if so long only others were restored."""


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
        """What is known of a profile, or of all together; None before its first restore, and once it is forgotten.

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
