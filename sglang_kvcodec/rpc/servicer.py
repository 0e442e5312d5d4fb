"""The peer's RPCs about pages. Nothing a client or an engine does ends more than its own call.

Every call is a stream of serialized messages to gRPC, also where there is one request: so its caller is known before
any of it is read, one that never comes is given up, and bytes which are none are refused like any other bad request.
Fetch writes serialized messages, see ``rpc/wire.py``.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
import grpc.aio
from prometheus_client import Counter

from sglang_kvcodec import __version__, peer_metrics
from sglang_kvcodec.config import MIB
from sglang_kvcodec.errors import FormatError, StorageError
from sglang_kvcodec.format.exchange import PutResult
from sglang_kvcodec.format.namespace import FORMAT_VERSION
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.admission import Caller
from sglang_kvcodec.rpc.bandwidth import BandwidthLimit
from sglang_kvcodec.rpc.budget import ByteBudget
from sglang_kvcodec.rpc.calls import Call, Calls
from sglang_kvcodec.rpc.fetching import FetchMessage, PageLayout, PayloadReader, plan_messages, read_page
from sglang_kvcodec.rpc.hot_prefixes import HotPrefixes
from sglang_kvcodec.rpc.limits import MAX_MESSAGE_BYTES, MAX_PAGES_PER_REQUEST, message_bytes
from sglang_kvcodec.rpc.lookups import found_pages
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.prefix_order import PrefixOrder
from sglang_kvcodec.rpc.putting import OUTCOMES, IncomingObject, store_object
from sglang_kvcodec.rpc.requests import announced_object, storage_keys
from sglang_kvcodec.rpc.shares import ClientBudgets, StreamSlots
from sglang_kvcodec.rpc.tenants import TenantEngine, TenantViews
from sglang_kvcodec.rpc.wire import decode_put
from sglang_kvcodec.storage.base import StorageEngine

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEADERS_PER_READ = 32
_READ_AHEAD_BYTES = 2 * MIB
"""Payload that a Fetch reads at once in a thread; it holds two of these. A hand-over costs more than a message."""
_NETWORK_THREADS = 16
"""Calls at once of an engine that only waits: for its reads, and as many for its writes."""


class PeerServicer:
    """Serves a storage engine. Belongs to one event loop; the engine is called in threads of its own."""

    def __init__(self, engine: StorageEngine, limits: PeerLimits, calls: Calls, views: TenantViews) -> None:
        """Serves ``engine``, of which ``views`` are; it stays the caller's to close, after :meth:`close`."""
        self._engine = engine
        self._views = views
        self._limits = limits
        self._serving = calls
        # Apart, so that no Lookup waits for the disk behind a queue of writes.
        least_threads = _NETWORK_THREADS if engine.waits_for_network else 1
        self._readers = ThreadPoolExecutor(max(self._limits.read_threads, least_threads), "kvcodec-read")
        self._writers = ThreadPoolExecutor(max(self._limits.write_threads, least_threads), "kvcodec-write")
        self._budget = ByteBudget(self._limits.receive_bytes)
        bits_per_s = self._limits.bandwidth_bits_per_s
        self._bandwidth = BandwidthLimit(bits_per_s) if bits_per_s else None
        self._client_budgets = ClientBudgets(self._limits.receive_bytes_of_a_client)
        self._stream = StreamSlots(self._limits.max_streams, self._limits.streams_of_a_client)
        self._order = PrefixOrder()
        self.prefixes = HotPrefixes()
        """What Lookups have found."""

    @property
    def bandwidth(self) -> BandwidthLimit | None:
        """Bound of what the peer sends, to share with others who send."""
        return self._bandwidth

    def close(self) -> None:
        """Waits for the engine's calls under way."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)

    async def Lookup(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.LookupResponse:
        """See ``protos/``."""
        async with self._serving("Lookup", context) as call:
            request = await call.request(pb.LookupRequest)
            keys = storage_keys(request.namespace_digest, request.page_hashes)
            engine = self._views.of(call.caller)
            sizes = await self._read(engine.sizes, keys)
            found = found_pages(sizes)
            stored_keys = _stored_keys(engine, keys)
            if found.covered_pages:
                self.prefixes.note(stored_keys[found.covered_pages - 1], found.covered_pages)
            _count_asked("Lookup", sizes)
            # Next, when the answer is on its way: it takes a good part of the time of a Lookup.
            asyncio.get_running_loop().call_soon(self._order.learn, stored_keys)
            return found

    async def Fetch(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """See ``protos/``."""
        async with self._serving("Fetch", context) as call, self._stream("Fetch", call.caller.name):
            request = await call.request(pb.FetchRequest)
            keys = storage_keys(request.namespace_digest, request.page_hashes)
            engine = self._views.of(call.caller)
            size_bytes = message_bytes(request.max_message_bytes, self._most_message_bytes())
            sizes = await self._read(engine.sizes, keys)
            stored = [(index, size) for index, size in enumerate(sizes) if size is not None]
            _count_asked("Fetch", sizes)
            with engine.reading_ahead([(keys[index], size) for index, size in stored]):
                reader = PayloadReader(engine, keys)
                layouts = await self._send_headers(reader, engine, keys, stored, size_bytes, call)
                await self._send_payload(reader, layouts, size_bytes, call)

    async def Put(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.PutResponse:
        """See ``protos/``."""
        async with self._serving("Put", context) as call, self._stream("Put", call.caller.name):
            engine = self._views.of(call.caller)
            storing: list[asyncio.Task[PutResult]] = []
            keys: list[bytes] = []
            try:
                while (incoming := await self._receive(call)) is not None:
                    keys.append(incoming.key.to_bytes())
                    # Stored while the next one arrives.
                    storing.append(asyncio.create_task(self._store(engine, incoming, call.caller)))
                    if len(storing) > MAX_PAGES_PER_REQUEST:
                        raise FormatError(f"more than the {MAX_PAGES_PER_REQUEST} objects of one Put")
            finally:
                # What is committed is stored before the client hears how its stream ended.
                ended = await asyncio.gather(*storing, return_exceptions=True)
                await self._keep_heads(_stored_keys(engine, keys))
            response = pb.PutResponse()
            for result in ended:
                if isinstance(result, BaseException):
                    raise result
                response.results.add(outcome=OUTCOMES[result.outcome], detail=result.detail)
            return response

    async def Delete(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.DeleteResponse:
        """See ``protos/``."""
        async with self._serving("Delete", context) as call:
            request = await call.request(pb.DeleteRequest)
            keys = storage_keys(request.namespace_digest, request.page_hashes)
            return pb.DeleteResponse(deleted_pages=await self._write(_delete_all, self._views.of(call.caller), keys))

    async def Stat(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.StatResponse:
        """See ``protos/``."""
        async with self._serving("Stat", context) as call:
            await call.request(pb.StatRequest)
            stat = await self._read(self._engine.stat)
            is_told = call.caller.is_operator
            return pb.StatResponse(
                objects=stat.objects if is_told else 0,
                stored_bytes=stat.stored_bytes if is_told else 0,
                capacity_bytes=stat.capacity_bytes,
                evicted_objects=stat.evicted_objects if is_told else 0,
                engine=self._engine.name,
                format_version=FORMAT_VERSION,
                software_version=__version__,
            )

    def _most_message_bytes(self) -> int:
        """So large that under a limit of the bandwidth streams share the link evenly."""
        bounds = [self._bandwidth.message_bytes if self._bandwidth else None, self._serving.message_bytes]
        return min((bound for bound in bounds if bound is not None), default=MAX_MESSAGE_BYTES)

    async def _keep_heads(self, keys: Sequence[bytes]) -> None:
        """Has the pages before those that were put outlive them. Pages of one Put are in prefix order.

        ``keys``: as the whole engine has them.
        """
        if not keys:
            return
        try:
            await self._read(self._engine.sizes, self._order.with_heads(keys))
        except StorageError as error:
            logger.warning("the order of use of %d pages was not kept: %s", len(keys), error)

    async def _send_headers(
        self,
        reader: PayloadReader,
        engine: StorageEngine,
        keys: Sequence[bytes],
        stored: Sequence[tuple[int, int]],
        size_bytes: int,
        call: Call,
    ) -> dict[int, PageLayout]:
        """Tells which pages are missing and sends the headers of the others; gives their layouts by page index.

        ``stored``: index and size in bytes of the pages that are stored.
        """
        found = {index for index, _ in stored}
        response = pb.FetchResponse(missing=[index for index in range(len(keys)) if index not in found])
        layouts: dict[int, PageLayout] = {}
        held_bytes = 0
        for first in range(0, len(stored), _HEADERS_PER_READ):
            batch = stored[first : first + _HEADERS_PER_READ]
            named = [(keys[index], size) for index, size in batch]
            pages = await self._read(_read_pages, engine, named, call.caller.token is not None)
            reader.was_read(index for index, _ in batch)
            for (index, object_bytes), page in zip(batch, pages, strict=True):
                if page is None:
                    response.missing.append(index)
                    continue
                header, layouts[index] = page
                if held_bytes and held_bytes + len(header) > size_bytes:
                    await self._send(response.SerializeToString(), held_bytes, call)
                    response, held_bytes = pb.FetchResponse(), 0
                response.headers.add(page_index=index, object_bytes=object_bytes, header=header)
                held_bytes += len(header)
        await self._send(response.SerializeToString(), held_bytes, call)
        return layouts

    async def _send_payload(
        self, reader: PayloadReader, layouts: dict[int, PageLayout], size_bytes: int, call: Call
    ) -> None:
        """Sends the payload; where reads may wait, the next few messages are read while the last few leave."""
        plan = plan_messages(layouts, size_bytes)
        at_once = max(1, _READ_AHEAD_BYTES // size_bytes)
        pending: asyncio.Task[list[FetchMessage]] | None = None
        try:
            for slices in plan:
                messages = [] if pending is None else await pending
                pending = None
                if not self._engine.reads_wait:
                    messages = reader.read([slices])
                elif (message := reader.read_now(slices)) is not None:
                    messages.append(message)
                else:
                    more = [slices, *itertools.islice(plan, at_once - 1)]
                    pending = asyncio.create_task(self._read(reader.read, more))
                await self._send_all(messages, call)
            if pending is not None:
                await self._send_all(await pending, call)
        finally:
            if pending is not None:
                pending.cancel()

    async def _send_all(self, messages: Sequence[FetchMessage], call: Call) -> None:
        call.require_still_admitted()
        for message in messages:
            if message.lost:
                await call.write(pb.FetchResponse(missing=message.lost).SerializeToString(), 0)
            if message.payload_bytes:
                await self._send(message.encoded, message.payload_bytes, call)

    async def _send(self, encoded: bytes, object_bytes: int, call: Call) -> None:
        if self._bandwidth is not None:
            await self._bandwidth.take(object_bytes)
        await call.write(encoded, object_bytes)
        peer_metrics.PEER_SENT_BYTES.inc(object_bytes)

    async def _receive(self, call: Call) -> IncomingObject | None:
        """The next object up to its commit, its bytes taken from the budgets; None at the end of the stream."""
        data = await call.next_message()
        if data is None:
            return None
        step = decode_put(data)
        if not isinstance(step, pb.PutRequest) or step.WhichOneof("step") != "begin":
            raise FormatError("an object starts with its begin")
        call.require_still_admitted()
        incoming = IncomingObject(*announced_object(step.begin))
        # The client's own first: who waits for that keeps nobody else waiting.
        client, wait_s = call.caller.name, self._limits.receive_wait_s
        await self._client_budgets.acquire(client, incoming.object_bytes, wait_s)
        try:
            await self._budget.acquire(incoming.object_bytes, wait_s)
        except BaseException:
            self._client_budgets.release(client, incoming.object_bytes)
            raise
        try:
            await self._receive_chunks(incoming, call)
        except BaseException:
            self._release(incoming, call.caller)
            raise
        return incoming

    async def _receive_chunks(self, incoming: IncomingObject, call: Call) -> None:
        until_waited_s = call.waited_s + self._limits.object_s
        while (data := await call.next_message()) is not None:
            step = decode_put(data)
            if isinstance(step, memoryview):
                incoming.add(step)
                peer_metrics.PEER_RECEIVED_BYTES.inc(len(step))
            elif step.WhichOneof("step") == "commit" and step.commit:
                return
            else:
                raise FormatError(f"page {incoming.key}: chunks and a commit follow the begin")
            if call.waited_s > until_waited_s:
                raise call.too_slow(f"page {incoming.key}: not complete within {self._limits.object_s} s")
        raise FormatError(f"page {incoming.key}: the stream ended before the commit")

    async def _store(self, engine: StorageEngine, incoming: IncomingObject, caller: Caller) -> PutResult:
        try:
            result = await self._write(store_object, engine, incoming)
        finally:
            self._release(incoming, caller)
        peer_metrics.PEER_PUTS.labels(result.outcome.value).inc()
        return result

    def _release(self, incoming: IncomingObject, caller: Caller) -> None:
        self._budget.release(incoming.object_bytes)
        self._client_budgets.release(caller.name, incoming.object_bytes)

    async def _read(self, function: Callable[..., T], *args: object) -> T:
        # A thread costs several times what it takes to copy a message, and the copy is then in another core's cache.
        if not self._engine.reads_wait:
            return function(*args)
        return await self._in_threads(self._readers, function, *args)

    async def _write(self, function: Callable[..., T], *args: object) -> T:
        return await self._in_threads(self._writers, function, *args)

    async def _in_threads(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, functools.partial(function, *args))


def _count_asked(method: str, sizes: Sequence[int | None]) -> None:
    missing = sizes.count(None)
    _asked_pages(method, "stored").inc(len(sizes) - missing)
    _asked_pages(method, "missing").inc(missing)


@functools.cache
def _asked_pages(method: str, outcome: str) -> Counter:
    """The counter of these labels: to find it takes ten times what it takes to count."""
    return peer_metrics.PEER_ASKED_PAGES.labels(method, outcome)


def _stored_keys(engine: StorageEngine, keys: Sequence[bytes]) -> Sequence[bytes]:
    """The keys under which the whole engine has what a tenant's view of it calls ``keys``."""
    return engine.stored_keys(keys) if isinstance(engine, TenantEngine) else keys


def _read_pages(
    engine: StorageEngine, pages: Sequence[tuple[bytes, int]], has_tenants: bool
) -> list[tuple[bytes, PageLayout] | None]:
    return [read_page(engine, key, object_bytes, has_tenants) for key, object_bytes in pages]


def _delete_all(engine: StorageEngine, keys: Sequence[bytes]) -> int:
    return sum(engine.delete(key) for key in keys)
