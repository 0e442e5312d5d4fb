"""Around an engine on another machine: what a Fetch is about to read is read whole, many objects at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.storage.base import RangeReader, StorageEngine
from sglang_kvcodec.storage.wrappers import EngineWrapper

_READS_AT_ONCE = 32
READ_AHEAD_BYTES = 256 << 20


@dataclasses.dataclass
class _Held:
    data: Future[bytes | memoryview | None]
    size_bytes: int
    readers: int


class ReadAheadEngine(EngineWrapper):
    """Reads of :meth:`reading_ahead`'s objects wait once for the whole object, not for each slice of it.

    A Fetch takes each page in as many slices as there are layer groups, page after page: by itself it would wait for
    the network as often. Fetches of the same pages at the same time share what is read.
    """

    def __init__(self, engine: StorageEngine, most_bytes: int = READ_AHEAD_BYTES) -> None:
        """Wraps ``engine``; holds at most ``most_bytes`` for all who read. What is over that is read as without."""
        super().__init__(engine)
        self._free_bytes = most_bytes
        self._lock = threading.Lock()
        self._held: dict[bytes, _Held] = {}
        self._threads = ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="kvcodec-read-ahead")

    @contextlib.contextmanager
    def reading_ahead(self, objects: Sequence[tuple[bytes, int]]) -> Iterator[None]:
        """See the base class."""
        mine: list[tuple[bytes, _Held]] = []
        try:
            for key, size_bytes in objects:
                if (held := self._hold(key, size_bytes)) is not None:
                    mine.append((key, held))
            yield
        finally:
            for key, held in mine:
                self._release(key, held)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """See the base class."""
        return self._read(super().get_range, key, start, stop)

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """See the base class."""
        with super().ranges() as get_range:
            yield lambda key, start, stop: self._read(get_range, key, start, stop)

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        with self._lock:
            # It stays with those who hold it, who free its bytes.
            self._held.pop(key, None)
        return super().delete(key)

    def close(self) -> None:
        """See the base class."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        super().close()

    def _hold(self, key: bytes, size_bytes: int) -> _Held | None:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                if size_bytes > self._free_bytes:
                    return None
                try:
                    data = self._threads.submit(self._engine.get_range, key, 0, size_bytes)
                except RuntimeError:
                    raise StorageUnavailableError("the store is closed") from None
                held = self._held[key] = _Held(data, size_bytes, 0)
                self._free_bytes -= size_bytes
            held.readers += 1
            return held

    def _release(self, key: bytes, held: _Held) -> None:
        with self._lock:
            held.readers -= 1
            if held.readers:
                return
            held.data.cancel()
            self._free_bytes += held.size_bytes
            if self._held.get(key) is held:
                del self._held[key]

    def _read(self, get_range: RangeReader, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        with self._lock:
            held = self._held.get(key)
        if held is None:
            return get_range(key, start, stop)
        try:
            data = held.data.result()
        except concurrent.futures.CancelledError:
            # Its readers have gone, and this one is none of them.
            return get_range(key, start, stop)
        return None if data is None else memoryview(data)[start:stop]
