"""What is common to engines whose index is in Redis, wherever their objects are: any number of peers may share one."""

from __future__ import annotations

import abc
import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.storage.base import StorageEngine, StoredObject, StoreStat
from sglang_kvcodec.storage.redis_index import TOKEN_BYTES, Entry, RedisIndex

_ROOM_WAIT_S = 10.0
_ROOM_POLL_S = 0.02


class NamedObjects(Protocol):
    """Where the objects of an index lie, under names that are used once: those of :meth:`RedisIndex.name`. Thread-safe.

    Every method raises StorageUnavailableError where the servers do not answer.
    """

    @property
    def lease_s(self) -> float:
        """How long room is held for a put whose peer says no more: twice the time-outs of :meth:`put`, at least."""

    def put(self, name: bytes, value: bytes) -> None:
        """Stores an object."""

    def get(self, name: bytes, start: int, stop: int, *, is_whole: bool) -> bytes | None:
        """Bytes ``[start, stop)``, at least one, all of the object if ``is_whole``; fewer or None if it has gone."""

    def delete(self, names: Sequence[bytes]) -> None:
        """Deletes objects; one that is not there is no error."""


class IndexedEngine(StorageEngine):
    """Objects under names that are used once; their sizes and order in a :class:`RedisIndex`.

    Peers that share a store keep one order and one count, and each holds them to the capacity it was given itself. An
    object that has been lost although the index has it is a miss, and leaves the index when it is read.
    """

    waits_for_network = True

    def __init__(self, index: RedisIndex, objects: NamedObjects, capacity_bytes: int) -> None:
        """An engine on both; ``index`` is its own to close."""
        self._index = index
        self._objects = objects
        self._capacity_bytes = capacity_bytes

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        return [None if entry is None else entry.size_bytes for entry in self._index.find(keys)]

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        (entry,) = self._index.find([key])
        return None if entry is None else self._read(key, entry, 0, entry.size_bytes)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | None:
        """See the base class."""
        entry = self._index.remembered(key)
        if entry is not None:
            part = self._read(key, entry, start, stop)
            if part is not None:
                return part
        # It is as unknown as one that has been evicted and put again.
        (entry,) = self._index.peek([key])
        return None if entry is None else self._read(key, entry, start, stop)

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        if len(value) > self._capacity_bytes:
            raise CapacityError(f"an object of {len(value)} bytes can't fit in {self._capacity_bytes}")
        token = secrets.token_hex(TOKEN_BYTES // 2).encode()
        lease_s = self._objects.lease_s
        started_s = time.monotonic()
        if not self._begin(key, len(value), token, lease_s):
            return False
        name = self._index.name(key, token)
        try:
            if value:
                self._objects.put(name, value)
            # Too late, and the bytes that this put held may be another's: the commit would say so as well, but then a
            # write that is still on its way could come after the one who cleans up.
            if time.monotonic() - started_s > lease_s / 2:
                raise StorageUnavailableError("a put took too long")
            outcome = self._index.commit(key, token)
        except StorageUnavailableError:
            self._give_up(key, token)
            raise
        if outcome == b"stored":
            return True
        self._bury([name])
        if outcome == b"lost":
            raise StorageUnavailableError("a put took so long that its room was given to others")
        return False

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        name = self._index.remove(key)
        if name is None:
            return False
        self._bury([name])
        return True

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        entries = self._index.peek(keys)
        return [None if entry is None else StoredObject(entry.size_bytes, entry.stored_at_s) for entry in entries]

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        return self._index.key_batches()

    @abc.abstractmethod
    def tidy(self) -> None:
        """See the base class: sees to objects that are in no index, as servers that crashed and lost writes leave."""

    def resize(self, capacity_bytes: int) -> None:
        """See the base class. Each of the peers on a store has its own bound: the lowest is the store's."""
        self._capacity_bytes = capacity_bytes
        self._trim()

    def stat(self) -> StoreStat:
        """See the base class."""
        objects, stored_bytes, evicted_objects = self._index.stat()
        return StoreStat(objects, stored_bytes, self._capacity_bytes, evicted_objects)

    def close(self) -> None:
        """See the base class."""
        self._index.close()

    def _trim(self) -> None:
        while names := self._index.overflow(self._capacity_bytes):
            self._bury(names)

    def _bury(self, names: Sequence[bytes]) -> None:
        """Deletes objects that the index has given up, and then frees their bytes."""
        self._objects.delete(names)
        self._index.bury(names)

    def _found_incomplete(self) -> None:
        """Called when a put finds an index that is not complete, before the next try."""

    def _begin(self, key: bytes, size_bytes: int, token: bytes, lease_s: float) -> bool:
        """Has room held for a put; False if the object is there."""
        deadline_s = time.monotonic() + _ROOM_WAIT_S
        while True:
            verdict, names = self._index.begin(key, size_bytes, token, self._capacity_bytes, lease_s)
            if verdict in (b"go", b"there"):
                return verdict == b"go"
            if names:
                self._bury(names)
                continue
            if verdict == b"incomplete":
                self._found_incomplete()
            if time.monotonic() > deadline_s:
                reason = "puts under way hold everything" if verdict == b"room" else "the index is being rebuilt"
                raise StorageUnavailableError(f"no room for {size_bytes} bytes: {reason}")
            time.sleep(_ROOM_POLL_S)

    def _give_up(self, key: bytes, token: bytes) -> None:
        # If this fails as well, whoever needs room when the lease has run out does it.
        with contextlib.suppress(StorageUnavailableError):
            self._index.abandon(key, token)
            self._bury([self._index.name(key, token)])

    def _read(self, key: bytes, entry: Entry, start: int, stop: int) -> bytes | None:
        """A part of the object that an entry names; None if it has gone, and then it leaves the index."""
        stop = min(stop, entry.size_bytes)
        if start >= stop:
            return b""
        is_whole = start == 0 and stop == entry.size_bytes
        part = self._objects.get(self._index.name(key, entry.token), start, stop, is_whole=is_whole)
        if part is not None and len(part) == stop - start:
            return part
        name = self._index.remove(key, entry.token)
        if name is not None:
            self._bury([name])
        return None
