"""What keeps tenants apart in one store: each tenant's objects lie under storage keys that nobody else can name.

The namespace digest of a key is replaced by a keyed hash of it and the tenant. So a page of another tenant is, to the
engine and to the clock, a page that does not exist. The key of the hash is secret: a client chooses its namespace
digests freely, and could otherwise choose what another tenant's become. The default tenant's keys are what the clients
sent, as they are without tenants.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
from collections.abc import Iterator, Sequence

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.namespace import NAMESPACE_BYTES
from sglang_kvcodec.format.page_object import PREFIX, header_bytes, read_header
from sglang_kvcodec.rpc.admission import Caller
from sglang_kvcodec.rpc.tokens import MAX_TOKENS
from sglang_kvcodec.storage.base import RangeReader, StorageEngine, StoredObject
from sglang_kvcodec.storage.wrappers import EngineWrapper

_NAMESPACES_REMEMBERED = 1024


class TenantEngine(EngineWrapper):
    """An engine as one tenant sees it. Its counts are those of the whole engine."""

    def __init__(self, engine: StorageEngine, tenant: str, secret: bytes) -> None:
        """Wraps ``engine``; ``secret`` is the same in all peers on one store."""
        super().__init__(engine)
        prefix = b"sglang-kvcodec tenant\0" + tenant.encode() + b"\0"

        @functools.lru_cache(_NAMESPACES_REMEMBERED)
        def stored_namespace(namespace_digest: bytes) -> bytes:
            return hmac.digest(secret, prefix + namespace_digest, hashlib.sha256)

        self._stored_namespace = stored_namespace
        self._own_namespaces: dict[bytes, bytes | None] = {}

    def stored_key(self, key: bytes) -> bytes:
        """The storage key of what the tenant calls ``key``."""
        return self._stored_namespace(key[:NAMESPACE_BYTES]) + key[NAMESPACE_BYTES:]

    def stored_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """The same of several."""
        return [self.stored_key(key) for key in keys]

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See the base class."""
        return super().sizes(self.stored_keys(keys))

    def get(self, key: bytes) -> bytes | None:
        """See the base class."""
        return super().get(self.stored_key(key))

    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """See the base class."""
        return super().get_range(self.stored_key(key), start, stop)

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """See the base class."""
        with super().ranges() as get_range:
            yield self._by_stored_key(get_range)

    @contextlib.contextmanager
    def ranges_now(self) -> Iterator[RangeReader | None]:
        """See the base class."""
        with super().ranges_now() as get_range:
            yield None if get_range is None else self._by_stored_key(get_range)

    def _by_stored_key(self, get_range: RangeReader) -> RangeReader:
        return lambda key, start, stop: get_range(self.stored_key(key), start, stop)

    @contextlib.contextmanager
    def reading_ahead(self, objects: Sequence[tuple[bytes, int]]) -> Iterator[None]:
        """See the base class."""
        with super().reading_ahead([(self.stored_key(key), size_bytes) for key, size_bytes in objects]):
            yield

    def put(self, key: bytes, value: bytes) -> bool:
        """See the base class."""
        return super().put(self.stored_key(key), value)

    def delete(self, key: bytes) -> bool:
        """See the base class."""
        return super().delete(self.stored_key(key))

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """See the base class."""
        return super().peek(self.stored_keys(keys))

    def key_batches(self) -> Iterator[list[bytes]]:
        """The tenant's keys as it calls them, see the base class.

        A hash can't be turned back: the tenant's own name of a namespace is read from an object that lies in it. One of
        which no object can be read is not listed.
        """
        for batch in super().key_batches():
            named = ((self._own_namespace(key), key[NAMESPACE_BYTES:]) for key in batch)
            yield [namespace + page_hash for namespace, page_hash in named if namespace is not None]

    def _own_namespace(self, stored_key: bytes) -> bytes | None:
        """What the tenant calls the namespace of a storage key; None if that is not the tenant's."""
        stored = stored_key[:NAMESPACE_BYTES]
        known = self._own_namespaces
        if stored in known:
            return known[stored]
        told = _told_namespace(self._engine, stored_key)
        if told is None:
            # The next object of the namespace may say more.
            return None
        own = told if self._stored_namespace(told) == stored else None
        # A new one, so that no other thread looks into one that is being changed.
        self._own_namespaces = {stored: own} if len(known) >= _NAMESPACES_REMEMBERED else {**known, stored: own}
        return own


class TenantViews:
    """An engine as each caller's tenant sees it."""

    def __init__(self, engine: StorageEngine) -> None:
        self._engine = engine
        self._views: dict[tuple[str, bytes], TenantEngine] = {}

    def of(self, caller: Caller) -> StorageEngine:
        """The view of the caller's tenant; of the default tenant, the engine."""
        if not caller.tenant:
            return self._engine
        tenant = caller.tenant, caller.tenant_secret
        if tenant not in self._views:
            if len(self._views) >= MAX_TOKENS:
                # The file was changed very often: a view holds nothing that is not made anew.
                self._views.clear()
            self._views[tenant] = TenantEngine(self._engine, *tenant)
        return self._views[tenant]


def _told_namespace(engine: StorageEngine, stored_key: bytes) -> bytes | None:
    """The namespace that a stored object says it is of; None if it is gone, damaged, or of a format to come."""
    try:
        prefix = engine.get_range(stored_key, 0, PREFIX.size)
        header = engine.get_range(stored_key, 0, header_bytes(prefix)) if prefix is not None else None
        return read_header(header).key.namespace_digest if header is not None else None
    except FormatError:
        return None
