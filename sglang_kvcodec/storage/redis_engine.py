"""The engine that keeps objects in Redis or Valkey, one server or a cluster, which any number of peers may share."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.storage import redis_scripts as scripts
from sglang_kvcodec.storage.base import StorageEngine, StoredObject, StoreStat
from sglang_kvcodec.storage.redis_connection import RedisAddress, RedisConnection

_LEASE_S = 120.0
"""How long room is held for a put whose peer says no more. Above all time-outs of the calls of a put together."""
_NAMES_PER_STEP = 256
_ROOM_WAIT_S = 10.0
_ROOM_POLL_S = 0.02
_ENTRIES_REMEMBERED = 1 << 16
_TOKEN_BYTES = 8


class _Entry(NamedTuple):
    size_bytes: int
    token: bytes
    stored_at_s: float

    @classmethod
    def parse(cls, text: bytes) -> _Entry:
        size_bytes, token, stored_at_ms = text.split(b":")
        return cls(int(size_bytes), token, int(stored_at_ms) / 1000)


class RedisEngine(StorageEngine):
    """Objects as strings spread over all slots; their sizes and order in one slot, see :mod:`redis_scripts`.

    Peers that share a store keep one order and one count, and each holds them to the capacity it was given itself. An
    acknowledged put is as durable as the server's own settings make it. An object that the servers have lost although
    the index has it is a miss, and leaves the index when it is read.
    """

    waits_for_network = True

    def __init__(self, address: RedisAddress, capacity_bytes: int) -> None:
        """Connects; what is over the capacity is evicted.

        Raises:
            ConfigurationError: the servers evict keys by themselves.
            StorageUnavailableError: no answer.
        """
        self.name = "rediscluster" if address.is_cluster else "redis"
        self._capacity_bytes = capacity_bytes
        tag = f"{{{address.prefix}}}:".encode()
        self._index = [tag + part for part in (b"entries", b"order", b"leases", b"doomed", b"counts")]
        self._name = f"{address.prefix}:o:".encode()
        self._closed = False
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._connection = RedisConnection(address)
        try:
            self._trim()
        except BaseException:
            self._connection.close()
            raise

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        return [None if entry is None else entry.size_bytes for entry in self._find(keys)]

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        (entry,) = self._find([key])
        return None if entry is None else self._read(key, entry, 0, entry.size_bytes)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | None:
        """See the base class."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None:
            part = self._read(key, entry, start, stop)
            if part is not None:
                return part
        # It is as unknown as one that has been evicted and put again.
        (entry,) = self._peek([key])
        return None if entry is None else self._read(key, entry, start, stop)

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        if len(value) > self._capacity_bytes:
            raise CapacityError(f"an object of {len(value)} bytes can't fit in {self._capacity_bytes}")
        token = secrets.token_hex(_TOKEN_BYTES).encode()
        started_s = time.monotonic()
        if not self._begin(key, len(value), token):
            return False
        name = self._name + key + token
        try:
            if value:
                self._connection.call("SET", name, value)
            # Too late, and the bytes that this put held may be another's: the commit would say so as well, but then a
            # write that is still on its way could come after the one who cleans up.
            if time.monotonic() - started_s > _LEASE_S / 2:
                raise StorageUnavailableError("a put took too long")
            outcome = self._run(scripts.COMMIT, key, token)
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
        return self._remove(key, b"")

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        entries = self._peek(keys)
        return [None if entry is None else StoredObject(entry.size_bytes, entry.stored_at_s) for entry in entries]

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        cursor = 0
        while True:
            self._require_open()
            cursor, entries = self._connection.call("HSCAN", self._index[0], cursor, "COUNT", 1000)
            if entries:
                yield list(entries)
            if not int(cursor):
                return

    def tidy(self) -> None:
        """See the base class: deletes objects that are in no index, as a server that crashed and lost writes leaves."""
        self._require_open()
        for names in self._connection.scan(self._name + b"*"):
            strays = self._run(scripts.STRAYS, *names)
            if strays:
                self._connection.delete(strays)

    def resize(self, capacity_bytes: int) -> None:
        """See the base class. Each of the peers on a store has its own bound: the lowest is the store's."""
        self._capacity_bytes = capacity_bytes
        self._trim()

    def stat(self) -> StoreStat:
        """See the base class."""
        objects, stored_bytes, evicted_objects = self._run(scripts.STAT)
        return StoreStat(objects, stored_bytes, self._capacity_bytes, evicted_objects)

    def close(self) -> None:
        """See the base class."""
        self._closed = True
        self._connection.close()

    def _trim(self) -> None:
        while names := self._run(scripts.TRIM, self._capacity_bytes, _NAMES_PER_STEP):
            self._bury(names)

    def _begin(self, key: bytes, size_bytes: int, token: bytes) -> bool:
        """Has room held for a put; False if the object is there."""
        deadline_s = time.monotonic() + _ROOM_WAIT_S
        while True:
            verdict, *names = self._run(
                scripts.BEGIN, key, size_bytes, token, self._capacity_bytes, _NAMES_PER_STEP, int(_LEASE_S * 1000)
            )
            if verdict != b"room":
                return bool(verdict == b"go")
            if names:
                self._bury(names)
            elif time.monotonic() > deadline_s:
                raise StorageUnavailableError(f"no room for {size_bytes} bytes: puts under way hold everything")
            else:
                time.sleep(_ROOM_POLL_S)

    def _give_up(self, key: bytes, token: bytes) -> None:
        # If this fails as well, whoever needs room when the lease has run out does it.
        with contextlib.suppress(StorageUnavailableError):
            self._run(scripts.ABANDON, key, token)
            self._bury([self._name + key + token])

    def _remove(self, key: bytes, token: bytes) -> bool:
        name = self._run(scripts.REMOVE, key, token)
        with self._lock:
            self._entries.pop(key, None)
        if not name:
            return False
        self._bury([name])
        return True

    def _bury(self, names: Sequence[bytes]) -> None:
        """Deletes objects that the index has given up, and then frees their bytes."""
        self._connection.delete(names)
        self._run(scripts.BURY, *names)

    def _read(self, key: bytes, entry: _Entry, start: int, stop: int) -> bytes | None:
        """A part of the object that an entry names; None if it has gone, and then it leaves the index."""
        self._require_open()
        stop = min(stop, entry.size_bytes)
        if start >= stop:
            return b""
        name = self._name + key + entry.token
        whole = start == 0 and stop == entry.size_bytes
        part = self._connection.call("GET", name) if whole else self._connection.call("GETRANGE", name, start, stop - 1)
        if part is not None and len(part) == stop - start:
            return bytes(part)
        self._remove(key, entry.token)
        return None

    def _find(self, keys: Sequence[bytes]) -> list[_Entry | None]:
        """Entries, marked as used."""
        self._require_open()
        return self._remember(keys, self._run(scripts.FIND, *keys)) if keys else []

    def _peek(self, keys: Sequence[bytes]) -> list[_Entry | None]:
        """Entries, not marked."""
        self._require_open()
        return self._remember(keys, self._connection.call("HMGET", self._index[0], *keys)) if keys else []

    def _remember(self, keys: Sequence[bytes], found: Sequence[bytes | None]) -> list[_Entry | None]:
        entries = [None if text is None else _Entry.parse(text) for text in found]
        with self._lock:
            for key, entry in zip(keys, entries, strict=True):
                self._entries.pop(key, None)
                if entry is not None:
                    self._entries[key] = entry
            while len(self._entries) > _ENTRIES_REMEMBERED:
                self._entries.popitem(last=False)
        return entries

    def _run(self, script: str, *arguments: Any) -> Any:
        self._require_open()
        return self._connection.run(script, self._index, [self._name, *arguments])

    def _require_open(self) -> None:
        if self._closed:
            raise StorageUnavailableError("the store is closed")
