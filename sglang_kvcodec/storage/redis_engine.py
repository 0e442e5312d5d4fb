"""The engine that keeps objects in Redis or Valkey, one server or a cluster, which any number of peers may share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_kvcodec.storage.indexed_engine import IndexedEngine
from sglang_kvcodec.storage.redis_connection import RedisAddress, RedisConnection
from sglang_kvcodec.storage.redis_index import RedisIndex

_LEASE_S = 120.0
"""Above all time-outs of the calls of a put together."""


class RedisEngine(IndexedEngine):
    """Objects as strings spread over all slots; their index in one slot of the same servers.

    An acknowledged put is as durable as the server's own settings make it.
    """

    def __init__(self, address: RedisAddress, capacity_bytes: int) -> None:
        """Connects; what is over the capacity is evicted.

        Raises:
            ConfigurationError: the servers evict keys by themselves.
            StorageUnavailableError: no answer.
        """
        self.name = "rediscluster" if address.is_cluster else "redis"
        self._connection = RedisConnection(address)
        name_prefix = f"{address.prefix}:o:".encode()
        self._strings = _RedisStrings(self._connection, name_prefix)
        super().__init__(RedisIndex(self._connection, address.prefix, name_prefix), self._strings, capacity_bytes)
        try:
            self._trim()
        except BaseException:
            self._connection.close()
            raise

    def tidy(self) -> None:
        """See the base class: deletes them."""
        self._index.require_open()
        for names in self._strings.scan():
            strays = self._index.strays(names)
            if strays:
                self._strings.delete(strays)


class _RedisStrings:
    """See :class:`NamedObjects`."""

    def __init__(self, connection: RedisConnection, name_prefix: bytes) -> None:
        self._connection = connection
        self._name_prefix = name_prefix

    @property
    def lease_s(self) -> float:
        return _LEASE_S

    def put(self, name: bytes, value: bytes) -> None:
        self._connection.call("SET", name, value)

    def get(self, name: bytes, start: int, stop: int, *, is_whole: bool) -> bytes | None:
        call = self._connection.call
        part = call("GET", name) if is_whole else call("GETRANGE", name, start, stop - 1)
        return None if part is None else bytes(part)

    def delete(self, names: Sequence[bytes]) -> None:
        self._connection.delete(names)

    def scan(self) -> Iterator[list[bytes]]:
        """All names, some at a time."""
        return self._connection.scan(self._name_prefix + b"*")
