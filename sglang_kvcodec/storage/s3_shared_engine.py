"""The engine with objects in an S3-compatible bucket and their index in Redis, which any number of peers may share."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.storage import s3_layouts
from sglang_kvcodec.storage.base import KEY_BYTES, StoreStat
from sglang_kvcodec.storage.indexed_engine import IndexedEngine
from sglang_kvcodec.storage.redis_connection import RedisAddress, RedisConnection
from sglang_kvcodec.storage.redis_index import TOKEN_BYTES, FoundName, RedisIndex
from sglang_kvcodec.storage.s3_bucket import S3Address, S3Bucket

_OBJECTS = "indexed"
_NAME = re.compile(rf"{_OBJECTS}/([0-9a-f]{{{2 * KEY_BYTES}}})-([0-9a-f]{{{TOKEN_BYTES}}})")
_LEASE_S = 900.0
"""More than twice what the largest object takes: four steps, each up to 80 s with what is tried anew."""
_WATCH_S = 10.0

_logger = logging.getLogger(__name__)


class SharedS3Engine(IndexedEngine):
    """Objects under ``indexed/<key in hex>-<token>``; their index in Redis, set apart by the id of the store.

    The bucket may outlive the index, and is what counts: objects that the index does not know are adopted, at a start
    that finds an index that is not complete and by :meth:`tidy`. While it is not complete puts wait for that.

    Sizes are known without the bucket. So that nobody is told of objects that can't be read, a peer that can't read the
    mark of the store, which it tries every ten seconds, gives no sizes and no counts and puts nothing until it can.
    """

    name = "s3"

    def __init__(
        self, address: S3Address, index_address: RedisAddress, capacity_bytes: int, *, watch_s: float = _WATCH_S
    ) -> None:
        """Joins the store, or makes it; what is over the capacity is evicted.

        Takes two requests, and two more for each thousand objects if the index is not complete.

        Raises:
            ConfigurationError: one peer has the prefix for itself; the library refuses the address or the environment;
                the index's servers evict keys by themselves.
            StorageUnavailableError: no answer, or a refusal.
        """
        self._bucket = S3Bucket(address)
        self._store_id = s3_layouts.join(self._bucket)
        self._named = _NamedInBucket(self._bucket)
        index = RedisIndex(
            RedisConnection(index_address), f"{index_address.prefix}:{self._store_id}", objects_outlive_it=True
        )
        super().__init__(index, self._named, capacity_bytes)
        self._away = ""
        self._is_closing = False
        self._waker = threading.Event()
        try:
            if not index.is_complete():
                self.tidy()
            self._trim()
        except BaseException:
            index.close()
            raise
        self._watch = threading.Thread(target=self._watch_store, args=(watch_s,), name="kvcodec-s3", daemon=True)
        self._watch.start()

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        self._require_there()
        return super().sizes(keys)

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        self._require_there()
        return super().put(key, value)

    def tidy(self) -> None:
        """See the base class: adopts them, and evicts what is over the capacity then."""
        token = self._index.begin_rebuild()
        strays: set[bytes] = set()
        for found in self._named.scan():
            strays.update(self._index.strays([name for name, _, _ in found]))
        # What was listed may have been deleted since, and so be in no index. Names are used once: what is still there
        # after it was found to be unknown is known to nobody.
        for found in self._named.scan() if strays else ():
            doubles = self._index.adopt(name for name in found if name.name in strays)
            if doubles:
                self._bury(doubles)
        # False if the index was lost meanwhile: then it is not complete, which the watch notices.
        self._index.end_rebuild(token)
        self._trim()

    def stat(self) -> StoreStat:
        """See the base class."""
        self._require_there()
        return super().stat()

    def close(self) -> None:
        """See the base class."""
        self._is_closing = True
        self._waker.set()
        super().close()
        self._watch.join()

    def _found_incomplete(self) -> None:
        self._waker.set()

    def _watch_store(self, period_s: float) -> None:
        while True:
            self._waker.wait(period_s)
            self._waker.clear()
            if self._is_closing:
                return
            away = self._why_away()
            if bool(away) != bool(self._away):
                _logger.warning("%s", away or f"{self._bucket.where} is back")
            self._away = away
            if away:
                continue
            try:
                if not self._index.is_complete():
                    _logger.warning("the index of %s has been lost and is rebuilt", self._bucket.where)
                    self.tidy()
            except StorageUnavailableError as error:
                if not self._is_closing:
                    _logger.warning("can't see to the index of %s: %s", self._bucket.where, error)

    def _why_away(self) -> str:
        """Why no object can be read now; nothing if they can."""
        try:
            store_id = s3_layouts.read_store_id(self._bucket)
        except StorageUnavailableError as error:
            return str(error)
        return "" if store_id == self._store_id else f"{self._bucket.where} failed: it is not the store that it was"

    def _require_there(self) -> None:
        if self._away:
            raise StorageUnavailableError(self._away)


class _NamedInBucket:
    """See :class:`NamedObjects`."""

    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket

    @property
    def lease_s(self) -> float:
        return _LEASE_S

    def put(self, name: bytes, value: bytes) -> None:
        self._bucket.replace(_path(name), value)

    def get(self, name: bytes, start: int, stop: int, *, is_whole: bool) -> bytes | None:
        return self._bucket.get_range(_path(name), start, stop)

    def delete(self, names: Sequence[bytes]) -> None:
        self._bucket.delete([_path(name) for name in names])

    def scan(self) -> Iterator[list[FoundName]]:
        """All objects, some at a time."""
        for batch in self._bucket.list(_OBJECTS):
            matches = [(_NAME.fullmatch(found.name), found) for found in batch]
            yield [
                FoundName(bytes.fromhex(match[1]) + match[2].encode(), found.size_bytes, found.modified_at_s)
                for match, found in matches
                if match is not None
            ]


def _path(name: bytes) -> str:
    return f"{_OBJECTS}/{name[:KEY_BYTES].hex()}-{name[KEY_BYTES:].decode()}"
