"""The restore of one batch as those see it who wait for it: what goes where, how far it is, and how it ends."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import KVCodecError, RestoreTimeoutError
from sglang_kvcodec.flow.streams import DeviceEvent
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, layer_groups

logger = logging.getLogger(__name__)

OnLayers = Callable[[LayerGroup, Sequence[DeviceEvent]], None]
"""Takes a layer group, and the events after which all its layers are in the pool; none if they are there already."""

PATIENCE = 4.0
"""A restore may take so many times as long as it is expected to, counted from when the last of its pages has landed."""
LEAST_PATIENCE_S = 3.0
"""And so long in any case: computing its requests instead takes as long as well."""


@dataclasses.dataclass(frozen=True)
class RestoreJob:
    """Pages of one request and where they go.

    Attributes:
        pages: checked page objects, or arriving ones; held until the restore has ended.
        slots: int64 ``(len(pages) * page_tokens,)`` on the pool's device, private to the request until it has ended;
            what comes later in the order of the events that were told may reuse them.
    """

    pages: Sequence[PageObject]
    slots: torch.Tensor


class Restore:
    """The restore of one batch. Calls back on restore threads: layer by layer in order, or once with an error."""

    def __init__(
        self,
        jobs: Sequence[RestoreJob],
        spec: KVSpec,
        parts: int,
        on_layers: OnLayers,
        on_failure: Callable[[KVCodecError], None],
        number: int = 0,
        timeout_s: float = math.inf,
        patience_s: float = math.inf,
    ) -> None:
        """A restore of all layer groups of ``spec``, each in ``parts`` parts; the least ``number`` is first.

        It ends after ``timeout_s``, or ``patience_s`` after the last of its pages has landed.
        """
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._start_s = self._landed_s = time.monotonic()
        groups = layer_groups(spec)
        self.jobs = jobs
        self.number = number
        self.bad_pages: list[PageObject] = []
        self._groups = groups
        self._spec = spec
        self._open_parts = [parts] * len(groups)
        self._events: list[list[DeviceEvent]] = [[] for _ in groups]
        self._announced = 0
        self._open = parts * len(groups)
        self._on_layers = on_layers
        self._on_failure = on_failure
        self._error: KVCodecError | None = None
        self._lock = threading.Lock()

    @property
    def has_failed(self) -> bool:
        """Whether the parts that are left need not be done."""
        return self._error is not None

    def check_time(self) -> None:
        """Before each part, so that what is under way is not left half done.

        Raises:
            RestoreTimeoutError: it has taken too long already.
        """
        now_s = time.monotonic()
        if now_s - self._start_s > self._timeout_s:
            raise RestoreTimeoutError(f"a restore is not done after {self._timeout_s:g} s")
        if now_s - self._landed_s > self._patience_s:
            raise RestoreTimeoutError(
                f"a restore is not done {self._patience_s:.3g} s after its pages have landed: expected were "
                f"{self._patience_s / PATIENCE:.3g} s at most"
            )

    def landed(self) -> None:
        """More of its pages can be restored."""
        self._landed_s = time.monotonic()

    def queued(self, group_index: int, event: DeviceEvent) -> None:
        """Takes note of writes to the slots that will have ended with ``event``."""
        with self._lock:
            self._events[group_index].append(event)

    def part_done(self, group_index: int, error: KVCodecError | None) -> None:
        """Counts a part, done or not. The failure is told when no thread writes to the slots any more."""
        with self._lock:
            self._open -= 1
            self._open_parts[group_index] -= 1
            if error is not None and self._error is None:
                self._error = error
            has_ended = self._open == 0
            if has_ended and self._error is None:
                _count_restored(self.jobs, self._spec)
            while (
                self._error is None and self._announced < len(self._groups) and self._open_parts[self._announced] == 0
            ):
                self._on_layers(self._groups[self._announced], self._events[self._announced])
                self._announced += 1
        failure = self._error
        if has_ended and failure is not None:
            self._wait_for_queued()
            metrics.RESTORE_FAILURES.labels(reason=failure.reason).inc()
            self._on_failure(failure)

    def _wait_for_queued(self) -> None:
        """Until no slot is written any more, or the device is beyond help."""
        try:
            for event in (event for events in self._events for event in events):
                event.synchronize()
        except Exception:
            # The forward pass must not wait for ever; its own next call will say what has become of the device.
            logger.exception("kvcodec: a device failed while pages were restored")

    def found_bad(self, pages: Sequence[PageObject]) -> None:
        """Remembers pages that could not be decoded."""
        with self._lock:
            self.bad_pages.extend(page for page in pages if page not in self.bad_pages)


StartRestore = Callable[[Sequence[RestoreJob], OnLayers, Callable[[KVCodecError], None]], Restore]
"""As ``Restorer.start``, with the events to wait for given."""


def _count_restored(jobs: Sequence[RestoreJob], spec: KVSpec) -> None:
    """By tier: the pages of one request may be of several."""
    tiers = collections.Counter(page.header.profile_name for job in jobs for page in job.pages)
    for tier, pages in tiers.items():
        metrics.RESTORED_TOKENS.labels(tier=tier).inc(pages * spec.page_tokens)
        metrics.RESTORED_BYTES.labels(tier=tier).inc(pages * spec.page_bytes)
