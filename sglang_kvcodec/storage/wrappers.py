"""Engines around an engine: each adds one thing, and they compose."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import StorageError
from sglang_kvcodec.storage.base import RangeReader, StorageEngine, StoredObject, StoreStat


class EngineWrapper(StorageEngine):
    """Passes every call on. Closing it closes the engine inside."""

    def __init__(self, engine: StorageEngine) -> None:
        self.name = engine.name
        self.reads_wait = engine.reads_wait
        self.waits_for_network = engine.waits_for_network
        self._engine = engine

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        return self._engine.sizes(keys)

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        return self._engine.get(key)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """See the base class."""
        return self._engine.get_range(key, start, stop)

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """See the base class."""
        with self._engine.ranges() as get_range:
            yield get_range

    @contextlib.contextmanager
    def ranges_now(self) -> Iterator[RangeReader | None]:
        """See the base class."""
        with self._engine.ranges_now() as get_range:
            yield get_range

    @contextlib.contextmanager
    def reading_ahead(self, objects: Sequence[tuple[bytes, int]]) -> Iterator[None]:
        """See the base class."""
        with self._engine.reading_ahead(objects):
            yield

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        return self._engine.put(key, value)

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        return self._engine.delete(key)

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        return self._engine.peek(keys)

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        return self._engine.key_batches()

    def tidy(self) -> None:
        """See the base class."""
        self._engine.tidy()

    def resize(self, capacity_bytes: int) -> None:
        """See the base class."""
        self._engine.resize(capacity_bytes)

    def stat(self) -> StoreStat:
        """See the base class."""
        return self._engine.stat()

    def close(self) -> None:
        """See the base class."""
        self._engine.close()


class ExpiringEngine(EngineWrapper):
    """An object is not found any longer ``ttl_s`` seconds after its put, and is deleted when that is noticed.

    It is noticed when it is asked for, when all keys are listed, as the scrub does, and by :meth:`tidy`. A read in
    :meth:`ranges` sees what was there when its block began.
    """

    def __init__(self, engine: StorageEngine, ttl_s: float, clock_s: Callable[[], float] = time.time) -> None:
        """Wraps ``engine``; ``clock_s`` gives seconds of Unix time."""
        super().__init__(engine)
        self._ttl_s = ttl_s
        self._clock_s = clock_s

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        self._expire(keys)
        return super().sizes(keys)

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        self._expire([key])
        return super().get(key)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """See the base class."""
        self._expire([key])
        return super().get_range(key, start, stop)

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class: what has expired makes way for the new object."""
        self._expire([key])
        return super().put(key, value)

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        self._expire([key])
        return super().delete(key)

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        self._expire(keys)
        return super().peek(keys)

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        for batch in super().key_batches():
            gone = self._expire(batch)
            yield [key for key in batch if key not in gone]

    def tidy(self) -> None:
        """See the base class: deletes all that has expired."""
        for _ in self.key_batches():
            pass
        super().tidy()

    def _expire(self, keys: Sequence[bytes]) -> set[bytes]:
        oldest_s = self._clock_s() - self._ttl_s
        stored_at_s = self._engine.stored_at_s(keys)
        expired = {key for key, at in zip(keys, stored_at_s, strict=True) if at is not None and at <= oldest_s}
        for key in expired:
            if self._engine.delete(key):
                peer_metrics.STORE_EXPIRED.inc()
        return expired


class MeteredEngine(EngineWrapper):
    """Counts the calls and errors of an engine, and the time they take."""

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        with self._metered("sizes"):
            return super().sizes(keys)

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        with self._metered("get"):
            return super().get(key)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """See the base class."""
        with self._metered("get_range"):
            return super().get_range(key, start, stop)

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """See the base class; counted once, with all its reads."""
        with self._metered("ranges"), super().ranges() as get_range:
            yield get_range

    @contextlib.contextmanager
    def ranges_now(self) -> Iterator[RangeReader | None]:
        """See the base class; counted as ``ranges``."""
        with self._metered("ranges"), super().ranges_now() as get_range:
            yield get_range

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        with self._metered("put"):
            return super().put(key, value)

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        with self._metered("delete"):
            return super().delete(key)

    @contextlib.contextmanager
    def _metered(self, method: str) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        except StorageError as error:
            peer_metrics.STORE_ERRORS.labels(method, error.reason).inc()
            raise
        finally:
            peer_metrics.STORE_CALL_SECONDS.labels(method).observe(time.monotonic() - started_s)


class FaultyEngine(EngineWrapper):
    """Asks a hook before each call, which may raise, wait, or damage what is read; for tests and rehearsals."""

    def __init__(self, engine: StorageEngine) -> None:
        super().__init__(engine)
        self._lock = threading.Lock()
        self._before: Callable[[str, Sequence[bytes]], None] = lambda method, keys: None
        self._damage: Callable[[bytes], bytes] | None = None

    def set_faults(
        self,
        before: Callable[[str, Sequence[bytes]], None] | None = None,
        damage: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """Sets the faults from now on.

        Args:
            before: called with the name of the method and the keys it is about.
            damage: applied to what ``get`` and ``get_range`` return.
        """
        with self._lock:
            self._before = before or (lambda method, keys: None)
            self._damage = damage

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        self._before("sizes", keys)
        return super().sizes(keys)

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        self._before("get", [key])
        value = super().get(key)
        return value if value is None or self._damage is None else self._damage(value)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """See the base class."""
        self._before("get_range", [key])
        value = super().get_range(key, start, stop)
        return value if value is None or self._damage is None else self._damage(bytes(value))

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """See the base class: each read of its own, so that each may fail."""
        yield self.get_range

    @contextlib.contextmanager
    def ranges_now(self) -> Iterator[RangeReader | None]:
        """See the base class: any read may wait."""
        yield None

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        self._before("put", [key])
        return super().put(key, value)

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        self._before("delete", [key])
        return super().delete(key)

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        self._before("peek", keys)
        return super().peek(keys)

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        for batch in super().key_batches():
            self._before("key_batches", batch)
            yield batch

    def stat(self) -> StoreStat:
        """See the base class."""
        self._before("stat", [])
        return super().stat()
