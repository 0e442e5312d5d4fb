"""What was used of an LMDB store, until it is written: reads only remember, a thread of its own writes."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)

USES_HELD = 4096
"""Uses remembered before they are written without a put to do it."""
MOST_USES_HELD = 4 * USES_HELD
"""About so many at most: where writing does not keep up, the older half is forgotten, which only blurs the order of
eviction."""
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
        self._older: dict[bytes, int] = {}
        self._held: dict[bytes, int] = {}
        """What was used since the older ones were full. Where nobody writes, those are forgotten as a whole."""
        self._fresh: list[tuple[int, Sequence[bytes]]] = []
        """What is not among the held yet: the number before theirs, and keys, of which the first was used last. A
        Lookup brings a thousand, and is not to go through them one by one."""
        self._fresh_uses = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def next_number(self) -> int:
        """The number of a use that happens now."""
        with self._changed:
            self._number += 1
            return self._number

    def remember(self, keys: Sequence[bytes]) -> None:
        """Objects that were used together, the first one last. Never waits for the disk, and keeps ``keys``."""
        if not keys:
            return
        with self._changed:
            self._fresh.append((self._number, keys))
            self._number += len(keys)
            self._fresh_uses += len(keys)
            if self._fresh_uses < USES_HELD:
                return
            if self._fresh_uses >= USES_HELD + USES_HELD // 4:
                # The thread, whose task this is, is writing.
                self._merge()
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="kvcodec-lmdb-uses", daemon=True)
                    self._thread.start()
                self._changed.notify_all()

    @property
    def held_uses(self) -> int:
        """How many objects' uses wait to be written, but for the freshest."""
        return len(self._older) + len(self._held)

    def _merge(self) -> None:
        for number, keys in self._fresh:
            self._held.update(zip(reversed(keys), range(number + 1, number + 1 + len(keys)), strict=True))
        self._fresh, self._fresh_uses = [], 0
        if len(self._held) >= MOST_USES_HELD // 2:
            self._older, self._held = self._held, {}

    def take(self, most: int | None = None) -> dict[bytes, int]:
        """Key -> number of the last use of what is held, ``most`` of the oldest or all; they are the caller's now."""
        with self._changed:
            self._merge()
            if most is None or self.held_uses <= most:
                taken = {**self._older, **self._held}
                self._older, self._held = {}, {}
                return taken
            if not self._older:
                self._older, self._held = self._held, {}
            taken = dict(itertools.islice(self._older.items(), most))
            for key in taken:
                del self._older[key]
        return taken

    def give_back(self, taken: Mapping[bytes, int]) -> None:
        """Holds what could not be written, unless it was used again since."""
        with self._changed:
            self._merge()
            self._older = {**taken, **self._older}

    def close(self) -> None:
        """Ends the thread, after what it is writing. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        pause_until_s = 0.0
        while True:
            with self._changed:
                if self._fresh_uses >= USES_HELD:
                    self._merge()
                if self._closed:
                    return
                pause_s = pause_until_s - time.monotonic()
                if self.held_uses < USES_HELD or pause_s > 0:
                    self._changed.wait(pause_s if pause_s > 0 else None)
                    continue
            started_s = time.monotonic()
            try:
                self._write()
            except Exception:
                # A thread's top: whatever it is, the order blurs and the store goes on.
                logger.exception("the order of use was not kept")
            pause_until_s = time.monotonic() + _PAUSE_FACTOR * (time.monotonic() - started_s)
