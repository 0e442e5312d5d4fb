"""What every RPC of the peer has around it: counting, a status for each failure, a bound of the streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import CapacityError, StorageError
from sglang_kvcodec.rpc.errors import status_of

logger = logging.getLogger(__name__)


class StreamSlots:
    """Bounds the streams that are open at once. For one event loop."""

    def __init__(self, max_streams: int) -> None:
        self.open_streams = 0
        self._max_streams = max_streams

    @contextlib.asynccontextmanager
    async def __call__(self, method: str) -> AsyncIterator[None]:
        """Holds a slot.

        Raises:
            CapacityError: there is none.
        """
        if self.open_streams >= self._max_streams:
            raise CapacityError(f"this peer serves {self.open_streams} streams already")
        self.open_streams += 1
        peer_metrics.PEER_STREAMS.labels(method).inc()
        try:
            yield
        finally:
            self.open_streams -= 1
            peer_metrics.PEER_STREAMS.labels(method).dec()


@contextlib.asynccontextmanager
async def serving(method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Counts a call, and turns whatever ends it into a status with a sentence."""
    started_s = time.perf_counter()
    status = grpc.StatusCode.OK
    try:
        yield
    except asyncio.CancelledError:
        status = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:  # the top of a call: whatever an engine raises must not reach gRPC
        if context.done():
            status = grpc.StatusCode.CANCELLED
            return
        status, sentence = status_of(error)
        if isinstance(error, StorageError):
            logger.warning("%s failed: %s", method, error)
        elif status is grpc.StatusCode.UNAVAILABLE:
            logger.exception("%s failed", method)
        await context.abort(status, sentence)
    finally:
        peer_metrics.PEER_RPCS.labels(method, status.name).inc()
        peer_metrics.PEER_RPC_SECONDS.labels(method).observe(time.perf_counter() - started_s)
