"""What an LMDB store holds, as operations inside one transaction.

Four tables: ``objects`` (key -> bytes), ``meta`` (key -> sequence number of the last use, size, time of the put),
``order`` (sequence number -> key: the least recently used object is the first record) and LMDB's unnamed one (format
mark and counts). Records of format 1 have no time; they are read as of the time when the store was opened. Sizes and
order are apart from the objects so that no bookkeeping ever reads an object.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
import time
from collections.abc import Sequence
from typing import Any

FORMAT_KEY = b"sglang-kvcodec store"
FORMAT_VERSION = b"2"
READ_VERSIONS = frozenset({b"1", b"2"})
TABLE_COUNT = 3

_COUNTS_KEY = b"counts"
_COUNTS = struct.Struct(">QQ")
_META = struct.Struct(">QQQ")
"""Sequence number, bytes, milliseconds of Unix time."""
_META_1 = struct.Struct(">QQ")
_SIZE_IN_META = slice(8, 16)
"""Of either."""
_SIZE_OF_META = struct.Struct(">8xQ8x")
"""The same of a record of this format."""
_SEQUENCE = struct.Struct(">Q")


@dataclasses.dataclass(frozen=True)
class Tables:
    """LMDB's handles of the named tables; they live as long as the environment."""

    objects: Any
    meta: Any
    order: Any

    @classmethod
    def open(cls, environment: Any, transaction: Any) -> Tables:
        """Opens the tables, creating those that are missing."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(*(environment.open_db(name.encode(), txn=transaction) for name in names))


class StoreTransaction:
    """One LMDB transaction on a store. Lives inside the ``with`` that made it; for one thread."""

    def __init__(self, transaction: Any, tables: Tables) -> None:
        self._transaction = transaction
        self._tables = tables
        self.changes: dict[bytes, int | None] = {}
        """Sizes in bytes of the objects that this adds, None of those that it removes."""
        self.stored_bytes, self.evicted_objects = _COUNTS.unpack(transaction.get(_COUNTS_KEY, bytes(_COUNTS.size)))

    # ---- reading ----
    def objects(self) -> int:
        """How many objects there are."""
        return int(self._transaction.stat(self._tables.meta)["entries"])

    def size_bytes(self, key: bytes) -> int | None:
        """Size of an object, None where there is none."""
        record = self._transaction.get(key, db=self._tables.meta)
        return None if record is None else _read_meta(record)[1]

    def sizes_bytes(self, keys: Sequence[bytes]) -> list[int | None]:
        """The same of several; a Lookup asks for a thousand, so that each step of this counts."""
        get, meta = self._transaction.get, self._tables.meta
        records = list(map(get, keys, itertools.repeat(None), itertools.repeat(meta)))
        if None not in records and len(encoded := b"".join(records)) == _META.size * len(records):
            return [size for (size,) in _SIZE_OF_META.iter_unpack(encoded)]
        return [None if record is None else int.from_bytes(record[_SIZE_IN_META], "big") for record in records]

    def size_and_time(self, key: bytes) -> tuple[int, int] | None:
        """Size of an object and when it was put, in ms of Unix time, 0 if unknown; None where there is none."""
        record = self._transaction.get(key, db=self._tables.meta)
        return None if record is None else _read_meta(record)[1:]

    def keys_after(self, key: bytes, most: int) -> list[bytes]:
        """The next keys in their order; from the first on after an empty ``key``."""
        with self._transaction.cursor(self._tables.meta) as cursor:
            if not (cursor.set_range(key + b"\0") if key else cursor.first()):
                return []
            return [bytes(found) for found in itertools.islice(cursor.iternext(keys=True, values=False), most)]

    def sizes_after(self, key: bytes, most: int) -> tuple[list[bytes], list[int]]:
        """The same with the sizes of their objects in bytes."""
        with self._transaction.cursor(self._tables.meta) as cursor:
            if not (cursor.set_range(key + b"\0") if key else cursor.first()):
                return [], []
            records = list(itertools.islice(cursor.iternext(), most))
        return [bytes(found) for found, _ in records], [_read_meta(record)[1] for _, record in records]

    def read(self, key: bytes) -> bytes | None:
        """A copy of an object, None where there is none."""
        value = self._transaction.get(key, db=self._tables.objects)
        return None if value is None else bytes(value)

    def read_range(self, key: bytes, start: int, stop: int) -> bytes | None:
        """A copy of bytes ``[start, stop)`` of an object, None where there is none."""
        value = self.view_range(key, start, stop)
        return None if value is None else bytes(value)

    def view_range(self, key: bytes, start: int, stop: int) -> memoryview | None:
        """Bytes ``[start, stop)`` of an object in the map, for as long as the transaction; None where there is none."""
        value: memoryview | None = self._transaction.get(key, db=self._tables.objects)
        return None if value is None else value[start:stop]

    def last_sequence(self) -> int:
        """The highest sequence number in use, 0 in an empty store."""
        with self._transaction.cursor(self._tables.order) as cursor:
            return int(_SEQUENCE.unpack(cursor.key())[0]) if cursor.last() else 0

    # ---- writing ----
    def add(self, key: bytes, value: bytes, sequence: int) -> None:
        """Adds an object that is not there."""
        self._transaction.put(key, value, db=self._tables.objects)
        self._place(key, sequence, len(value), time.time_ns() // 10**6)
        self.stored_bytes += len(value)
        self.changes[key] = len(value)

    def touch(self, key: bytes, sequence: int) -> None:
        """Records a use, unless the object has gone or was used later."""
        record = self._transaction.get(key, db=self._tables.meta)
        if record is None:
            return
        old_sequence, size_bytes, stored_at_ms = _read_meta(record)
        if sequence > old_sequence:
            self._transaction.delete(_SEQUENCE.pack(old_sequence), db=self._tables.order)
            self._place(key, sequence, size_bytes, stored_at_ms)

    def remove(self, key: bytes) -> bool:
        """Removes an object; whether it was there."""
        record = self._transaction.pop(key, db=self._tables.meta)
        if record is None:
            return False
        sequence, size_bytes, _ = _read_meta(record)
        self._transaction.delete(_SEQUENCE.pack(sequence), db=self._tables.order)
        self._transaction.delete(key, db=self._tables.objects)
        self.stored_bytes -= size_bytes
        self.changes[key] = None
        return True

    def evict_oldest(self) -> bool:
        """Removes the least recently used object; False if the store is empty."""
        with self._transaction.cursor(self._tables.order) as cursor:
            if not cursor.first():
                return False
            key = bytes(cursor.value())
        self.remove(key)
        self.evicted_objects += 1
        return True

    def save_counts(self) -> None:
        """Writes the counts; called once, before the commit."""
        self._transaction.put(_COUNTS_KEY, _COUNTS.pack(self.stored_bytes, self.evicted_objects))

    def _place(self, key: bytes, sequence: int, size_bytes: int, stored_at_ms: int) -> None:
        self._transaction.put(key, _META.pack(sequence, size_bytes, stored_at_ms), db=self._tables.meta)
        self._transaction.put(_SEQUENCE.pack(sequence), key, db=self._tables.order)


def _read_meta(record: bytes | memoryview) -> tuple[int, int, int]:
    if len(record) == _META_1.size:
        return (*_META_1.unpack(record), 0)
    return _META.unpack(record)
