"""The engine that keeps objects in a directory, in LMDB: crash-safe, bounded, least recently used out first."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.storage.base import RangeReader, StorageEngine, StoredObject, StoreStat
from sglang_kvcodec.storage.lmdb_environment import FileFullError, LmdbEnvironment
from sglang_kvcodec.storage.lmdb_tables import StoreTransaction
from sglang_kvcodec.storage.lmdb_uses import RememberedUses
from sglang_kvcodec.storage.size_index import Batch, SizeIndex

_EVICTIONS_PER_TRANSACTION = 1024
_KEYS_PER_BATCH = 1024
_ROOM_ATTEMPTS = 6
"""How often room is made in a full data file before giving up; each time twice as much is evicted."""

_USES_AT_ONCE = 2048
_TOUCHES_BETWEEN_RESTS = 32
_REST_S, _MOST_REST_S, _READ_LATELY_S = 0.002, 0.2, 0.01
"""A thread that writes uses takes the interpreter's lock from a Lookup at each of its thousand pages, which makes that
several times slower: it lets readers go first, but puts wait for it no longer than this."""

_logger = logging.getLogger(__name__)


class LmdbEngine(StorageEngine):
    """Objects in an LMDB environment.

    Every put is one transaction, synced before it returns, evictions included. Reads take no write transaction and wait
    for none: what they used is remembered and written with the next put, by a thread of its own from 4096 uses on, and
    at close. A crash forgets the uses that were not written, some 20 000 at most, never an object. Sizes are in memory,
    16 bytes for each object, from some seconds after the start on; until then they are read.

    The data file grows with what is stored and never shrinks. LMDB stores in pages of 4 KiB, so the file is larger
    than the objects: little for objects of 100 KiB, several times for objects of 100 bytes.
    """

    name = "lmdb"

    def __init__(self, directory: pathlib.Path, capacity_bytes: int, *, max_file_bytes: int | None = None) -> None:
        """Opens or creates the store; what is over a capacity smaller than the last one is evicted.

        Args:
            directory: holds the store and nothing else.
            capacity_bytes: bound of the bytes of all objects.
            max_file_bytes: bound of the data file; objects are evicted when it is reached. Default: twice the
                capacity and 256 MiB, so that the capacity is what binds.

        Raises:
            ConfigurationError: the directory holds something else, or a store of another version.
            StorageUnavailableError: in use by another engine, read-only, disk full.
        """
        self._capacity_bytes = capacity_bytes
        self._max_file_bytes = max_file_bytes
        self._environment = LmdbEnvironment(directory, max_file_bytes or _file_bytes(capacity_bytes))
        self._opened_at_s = time.time()
        self._read_at_s = 0.0
        self._index: SizeIndex | None = None
        self._write_lock = threading.Lock()
        try:
            with self._environment.reading() as store:
                self._uses = RememberedUses(store.last_sequence(), self._write_uses_alone)
            self._evict_to_capacity()
        except StorageUnavailableError:
            self._environment.close()
            raise
        self._index = SizeIndex(self._size_batches)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        with self._environment.in_use():
            found = self._index.sizes(keys) if self._index is not None else None
        if found is None:
            with self._environment.reading(views=False) as store:
                found = store.sizes_bytes(keys)
        self._read_at_s = time.monotonic()
        there = keys if None not in found else [key for key, size in zip(keys, found, strict=True) if size is not None]
        self._uses.remember(there)
        return found

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        with self._environment.reading() as store:
            value = store.read(key)
        if value is not None:
            self._uses.remember([key])
        return value

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | None:
        """See the base class."""
        with self._environment.reading() as store:
            return store.read_range(key, start, stop)

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """See the base class: one snapshot, nothing copied."""
        with self._environment.reading() as store:
            yield store.view_range

    @contextlib.contextmanager
    def ranges_now(self) -> Iterator[RangeReader | None]:
        """See the base class. What a thread has just read is in the kernel's page cache: LMDB's binding touches it all.

        It would wait while the data file grows, or is opened anew after a failure.
        """
        with self._environment.reading_now() as store:
            yield None if store is None else store.view_range

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        if len(value) > self._capacity_bytes:
            raise CapacityError(f"an object of {len(value)} bytes can't fit in {self._capacity_bytes}")
        with self._environment.reading() as store:
            is_there = store.size_bytes(key) is not None
        if is_there:
            self._uses.remember([key])
            return False
        with self._write_lock:
            for attempt in range(_ROOM_ATTEMPTS):
                try:
                    return self._put_in_one_transaction(key, value)
                except FileFullError:
                    self._make_room_in_file(len(value) << attempt)
            try:
                return self._put_in_one_transaction(key, value)
            except FileFullError as error:
                raise StorageUnavailableError(f"no room for {len(value)} bytes: {error}") from error

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        with self._environment.reading() as store:
            if store.size_bytes(key) is None:
                return False
        with self._write_lock, self._writing() as store:
            return store.remove(key)

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class. What was put before there was a record of it counts as put when the store was opened."""
        with self._environment.reading() as store:
            found = [store.size_and_time(key) for key in keys]
        return [
            None if record is None else StoredObject(record[0], record[1] / 1000 or self._opened_at_s)
            for record in found
        ]

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class. Each batch is a snapshot of its own, so that a slow walk keeps no old pages alive."""
        last = b""
        while True:
            with self._environment.reading() as store:
                batch = store.keys_after(last, _KEYS_PER_BATCH)
            if not batch:
                return
            yield batch
            last = batch[-1]

    def resize(self, capacity_bytes: int) -> None:
        """See the base class. The data file may grow with it, for which this waits until nobody reads or writes."""
        with self._write_lock:
            self._environment.allow_file(self._max_file_bytes or _file_bytes(capacity_bytes))
            self._capacity_bytes = capacity_bytes
            self._write_uses(self._uses.take())
            self._evict_to_capacity()

    def stat(self) -> StoreStat:
        """See the base class."""
        with self._environment.reading() as store:
            return StoreStat(store.objects(), store.stored_bytes, self._capacity_bytes, store.evicted_objects)

    def close(self) -> None:
        """See the base class."""
        self._uses.close()
        if self._index is not None:
            self._index.close()
        with self._write_lock:
            if self._environment.closed:
                return
            self._write_uses(self._uses.take())
            self._environment.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[StoreTransaction]:
        """A transaction that changes what is stored; the index hears of it when it is on the disk."""
        with self._environment.writing() as store:
            yield store
        if self._index is not None:
            self._index.change(store.changes)

    def _size_batches(self) -> Iterator[Batch]:
        last = b""
        while not self._environment.closed:
            with self._environment.reading(views=False) as store:
                keys, sizes_bytes = store.sizes_after(last, _KEYS_PER_BATCH)
            if not keys:
                return
            yield keys, sizes_bytes
            last = keys[-1]

    def _put_in_one_transaction(self, key: bytes, value: bytes) -> bool:
        uses = self._uses.take()
        try:
            with self._writing() as store:
                for used, number in uses.items():
                    store.touch(used, number)
                if store.size_bytes(key) is not None:
                    store.touch(key, self._uses.next_number())
                    return False
                while store.stored_bytes + len(value) > self._capacity_bytes:
                    store.evict_oldest()
                store.add(key, value, self._uses.next_number())
                return True
        except StorageUnavailableError:
            self._uses.give_back(uses)
            raise

    def _make_room_in_file(self, room_bytes: int) -> None:
        """Evicts at least ``room_bytes`` and makes their place in the file usable."""
        with self._writing() as store:
            goal_bytes = store.stored_bytes - room_bytes
            while store.stored_bytes > goal_bytes and store.evict_oldest():
                pass
        # LMDB reuses what a transaction freed from the next but one transaction on; this one does nothing else.
        with self._environment.writing():
            pass

    def _evict_to_capacity(self) -> None:
        is_over = True
        while is_over:
            with self._environment.reading() as store:
                is_over = store.stored_bytes > self._capacity_bytes
            if is_over:
                with self._writing() as store:
                    self._evict_some(store)

    def _evict_some(self, store: StoreTransaction) -> None:
        for _ in range(_EVICTIONS_PER_TRANSACTION):
            if store.stored_bytes <= self._capacity_bytes or not store.evict_oldest():
                return

    def _write_uses_alone(self) -> None:
        with self._write_lock:
            self._write_uses(self._uses.take(_USES_AT_ONCE), self._let_readers_go_first)

    def _let_readers_go_first(self, waited_s: float) -> float:
        """Rests while somebody reads, and else not; the seconds of all rests, of which ``waited_s`` were before."""
        if waited_s < _MOST_REST_S and time.monotonic() - self._read_at_s < _READ_LATELY_S:
            time.sleep(_REST_S)
            waited_s += _REST_S
        return waited_s

    def _write_uses(self, uses: Mapping[bytes, int], rest: Callable[[float], float] = lambda waited_s: 0.0) -> None:
        """Writes remembered uses; forgets them if that fails, for their loss only blurs the order of eviction."""
        if not uses:
            return
        waited_s = 0.0
        try:
            with self._environment.writing() as store:
                for index, (key, number) in enumerate(uses.items()):
                    if index % _TOUCHES_BETWEEN_RESTS == 0:
                        waited_s = rest(waited_s)
                    store.touch(key, number)
        except StorageUnavailableError as error:
            _logger.warning("the order of use of %d objects was not kept: %s", len(uses), error)


def _file_bytes(capacity_bytes: int) -> int:
    return 2 * capacity_bytes + (256 << 20)
