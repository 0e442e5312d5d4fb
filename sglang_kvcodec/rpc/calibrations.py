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
from sglang_kvcodec.errors import CapacityError, FormatError, NotFoundError, PeerTimeoutError, StorageUnavailableError
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.calls import StreamSlots, serving
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.rpc.requests import parsed
from sglang_kvcodec.rpc.servicer import PeerLimits
from sglang_kvcodec.storage.artifacts import ArtifactStore, ArtifactWriter

T = TypeVar("T")

_THREADS = 2


class CalibrationServicer:
    """Serves a store of artifacts. Belongs to one event loop; what blocks is called in threads of its own.

    Its streams are counted apart from those of pages, so that a fleet that starts takes no fetch's place.
    """

    def __init__(self, artifacts: ArtifactStore, limits: PeerLimits | None = None) -> None:
        """Serves ``artifacts``, which stays the caller's to close, after :meth:`close`."""
        self._artifacts = artifacts
        self._limits = limits or PeerLimits()
        # Apart, so that no server that starts waits for the disk behind a queue of writes.
        self._readers = ThreadPoolExecutor(_THREADS, "kvcodec-calibration-read")
        self._writers = ThreadPoolExecutor(_THREADS, "kvcodec-calibration-write")
        self._stream = StreamSlots(self._limits.max_streams)
        self._export()

    @property
    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The RPCs by name, for a gRPC server; requests come serialized."""
        unary = grpc.unary_unary_rpc_method_handler
        return {
            "PutCalibration": grpc.stream_unary_rpc_method_handler(
                self.PutCalibration, None, pb.PutCalibrationResponse.SerializeToString
            ),
            "GetCalibration": grpc.unary_stream_rpc_method_handler(
                self.GetCalibration, None, pb.GetCalibrationResponse.SerializeToString
            ),
            "ListCalibrations": unary(self.ListCalibrations, None, pb.ListCalibrationsResponse.SerializeToString),
            "DeleteCalibration": unary(self.DeleteCalibration, None, pb.DeleteCalibrationResponse.SerializeToString),
        }

    def close(self) -> None:
        """Waits for the store's calls under way, so that what broken streams have left is removed."""
        self._readers.shutdown()
        self._writers.shutdown()

    async def PutCalibration(
        self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.PutCalibrationResponse:
        """See ``protos/``."""
        async with serving("PutCalibration", context), self._stream("PutCalibration"):
            step = await self._next_step(context)
            if step.WhichOneof("step") != "begin":
                raise FormatError("a calibration starts with its begin")
            begin = step.begin
            writer = self._artifacts.receive(begin.model_digest, begin.digest, begin.size_bytes)
            try:
                await self._receive(writer, context)
            except StorageUnavailableError as error:
                # A full disk is not an absent peer: the client need not leave it alone.
                raise CapacityError(str(error)) from error
            finally:
                await _release(self._writers, writer.abort)
            self._export()
            return pb.PutCalibrationResponse(digest=begin.digest)

    async def GetCalibration(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """See ``protos/``."""
        async with serving("GetCalibration", context), self._stream("GetCalibration"):
            request = parsed(pb.GetCalibrationRequest, data)
            reader = self._artifacts.open(request.model_digest, request.digest or None)
            if reader is None:
                raise NotFoundError("no such calibration is stored")
            try:
                begin = pb.GetCalibrationBegin(digest=reader.digest, size_bytes=reader.size_bytes)
                await context.write(pb.GetCalibrationResponse(begin=begin))
                while chunk := await _in_threads(self._readers, reader.read, DEFAULT_MESSAGE_BYTES):
                    await context.write(pb.GetCalibrationResponse(chunk=chunk))
                    peer_metrics.PEER_CALIBRATION_SENT_BYTES.inc(len(chunk))
            except FormatError as error:
                peer_metrics.STORE_CALIBRATIONS_DAMAGED.labels(error.reason).inc()
                self._export()
                raise NotFoundError(f"the stored calibration was damaged: {error}") from error
            finally:
                await _release(self._readers, reader.close)

    async def ListCalibrations(self, data: bytes, context: grpc.aio.ServicerContext) -> pb.ListCalibrationsResponse:
        """See ``protos/``."""
        async with serving("ListCalibrations", context):
            parsed(pb.ListCalibrationsRequest, data)
            response = pb.ListCalibrationsResponse()
            for entry in self._artifacts.entries():
                response.calibrations.add(
                    model_digest=entry.model_digest,
                    digest=entry.digest,
                    size_bytes=entry.size_bytes,
                    stored_at_ms=entry.stored_at_ms,
                    is_current=entry.is_current,
                )
            return response

    async def DeleteCalibration(self, data: bytes, context: grpc.aio.ServicerContext) -> pb.DeleteCalibrationResponse:
        """See ``protos/``."""
        async with serving("DeleteCalibration", context):
            request = parsed(pb.DeleteCalibrationRequest, data)
            deleted = await _in_threads(self._writers, self._artifacts.delete, request.model_digest, request.digest)
            self._export()
            return pb.DeleteCalibrationResponse(deleted=deleted)

    async def _receive(self, writer: ArtifactWriter, context: grpc.aio.ServicerContext) -> None:
        while (step := await self._next_step(context)).WhichOneof("step") == "chunk":
            await _in_threads(self._writers, writer.write, step.chunk)
            peer_metrics.PEER_CALIBRATION_RECEIVED_BYTES.inc(len(step.chunk))
        if not step.commit:
            raise FormatError("chunks and a commit follow the begin of a calibration")
        await _in_threads(self._writers, writer.commit)

    async def _next_step(self, context: grpc.aio.ServicerContext) -> pb.PutCalibrationRequest:
        try:
            async with asyncio.timeout(self._limits.idle_s):
                data = await context.read()
        except TimeoutError:
            raise PeerTimeoutError(f"no message within {self._limits.idle_s} s") from None
        if data is grpc.aio.EOF:
            raise FormatError("the stream ended before the commit of a calibration")
        return parsed(pb.PutCalibrationRequest, data)

    def _export(self) -> None:
        with contextlib.suppress(StorageUnavailableError):  # it is being closed
            stat = self._artifacts.stat()
            peer_metrics.STORE_CALIBRATIONS.set(stat.artifacts)
            peer_metrics.STORE_CALIBRATION_BYTES.set(stat.stored_bytes)
            peer_metrics.STORE_CALIBRATION_CAPACITY_BYTES.set(stat.capacity_bytes)


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
