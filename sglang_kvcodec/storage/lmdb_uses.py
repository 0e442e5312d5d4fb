"""What was used of an LMDB store, until it is written: reads only remember, a thread of its own writes."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

USES_HELD = 4096
"""Uses remembered before they are written without a put to do it."""
MOST_USES_HELD = 4 * USES_HELD
"""Where writing does not keep up, the oldest are forgotten: their loss only blurs the order of eviction."""
_PAUSE_FACTOR = 4.0
"""Each use dirties pages all over the file: writing them may take the disk a fifth of the time, puts have the rest."""


class RememberedUses:
    """Numbers uses in their order and holds them until somebody takes them. Thread-safe."""

    def __init__(self, last_number: int, write: Callable[[], None]) -> None:
        """Goes on after ``last_number``.

        Args:
            last_number: the highest number in the store.
            write: called on a thread of its own when there are many: takes and writes them, may block, raises nothing.
        """
        self._write = write
        self._changed = threading.Condition()
        self._number = last_number
        self._held: OrderedDict[bytes, int] = OrderedDict()
        """The oldest first."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def next_number(self) -> int:
        """The number of a use that happens now."""
        with self._changed:
            self._number += 1
            return self._number

    def remember(self, keys: Sequence[bytes]) -> None:
        """Objects that were used together, the first one last. Never waits for the disk."""
        with self._changed:
            for key in reversed(keys):
                self._number += 1
                self._held[key] = self._number
                self._held.move_to_end(key)
            while len(self._held) > MOST_USES_HELD:
                self._held.popitem(last=False)
            if len(self._held) >= USES_HELD and not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="kvcodec-lmdb-uses", daemon=True)
                    self._thread.start()
                self._changed.notify_all()

    def take(self) -> dict[bytes, int]:
        """Key -> number of all that are held; they are the caller's now."""
        with self._changed:
            taken, self._held = self._held, OrderedDict()
        return taken

    def give_back(self, taken: dict[bytes, int]) -> None:
        """Holds what could not be written, unless it was used again since."""
        with self._changed:
            older = [(key, number) for key, number in taken.items() if key not in self._held]
            self._held = OrderedDict([*older, *self._held.items()])

    def close(self) -> None:
        """Ends the thread, after what it is writing. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._held) >= USES_HELD)
                if self._closed:
                    return
            started_s = time.monotonic()
            try:
                self._write()
            except Exception:
                # A thread's top: whatever it is, the order blurs and the store goes on.
                logger.exception("the order of use was not kept")
            pause_s = _PAUSE_FACTOR * (time.monotonic() - started_s)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause_s)
