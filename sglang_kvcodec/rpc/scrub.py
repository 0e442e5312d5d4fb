"""Reads every stored object from time to time and drops those that are damaged, before anyone asks for them."""

from __future__ import annotations

import logging
import threading
import time

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import ForeignPageError, FormatError, StorageError, UnknownFormatError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import MAGIC, PageObject
from sglang_kvcodec.storage.base import StorageEngine

logger = logging.getLogger(__name__)

PAUSE_S = 600.0
"""Between two passes, and before an engine that failed is tried again."""


class Scrubber:
    """A thread that walks over a store again and again at a bounded rate. It marks nothing as used."""

    def __init__(self, engine: StorageEngine, bytes_per_s: int, pause_s: float = PAUSE_S) -> None:
        """Starts.

        Args:
            engine: what to walk over; the caller's to close, after :meth:`close`.
            bytes_per_s: bound of what is read; 0 to read nothing and only have the engine tidy up.
            pause_s: time between two passes.
        """
        self._engine = engine
        self._bytes_per_s = bytes_per_s
        self._pause_s = pause_s
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._is_woken = False
        self._thread = threading.Thread(target=self._run, name="kvcodec-scrub", daemon=True)
        self._thread.start()

    def set_rate(self, bytes_per_s: int) -> None:
        """Changes the bound of what is read; a pause ends, and a walk goes on or, with 0, ends."""
        with self._changed:
            self._bytes_per_s = bytes_per_s
            self._is_woken = True
            self._changed.notify()

    def close(self) -> None:
        """Ends the walk, after the object that it is at."""
        with self._changed:
            self._closing.set()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._engine.tidy()
                if self._bytes_per_s:
                    self._pass()
            except StorageError as error:
                logger.warning("the scrub stops for %s s: %s", self._pause_s, error)
            except Exception:
                # A thread's top: whatever it is, the peer goes on without.
                logger.exception("the scrub failed and stops for %s s", self._pause_s)
            self._pause(self._pause_s)

    def _pass(self) -> None:
        started_s = time.monotonic()
        objects = dropped = 0
        for batch in self._engine.key_batches():
            for key in batch:
                if self._closing.is_set() or not self._bytes_per_s:
                    return
                data = self._engine.get_range(key, 0, MAX_OBJECT_BYTES)
                if data is None:
                    continue
                objects += 1
                peer_metrics.STORE_SCRUBBED_BYTES.inc(len(data))
                dropped += self._drop_if_damaged(key, bytes(data))
                # Read once: it may become 0 meanwhile.
                if bytes_per_s := self._bytes_per_s:
                    self._pause(len(data) / bytes_per_s)
        peer_metrics.STORE_SCRUB_PASSES.inc()
        logger.info("scrubbed %d objects in %.0f s, %d were damaged", objects, time.monotonic() - started_s, dropped)

    def _pause(self, seconds: float) -> None:
        """Waits until then, until the rate changes, or not at all once it is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_woken or self._closing.is_set(), seconds)
            self._is_woken = False

    def _drop_if_damaged(self, key: bytes, data: bytes) -> bool:
        try:
            page_hash = PageKey.from_bytes(key).page_hash
            stored = PageObject(data).header.key
            # The rest of the key may be a tenant's, which can't be told from the object.
            if stored.page_hash != page_hash:
                raise ForeignPageError(f"page {stored} is stored under another key")
        except (FormatError, ValueError) as error:
            if isinstance(error, UnknownFormatError) and data.startswith(MAGIC):
                # Of another version of this package, which may be able to read it.
                return False
            reason = error.reason if isinstance(error, FormatError) else "foreign_page"
            logger.warning("scrub: deleting %s, which is damaged: %s", key.hex(), error)
            if not self._engine.delete(key):
                return False
            peer_metrics.STORE_DAMAGED.labels(reason).inc()
            return True
        return False
