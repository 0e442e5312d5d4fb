"""The peer's RPCs about calibration artifacts, opaque bytes to it. A call holds a chunk or two of one, never all."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
import grpc.aio

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import CapacityError, FormatError, NotFoundError, StorageUnavailableError
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.admission import Caller
from sglang_kvcodec.rpc.calls import Call, Calls
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.requests import parsed
from sglang_kvcodec.rpc.shares import StreamSlots
from sglang_kvcodec.storage.artifacts import ArtifactStore, ArtifactWriter

T = TypeVar("T")

_THREADS = 2


class CalibrationServicer:
    """Serves a store of artifacts. Belongs to one event loop; what blocks is called in threads of its own.

    Its streams are counted apart from those of pages, so that a fleet that starts takes no fetch's place.
    """

    def __init__(self, artifacts: ArtifactStore, limits: PeerLimits, calls: Calls) -> None:
        """Serves ``artifacts``, which stays the caller's to close, after :meth:`close`."""
        self._artifacts = artifacts
        self._of_tenants: dict[str, ArtifactStore] = {}
        self._opening = asyncio.Lock()
        self._limits = limits
        self._serving = calls
        # Apart, so that no server that starts waits for the disk behind a queue of writes.
        self._readers = ThreadPoolExecutor(_THREADS, "kvcodec-calibration-read")
        self._writers = ThreadPoolExecutor(_THREADS, "kvcodec-calibration-write")
        self._stream = StreamSlots(limits.max_streams, limits.streams_of_a_client)
        self._export()

    @property
    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The RPCs by name, for a gRPC server; requests come serialized."""
        unary = grpc.stream_unary_rpc_method_handler
        return {
            "PutCalibration": unary(self.PutCalibration, None, pb.PutCalibrationResponse.SerializeToString),
            "GetCalibration": grpc.stream_stream_rpc_method_handler(self.GetCalibration, None, None),
            "ListCalibrations": unary(self.ListCalibrations, None, pb.ListCalibrationsResponse.SerializeToString),
            "DeleteCalibration": unary(self.DeleteCalibration, None, pb.DeleteCalibrationResponse.SerializeToString),
        }

    def close(self) -> None:
        """Waits for the store's calls under way, so that what broken streams have left is removed."""
        self._readers.shutdown()
        self._writers.shutdown()
        for artifacts in self._of_tenants.values():
            artifacts.close()

    async def PutCalibration(
        self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.PutCalibrationResponse:
        """See ``protos/``."""
        async with self._serving("PutCalibration", context) as call, self._stream("PutCalibration", call.caller.name):
            step = await self._next_step(call)
            if step.WhichOneof("step") != "begin":
                raise FormatError("a calibration starts with its begin")
            begin = step.begin
            artifacts = await self._artifacts_of(call.caller)
            writer = artifacts.receive(begin.model_digest, begin.digest, begin.size_bytes)
            try:
                await self._receive(writer, call)
            except StorageUnavailableError as error:
                # A full disk is not an absent peer: the client need not leave it alone.
                raise CapacityError(str(error)) from error
            finally:
                await _release(self._writers, writer.abort)
            self._export()
            return pb.PutCalibrationResponse(digest=begin.digest)

    async def GetCalibration(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """See ``protos/``."""
        async with self._serving("GetCalibration", context) as call, self._stream("GetCalibration", call.caller.name):
            request = await call.request(pb.GetCalibrationRequest)
            reader = (await self._artifacts_of(call.caller)).open(request.model_digest, request.digest or None)
            if reader is None:
                raise NotFoundError("no such calibration is stored")
            try:
                begin = pb.GetCalibrationBegin(digest=reader.digest, size_bytes=reader.size_bytes)
                await call.write(pb.GetCalibrationResponse(begin=begin).SerializeToString(), 0)
                while chunk := await _in_threads(self._readers, reader.read, DEFAULT_MESSAGE_BYTES):
                    call.require_still_admitted()
                    await call.write(pb.GetCalibrationResponse(chunk=chunk).SerializeToString(), len(chunk))
                    peer_metrics.PEER_CALIBRATION_SENT_BYTES.inc(len(chunk))
            except FormatError as error:
                peer_metrics.STORE_CALIBRATIONS_DAMAGED.labels(error.reason).inc()
                self._export()
                raise NotFoundError(f"the stored calibration was damaged: {error}") from error
            finally:
                await _release(self._readers, reader.close)

    async def ListCalibrations(
        self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.ListCalibrationsResponse:
        """See ``protos/``."""
        async with self._serving("ListCalibrations", context) as call:
            await call.request(pb.ListCalibrationsRequest)
            response = pb.ListCalibrationsResponse()
            for entry in (await self._artifacts_of(call.caller)).entries():
                response.calibrations.add(
                    model_digest=entry.model_digest,
                    digest=entry.digest,
                    size_bytes=entry.size_bytes,
                    stored_at_ms=entry.stored_at_ms,
                    is_current=entry.is_current,
                )
            return response

    async def DeleteCalibration(
        self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.DeleteCalibrationResponse:
        """See ``protos/``."""
        async with self._serving("DeleteCalibration", context) as call:
            request = await call.request(pb.DeleteCalibrationRequest)
            artifacts = await self._artifacts_of(call.caller)
            deleted = await _in_threads(self._writers, artifacts.delete, request.model_digest, request.digest)
            self._export()
            return pb.DeleteCalibrationResponse(deleted=deleted)

    async def _artifacts_of(self, caller: Caller) -> ArtifactStore:
        """The store of the caller's tenant, opened by the first who asks for it."""
        if not caller.tenant:
            return self._artifacts
        async with self._opening:
            if caller.tenant not in self._of_tenants:
                store = await _in_threads(self._writers, self._artifacts.of_tenant, caller.tenant)
                self._of_tenants[caller.tenant] = store
            return self._of_tenants[caller.tenant]

    async def _receive(self, writer: ArtifactWriter, call: Call) -> None:
        while (step := await self._next_step(call)).WhichOneof("step") == "chunk":
            call.require_still_admitted()
            await _in_threads(self._writers, writer.write, step.chunk)
            peer_metrics.PEER_CALIBRATION_RECEIVED_BYTES.inc(len(step.chunk))
        if not step.commit:
            raise FormatError("chunks and a commit follow the begin of a calibration")
        await _in_threads(self._writers, writer.commit)

    async def _next_step(self, call: Call) -> pb.PutCalibrationRequest:
        data = await call.next_message()
        if data is None:
            raise FormatError("the stream ended before the commit of a calibration")
        if call.waited_s > self._limits.artifact_s:
            raise call.too_slow(f"a calibration is not complete within {self._limits.artifact_s} s")
        return parsed(pb.PutCalibrationRequest, data)

    def _export(self) -> None:
        with contextlib.suppress(StorageUnavailableError):  # it is being closed
            stats = [artifacts.stat() for artifacts in (self._artifacts, *self._of_tenants.values())]
            peer_metrics.STORE_CALIBRATIONS.set(sum(stat.artifacts for stat in stats))
            peer_metrics.STORE_CALIBRATION_BYTES.set(sum(stat.stored_bytes for stat in stats))
            peer_metrics.STORE_CALIBRATION_CAPACITY_BYTES.set(sum(stat.capacity_bytes for stat in stats))


async def _in_threads(pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, functools.partial(function, *args))


async def _release(pool: ThreadPoolExecutor, function: Callable[[], None]) -> None:
    """Lets go of a writer or reader, also if the call is being cancelled."""
    try:
        released = pool.submit(function)
    except RuntimeError:
        # The peer stops, and its threads are gone.
        function()
    else:
        await asyncio.shield(asyncio.wrap_future(released))
