"""The peer's RPCs for its operator: what lies in the store, and its objects as they are. Marks nothing as used.

Who is of no tenant sees everything, the pages of tenants under the keys that they have in the store. Who is of one sees
what is its own.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
import grpc.aio

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import CapacityError, FormatError
from sglang_kvcodec.format.digest import Buffer
from sglang_kvcodec.format.namespace import NAMESPACE_BYTES
from sglang_kvcodec.rpc import admin_pb2 as pb
from sglang_kvcodec.rpc.bandwidth import BandwidthLimit
from sglang_kvcodec.rpc.calls import Call, Calls
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.rpc.requests import storage_keys
from sglang_kvcodec.rpc.shares import StreamSlots
from sglang_kvcodec.rpc.tenants import TenantViews
from sglang_kvcodec.storage.base import StorageEngine

T = TypeVar("T")

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"].full_name

MAX_NAMESPACES = 1 << 16
"""More are not counted one by one: the answer is one message."""
_PAGES_PER_MESSAGE = 4096
_STREAMS = 4
"""At once; each holds at most one object. Apart from those of pages, so that an operator takes no fetch's place."""
_STREAMS_OF_A_CLIENT = 3
_THREADS = 2


class AdminServicer:
    """Serves an operator. Belongs to one event loop; what blocks is called in threads of its own."""

    def __init__(self, views: TenantViews, calls: Calls, bandwidth: BandwidthLimit | None = None) -> None:
        """Serves an engine, which stays the caller's to close, after :meth:`close`.

        Args:
            views: what lies there, as each tenant sees it.
            calls: opens the calls of all servicers.
            bandwidth: bound of what the peer sends, fetches included; None for none.
        """
        self._views = views
        self._serving = calls
        self._bandwidth = bandwidth
        self._threads = ThreadPoolExecutor(_THREADS, "kvcodec-admin")
        self._stream = StreamSlots(_STREAMS, _STREAMS_OF_A_CLIENT)

    @property
    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The RPCs by name, for a gRPC server; messages are serialized here."""
        unary, streamed = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        return {
            "ListNamespaces": unary(self.ListNamespaces, None, pb.ListNamespacesResponse.SerializeToString),
            "ListPages": streamed(self.ListPages, None, None),
            "StatPages": unary(self.StatPages, None, pb.StatPagesResponse.SerializeToString),
            "ReadPages": streamed(self.ReadPages, None, None),
        }

    def close(self) -> None:
        """Waits for the engine's calls under way."""
        self._threads.shutdown(cancel_futures=True)

    async def ListNamespaces(
        self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.ListNamespacesResponse:
        """See ``protos/``."""
        async with self._serving("ListNamespaces", context) as call, self._stream("ListNamespaces", call.caller.name):
            await call.request(pb.ListNamespacesRequest)
            uses: dict[bytes, list[int]] = {}
            pages = _pages(self._views.of(call.caller), b"")
            while (batch := await self._in_threads(next, pages, None)) is not None:
                for page in batch:
                    use = uses.setdefault(page.namespace_digest, [0, 0])
                    use[0] += 1
                    use[1] += page.object_bytes
                if len(uses) > MAX_NAMESPACES:
                    raise CapacityError(f"more than {MAX_NAMESPACES} namespaces: list the pages instead")
            response = pb.ListNamespacesResponse()
            for digest, (objects, stored_bytes) in sorted(uses.items()):
                response.namespaces.add(namespace_digest=digest, objects=objects, stored_bytes=stored_bytes)
            return response

    async def ListPages(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """See ``protos/``."""
        async with self._serving("ListPages", context) as call, self._stream("ListPages", call.caller.name):
            request = await call.request(pb.ListPagesRequest)
            if len(request.namespace_digest) not in (0, NAMESPACE_BYTES):
                raise FormatError(
                    f"a namespace digest has {NAMESPACE_BYTES} bytes, not {len(request.namespace_digest)}"
                )
            pages = _pages(self._views.of(call.caller), request.namespace_digest)
            while (batch := await self._in_threads(next, pages, None)) is not None:
                for first in range(0, len(batch), _PAGES_PER_MESSAGE):
                    response = pb.ListPagesResponse(pages=batch[first : first + _PAGES_PER_MESSAGE])
                    call.require_still_admitted()
                    await call.write(response.SerializeToString(), 0)

    async def StatPages(
        self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.StatPagesResponse:
        """See ``protos/``."""
        async with self._serving("StatPages", context) as call:
            request = await call.request(pb.StatPagesRequest)
            keys = storage_keys(request.namespace_digest, request.page_hashes)
            found = await self._in_threads(self._views.of(call.caller).peek, keys)
            return pb.StatPagesResponse(object_bytes=[entry.size_bytes if entry else 0 for entry in found])

    async def ReadPages(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """See ``protos/``."""
        async with self._serving("ReadPages", context) as call, self._stream("ReadPages", call.caller.name):
            request = await call.request(pb.ReadPagesRequest)
            keys = storage_keys(request.namespace_digest, request.page_hashes)
            engine = self._views.of(call.caller)
            for index, key in enumerate(keys):
                call.require_still_admitted()
                # Whole, so that no object is put together from two that had the same key one after the other.
                found: Buffer | None = await self._in_threads(engine.get_range, key, 0, MAX_OBJECT_BYTES)
                begin = pb.ReadPagesBegin(page_index=index, is_missing=found is None, object_bytes=len(found or b""))
                await call.write(pb.ReadPagesResponse(begin=begin).SerializeToString(), 0)
                if found is not None and not request.without_data:
                    await self._send(found, call)

    async def _send(self, data: Buffer, call: Call) -> None:
        limits = (self._bandwidth.message_bytes if self._bandwidth is not None else None, self._serving.message_bytes)
        most_bytes = min((limit for limit in limits if limit is not None), default=DEFAULT_MESSAGE_BYTES)
        most_bytes = min(most_bytes, DEFAULT_MESSAGE_BYTES)
        view = memoryview(data)
        for start in range(0, len(view), most_bytes):
            chunk = bytes(view[start : start + most_bytes])
            if self._bandwidth is not None:
                await self._bandwidth.take(len(chunk))
            await call.write(pb.ReadPagesResponse(chunk=chunk).SerializeToString(), len(chunk))
            peer_metrics.PEER_ADMIN_SENT_BYTES.inc(len(chunk))

    async def _in_threads(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args))


def _pages(engine: StorageEngine, namespace_digest: bytes) -> Iterator[list[pb.ListedPage]]:
    """The pages of a namespace, or of all if it is empty, some at a time. Blocking; for a pool of threads."""
    for batch in engine.key_batches():
        keys = [key for key in batch if key.startswith(namespace_digest)]
        yield list(_listed(keys, engine))


def _listed(keys: Sequence[bytes], engine: StorageEngine) -> Iterator[pb.ListedPage]:
    for key, found in zip(keys, engine.peek(keys), strict=True):
        if found is not None:
            yield pb.ListedPage(
                namespace_digest=key[:NAMESPACE_BYTES],
                page_hash=key[NAMESPACE_BYTES:],
                object_bytes=found.size_bytes,
                stored_at_ms=int(found.stored_at_s * 1000),
            )
