"""The engine that keeps objects in an S3-compatible bucket, which one peer has for itself."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.storage.base import KEY_BYTES, StorageEngine, StoredObject, StoreStat
from sglang_kvcodec.storage.lru_index import LruIndex
from sglang_kvcodec.storage.s3_bucket import S3Address, S3Bucket
from sglang_kvcodec.storage.s3_layouts import OWNER, take_alone

_OBJECTS = "objects"
_ORDER = "order"
_NAME = re.compile(rf"{_OBJECTS}/([0-9a-f]{{{2 * KEY_BYTES}}})")
_ORDER_MARK = b"kvcodec-order-1\n"
_EVICTED = struct.Struct(">Q")
_OWNER_CHECK_S = 10.0
_KEYS_PER_BATCH = 1024

_logger = logging.getLogger(__name__)


class S3Engine(StorageEngine):
    """Objects under ``objects/<key in hex>``; sizes and order are kept in this process.

    A bucket can't count, so one peer owns a prefix: the last one to open it. One that had it before notices within ten
    seconds and serves no longer. At start the bucket is listed, a thousand objects in a request. The order of use and
    the count of evictions are written when the store is closed and by :meth:`tidy`; after a crash what was put since
    goes by the time of its put.

    Sizes are known without the bucket. So that nobody is told of objects that can't be read, an owner that can't ask
    whether it still is one gives no sizes and no counts until it can.
    """

    name = "s3"
    waits_for_network = True

    def __init__(self, address: S3Address, capacity_bytes: int, *, owner_check_s: float = _OWNER_CHECK_S) -> None:
        """Takes over the prefix, lists it, and evicts what is over the capacity.

        Raises:
            ConfigurationError: the library refuses the address or the environment, or peers share the prefix.
            StorageUnavailableError: no answer, or a refusal.
        """
        self._capacity_bytes = capacity_bytes
        self._bucket = S3Bucket(address)
        self._token = secrets.token_hex(16).encode()
        self._closed = threading.Event()
        self._is_owner = True
        self._away = ""
        take_alone(self._bucket, self._token)
        evicted_objects, order = self._read_order()
        found = dict(self._listed())
        # What the order does not know was put after it was written, or it was never written.
        known = [key for key in order if key in found]
        others = sorted(found.keys() - set(known), key=lambda key: found[key].stored_at_s)
        self._index = LruIndex(capacity_bytes, [(key, found[key]) for key in known + others], evicted_objects)
        self._delete_all(self._index.overflow())
        self._watch = threading.Thread(target=self._watch_owner, args=(owner_check_s,), name="kvcodec-s3", daemon=True)
        self._watch.start()

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        self._require_open()
        self._require_there()
        return [None if found is None else found.size_bytes for found in self._index.use(keys)]

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        self._require_open()
        (found,) = self._index.use([key])
        return None if found is None else self._read(key, 0, found.size_bytes)

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | None:
        """See the base class."""
        self._require_open()
        (found,) = self._index.peek([key])
        return None if found is None else self._read(key, start, min(stop, found.size_bytes))

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        self._require_open()
        while victims := self._index.begin_put(key, len(value)):
            self._delete_all(victims)
        if victims is None:
            return False
        try:
            is_new = self._bucket.create(_name(key), value)
            found = None if is_new else self._bucket.head(_name(key))
        except BaseException:
            # It may have got there all the same, then it is deleted before its room is given to another.
            self._index.end_put(key, None, is_uncertain=True)
            with contextlib.suppress(StorageUnavailableError):
                self._delete_all([key])
            raise
        if is_new:
            self._index.end_put(key, StoredObject(len(value), time.time()))
            return True
        # Another peer's, from before it was told that it has the prefix no longer.
        if found is None:
            self._index.end_put(key, None)
            raise StorageUnavailableError(f"another peer changes {self._bucket.where}")
        self._index.end_put(key, StoredObject(found.size_bytes, found.modified_at_s))
        self._delete_all(self._index.overflow())
        return False

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        self._require_open()
        if not self._index.remove(key):
            return False
        self._delete_all([key])
        return True

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        self._require_open()
        return self._index.peek(keys)

    def key_batches(self) -> Iterator[list[bytes]]:
        """See the base class."""
        self._require_open()
        keys = self._index.keys()
        for first in range(0, len(keys), _KEYS_PER_BATCH):
            yield keys[first : first + _KEYS_PER_BATCH]

    def tidy(self) -> None:
        """See the base class: finds what another peer has put before it gave up the prefix, and writes the order."""
        self._require_open()
        before = set(self._index.keys())
        self._index.adopt((key, stored) for key, stored in self._listed() if key not in before)
        self._delete_all(self._index.overflow())
        self._write_order()

    def resize(self, capacity_bytes: int) -> None:
        """See the base class."""
        self._require_open()
        self._capacity_bytes = capacity_bytes
        self._index.resize(capacity_bytes)
        self._delete_all(self._index.overflow())

    def stat(self) -> StoreStat:
        """See the base class."""
        self._require_open()
        self._require_there()
        index = self._index
        return StoreStat(len(index), index.stored_bytes, self._capacity_bytes, index.evicted_objects)

    def close(self) -> None:
        """See the base class."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._watch.join()
        if self._is_owner:
            try:
                self._write_order()
            except StorageUnavailableError as error:
                _logger.warning("the order of use was not kept: %s", error)

    def _read(self, key: bytes, start: int, stop: int) -> bytes | None:
        if start >= stop:
            return b""
        part = self._bucket.get_range(_name(key), start, stop)
        if part is None and self._index.remove(key):
            # Deleted by another than this peer, or evicted since.
            self._index.deleted([key])
        return part

    def _delete_all(self, keys: Sequence[bytes]) -> None:
        for first in range(0, len(keys), _KEYS_PER_BATCH):
            batch = keys[first : first + _KEYS_PER_BATCH]
            try:
                self._bucket.delete([_name(key) for key in batch])
            except BaseException:
                self._index.deleted(keys[first:], have_gone=False)
                raise
            self._index.deleted(batch)

    def _listed(self) -> Iterator[tuple[bytes, StoredObject]]:
        for batch in self._bucket.list(_OBJECTS):
            for found in batch:
                match = _NAME.fullmatch(found.name)
                if match is not None:
                    yield bytes.fromhex(match[1]), StoredObject(found.size_bytes, found.modified_at_s)

    def _read_order(self) -> tuple[int, Iterable[bytes]]:
        """Evictions so far, and keys, the least recently used first. What makes no sense is as good as nothing."""
        data = self._bucket.get(_ORDER) or b""
        body = data.removeprefix(_ORDER_MARK)
        if len(body) == len(data) or (len(body) - _EVICTED.size) % KEY_BYTES or len(body) < _EVICTED.size:
            return 0, []
        (evicted_objects,) = _EVICTED.unpack_from(body)
        keys = dict.fromkeys(body[at : at + KEY_BYTES] for at in range(_EVICTED.size, len(body), KEY_BYTES))
        return evicted_objects, keys

    def _write_order(self) -> None:
        self._bucket.replace(
            _ORDER, _ORDER_MARK + _EVICTED.pack(self._index.evicted_objects) + b"".join(self._index.keys())
        )

    def _watch_owner(self, period_s: float) -> None:
        while not self._closed.wait(period_s):
            try:
                token = self._bucket.get(OWNER)
            except StorageUnavailableError as error:
                _logger.warning("can't tell whose %s is: %s", self._bucket.where, error)
                self._away = str(error)
                continue
            self._away = ""
            if token != self._token:
                self._is_owner = False
                _logger.error("another peer has taken over %s: this one serves it no longer", self._bucket.where)
                return

    def _require_there(self) -> None:
        if self._away:
            raise StorageUnavailableError(self._away)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise StorageUnavailableError("the store is closed")
        if not self._is_owner:
            raise StorageUnavailableError(f"another peer has taken over {self._bucket.where}")


def _name(key: bytes) -> str:
    return f"{_OBJECTS}/{key.hex()}"
