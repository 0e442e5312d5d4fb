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

from sglang_kvcodec.format.namespace import NAMESPACE_BYTES
from sglang_kvcodec.storage.base import RangeReader, StorageEngine
from sglang_kvcodec.storage.wrappers import EngineWrapper

_NAMESPACES_REMEMBERED = 1024


class TenantEngine(EngineWrapper):
    """An engine as one tenant sees it. Its counts, and the list of its keys, are those of the whole engine."""

    def __init__(self, engine: StorageEngine, tenant: str, secret: bytes) -> None:
        """Wraps ``engine``; ``secret`` is the same in all peers on one store."""
        super().__init__(engine)
        prefix = b"sglang-kvcodec tenant\0" + tenant.encode() + b"\0"

        @functools.lru_cache(_NAMESPACES_REMEMBERED)
        def stored_namespace(namespace_digest: bytes) -> bytes:
            return hmac.digest(secret, prefix + namespace_digest, hashlib.sha256)

        self._stored_namespace = stored_namespace

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
            yield lambda key, start, stop: get_range(self.stored_key(key), start, stop)

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

    def stored_at_s(self, keys: Sequence[bytes]) -> list[float | None]:
        """See the base class."""
        return super().stored_at_s(self.stored_keys(keys))
