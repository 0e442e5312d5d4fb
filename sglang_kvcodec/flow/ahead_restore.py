"""Pages on their way into slots that no request has yet, while the request they are for still waits.

Nobody waits for it in a forward pass, and until all of it is in the pool and sound nobody knows of the slots.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence

import torch

from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.flow.restore import RestoreJob, StartRestore
from sglang_kvcodec.flow.streams import DeviceEvent
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import LayerGroup


class Progress(enum.IntEnum):
    """How far it is. Of several ranks the smallest counts."""

    FAILED = -1
    UNDER_WAY = 0
    RESTORED = 1


class AheadRestore:
    """One request's. Begins at once; the restorer's threads work on it, the scheduler's asks how far it is."""

    def __init__(
        self, pages: Sequence[PageObject], slots: torch.Tensor, layers: int, start_restore: StartRestore
    ) -> None:
        """Begins to restore.

        Args:
            pages: what is restored; held until the end.
            slots: int64, of these pages, on the pool's device.
            layers: of the pool.
            start_restore: starts the restore.
        """
        self.pages = pages
        self._slots: torch.Tensor | None = slots
        self._layers = layers
        self._events: list[DeviceEvent] = []
        self._has_failed = False
        self._is_queued = False
        """Whether the events are those of all layers."""
        self._restore = start_restore([RestoreJob(pages, slots)], self._on_layers, self._on_failure)

    def _on_layers(self, group: LayerGroup, events: Sequence[DeviceEvent]) -> None:
        self._events.extend(events)
        self._is_queued = group.first_layer + group.layers == self._layers

    def _on_failure(self, error: KVCodecError) -> None:
        self._has_failed = True

    @property
    def progress(self) -> Progress:
        """How far it is; once it is not under way any more, it stays what it is."""
        if self._has_failed:
            return Progress.FAILED
        if self._is_queued and all(event.query() for event in self._events):
            return Progress.RESTORED
        return Progress.UNDER_WAY

    @property
    def is_idle(self) -> bool:
        """Whether no slot is written any more."""
        return self.progress is not Progress.UNDER_WAY

    def take(self) -> torch.Tensor:
        """The slots, which are another's from now on."""
        slots, self._slots = self._slots, None
        assert slots is not None
        return slots

    def leftover(self) -> torch.Tensor | None:
        """The slots, if nobody took them; once it :attr:`is_idle`."""
        slots, self._slots = self._slots, None
        return slots

    @property
    def bad_pages(self) -> Sequence[PageObject]:
        """Pages that could not be restored."""
        return self._restore.bad_pages

    def wait(self) -> None:
        """Waits until it :attr:`is_idle`; for the end of a server or the flush of a cache."""
        pause = threading.Event()
        while not self.is_idle:
            pause.wait(0.005)
