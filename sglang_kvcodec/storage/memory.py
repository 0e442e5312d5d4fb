"""The engine that keeps objects in this process's memory: for tests, and for a peer whose cache may be lost."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.storage.base import StorageEngine, StoredObject, StoreStat

_KEYS_PER_BATCH = 1024


class MemoryEngine(StorageEngine):
    """Objects in a dict, least recently used first."""

    name = "memory"
    reads_wait = False

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._objects: OrderedDict[bytes, bytes] = OrderedDict()
        self._stored_at_s: dict[bytes, float] = {}
        self._stored_bytes = 0
        self._evicted_objects = 0
        self._closed = False

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        with self._lock:
            self._require_open()
            found = [self._objects.get(key) for key in keys]
            # The last key first, so that the first one ends up as used last.
            for key in reversed(keys):
                if key in self._objects:
                    self._objects.move_to_end(key)
        return [None if value is None else len(value) for value in found]

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        with self._lock:
            self._require_open()
            value = self._objects.get(key)
            if value is not None:
                self._objects.move_to_end(key)
            return value

    def get_range(self, key: bytes, start: int, stop: int) -> memoryview | None:
        """See the base class."""
        with self._lock:
            self._require_open()
            value = self._objects.get(key)
        return None if value is None else memoryview(value)[start:stop]

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        if len(value) > self._capacity_bytes:
            raise CapacityError(f"an object of {len(value)} bytes can't fit in {self._capacity_bytes}")
        with self._lock:
            self._require_open()
            if key in self._objects:
                self._objects.move_to_end(key)
                return False
            self._evict_to(self._capacity_bytes - len(value))
            self._objects[key] = value
            self._stored_at_s[key] = time.time()
            self._stored_bytes += len(value)
            return True

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        with self._lock:
            self._require_open()
            value = self._objects.pop(key, None)
            if value is None:
                return False
            del self._stored_at_s[key]
            self._stored_bytes -= len(value)
            return True

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        with self._lock:
            self._require_open()
            return [
                StoredObject(len(self._objects[key]), self._stored_at_s[key]) if key in self._objects else None
                for key in keys
            ]

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        with self._lock:
            self._require_open()
            keys = list(self._objects)
        for first in range(0, len(keys), _KEYS_PER_BATCH):
            yield keys[first : first + _KEYS_PER_BATCH]

    def resize(self, capacity_bytes: int) -> None:
        """See the base class."""
        with self._lock:
            self._require_open()
            self._capacity_bytes = capacity_bytes
            self._evict_to(capacity_bytes)

    def stat(self) -> StoreStat:
        """See the base class."""
        with self._lock:
            self._require_open()
            return StoreStat(len(self._objects), self._stored_bytes, self._capacity_bytes, self._evicted_objects)

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            self._closed = True
            self._objects.clear()
            self._stored_at_s.clear()

    def _evict_to(self, most_bytes: int) -> None:
        while self._stored_bytes > most_bytes:
            oldest, evicted = self._objects.popitem(last=False)
            del self._stored_at_s[oldest]
            self._stored_bytes -= len(evicted)
            self._evicted_objects += 1

    def _require_open(self) -> None:
        if self._closed:
            raise StorageUnavailableError("the store is closed")
