"""The index that peers on one store share: sizes, order of use and room, in one slot of Redis or Valkey."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.storage import redis_scripts as scripts
from sglang_kvcodec.storage.redis_connection import RedisConnection

TOKEN_BYTES = 16
"""Length of the token at the end of a name: hexadecimal digits."""
_NAMES_PER_STEP = 256
_ENTRIES_REMEMBERED = 1 << 16


class Entry(NamedTuple):
    """An object as the index has it: its size, what makes its name different from all others, the time of its put."""

    size_bytes: int
    token: bytes
    stored_at_s: float

    @classmethod
    def parse(cls, text: bytes) -> Entry:
        """An entry as the scripts write it."""
        size_bytes, token, stored_at_ms = text.split(b":")
        return cls(int(size_bytes), token, int(stored_at_ms) / 1000)


class FoundName(NamedTuple):
    """An object that lies in the store, whether or not the index knows it; the time is in seconds of Unix time."""

    name: bytes
    size_bytes: int
    stored_at_s: float


class RedisIndex:
    """What peers on one store know of its objects, see :mod:`redis_scripts`. Thread-safe.

    Every method raises StorageUnavailableError where the servers do not answer, and once it is closed.
    """

    def __init__(
        self, connection: RedisConnection, tag: str, name_prefix: bytes = b"", *, objects_outlive_it: bool = False
    ) -> None:
        """An index as it is in the servers.

        Args:
            connection: closed by :meth:`close`.
            tag: what sets the index apart from others.
            name_prefix: of the names of all objects.
            objects_outlive_it: whether there may be objects when the index is lost; then it gives room only once it
                is complete, see :meth:`begin_rebuild`.
        """
        self._connection = connection
        self._keys = [f"{{{tag}}}:{part}".encode() for part in ("entries", "order", "leases", "doomed", "counts")]
        self._name_prefix = name_prefix
        self._objects_outlive_it = objects_outlive_it
        self._is_closed = False
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def name(self, key: bytes, token: bytes) -> bytes:
        """The name of an object."""
        return self._name_prefix + key + token

    def find(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Entries; marks them as used, the first one last."""
        self.require_open()
        return self._remember(keys, self._run(scripts.FIND, *keys)) if keys else []

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Entries; does not mark them."""
        self.require_open()
        return self._remember(keys, self._connection.call("HMGET", self._keys[0], *keys)) if keys else []

    def remembered(self, key: bytes) -> Entry | None:
        """The entry that this process saw last, without a question; None if it saw none. Its object may have gone."""
        self.require_open()
        with self._lock:
            return self._entries.get(key)

    def key_batches(self) -> Iterator[list[bytes]]:
        """All keys, some at a time.

        Raises:
            StorageUnavailableError: an index that is not complete does not know them.
        """
        cursor = None
        while cursor != 0:
            self._require_complete()
            cursor, entries = self._connection.call("HSCAN", self._keys[0], cursor or 0, "COUNT", 1000)
            if entries:
                yield list(entries)
            cursor = int(cursor)
        self._require_complete()

    def begin(
        self, key: bytes, size_bytes: int, token: bytes, capacity_bytes: int, lease_s: float
    ) -> tuple[bytes, list[bytes]]:
        """Has room held for a put until it is committed or abandoned, or ``lease_s`` seconds have gone by.

        Returns:
            ``there`` if the object is; ``go`` if the room is held; ``incomplete`` if nobody knows what is stored yet;
            else ``room`` and names to delete and :meth:`bury` before the next try, none while others hold everything.
        """
        verdict, *names = self._run(
            scripts.BEGIN,
            key,
            size_bytes,
            token,
            capacity_bytes,
            _NAMES_PER_STEP,
            int(lease_s * 1000),
            int(self._objects_outlive_it),
        )
        return verdict, names

    def commit(self, key: bytes, token: bytes) -> bytes:
        """Makes an object visible: ``stored``; ``there`` if another put was faster; ``lost`` if its lease ran out."""
        return bytes(self._run(scripts.COMMIT, key, token))

    def abandon(self, key: bytes, token: bytes) -> None:
        """Gives up a put; its object is to be deleted, whether or not it got there."""
        self._run(scripts.ABANDON, key, token)

    def remove(self, key: bytes, token: bytes = b"") -> bytes | None:
        """Removes an entry, that of the token where one is given; the name to delete, None if there was none.

        Raises:
            StorageUnavailableError: an index that is not complete can't tell that there is none.
        """
        name = self._run(scripts.REMOVE, key, token, int(self._objects_outlive_it and not token))
        with self._lock:
            self._entries.pop(key, None)
        if name == 0:
            raise StorageUnavailableError("the index is being rebuilt")
        return name or None

    def bury(self, names: Sequence[bytes]) -> None:
        """Frees the bytes of objects that have been deleted."""
        self._run(scripts.BURY, *names)

    def overflow(self, capacity_bytes: int) -> list[bytes]:
        """Names of some objects that are over a capacity, which leave the index; empty once there are none."""
        return list(self._run(scripts.TRIM, capacity_bytes, _NAMES_PER_STEP))

    def strays(self, names: Sequence[bytes]) -> list[bytes]:
        """Those of the names of objects that the index knows nothing of."""
        return list(self._run(scripts.STRAYS, *names))

    def begin_rebuild(self) -> bytes:
        """Tells that all objects are about to be listed, and those that it does not know adopted.

        Returns:
            A token for :meth:`end_rebuild`, the same for all peers until the index is lost.
        """
        return bytes(self._run(scripts.REBUILD, secrets.token_hex(TOKEN_BYTES // 2)))

    def adopt(self, found: Iterable[FoundName]) -> list[bytes]:
        """Makes entries of the strays among objects that are there, to be evicted before all others.

        Returns:
            Names to delete and :meth:`bury`: those whose key has an entry of another object.
        """
        arguments = [part for name, size, at_s in found for part in (name, size, int(at_s * 1000))]
        return list(self._run(scripts.ADOPT, *arguments))

    def end_rebuild(self, token: bytes) -> bool:
        """Marks the index as complete; False if it was lost since the rebuild began, which is to begin anew."""
        return bool(self._run(scripts.COMPLETE, token))

    def is_complete(self) -> bool:
        """Whether it has been rebuilt since it is there."""
        return bool(self._run(scripts.IS_COMPLETE))

    def stat(self) -> tuple[int, int, int]:
        """Objects, their bytes, and evictions so far."""
        objects, stored_bytes, evicted_objects = self._run(scripts.STAT)
        return objects, stored_bytes, evicted_objects

    def close(self) -> None:
        """Closes the connections. May be called twice."""
        self._is_closed = True
        self._connection.close()

    def require_open(self) -> None:
        """Raises StorageUnavailableError once it is closed."""
        if self._is_closed:
            raise StorageUnavailableError("the store is closed")

    def _require_complete(self) -> None:
        self.require_open()
        if self._objects_outlive_it and not self.is_complete():
            raise StorageUnavailableError("the index is being rebuilt")

    def _remember(self, keys: Sequence[bytes], found: Sequence[bytes | None]) -> list[Entry | None]:
        entries = [None if text is None else Entry.parse(text) for text in found]
        with self._lock:
            for key, entry in zip(keys, entries, strict=True):
                self._entries.pop(key, None)
                if entry is not None:
                    self._entries[key] = entry
            while len(self._entries) > _ENTRIES_REMEMBERED:
                self._entries.popitem(last=False)
        return entries

    def _run(self, script: str, *arguments: Any) -> Any:
        self.require_open()
        return self._connection.run(script, self._keys, [self._name_prefix, *arguments])
