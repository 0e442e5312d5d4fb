"""How the scheduler's thread hears that a fetch has come to its end, without looking at each of them in each pass."""

from __future__ import annotations

import threading


class News:
    """Counts what has happened. Anyone may :meth:`tell`; one thread reads."""

    def __init__(self) -> None:
        """Nothing has happened."""
        self.count = 0
        """Another number than before whenever something was told in between, no matter how often."""
        self._event = threading.Event()

    def tell(self) -> None:
        """Something has happened, and can be seen already."""
        # Two at once may count as one: both have happened before either number can be read.
        self.count += 1
        self._event.set()

    def wait(self, most_s: float) -> None:
        """Waits until something was told since the last call, no longer than ``most_s``."""
        self._event.wait(most_s)
        self._event.clear()
